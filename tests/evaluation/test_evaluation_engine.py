"""The engine: same answers as one by one, whatever is batched, shared, broken or too large."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.pictures import picture
from llava_lite.errors import ContextError, ImageError
from llava_lite.evaluation import engine as engine_module
from llava_lite.evaluation.engine import (
    Engine,
    Group,
    Outcome,
    Prepared,
    image_groups,
    prepare_ahead,
    select_shard,
)
from llava_lite.evaluation.suite import Sample
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import State
from llava_lite.reduction import NO_REDUCTION, FastV, Reduction, ToMe

WISHES = [
    NO_REDUCTION,
    Reduction(ToMe(keep=6)),
    Reduction(ToMe(keep=6), "logical"),
    Reduction(fastv=FastV(keep=3, layer=1)),
    Reduction(ToMe(keep=8), "vtu", FastV(keep=4, layer=2)),
    Reduction(ToMe(keep=6), "folded"),
    Reduction(None, "folded", FastV(stages=((1, 9), (2, 3)), rest="fold")),
]
WORDS = ["star", "red", "blue circle", "square", "What color is the ring?", "white", "a b c d e"]


def many_samples() -> list[Sample]:
    """Two images with several questions each, one image alone, two images at once, and none."""
    samples = [
        Sample(f"{key}-{number}", f"{word} {number}?", (picture(key),), f"image {key}")
        for number, word in enumerate(WORDS[:4])
        for key in (1, 2)
    ]
    samples += [Sample(f"alone {n}", WORDS[n], (picture(n),)) for n in (3, 4, 5)]
    pair = (picture(6), picture(7))
    samples += [Sample(f"pair {n}", f"{WORDS[n]} red", pair, "pair") for n in range(3)]
    placed = "<image> red or <image> blue?"
    samples += [Sample("placed", placed, pair, "pair"), Sample("text", "What color?")]
    return samples


def one_by_one(model: Model, samples: Sequence[Sample], **options: Any) -> dict[str, str]:
    return {
        sample.id: str(model.generate(list(sample.images), sample.prompt, **options))
        for sample in samples
    }


def outcomes(model: Model, samples: Sequence[Sample], **settings: Any) -> dict[str, Outcome]:
    names = ("batch_size", "workers", "reuse_prefix")
    engine_settings = {name: settings.pop(name) for name in names if name in settings}
    options = GenerationOptions(**{"max_new_tokens": 5, **settings})
    found = list(Engine(model, options, **engine_settings).answer(samples))
    assert len(found) == len(samples)
    return {outcome.sample.id: outcome for outcome in found}


def texts(found: dict[str, Outcome]) -> dict[str, str]:
    assert all(outcome.error is None for outcome in found.values())
    return {name: str(outcome.answer) for name, outcome in found.items()}


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_are_those_of_single_calls(
    tiny_model: Model, wish: Reduction, batch_size: int
) -> None:
    samples = many_samples()
    expected = one_by_one(tiny_model, samples, max_new_tokens=5, reduction=wish)
    assert len(set(expected.values())) > 8
    found = outcomes(tiny_model, samples, reduction=wish, batch_size=batch_size)
    assert texts(found) == expected


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_sharing_a_beginning_changes_no_answer_and_no_count(
    tiny_model: Model, reuse_prefix: bool
) -> None:
    samples = many_samples()
    found = outcomes(tiny_model, samples, reuse_prefix=reuse_prefix, reduction="none")
    for sample in samples:
        answer = found[sample.id].answer
        assert answer is not None
        alone = tiny_model.generate(list(sample.images), sample.prompt, max_new_tokens=5)
        assert (answer, answer.usage) == (alone, alone.usage)
        assert answer.finish_reason == alone.finish_reason


@pytest.mark.parametrize(("least", "cached"), [(0.0, True), (1.0, False)])
def test_a_short_cached_beginning_is_run_again(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, least: float, cached: bool
) -> None:
    samples = many_samples()
    expected = one_by_one(tiny_model, samples, max_new_tokens=5)
    monkeypatch.setattr(engine_module, "LEAST_PREFIX", least)
    used: list[int] = []
    cache = tiny_model.prefix.cache

    def spy(ids: tuple[int, ...]) -> Any:
        used.append(len(ids))
        return cache(ids)

    monkeypatch.setattr(tiny_model.prefix, "cache", spy)
    assert texts(outcomes(tiny_model, samples)) == expected
    assert bool(used) == cached


def test_bytes_paths_and_functions_are_images(tiny_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture(3).save(path)
    images: list[Any] = [path, str(path), path.read_bytes(), lambda: picture(3)]
    images.append(tiny_model.encode(path))
    samples = [Sample(str(n), "star?", (image,)) for n, image in enumerate(images)]
    expected = str(tiny_model.generate(path, "star?", max_new_tokens=5))
    assert set(texts(outcomes(tiny_model, samples)).values()) == {expected}


def test_a_turned_photo_is_seen_as_the_model_sees_it(tiny_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(3).save(path, exif=exif, quality=95)
    plain = Model(tiny_model.llava, tiny_model.tokenizer, exif=False)
    cropping = Model(tiny_model.llava, tiny_model.tokenizer, replace(tiny_model.config, pad=False))
    seen = set()
    for model in (tiny_model, plain, cropping):
        sample = Sample("turned", "What color is the star?", (path,))
        [answer] = texts(outcomes(model, [sample], max_new_tokens=12)).values()
        assert answer == str(model.generate(path, sample.prompt, max_new_tokens=12))
        seen.add(answer)
    assert len(seen) > 1


# ---- what runs, and how often --------------------------------------------------------------------


def test_every_image_is_encoded_and_every_beginning_run_once(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    prefilled: list[int] = []
    encode_image, splice = type(tiny_model.llava).encode_image, type(tiny_model.llava).splice

    def counting_encode(self: Any, pixel_values: torch.Tensor, *rest: Any) -> Any:
        encoded.append(len(pixel_values))
        return encode_image(self, pixel_values, *rest)

    def counting_splice(self: Any, ids: Sequence[int], images: Sequence[Any], *rest: Any) -> Any:
        prefilled.append(len(images))
        return splice(self, ids, images, *rest)

    monkeypatch.setattr(type(tiny_model.llava), "encode_image", counting_encode)
    monkeypatch.setattr(type(tiny_model.llava), "splice", counting_splice)
    samples = [
        Sample(f"{key}-{number}", WORDS[number], (picture(key),), str(key))
        for number in range(4)
        for key in range(6)
    ]
    outcomes(tiny_model, samples, batch_size=4)
    assert encoded == [4, 2]
    assert sum(prefilled) == 6
    prefilled.clear()
    outcomes(tiny_model, samples, batch_size=4, reduction=WISHES[3])
    assert encoded == [4, 2, 4, 2]
    assert sum(prefilled) == 24  # FastV looks at the end of the prompt: all of it runs every time


def test_long_prompts_come_first_and_the_same_images_together() -> None:
    samples = [
        Sample("short", "a", (1,), "x"),
        Sample("long", "a" * 9, (2,), "y"),
        Sample("shared", "a" * 5, (1,), "x"),
        Sample("alone", "aa", (3,)),
        Sample("text", "aaa"),
        Sample("more text", "aaa", (), "x"),
    ]
    groups = image_groups(samples)
    names = [[sample.id for sample in group.samples] for group in groups]
    assert names == [["short", "shared"], ["long"], ["alone"], ["text"], ["more text"]]
    assert [group.size for group in groups] == [(1, 5), (1, 9), (1, 2), (0, 3), (0, 3)]


def test_shards_hold_every_sample_once_and_keep_images_together() -> None:
    samples = [Sample(str(n), "a", (n % 4,), str(n % 4)) for n in range(12)]
    samples += [Sample(f"alone {n}", "a", (n,)) for n in range(3)]
    shards = [select_shard(samples, (part, 3)) for part in (1, 2, 3)]
    assert sorted(s.id for shard in shards for s in shard) == sorted(s.id for s in samples)
    assert [s.id for s in shards[0]] == ["0", "3", "4", "7", "8", "11", "alone 2"]
    for shard in shards:
        keys = {s.image_key for s in shard if s.image_key}
        assert sum(s.image_key in keys for s in samples) == sum(bool(s.image_key) for s in shard)
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="must be i/n"):
            select_shard(samples, wrong)


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_images_are_opened_ahead_as_allowed_and_no_more(workers: int) -> None:
    started: list[int] = []

    def work(group: Group) -> Prepared:
        started.append(group.images[0])
        return Prepared(group, group.images)

    groups = [Group((Sample(str(n), "a", (n, n)),)) for n in range(20)]
    opened = prepare_ahead(groups, work, workers, ahead=6)
    for taken in range(20):
        assert next(opened).images == (taken, taken)
        ahead = min(20, taken + 1 + 3)  # six images are three groups
        deadline = time.monotonic() + 20
        while len(started) < ahead:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(started) == ahead
    assert next(opened, None) is None


def test_images_are_opened_while_the_model_runs(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step ends only when the image of the next sample is being opened."""
    opening = [threading.Event() for _ in range(3)]
    step = type(tiny_model).step

    def draw(number: int) -> Image.Image:
        opening[number].set()
        return picture(number)

    def waiting(self: Model, rows: Any) -> None:
        assert opening[1].wait(10), "nothing was opened"
        step(self, rows)

    monkeypatch.setattr(type(tiny_model), "step", waiting)
    samples = [Sample(str(n), "red?", (partial(draw, n),)) for n in range(3)]
    found = outcomes(tiny_model, samples, batch_size=1, workers=1, max_new_tokens=2)
    assert list(found) == ["0", "1", "2"] and texts(found)


def test_without_workers_images_are_opened_when_asked_for(tiny_model: Model) -> None:
    threads: set[str] = set()

    def draw() -> Image.Image:
        threads.add(threading.current_thread().name)
        return picture(1)

    sample = Sample("drawn", "red", (draw,))
    outcomes(tiny_model, [sample], workers=0)
    assert threads == {threading.current_thread().name}
    outcomes(tiny_model, [sample], workers=1)
    assert len(threads) == 2


def test_seconds_add_up_and_are_shared_by_those_who_spent_them(tiny_model: Model) -> None:
    def slow() -> Image.Image:
        time.sleep(0.05)
        return picture(1)

    samples = [Sample(str(n), "red", (slow,), "slow") for n in range(4)]
    samples += [Sample("text", "red")]
    start = time.perf_counter()
    found = outcomes(tiny_model, samples, workers=0, max_new_tokens=3)
    wall = time.perf_counter() - start
    assert all(found[str(n)].seconds["preprocess"] >= 0.05 / 4 for n in range(4))
    assert found["text"].seconds["preprocess"] < 0.01 and found["text"].seconds["vision"] == 0
    assert all(found[name].seconds["prefill"] > 0 for name in found)
    total = sum(sum(outcome.seconds.values()) for outcome in found.values())
    assert 0.05 <= total <= wall


@pytest.mark.parametrize("phase", ["vision", "prefill"])
def test_what_a_device_has_queued_counts_for_the_phase_that_queued_it(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """A device that works behind the calls, as a GPU does: who waits for it pays for it."""
    queued: list[float] = []
    encode_image, shared = type(tiny_model.llava).encode_image, engine_module.after_shared_prefixes

    def queueing(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            queued.append(0.2)
            return work(*args)

        return run

    def synchronize(device: str) -> None:
        assert device == "cpu"
        time.sleep(sum(queued))
        queued.clear()

    monkeypatch.setattr(engine_module, "synchronize", synchronize)
    if phase == "vision":
        monkeypatch.setattr(type(tiny_model.llava), "encode_image", queueing(encode_image))
    else:
        monkeypatch.setattr(engine_module, "after_shared_prefixes", queueing(shared))
    samples = [Sample(str(n), "red", (picture(1),), "one") for n in range(2)]
    found = outcomes(tiny_model, samples, max_new_tokens=1)
    for outcome in found.values():
        assert outcome.seconds[phase] >= 0.1  # each its half
    assert queued == []


# ---- what fails ----------------------------------------------------------------------------------


def test_a_bad_sample_costs_no_other_one(tiny_model: Model, tmp_path: Path) -> None:
    """Broken images, missing files, prompts too long, wrong counts of images, rows with errors."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    good = [Sample(f"good {n}", f"{WORDS[n]}?", (picture(n),)) for n in range(5)]
    shared = [Sample("fits", "red?", (picture(8),), "8")]
    too_long = Sample("too long", "star " * 500, (picture(8),), "8")
    bad = {
        "broken": Sample("broken", "red", (broken,)),
        "missing": Sample("missing", "red", (tmp_path / "none.png",), "none"),
        "missing too": Sample("missing too", "blue", (tmp_path / "none.png",), "none"),
        "count": Sample("count", "<image> <image> red", (picture(1),)),
        "row": Sample("row", "", error="row 7: no question"),
        "too long": too_long,
    }
    samples = [*good[:2], *bad.values(), *shared, *good[2:]]
    found = outcomes(tiny_model, samples, batch_size=4)
    errors = {name: str(found[name].error) for name in bad}
    assert "broken.png" in errors["broken"] and "none.png" in errors["missing too"]
    assert errors["count"].startswith("the prompt has 2 <image> markers")
    assert errors["row"] == "row 7: no question"
    assert isinstance(found["too long"].error, ContextError)
    assert isinstance(found["broken"].error, ImageError)
    answered = {name: outcome for name, outcome in found.items() if name not in bad}
    expected = one_by_one(tiny_model, [*good, *shared], max_new_tokens=5)
    assert texts(answered) == expected


def failing_forward(
    model: Model, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], Exception | None]
) -> list[int]:
    """Let the decoder fail as `fails` says of the number of its items; returns these numbers."""
    forward, sizes = type(model.llava).forward, []

    def checked(self: Any, input_embeds: list[torch.Tensor], *rest: Any) -> Any:
        sizes.append(len(input_embeds))
        error = fails(len(input_embeds))
        if error is not None:
            raise error
        return forward(self, input_embeds, *rest)

    monkeypatch.setattr(type(model.llava), "forward", checked)
    return sizes


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("odd")]
)
def test_out_of_memory_is_retried_in_halves(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    samples = many_samples()
    expected = one_by_one(tiny_model, samples, max_new_tokens=5)
    sizes = failing_forward(tiny_model, monkeypatch, lambda size: error if size > 3 else None)
    assert texts(outcomes(tiny_model, samples, batch_size=8)) == expected
    assert max(sizes) == 8 and sizes[-1] <= 3


def test_after_running_out_of_memory_batches_stay_small(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample(str(n), "red?", (picture(n),)) for n in range(24)]
    error = torch.OutOfMemoryError("CUDA out of memory")
    sizes = failing_forward(tiny_model, monkeypatch, lambda size: error if size > 4 else None)
    found = outcomes(tiny_model, samples, batch_size=8, max_new_tokens=2)
    assert all(outcome.error is None for outcome in found.values())
    assert sum(size > 4 for size in sizes) == 1


def test_what_never_fits_fails_alone(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that always fails, inside a batch, costs its own row only."""
    samples = [Sample(str(n), f"{WORDS[n]}?", (picture(n),)) for n in range(6)]
    expected = one_by_one(tiny_model, samples, max_new_tokens=5)
    advance = type(tiny_model).advance
    poison = tiny_model.request([picture(2)], "blue circle?", GenerationOptions(5))
    end = poison.state.pending_ids[-20:]

    def failing(self: Model, states: Sequence[State], *rest: Any) -> Any:
        if any(state.pending_ids[-20:] == end for state in states):
            raise RuntimeError("this prompt cannot be")
        return advance(self, states, *rest)

    monkeypatch.setattr(type(tiny_model), "advance", failing)
    found = outcomes(tiny_model, samples, batch_size=4)
    assert str(found["2"].error) == "this prompt cannot be"
    del found["2"], expected["2"]
    assert texts(found) == expected


def test_a_tower_that_runs_out_of_memory_is_given_fewer_images(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_image = type(tiny_model.llava).encode_image
    white = Image.new("RGB", (30, 30), "white")

    def checked(self: Any, pixel_values: torch.Tensor, *rest: Any) -> Any:
        if len(pixel_values) > 2 or any(float(one.std()) < 0.2 for one in pixel_values):
            raise RuntimeError("can't allocate memory")
        return encode_image(self, pixel_values, *rest)

    samples = [Sample(str(n), "red?", (picture(n),)) for n in range(7)]
    expected = one_by_one(tiny_model, samples, max_new_tokens=5)
    monkeypatch.setattr(type(tiny_model.llava), "encode_image", checked)
    found = outcomes(tiny_model, [*samples, Sample("white", "a", (white,))], batch_size=8)
    assert str(found.pop("white").error) == "can't allocate memory"
    assert texts(found) == expected


def test_a_beginning_that_does_not_fit_is_not_shared(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = many_samples()
    expected = one_by_one(tiny_model, samples, max_new_tokens=5)

    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine_module, "after_shared_prefixes", failing)
    assert texts(outcomes(tiny_model, samples)) == expected


def test_bad_options_show_before_any_work(tiny_model: Model) -> None:
    too_deep = GenerationOptions(reduction=Reduction(fastv=FastV(keep=3, layer=9)))
    with pytest.raises(ValueError, match="FastV layer 9 must be in"):
        Engine(tiny_model, too_deep)
    with pytest.raises(ValueError, match="batch_size 0"):
        Engine(tiny_model, GenerationOptions(), batch_size=0)


def test_an_interrupt_is_not_swallowed(tiny_model: Model) -> None:
    def interrupted() -> Image.Image:
        raise KeyboardInterrupt

    samples = [Sample("stop", "r", (interrupted,))]
    samples += [Sample(str(n), "red?" + "?" * n, (picture(n),)) for n in range(4)]
    engine = Engine(tiny_model, GenerationOptions(max_new_tokens=2), 1, workers=0)
    found = []
    with pytest.raises(KeyboardInterrupt):
        for outcome in engine.answer(samples):
            found.append(outcome.sample.id)
    assert found == ["3", "2", "1", "0"]  # long prompts come first


def test_an_interrupt_ends_the_threads(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one opens its image: it ends with that, and what waits behind it is never opened."""
    opened: list[int] = []
    opening, go_on = threading.Event(), threading.Event()

    def draw(number: int) -> Image.Image:
        opened.append(number)
        if number == 2:
            opening.set()
            assert go_on.wait(20)
        return picture(number)

    def interrupted(*_: object) -> None:
        assert opening.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny_model), "step", interrupted)
    samples = [Sample(str(n), "red?", (partial(draw, n),)) for n in range(9)]
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        list(Engine(tiny_model, GenerationOptions(max_new_tokens=2), 2, workers=1).answer(samples))
    [thread] = set(threading.enumerate()) - before
    go_on.set()
    thread.join(20)
    assert not thread.is_alive()
    assert opened == [0, 1, 2]


def test_requests_are_made_when_there_is_room_for_them(tiny_model: Model) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Any]:
        for number in range(6):
            taken.append(number)
            yield tiny_model.request([], WORDS[number], options)

    options = GenerationOptions(max_new_tokens=3)
    running = tiny_model.run(requests(), options, batch_size=2)
    next(running)
    assert taken == [0, 1]
    assert {index for index, _ in running} == set(range(6))


# ---- failures ------------------------------------------------------------------------------------


def test_failures_are_passed_on_before_more_images_are_opened(tiny_model: Model) -> None:
    opened: list[int] = []

    def broken() -> Image.Image:
        opened.append(1)
        raise ImageError("broken")

    samples = [Sample("good", "What color is the star?", (picture(1),))]
    samples += [Sample(f"bad {n}", "red?", (broken,)) for n in range(40)]
    engine = Engine(tiny_model, GenerationOptions(max_new_tokens=3), 4, workers=0)
    seen: list[tuple[str, int]] = []
    for outcome in engine.answer(samples):
        seen.append((outcome.sample.id, len(opened)))
    assert len(seen) == 41
    for position, (_, count) in enumerate(seen):
        assert count <= position + 4  # a batch of the tower at most waits
    errors = [outcome.error for outcome in engine.answer(samples[1:])]
    assert all(isinstance(error, ImageError) and error.__traceback__ is None for error in errors)


def test_errors_keep_no_images(tiny_model: Model, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    found = outcomes(tiny_model, [Sample("0", "red?", (broken,)), Sample("1", "star " * 500)])
    for outcome in found.values():
        assert isinstance(outcome.error, ImageError | ContextError)
        kept = (outcome.error.__traceback__, outcome.error.__cause__, outcome.error.__context__)
        assert kept == (None, None, None)


class AcceleratorError(RuntimeError):
    """As torch has it since 2.8."""


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), AcceleratorError("gone")]
)
@pytest.mark.parametrize("where", ["forward", "encode_image"])
def test_an_accelerator_that_fails_ends_the_run(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    method, calls = getattr(type(tiny_model.llava), where), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise error
        return method(*args, **options)

    monkeypatch.setattr(type(tiny_model.llava), where, failing)
    samples = [Sample(str(n), "red?", (picture(n),)) for n in range(8)]
    options = GenerationOptions(max_new_tokens=1)
    found = []
    with pytest.raises(RuntimeError) as raised:
        for outcome in Engine(tiny_model, options, 2).answer(samples):
            found.append(outcome.error)
    assert raised.value is error
    assert found == [None] * 2


def test_half_a_character_in_a_prompt_costs_no_run(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [Sample("half", "bad \ud83d"), Sample("good", "red?")]
    assert outcomes(tiny_model, samples)["good"].error is None
    request = type(tiny_model).request

    def strict(self: Model, images: Any, prompt: str, *rest: Any) -> Any:
        prompt.encode()
        return request(self, images, prompt, *rest)

    monkeypatch.setattr(type(tiny_model), "request", strict)
    found = outcomes(tiny_model, samples)
    assert found["good"].error is None and isinstance(found["half"].error, UnicodeError)
