"""The worker: a batch whose members come and go, and in which nobody harms another."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.models import random_llava
from helpers.pictures import picture

pytest.importorskip("fastapi")

from helpers.serving import TIMEOUT, Gated, eventually
from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import FastV, Reduction
from llava_lite.server.worker import Event, Job, Stopped, Worker


class Heard(queue.Queue[Event]):
    """What a job hears."""

    def last(self) -> Event:
        """The answer or the error, after all pieces."""
        while True:
            event = self.get(timeout=TIMEOUT)
            if isinstance(event, Answer | BaseException):
                return event


@pytest.fixture
def model(tiny_tokenizer: Tokenizer) -> Gated:
    return Gated(Model(random_llava(), tiny_tokenizer))


@pytest.fixture
def worker(model: Gated) -> Iterator[Worker]:
    worker = Worker(model, max_batch_size=3)
    worker.start()
    yield worker
    model.steps.release(1000)
    worker.stop()


def job_of(model: Model, prompt: str, pieces: bool = False, **options: Any) -> tuple[Job, Heard]:
    wishes = GenerationOptions(**{"max_new_tokens": 6, **options})
    heard = Heard()
    request = model.request([picture()], prompt, wishes)
    return Job(request, wishes, pieces, heard.put), heard


def alone(model: Model, prompt: str, **options: Any) -> Answer:
    """The same answer without a server, from the same weights."""
    plain = Model(model.llava, model.tokenizer)
    return plain.generate(picture(), prompt, **{"max_new_tokens": 6, **options})


WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 1, "top_k": 5},
    {"temperature": 0.7, "seed": 2, "top_p": 0.8, "max_new_tokens": 9},
    {"max_new_tokens": 1},
    {"stop": "e"},
    {"reduction": Reduction(fastv=FastV(keep=8, layer=1)), "max_new_tokens": 12},
)


def test_every_job_gets_the_answer_it_would_get_alone(model: Gated, worker: Worker) -> None:
    """More jobs than places, each with wishes of its own: they join as others leave."""
    model.steps.release(1000)
    jobs = [job_of(model, f"star {n}?", n % 2 == 0, **wish) for n, wish in enumerate(WISHES)]
    for job, _ in jobs:
        worker.submit(job)
    for number, (_, heard) in enumerate(jobs):
        answer, expected = heard.last(), alone(model, f"star {number}?", **WISHES[number])
        assert isinstance(answer, Answer)
        assert answer == expected
        assert (answer.token_ids, answer.finish_reason, answer.usage) == (
            *(expected.token_ids, expected.finish_reason),
            expected.usage,
        )
    assert max(model.sizes) == 3


def test_pieces_come_only_where_wanted_and_join_to_the_answer(model: Gated, worker: Worker) -> None:
    model.steps.release(1000)
    for wanted in (True, False):
        job, heard = job_of(model, "star?", wanted, max_new_tokens=12)
        worker.submit(job)
        events: list[Event] = []
        while not events or not isinstance(events[-1], Answer):
            events.append(heard.get(timeout=TIMEOUT))
        *pieces, answer = events
        assert "".join(map(str, pieces)) == (answer if wanted else "")
        assert len(pieces) > 2 if wanted else not pieces


def test_a_job_joins_while_another_runs(model: Gated, worker: Worker) -> None:
    first, heard = job_of(model, "one?", max_new_tokens=4)
    worker.submit(first)
    model.steps.release(2)
    eventually(lambda: len(model.sizes) == 2)
    second, heard_too = job_of(model, "two?", max_new_tokens=4)
    worker.submit(second)
    model.steps.release(100)
    assert heard.last() == alone(model, "one?", max_new_tokens=4)
    assert heard_too.last() == alone(model, "two?", max_new_tokens=4)
    # The first was blocked in its third step alone, or the second joined that one.
    assert model.sizes in ([1, 1, 1, 2, 1, 1, 1], [1, 1, 2, 2, 1, 1])


def test_a_cancelled_job_leaves_the_batch_and_the_queue(model: Gated, worker: Worker) -> None:
    stays, heard = job_of(model, "stays?", max_new_tokens=10)
    goes, nothing = job_of(model, "goes?", max_new_tokens=300)
    worker.submit(stays)
    worker.submit(goes)
    model.steps.release(3)
    eventually(lambda: len(model.sizes) == 3)
    never, nothing_too = job_of(model, "never?")
    never.cancelled = True
    worker.submit(never)
    worker.cancel(goes)
    worker.cancel(never)
    assert worker.num_waiting == 0  # before the step that runs has ended
    model.steps.release(100)
    assert heard.last() == alone(model, "stays?", max_new_tokens=10)
    assert nothing.empty() and nothing_too.empty()
    assert model.sizes[-1] == 1 and len(model.sizes) <= 12
    eventually(lambda: worker.num_running == 0 and worker.num_waiting == 0)


def test_a_job_that_fails_in_a_step_fails_alone(model: Gated, worker: Worker) -> None:
    jobs = [job_of(model, f"star {number}?", max_new_tokens=5) for number in range(3)]
    model.poison = jobs[1][0].request
    for job, _ in jobs:
        worker.submit(job)
    model.steps.release(100)
    error = jobs[1][1].last()
    assert isinstance(error, RuntimeError) and str(error) == "poison"
    for number in (0, 2):
        assert jobs[number][1].last() == alone(model, f"star {number}?", max_new_tokens=5)
    job, heard = job_of(model, "and then?")
    worker.submit(job)
    assert heard.last() == alone(model, "and then?")


def test_a_failed_step_moves_no_random_numbers(model: Gated, worker: Worker) -> None:
    """A seeded answer is the same when a step was repeated after its token had been drawn."""
    wish: dict[str, Any] = {"temperature": 5.0, "seed": 3, "max_new_tokens": 6}
    (job, heard), (bad, bad_heard) = job_of(model, "good?", **wish), job_of(model, "bad?")
    model.breaks_after_drawing = bad.request
    worker.submit(job)
    worker.submit(bad)
    model.steps.release(1000)
    assert isinstance(bad_heard.last(), RuntimeError)
    assert heard.last() == alone(model, "good?", **wish)


def test_a_job_that_cannot_start_fails_alone(model: Gated, worker: Worker) -> None:
    running, heard = job_of(model, "first?", max_new_tokens=5)
    worker.submit(running)
    bad, bad_heard = job_of(model, "bad?")
    good, good_heard = job_of(model, "good?")
    model.fails_to_start = bad.request
    worker.submit(bad)
    worker.submit(good)
    model.steps.release(100)
    assert isinstance(bad_heard.last(), RuntimeError)
    assert good_heard.last() == alone(model, "good?")
    assert heard.last() == alone(model, "first?", max_new_tokens=5)


def test_nobody_to_tell_is_no_reason_to_stop(model: Gated, worker: Worker) -> None:
    def deaf(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    model.steps.release(1000)
    job, _ = job_of(model, "deaf?", True, max_new_tokens=300)
    job.deliver = deaf
    worker.submit(job)
    eventually(lambda: job.cancelled)
    other, heard = job_of(model, "other?")
    worker.submit(other)
    assert heard.last() == alone(model, "other?")
    assert len(model.sizes) < 50


def test_stopping_tells_all_that_are_left(model: Gated) -> None:
    worker = Worker(model, max_batch_size=1)
    jobs = [job_of(model, f"star {number}?", max_new_tokens=300) for number in range(3)]
    for job, _ in jobs:
        worker.submit(job)
    worker.start()
    model.steps.release(2)
    eventually(lambda: len(model.sizes) == 2)
    threading.Timer(0.1, model.steps.release).start()  # the step that is being waited for
    worker.stop()
    assert all(isinstance(heard.last(), Stopped) for _, heard in jobs)
    assert not worker.is_alive and worker.num_waiting == worker.num_running == 0
    with pytest.raises(Stopped):
        worker.submit(jobs[0][0])
    worker.stop()  # once more does no harm


def test_stopping_before_starting(model: Gated) -> None:
    Worker(model, max_batch_size=1).stop()
