"""Batches and evaluations on Ray: two actors on this machine give what one process gives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.models import ROOT
from helpers.peers import peer
from llava_lite.cli import console
from llava_lite.cli import program as cli
from llava_lite.evaluation.fingerprint import model_hash
from llava_lite.evaluation.predictions import read_predictions
from llava_lite.evaluation.suite import Sample
from llava_lite.generation import batch_file
from llava_lite.generation.batch_file import BatchError
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.integrations import ray_batch, ray_eval
from llava_lite.integrations.ray_batch import (
    Cluster,
    DyingActors,
    LostBlock,
    ModelSource,
    Predictor,
    RayError,
    images_of,
    map_blocks,
    run_batch,
)
from llava_lite.integrations.ray_eval import asking_actors, split_groups
from llava_lite.saving import JsonObject

OPTIONS = {"max_new_tokens": 6}
TWO = Cluster(actors=2, cpus=1)
QUESTIONS = ("star?", "What color is it?", "ring", "circle square", "Describe the image.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about images, one of which is missing and one of which is broken."""
    folder = tmp_path_factory.mktemp("rows")
    for color in ("red", "green", "blue"):
        Image.new("RGB", (60, 40), color).save(folder / f"{color}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    images = ["red.png", None, ["green.png", "blue.png"], "missing.png", "blue.png", "broken.png"]
    rows = [
        {"id": f"row {n}", "image": images[n % 6], "prompt": QUESTIONS[n % 5]} for n in range(11)
    ]
    rows.append({"id": 7, "image": "red.png", "prompt": "long " * 600})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def rows(folder: Path) -> list[batch_file.Row]:
    return batch_file.read_rows(folder / "rows.jsonl")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture(scope="module")
def source(model_folder: Path) -> ModelSource:
    return ModelSource(str(model_folder), {"device": "cpu"})


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """Ray on this machine with two CPUs, once for all tests: it takes its time to start."""
    ray = peer("ray")
    peer("ray.data")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # of 15 a busy machine leaves workers no time
        ray.init(address="local", num_cpus=2, **options)
    yield ray
    ray.shutdown()


def read(output: Path) -> list[JsonObject]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def comparable(record: JsonObject) -> JsonObject:
    """Of an error only the name of the file: on Ray it is named by its absolute path."""
    if "error" in record:
        record = {**record, "error": record["error"].split("/")[-1]}
    return record


@pytest.fixture(scope="module")
def plain(folder: Path, tiny_model: Model) -> list[JsonObject]:
    """What one process writes."""
    output = folder / "plain.jsonl"
    batch_file.run_batch(
        tiny_model, batch_file.read_rows(folder / "rows.jsonl"), output, batch_size=2, **OPTIONS
    )
    return [comparable(record) for record in read(output)]


# ---- without Ray ---------------------------------------------------------------------------------


class LocalRay:
    """`map_blocks` in this process, for tests without Ray. `deadly(item)`: this item would kill
    its actor."""

    def __init__(
        self,
        model: Model,
        stop_after: int | None = None,
        deadly: Callable[[Any], bool] = lambda _: False,
    ) -> None:
        self.model, self.stop_after, self.asked, self.deadly = model, stop_after, 0, deadly
        self.stop: type[BaseException] = KeyboardInterrupt

    def __call__(
        self, blocks: Sequence[Any], work: Any, source: Any, cluster: Any
    ) -> Iterator[Any]:
        for number, block in enumerate(blocks):
            if number == self.stop_after:
                raise self.stop
            if any(map(self.deadly, block)):
                yield LostBlock()
                continue
            self.asked += len(block)
            yield work(self.model, block)


def test_an_interrupted_run_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[batch_file.Row],
    output: Path,
    tiny_model: Model,
    plain: list[JsonObject],
) -> None:
    source, local = ModelSource("x"), LocalRay(tiny_model, stop_after=2)
    monkeypatch.setattr(ray_batch, "map_blocks", local)
    with pytest.raises(KeyboardInterrupt):
        run_batch(rows, output, source, TWO, batch_size=2, **OPTIONS)
    assert [comparable(one) for one in read(output)] == plain[:4]
    with pytest.raises(BatchError, match="is not empty"):
        run_batch(rows, output, source, TWO, **OPTIONS)
    with open(output, "a") as file:
        file.write('{"id": "row 4", "prom')
    local.stop_after, local.asked = None, 0
    summary = run_batch(rows, output, source, TWO, batch_size=2, resume=True, **OPTIONS)
    assert [comparable(one) for one in read(output)] == plain
    assert local.asked == 8
    assert (summary.present, summary.answered, summary.failed) == (3, 5, 4)
    again = run_batch(rows, output, source, TWO, resume=True, retry_errors=True, **OPTIONS)
    assert (again.present, again.answered, again.failed) == (8, 0, 4)
    with pytest.raises(BatchError, match="another reduction"):
        run_batch(rows, output, source, TWO, resume=True, reduction="fastv-50")


def test_shards_are_those_of_a_plain_batch(
    monkeypatch: pytest.MonkeyPatch, rows: list[batch_file.Row], output: Path, tiny_model: Model
) -> None:
    monkeypatch.setattr(ray_batch, "map_blocks", LocalRay(tiny_model))
    run_batch(rows, output, ModelSource(), TWO, shard=(2, 5), **OPTIONS)
    assert [record["id"] for record in read(output)] == ["row 1", "row 6", 7]


DIED = "the Ray actor that worked on it died, twice"


def test_a_row_that_kills_its_actor_costs_no_other_row(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[batch_file.Row],
    output: Path,
    tiny_model: Model,
    plain: list[JsonObject],
) -> None:
    local = LocalRay(tiny_model, deadly=lambda row: row.id == "row 2")
    monkeypatch.setattr(ray_batch, "map_blocks", local)
    summary = run_batch(rows, output, ModelSource(), TWO, batch_size=2, **OPTIONS)
    # The rows of the lost block, 2 and 3, come last.
    expected = [*plain[:2], *plain[4:], *plain[2:4]]
    expected[10] = rows[2].record_error(BatchError(DIED))
    assert [comparable(one) for one in read(output)] == expected
    assert (summary.answered, summary.failed) == (7, 5)
    local.deadly = lambda _: False
    again = run_batch(rows, output, ModelSource(), TWO, resume=True, retry_errors=True, **OPTIONS)
    assert (again.present, again.answered, again.failed) == (7, 1, 4)


def test_where_actors_keep_dying_what_was_lost_so_far_is_booked(
    monkeypatch: pytest.MonkeyPatch, rows: list[batch_file.Row], output: Path, tiny_model: Model
) -> None:
    """Otherwise a resumed run would end at the same place."""
    local = LocalRay(tiny_model, stop_after=4, deadly=lambda row: row.id == "row 1")
    local.stop = DyingActors
    monkeypatch.setattr(ray_batch, "map_blocks", local)
    with pytest.raises(DyingActors, match="died again and again, in more than 8 blocks"):
        run_batch(rows, output, ModelSource(), TWO, batch_size=1, **OPTIONS)
    assert [record["id"] for record in read(output)] == ["row 0", "row 2", "row 3", "row 1"]
    assert [record.get("error") for record in read(output)[1:]] == [
        None,
        read(output)[2]["error"],  # its image is missing
        DIED,
    ]


def test_samples_that_kill_their_actor_cost_no_other(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Model, source: ModelSource
) -> None:
    peer("ray")
    local = LocalRay(tiny_model, deadly=lambda sample: sample.id == "deadly")
    monkeypatch.setattr(ray_batch, "map_blocks", local)
    monkeypatch.setattr(ray_eval, "connect", nullcontext)
    monkeypatch.setattr(ray_eval, "pool", lambda *_: (1, 1, 0))
    samples = [Sample("a", "star?"), Sample("deadly", "ring"), Sample("b", "circle square")]
    ask = asking_actors(source, TWO, GenerationOptions(**OPTIONS), batch_size=1)
    with ask(samples) as asked:
        found = {record["id"]: record for record in asked.records}
    assert {name: record.get("answer") for name, record in found.items()} == {
        "a": tiny_model.generate(None, "star?", **OPTIONS),
        "deadly": None,
        "b": tiny_model.generate(None, "circle square", **OPTIONS),
    }
    assert (found["deadly"]["error"], found["deadly"]["finish_reason"]) == (DIED, "error")


def test_an_actor_that_dies_with_an_empty_block_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_batch, "map_blocks", lambda *_: (LostBlock() for _ in range(1)))
    with pytest.raises(RayError, match=DIED):
        list(ray_batch.answer_blocks([[]], lambda *_: None, ModelSource(), TWO, lambda *_: None))


class FakeRay:
    """Ray in this process. `deadly` blocks kill their actor; `ready` actors load a model, others
    wait for room for ever; `loading_kills` them."""

    exceptions = SimpleNamespace(
        RayError=type("RayError", (Exception,), {}),
        RayActorError=type("RayActorError", (Exception,), {}),
        OutOfMemoryError=type("OutOfMemoryError", (Exception,), {}),
    )

    def __init__(self, deadly: Sequence[int] = (), ready: int = 99, loading_kills: bool = False):
        self.deadly, self.ready, self.loading_kills = deadly, ready, loading_kills
        self.started: list[Any] = []
        self.most_at_once = 0

    def remote(self, kind: type) -> Any:
        def task(actor: int, *block: Any) -> tuple[int, Any]:
            return (actor, *block)  # type: ignore[return-value]

        def start(work: Any, *_: Any) -> Any:
            actor, self.work = len(self.started), work
            check, run = (SimpleNamespace(remote=partial(task, actor)) for _ in range(2))
            self.started.append(SimpleNamespace(check=check, run=run))
            return self.started[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, tasks: list[Any]) -> tuple[list[Any], list[Any]]:
        """The last task that can end: results do not come in order."""
        self.most_at_once = max(self.most_at_once, len(tasks))
        return [[task for task in tasks if task[0] < self.ready][-1]], []

    def get(self, task: tuple[int, Any]) -> Any:
        if len(task) == 1 and not self.loading_kills:
            return None
        if len(task) == 1 or task[1] in self.deadly:
            raise self.exceptions.RayActorError
        return self.work(None, task[1])


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_batch, "connect", nullcontext)
    monkeypatch.setattr(ray_batch, "pool", lambda *_: (3, 1, 0))
    return fake


def double(_: Any, block: int) -> int:
    return 2 * block


@pytest.mark.parametrize("deadly", [(), (1,), (0, 2), (3,), (0, 1, 2, 3), tuple(range(8))])
@pytest.mark.parametrize("ready", [1, 2, 99])
def test_results_come_in_order_and_lost_blocks_are_told_from_others(
    fake_ray: FakeRay, deadly: tuple[int, ...], ready: int
) -> None:
    """Also where the cluster has no room for some of the actors."""
    fake_ray.deadly, fake_ray.ready = deadly, ready
    results = map_blocks(range(9), double, ModelSource(), TWO)
    found = ["lost" if isinstance(one, LostBlock) else one for one in results]
    assert found == ["lost" if n in deadly else 2 * n for n in range(9)]
    assert len(fake_ray.started) == 3
    assert fake_ray.most_at_once == 3  # one task for each actor


def test_no_more_actors_than_blocks(fake_ray: FakeRay) -> None:
    assert list(map_blocks([1, 2], double, ModelSource(), TWO)) == [2, 4]
    assert len(fake_ray.started) == 2


@pytest.mark.parametrize("loading", [False, True])
def test_a_run_ends_where_actors_always_die(fake_ray: FakeRay, loading: bool) -> None:
    fake_ray.deadly, fake_ray.loading_kills = range(9), loading
    with pytest.raises(DyingActors, match="more than 8 blocks"):
        list(map_blocks(range(20), double, ModelSource(), TWO))


def test_blocks_around_a_slow_one_are_handed_on_before_a_run_ends(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind it died, and would else die in every resumed run. The slow one is answered."""

    def wait(tasks: list[Any]) -> tuple[list[Any], list[Any]]:
        slow_last = sorted(tasks, key=lambda task: task[1:] != (0,))
        return [slow_last[-1]], []

    monkeypatch.setattr(fake_ray, "wait", wait)
    fake_ray.deadly = range(3, 20)
    found: list[Any] = []
    with pytest.raises(DyingActors):
        for one in map_blocks(range(20), double, ModelSource(), TWO):
            found.append(type(one) if isinstance(one, RayError) else one)
    assert found == [0, 2, 4, *[LostBlock] * 9]


def test_an_error_of_the_work_ends_the_run_before_a_slow_block_does(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def wait(tasks: list[Any]) -> tuple[list[Any], list[Any]]:
        return [[task for task in tasks if task[1:] != (0,)][-1]], []

    def work(_: Any, block: int) -> Any:
        asked.append(block)
        return RayError("broken") if block == 3 else block

    monkeypatch.setattr(fake_ray, "wait", wait)
    with pytest.raises(RayError, match="broken"):
        list(map_blocks(range(20), work, ModelSource(), TWO))
    assert asked == [1, 2, 3]


@pytest.mark.parametrize("retry", [False, True])
def test_what_cannot_start_touches_no_file(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    rows: list[batch_file.Row],
    output: Path,
    tiny_model: Model,
    retry: bool,
) -> None:
    """Neither an empty output nor one without the error lines that were to be asked again."""
    peer("ray")
    if retry:
        monkeypatch.setattr(ray_batch, "map_blocks", LocalRay(tiny_model))
        assert run_batch(rows, output, ModelSource(), TWO, **OPTIONS).failed == 4
        monkeypatch.undo()
    before = output.read_bytes() if retry else None

    def fails(text: str, source: ModelSource) -> None:
        with pytest.raises(RayError, match=text):
            run_batch(rows, output, source, TWO, resume=retry, retry_errors=retry)
        assert (output.read_bytes() if output.exists() else None) == before

    fails("device cuda:3", on_device("cuda:3"))
    fake_ray = request.getfixturevalue("fake_ray")
    fake_ray.get = lambda _: RayError("no model in a Ray actor: x")
    fails("no model in a Ray actor", ModelSource("x"))
    monkeypatch.setitem(sys.modules, "ray", None)
    fails("Ray is not installed", ModelSource())


@pytest.mark.parametrize(
    ("name", "block", "failure"),
    [
        ("", 2, ""),
        ("/nowhere", 2, "no model in a Ray actor: /nowhere: no such file"),
        ("", "x", "a Ray actor failed: TypeError: can"),
    ],
)
def test_what_fails_in_an_actor_is_one_line(
    source: ModelSource, name: str, block: Any, failure: str
) -> None:
    used = replace(source, name=name or source.name)
    actor = ray_batch.Actor(lambda model, block: block + 1, used, torch.get_num_threads())
    result = actor.run(block)
    if failure:
        assert isinstance(result, RayError)
        assert str(result).startswith(failure) and "\n" not in str(result)
    else:
        assert result == 3
    assert actor.check() is (result if name else None)


def test_a_predictor_by_itself(source: ModelSource, folder: Path, tiny_model: Model) -> None:
    predictor = Predictor(source.name, source.options, **OPTIONS)
    columns = {
        "key": [1, 2, 3, 4],
        "prompt": ["star?", "star?", "ring", "star?"],
        "image": [str(folder / "red.png"), None, str(folder / "missing.png"), "also missing"],
    }
    given = predictor(columns)
    red = tiny_model.generate(folder / "red.png", "star?", **OPTIONS)
    assert given["key"] == [1, 2, 3, 4]
    assert given["answer"] == [str(red), tiny_model.generate(None, "star?", **OPTIONS), "", ""]
    assert given["finish_reason"] == [red.finish_reason, "length", "error", "error"]
    assert given["error"][:2] == ["", ""] and "missing.png" in given["error"][2]
    text_only = predictor({"prompt": ["star?"]})
    assert text_only["answer"] == [given["answer"][1]]
    nulls = {"prompt": ["star?"], "image": torch.full((1,), torch.nan).numpy()}
    assert predictor(nulls)["answer"] == [given["answer"][1]]


def test_a_predictor_passes_on_that_its_accelerator_failed(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(source.name, source.options, **OPTIONS)

    def failing(*_: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(predictor.model, "generate", failing)
    with pytest.raises(RuntimeError, match="CUDA error"):
        predictor({"prompt": ["star?", "ring"]})


def test_images_of_a_cell() -> None:
    import numpy as np

    pixels = np.zeros((4, 5, 3), np.uint8)
    assert images_of(None) == []
    assert images_of(float("nan")) == images_of(np.float32("nan")) == []
    assert images_of("a.png") == ["a.png"]
    assert images_of(b"bytes") == [b"bytes"]
    assert images_of(["a.png", "b.png"]) == ["a.png", "b.png"]
    assert images_of(np.array(["a.png", "b.png"])) == ["a.png", "b.png"]
    assert images_of(np.array(["a.png"], dtype=object)) == ["a.png"]
    assert len(images_of(pixels)) == 1 and images_of(pixels)[0] is pixels


def test_actors_find_what_stands_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    source = ModelSource("model", {"base": Path("model"), "vision_tower": None, "dtype": "bf16"})
    there = source.everywhere()
    assert there.name == there.options["base"] == str(tmp_path / "model")
    assert (there.options["vision_tower"], there.options["dtype"]) == (None, "bf16")
    assert ModelSource("owner/name").everywhere().name == "owner/name"


def nodes_of(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    """A cluster of such nodes, and a large one that is no longer there."""
    nodes = [{"Alive": True, "Resources": {**has, "memory": 1e9}} for has in resources]
    nodes.append({"Alive": False, "Resources": {"CPU": 512.0, "GPU": 64.0}})
    fake = type("Ray", (), {"nodes": staticmethod(lambda: nodes)})
    monkeypatch.setattr(ray_batch, "import_ray", lambda: fake)


def on_device(device: Any) -> ModelSource:
    return ModelSource("x", {"device": device})


ANY, EIGHT, GPUS = on_device("auto"), {"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("cluster", "source", "nodes", "expected"),
    [
        (Cluster(), ANY, [EIGHT], (1, 8, 0)),
        (Cluster(actors=3), ANY, [EIGHT], (3, 2, 0)),
        (Cluster(), ModelSource(), [GPUS], (4, 1, 1)),
        (Cluster(actors=2, cpus=3), ANY, [GPUS], (2, 3, 1)),
        (Cluster("auto", actors=64), ANY, [GPUS], (64, 1, 1)),  # it may grow
        # An actor is on one node, whatever all of them have together.
        (Cluster("auto"), ANY, [{"CPU": 1.0}, {"CPU": 1.0}], (1, 1, 0)),
        (Cluster("auto"), ANY, [{"CPU": 2.0}, EIGHT], (1, 8, 0)),
        (Cluster("auto", actors=2), ANY, [{"CPU": 2.0}, EIGHT], (2, 4, 0)),
        (Cluster("auto", actors=3), ANY, [{"CPU": 3.0}, EIGHT], (3, 3, 0)),
        (Cluster("auto"), ANY, [{}, EIGHT], (1, 8, 0)),  # a head that takes no work
        # A GPU without a CPU beside it takes no actor.
        (Cluster(), ANY, [{"CPU": 2.0, "GPU": 4.0}], (2, 1, 1)),
        (Cluster("auto"), ANY, [EIGHT, GPUS, GPUS], (8, 1, 1)),
        # Only what runs on a GPU reserves one.
        (Cluster(actors=2), on_device("cpu"), [GPUS], (2, 8, 0)),
        (Cluster(), on_device(torch.device("cpu")), [GPUS], (1, 16, 0)),
        (Cluster(), on_device("cuda"), [EIGHT, GPUS], (4, 1, 1)),
        (Cluster(), on_device("cuda:0"), [GPUS], (4, 1, 1)),
    ],
)
def test_how_many_actors_there_are(
    monkeypatch: pytest.MonkeyPatch,
    cluster: Cluster,
    source: ModelSource,
    nodes: list[dict[str, float]],
    expected: Any,
) -> None:
    nodes_of(monkeypatch, *nodes)
    assert ray_batch.pool(cluster, source) == expected


@pytest.mark.parametrize(
    ("cluster", "source", "nodes", "text"),
    [
        (Cluster(actors=9), ANY, [EIGHT], "9 actors need 9 CPUs and 0 GPUs, but there are 8 and 0"),
        (Cluster(actors=2, cpus=5), ANY, [EIGHT], "2 actors need 10 CPUs"),
        (
            Cluster(actors=3),
            ANY,
            [{"CPU": 8.0, "GPU": 2.0}],
            "3 CPUs and 3 GPUs, but there are 8 and 2",
        ),
        (
            Cluster("auto", cpus=9),
            ANY,
            [EIGHT, EIGHT],
            "^no node has room for an actor of 9 CPUs and 0 GPUs; nodes have 8 CPUs and 0 GPUs$",
        ),
        (Cluster("auto", cpus=2), ANY, [EIGHT, {"CPU": 1.0, "GPU": 1.0}], "2 CPUs and 1 GPUs"),
        (Cluster("auto"), ANY, [], "no node has room for .*; nodes have nothing"),
        (Cluster("auto"), on_device("cuda"), [EIGHT], "device cuda: no node .* has a GPU"),
        (Cluster(), on_device("cuda:1"), [GPUS], "device cuda:1: Ray gives every actor a GPU"),
    ],
)
def test_actors_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    cluster: Cluster,
    source: ModelSource,
    nodes: list[dict[str, float]],
    text: str,
) -> None:
    nodes_of(monkeypatch, *nodes)
    with pytest.raises(RayError, match=text):
        ray_batch.pool(cluster, source)


def commands(rows: Path, output: Path) -> list[list[str]]:
    """Those that can run on Ray."""
    files = [str(rows), "-o", str(output)]
    return [["batch", *files], ["eval", "jsonl", *files]]


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in commands(folder / "rows.jsonl", tmp_path / "out"):
        assert cli.main([*command, "--ray"]) == 1
        assert "pip install 'llava-lite[ray]'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert list(map_blocks([], lambda *_: None, ModelSource(), TWO)) == []  # nothing to do


@pytest.mark.parametrize("flags", [["--ray-actors", "2"], ["--ray-address", "auto"]])
def test_flags_need_ray(folder: Path, capsys: Any, flags: list[str]) -> None:
    for command in commands(folder / "rows.jsonl", folder / "no"):
        assert cli.main([*command, *flags]) == 2
        assert f"{flags[0]} needs --ray" in capsys.readouterr().err
        assert not (folder / "no").exists()


def test_importing_it_imports_no_ray() -> None:
    code = "import sys, llava_lite.integrations.ray_batch; print('ray' in sys.modules)"
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(run, capture_output=True, text=True, env=environment).stdout == "False\n"


# ---- an evaluation, without Ray ------------------------------------------------------------------


def test_blocks_hold_all_samples_about_the_same_images() -> None:
    def ids(size: int) -> list[str]:
        samples = [
            Sample("a", "?", ("x",), "x"),
            Sample("b", "long?", ("y",), "y"),
            Sample("c", "?", ("x",), "x"),
            Sample("d", "?"),
            Sample("e", "?", ("y",), "y"),
            Sample("f", "?", ("y",), "y"),
            Sample("g", "", error="no image"),
        ]
        return ["".join(sample.id for sample in block) for block in split_groups(samples, size)]

    assert ids(1) == ["bef", "ac", "d", "g"]
    assert ids(2) == ["bef", "ac", "dg"]
    assert ids(4) == ["befac", "dg"]
    assert split_groups([], 4) == []


def test_images_that_lie_here_are_found_from_any_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    images = ("red.png", Path("red.png"), "gone.png", "https://example.org/red.png", b"red.png")
    found = ray_eval.with_absolute_paths(Sample("a", "?", images, "key"))
    here = str(folder / "red.png")
    assert found == Sample("a", "?", (here, here, *images[2:]), "key")


def test_samples_travel_whatever_their_images_are(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tiny_model: Model, source: ModelSource
) -> None:
    """Bytes, functions, no image, and samples that cannot be asked, to actors and back."""
    cloudpickle = peer("ray.cloudpickle")

    class Travelling(LocalRay):
        def __call__(self, blocks: Sequence[Any], work: Any, *rest: Any) -> Iterator[Any]:
            sent = cloudpickle.loads(cloudpickle.dumps((blocks, work)))
            for result in super().__call__(*sent, *rest):
                yield cloudpickle.loads(cloudpickle.dumps(result))

    monkeypatch.setattr(ray_batch, "map_blocks", Travelling(tiny_model))
    monkeypatch.setattr(ray_eval, "connect", nullcontext)
    monkeypatch.setattr(ray_eval, "pool", lambda *_: (8, 1, 0))
    red = (folder / "red.png").read_bytes()
    samples = [
        Sample("bytes", "star?", (red,), "red"),
        Sample("no image", "ring", error="no image"),
        Sample("function", "ring", (lambda: red,)),
        Sample("broken", "star?", (b"broken",)),
        Sample("text", "star?"),
        Sample("again", "ring", (red,), "red"),
    ]
    ask = asking_actors(source, TWO, GenerationOptions(**OPTIONS), batch_size=2)
    with ask(samples) as asked:
        found = {record["id"]: record for record in asked.records}
    answers = {name: record.get("answer") for name, record in found.items()}
    ring = tiny_model.generate(red, "ring", **OPTIONS)
    assert answers == {
        "bytes": tiny_model.generate(red, "star?", **OPTIONS),
        "no image": None,
        "function": ring,
        "broken": None,
        "text": tiny_model.generate(None, "star?", **OPTIONS),
        "again": ring,
    }
    assert found["again"]["usage"] == ring.usage
    assert found["no image"]["error"] == "no image" and found["broken"]["error"]
    assert asked.settings["model_hash"] == model_hash([Path(str(source.name))])
    # Groups of two, one, one, one and one, at least one sample in a block, and the empty one.
    assert (asked.about["actors"], asked.about["batch_size"]) == (6, 2)


# ---- with Ray ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_actors_work_and_a_failure_ends_it(ray_here: Any, source: ModelSource) -> None:
    def work(model: Model, block: float) -> int:
        time.sleep(block)
        return os.getpid()

    processes: list[int] = []
    with pytest.raises(RayError, match="^a Ray actor failed: TypeError: [^\n]*$"):
        for process in map_blocks([0.3] * 8 + ["text"], work, source, TWO):
            processes.append(process)
    # The other actor may still work on the eighth block when the ninth fails.
    assert len(processes) in (7, 8)
    assert len(set(processes)) == 2 and os.getpid() not in processes


@pytest.mark.slow
def test_a_block_that_kills_its_actor_is_lost_alone(ray_here: Any, source: ModelSource) -> None:
    def work(model: Model, block: int) -> int:
        if block == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        return block

    one_actor = Cluster(actors=1, cpus=1)  # each start takes its time
    results = map_blocks(range(6), work, source, one_actor)
    found = ["lost" if isinstance(one, LostBlock) else one for one in results]
    assert found == [0, 1, 2, "lost", 4, 5]


@pytest.mark.slow
def test_a_predictor_in_a_pipeline(
    ray_here: Any, folder: Path, source: ModelSource, tiny_model: Model
) -> None:
    import ray.data

    rows = [
        {"prompt": text, "image": str(folder / "red.png"), "n": n}
        for n, text in enumerate(QUESTIONS)
    ]
    answered = ray.data.from_items(rows).map_batches(
        Predictor,
        fn_constructor_kwargs={"model": source.name, "load_options": source.options, **OPTIONS},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        batch_size=2,
    )
    found = {row["n"]: row["answer"] for row in answered.take_all()}
    for number, text in enumerate(QUESTIONS):
        assert found[number] == tiny_model.generate(folder / "red.png", text, **OPTIONS)


@pytest.fixture(scope="module")
def questions(folder: Path, plain: list[JsonObject]) -> Path:
    """A data set of the same rows. What the model says is right for the first six of twelve, two of
    which have no image to be asked about."""
    rows = []
    for number, row in enumerate(read(folder / "rows.jsonl")):
        images = [row["image"]] if isinstance(row["image"], str) else row["image"] or []
        right = plain[number].get("answer", "x") if number < 6 else "x"
        question = {"id": str(row["id"]), "question": row["prompt"], "answers": [right]}
        rows.append({**question, "images": images})
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def evaluate(questions: Path, output: Path, source: ModelSource, *flags: str) -> dict[str, Any]:
    """The report of `llava-lite eval`, without what differs between two runs."""
    words = ["eval", "jsonl", str(questions), "-o", str(output), "-m", str(source.name), "-n", "6"]
    words += ["--device", "cpu", "--threads", "1", "--batch-size", "1", "--quiet", *flags]
    assert cli.main(words) == console.FAILED  # some questions cannot be asked
    content = json.loads((output / "report.json").read_text())
    return {name: content[name] for name in content if name not in ("measured", "runs")}


@pytest.mark.slow
def test_an_evaluation_is_the_same_here_and_on_two_actors(
    ray_here: Any, questions: Path, tmp_path: Path, source: ModelSource
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    expected = evaluate(questions, here, source)
    assert expected["scores"]["accuracy"]["value"] == pytest.approx(4 / 12)
    assert evaluate(questions, there, source, "--ray", "--ray-actors", "2") == expected
    file = there / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7]) + lines[7][:40])  # a killed run: five answers and a half
    kept = read_predictions(file).records
    assert evaluate(questions, there, source, "--reuse", "--ray", "--ray-actors", "1") == expected
    assert evaluate(questions, there, source, "--reuse") == expected
    found = read_predictions(file)
    assert found.records.items() >= kept.items() and len(kept) == 5
    assert found.answers == read_predictions(here / "predictions.jsonl").answers
    assert len(file.read_bytes().splitlines()) == 1 + 3 + 12  # header, runs, samples
    runs = [(run["samples"], run.get("actors")) for run in found.runs]
    assert runs == [(5, 2), (7, 1), (0, None)]


@pytest.mark.slow
def test_killed_and_resumed_two_actors_write_what_one_process_writes(
    ray_here: Any, folder: Path, tmp_path: Path, source: ModelSource, plain: list[JsonObject]
) -> None:
    """The program itself, on a cluster that is there, killed once it has written something."""
    many, output = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    rows = [row | {"image": absolute(folder, row["image"])} for row in read(folder / "rows.jsonl")]
    asked = [row | {"id": f"{round} {row['id']}"} for round in range(10) for row in rows]
    many.write_text("\n".join(map(json.dumps, asked)))
    words = ["batch", str(many), "-o", str(output), "-m", str(source.name), "--device", "cpu"]
    words += ["-n", "6", "--batch-size", "2", "--threads", "1", "--resume", "--quiet", "--ray"]
    address = ray_here.get_runtime_context().gcs_address
    killed = [sys.executable, "-m", "llava_lite", *words, "--ray-address", address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(killed, env=environment)
    deadline = time.monotonic() + 240
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    assert 0 < before.count(b"\n") < len(asked)
    heard: list[JsonObject] = []
    options = {"batch_size": 2, "resume": True, "on_record": heard.append, **OPTIONS}
    summary = run_batch(batch_file.read_rows(many), output, source, TWO, **options)
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    records = read(output)
    assert heard == records[-len(heard) :]
    assert summary.answered + summary.present == 8 * 10
    assert summary.first_error is not None and summary.failed == 4 * 10
    assert [record["id"] for record in records] == [row["id"] for row in asked]
    for number, record in enumerate(records):
        expected = plain[number % len(plain)]
        assert record.get("answer") == expected.get("answer")
        assert comparable(record).get("error") == expected.get("error")


def absolute(folder: Path, image: Any) -> Any:
    if isinstance(image, list):
        return [str(folder / name) for name in image]
    return image and str(folder / image)
