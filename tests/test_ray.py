"""Batches and samples on Ray: two actors on this machine give what one process gives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_CONFIG, random_llava
from PIL import Image

from llava_lite import batch, cli
from llava_lite.batch import BatchError, Record
from llava_lite.checkpoint import save_model
from llava_lite.evaluation.suite import Sample
from llava_lite.generation import Model
from llava_lite.integrations import ray_batch
from llava_lite.integrations.ray_batch import (
    Cluster,
    ModelSource,
    Predictor,
    RayError,
    answer_samples,
    images_of,
    map_blocks,
    run_batch,
)
from llava_lite.tokenizer import Tokenizer

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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> ModelSource:
    """The tiny random model as a folder."""
    where = tmp_path_factory.mktemp("models") / "random"
    save_model(random_llava(), TINY_CONFIG, where, tiny_tokenizer)
    return ModelSource(str(where), {"device": "cpu"})


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """Ray on this machine with two CPUs, once for all tests: it takes its time to start."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


def read(output: Path) -> list[Record]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def comparable(record: Record) -> Record:
    """Of an error only the name of the file: on Ray it is named by its absolute path."""
    if "error" in record:
        record = {**record, "error": record["error"].split("/")[-1]}
    return record


@pytest.fixture(scope="module")
def plain(folder: Path, tiny_model: Model) -> list[Record]:
    """What one process writes."""
    output = folder / "plain.jsonl"
    batch.run_batch(
        tiny_model, batch.read_rows(folder / "rows.jsonl"), output, batch_size=2, **OPTIONS
    )
    return [comparable(record) for record in read(output)]


# ---- without Ray ---------------------------------------------------------------------------------


class LocalRay:
    """`map_blocks` in this process, for what does not depend on Ray."""

    def __init__(self, model: Model, stop_after: int | None = None) -> None:
        self.model, self.stop_after, self.asked = model, stop_after, 0

    def __call__(self, blocks: Sequence[Any], work: Any, *_: object) -> Iterator[Any]:
        for number, block in enumerate(blocks):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.asked += len(block)
            yield work(self.model, block)


def test_an_interrupted_run_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    tiny_model: Model,
    plain: list[Record],
) -> None:
    rows, output = batch.read_rows(folder / "rows.jsonl"), tmp_path / "out.jsonl"
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
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, tiny_model: Model
) -> None:
    monkeypatch.setattr(ray_batch, "map_blocks", LocalRay(tiny_model))
    rows, output = batch.read_rows(folder / "rows.jsonl"), tmp_path / "out.jsonl"
    run_batch(rows, output, ModelSource(), TWO, shard=(2, 5), **OPTIONS)
    assert [record["id"] for record in read(output)] == ["row 1", "row 6", 7]


def test_samples_of_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tiny_model: Model
) -> None:
    """Images as bytes and as functions, and a sample that cannot be asked."""
    monkeypatch.setattr(ray_batch, "map_blocks", LocalRay(tiny_model))
    red = (folder / "red.png").read_bytes()
    samples = [
        Sample("a", "star?", (red,), "red"),
        Sample("b", "ring", error="no image"),
        Sample("c", "ring", (lambda: red,)),
        Sample("d", "star?", (b"broken",)),
        Sample("e", "star?"),
        Sample("f", "star?", (lambda: (folder / "gone.png").read_bytes(),)),
    ]
    source = ModelSource()
    first, second, third, broken, last, gone = answer_samples(
        samples, source, TWO, batch_size=3, **OPTIONS
    )
    answer = tiny_model.generate(red, "star?", **OPTIONS)
    assert first == {
        "id": "a",
        "answer": str(answer),
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
    }
    assert second == {"id": "b", "error": "no image", "finish_reason": "error", "usage": {}}
    assert third["answer"] == tiny_model.generate(red, "ring", **OPTIONS)
    assert (broken["id"], broken["finish_reason"], broken["usage"]) == ("d", "error", {})
    assert "answer" not in broken and broken["error"]
    assert gone["id"] == "f" and "gone.png" in gone["error"]
    assert last["answer"] == tiny_model.generate(None, "star?", **OPTIONS)


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
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    used = replace(source, name=name or source.name)
    actor = ray_batch.Actor(
        cloudpickle.dumps((lambda model, block: block + 1, used)), torch.get_num_threads()
    )
    [row] = actor({"block": [cloudpickle.dumps(block)]})
    assert row["failure"][0].startswith(failure) and "\n" not in row["failure"][0]
    assert bool(row["failure"][0]) == bool(failure)
    assert cloudpickle.loads(row["result"][0]) == (None if failure else 3)


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


def test_images_of_a_cell() -> None:
    import numpy as np

    pixels = np.zeros((4, 5, 3), np.uint8)
    assert images_of(None) == []
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


@pytest.mark.parametrize(
    ("cluster", "resources", "expected"),
    [
        (Cluster(), {"CPU": 8.0}, (1, 8, 0)),
        (Cluster(actors=3), {"CPU": 8.0}, (3, 2, 0)),
        (Cluster(), {"CPU": 16.0, "GPU": 4.0}, (4, 1, 1)),
        (Cluster(actors=2, cpus=3), {"CPU": 16.0, "GPU": 4.0}, (2, 3, 1)),
        (Cluster("auto", actors=64), {"CPU": 16.0, "GPU": 4.0}, (64, 1, 1)),  # it may grow
    ],
)
def test_how_many_actors_there_are(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, resources: Any, expected: Any
) -> None:
    fake = type("Ray", (), {"cluster_resources": staticmethod(lambda: resources)})
    monkeypatch.setattr(ray_batch, "import_ray", lambda: fake)
    assert ray_batch.pool(cluster) == expected


@pytest.mark.parametrize(
    ("cluster", "resources", "text"),
    [
        (Cluster(actors=9), {"CPU": 8.0}, "9 actors need 9 CPUs and 0 GPUs, but there are 8 and 0"),
        (Cluster(actors=2, cpus=5), {"CPU": 8.0}, "2 actors need 10 CPUs"),
        (Cluster(actors=3), {"CPU": 8.0, "GPU": 2.0}, "3 CPUs and 3 GPUs, but there are 8 and 2"),
    ],
)
def test_more_actors_than_fit(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, resources: Any, text: str
) -> None:
    fake = type("Ray", (), {"cluster_resources": staticmethod(lambda: resources)})
    monkeypatch.setattr(ray_batch, "import_ray", lambda: fake)
    with pytest.raises(RayError, match=text):
        ray_batch.pool(cluster)


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    output = tmp_path / "out.jsonl"
    assert cli.main(["batch", str(folder / "rows.jsonl"), "-o", str(output), "--ray"]) == 1
    assert "pip install 'llava-lite[ray]'" in capsys.readouterr().err
    assert list(map_blocks([], lambda *_: None, ModelSource(), TWO)) == []  # nothing to do


@pytest.mark.parametrize("flags", [["--ray-actors", "2"], ["--ray-address", "auto"]])
def test_flags_need_ray(folder: Path, capsys: Any, flags: list[str]) -> None:
    arguments = ["batch", str(folder / "rows.jsonl"), "-o", str(folder / "no.jsonl"), *flags]
    assert cli.main(arguments) == 2
    assert f"{flags[0]} needs --ray" in capsys.readouterr().err
    assert not (folder / "no.jsonl").exists()


def test_importing_it_imports_no_ray() -> None:
    code = "import sys, llava_lite.integrations.ray_batch; print('ray' in sys.modules)"
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(run, capture_output=True, text=True, env=environment).stdout == "False\n"


# ---- with Ray ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_actors_write_what_one_process_writes(
    ray_here: Any, folder: Path, tmp_path: Path, source: ModelSource, plain: list[Record]
) -> None:
    output, heard = tmp_path / "out.jsonl", list[Record]()
    rows = batch.read_rows(folder / "rows.jsonl")
    summary = run_batch(rows, output, source, TWO, batch_size=2, on_record=heard.append, **OPTIONS)
    assert [comparable(record) for record in read(output)] == plain
    assert heard == read(output)
    assert (summary.answered, summary.failed) == (8, 4)
    assert summary.first_error is not None and summary.first_error["id"] == "row 3"


@pytest.mark.slow
def test_both_actors_work_and_a_failure_ends_it(ray_here: Any, source: ModelSource) -> None:
    def work(model: Model, block: float) -> int:
        time.sleep(block)
        return os.getpid()

    processes: list[int] = []
    with pytest.raises(RayError, match="^a Ray actor failed: TypeError: [^\n]*$"):
        for process in map_blocks([0.3] * 8 + ["text"], work, source, TWO):
            processes.append(process)
    assert len(processes) == 8 and len(set(processes)) == 2 and os.getpid() not in processes


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


@pytest.mark.slow
def test_kill_9_and_resume(
    folder: Path, tmp_path: Path, source: ModelSource, plain: list[Record]
) -> None:
    """The program itself, on a Ray of its own, killed as soon as it has written something."""
    pytest.importorskip("ray.data")
    many, output = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"image": absolute(folder, row["image"])} for row in rows]
    asked = [row | {"id": f"{round} {row['id']}"} for round in range(20) for row in rows]
    many.write_text("\n".join(map(json.dumps, asked)))
    command = [sys.executable, "-m", "llava_lite", "batch", str(many), "-o", str(output)]
    command += ["-m", str(source.name), "--device", "cpu", "-n", "6", "--batch-size", "2"]
    command += ["--ray", "--ray-actors", "2", "--threads", "1", "--resume", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    assert 0 < before.count(b"\n") < len(asked)
    command[command.index("--ray-actors") + 1] = "1"  # nothing depends on how many there are
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1  # some rows failed, as they should
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    records = read(output)
    assert [record["id"] for record in records] == [row["id"] for row in asked]
    for number, record in enumerate(records):
        expected = plain[number % len(plain)]
        assert record.get("answer") == expected.get("answer")
        assert comparable(record).get("error") == expected.get("error")


def absolute(folder: Path, image: Any) -> Any:
    if isinstance(image, list):
        return [str(folder / name) for name in image]
    return image and str(folder / image)
