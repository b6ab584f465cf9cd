"""Predictions that survive everything, and what a report says of them."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import ROOT
from llava_lite.errors import EvaluationError, ImageError
from llava_lite.evaluation import fingerprint, predictions
from llava_lite.evaluation.engine import Engine, Outcome
from llava_lite.evaluation.fingerprint import file_hash, model_hash
from llava_lite.evaluation.page import page
from llava_lite.evaluation.predictions import (
    PredictionsError,
    PredictionsWriter,
    differences,
    read_predictions,
)
from llava_lite.evaluation.report import Evaluation, report, table
from llava_lite.evaluation.runner import Ask, Files, Selection, ask_here, record_of, run
from llava_lite.evaluation.settings import Origin, answer_settings, model_settings
from llava_lite.evaluation.suite import Metric, Sample, Scores
from llava_lite.generation.answer import Answer
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.reduction import Reduction, ToMe

SETTINGS = {"suite": "fake", "reduction": "none", "files": [{"name": "f", "sha256": "0"}]}
RUN = {"started": "2026-01-01T00:00:00+00:00", "limit": None, "shard": [1, 1]}


def line(name: str, answer: str | None = "yes", elapsed: float = 1.0) -> dict[str, Any]:
    said = {"answer": answer} if answer is not None else {"error": "broken image"}
    return {
        "id": name,
        **said,
        "finish_reason": "stop" if answer is not None else "error",
        "usage": {"prompt_tokens": 40, "image_patches": 16} if answer is not None else {},
        "seconds": {"preprocess": 0.5, "vision": 1.0, "prefill": 2.0, "decode": 0.25},
        "elapsed": elapsed,
        "peak_bytes": 10**9,
    }


def write(path: Path, *lines: dict[str, Any], **options: Any) -> None:
    settings = options.pop("settings", SETTINGS)
    with PredictionsWriter(path, **options) as writer:
        writer.begin(settings, RUN)
        for record in lines:
            writer.append(record)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "predictions.jsonl"


# ---- predictions ---------------------------------------------------------------------------------


def test_lines_come_back_as_they_were_written(path: Path) -> None:
    strange = line("2", "one\u2028two\n\U0001f600\x00")
    write(path, line("1"), strange, line("3", None))
    found = read_predictions(path)
    assert found.settings == SETTINGS
    assert found.records == {"1": line("1"), "2": strange, "3": line("3", None)}
    assert found.answers == {"1": "yes", "2": strange["answer"]}
    assert (found.done(), found.done(retry_errors=True)) == ({"1", "2", "3"}, {"1", "2"})
    assert found.size == path.stat().st_size
    assert path.read_bytes().isascii()
    [run_line] = found.runs
    assert run_line == {**RUN, "samples": 3, "seconds": 1.0, "peak_bytes": 10**9}


def test_a_line_is_in_the_file_as_soon_as_it_is_appended(path: Path) -> None:
    with PredictionsWriter(path) as writer:
        writer.begin(SETTINGS, RUN)
        for number in range(3):
            writer.append(line(str(number)))
            assert len(read_predictions(path).records) == number + 1


def test_reuse_goes_on_after_a_cut_at_every_byte(path: Path) -> None:
    """Whatever is left of a file: whole lines stay, half a line goes, the rest is asked again."""
    names = ["a", "b", "c"]
    write(path, line("a"), line("b", None))
    write(path, line("c"), reuse=True)
    whole = path.read_bytes()
    expected = read_predictions(path).records
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = whole[:size].count(b'{"id": ') if whole[:size].endswith(b"\n") else None
        with PredictionsWriter(path, reuse=True) as writer:
            writer.begin(SETTINGS, RUN)
            before = writer.before
            done = before.done()
            assert kept is None or len(done) == kept
            assert {name: expected[name] for name in done} == before.records
            for name in names:
                if name not in done:
                    writer.append(expected[name])
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        assert [record["id"] for record in lines if "id" in record] == names
        assert read_predictions(path).records == expected


def test_the_last_line_of_a_sample_counts(path: Path) -> None:
    write(path, line("a", None), line("b"))
    write(path, line("a", "now"), reuse=True)
    assert read_predictions(path).answers == {"a": "now", "b": "yes"}


def test_a_file_that_is_there_is_not_touched_unasked(path: Path) -> None:
    write(path, line("a"))
    before = path.read_bytes()
    with pytest.raises(PredictionsError, match="already exists .use --reuse to resume"):
        write(path)
    assert path.read_bytes() == before
    write(path, line("b"), force=True)
    assert set(read_predictions(path).records) == {"b"}


def test_other_settings_are_refused_by_name(path: Path) -> None:
    write(path, line("a"))
    before = path.read_bytes()
    other = {**SETTINGS, "reduction": "hybrid-72-36", "template": "plain"}
    with pytest.raises(PredictionsError) as caught:
        write(path, reuse=True, settings=other)
    assert str(caught.value) == (
        f"{path}: was answered with other settings: reduction none, now hybrid-72-36; "
        "template none, now plain"
    )
    assert path.read_bytes() == before


def test_differences_name_what_was_and_what_is() -> None:
    before = {"same": 1, "gone": True, "long": "a" * 70, "list": (1, 2)}
    now = {"same": 1, "new": 0.5, "long": "b" * 70, "list": [1, 3]}
    assert differences(before, now) == [
        "gone true, now none",
        f"long {'a' * 28}...{'a' * 28}, now {'b' * 28}...{'b' * 28}",
        "list [1, 2], now [1, 3]",
        "new none, now 0.5",
    ]


def test_two_runs_on_one_file_do_not_mix(path: Path) -> None:
    with PredictionsWriter(path) as writer:
        writer.begin(SETTINGS, RUN)
        writer.append(line("a"))
        for options in ({"reuse": True}, {"force": True}):
            with pytest.raises(PredictionsError, match="another run is writing to it"):
                write(path, **options)
        writer.append(line("b"))
    write(path, line("c"), reuse=True)
    assert set(read_predictions(path).records) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "answer": "b"}\n', "line 1: is not the header"),
        ("just notes\n", "line 1: not valid JSON"),
        ("just notes", "line 1: is no line of a predictions file"),
        ('{"predictions": 2, "settings": {}}\n', "is written in format 2, this version reads 1"),
        ('{"predictions": 1, "settings": {}}\n[1]\n', "line 2: a list, not a JSON object"),
        ('{"predictions": 1, "settings": {}}\n{"id": "a"}\n', "line 2: is no line"),
        ('{"predictions": 1, "settings": {}}\nmy notes', "line 2: is no line"),
        ("", "holds no predictions"),
        ('{"predictions": 1, "sett', "holds no predictions"),
    ],
)
def test_other_files_are_refused_and_kept(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(PredictionsError, match=message):
        read_predictions(path)
    if "holds no" not in message:  # those are what a killed run leaves: it starts anew
        with pytest.raises(PredictionsError, match=message):
            write(path, reuse=True, settings={})
        assert path.read_text() == content


def test_zeros_of_a_disk_without_power_are_cut_off(path: Path) -> None:
    write(path, line("a"))
    with open(path, "ab") as file:
        file.write(b"\0" * 100)
    write(path, line("b"), reuse=True)
    assert set(read_predictions(path).records) == {"a", "b"}


def test_lines_are_forced_to_the_disk_now_and_then(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, synced = [100.0], []
    monkeypatch.setattr(predictions, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(clock[0]))
    with PredictionsWriter(path) as writer:
        writer.begin(SETTINGS, RUN)
        for seconds in (1, 3, 2, 4, 2):
            clock[0] += seconds
            writer.append(line(str(seconds)))
        assert synced == [106.0, 112.0]
    assert synced == [106.0, 112.0, 112.0]


# ---- hashes and settings -------------------------------------------------------------------------


def test_a_converted_model_is_known_by_its_manifest(tmp_path: Path) -> None:
    for name, text in (("manifest.json", "{}"), ("config.json", "a"), ("tokenizer.json", "b")):
        (tmp_path / name).write_text(text)
    first = model_hash([tmp_path])
    (tmp_path / "model.safetensors").write_text("its hash is in the manifest")
    (tmp_path / "notes.txt").write_text("not a part of it")
    assert model_hash([tmp_path]) == first
    (tmp_path / "thresholds.json").write_text("[0.5]")
    assert len({model_hash([tmp_path]), first}) == 2


def test_another_checkpoint_is_known_by_content_not_by_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SMALL_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 10)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 16)
    (tmp_path / "config.json").write_text("{}")
    seen = {model_hash([tmp_path])}
    os.utime(weights, (1, 1))
    assert seen == {model_hash([tmp_path])}
    for change in ({0: 9}, {4095: 9}, {2047 + 9: 7}):  # ends, and a place between
        data = bytearray(bytes(range(256)) * 16)
        for start in range(40):  # a tensor, not one byte
            for place, value in change.items():
                data[min(4095, place + start)] = value
        weights.write_bytes(data)
        seen.add(model_hash([tmp_path]))
    weights.write_bytes(bytes(range(256)) * 17)
    seen.add(model_hash([tmp_path]))
    (tmp_path / "config.json").write_text("{ }")
    seen |= {model_hash([tmp_path]), model_hash([tmp_path, weights]), model_hash([weights])}
    assert len(seen) == 8


def test_files_are_hashed_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc")
    assert file_hash(file) == ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(EvaluationError, match="none.txt: cannot be read: No such file"):
        file_hash(tmp_path / "none.txt")
    with pytest.raises(EvaluationError, match="none.txt: cannot be read: No such file"):
        model_hash([tmp_path / "none.txt"])


@dataclass
class FakeSuite:
    """Questions with their right answers, grouped by the first letter of their names."""

    right: Mapping[str, str]
    files: Sequence[Path]
    name: str = "fake"
    max_new_tokens: int = 4
    settings: Mapping[str, Any] = field(default_factory=lambda: {"language": "en"})
    folder: Path | None = None

    def samples(self) -> list[Sample]:
        return [Sample(name, f"{name}?") for name in self.right]

    def select(self, ids: Collection[str]) -> "FakeSuite":
        return replace(self, right={name: said for name, said in self.right.items() if name in ids})

    def score(self, answers: Mapping[str, str]) -> Scores:
        marks = {name: answers.get(name) == said for name, said in self.right.items()}
        groups = {
            letter: Metric.share(
                sum(mark for name, mark in marks.items() if name[0] == letter),
                sum(name[0] == letter for name in marks),
            )
            for letter in sorted({name[0] for name in marks})
        }
        length = Metric(math.nan if not answers else max(map(len, answers.values())), len(answers))
        shares = Metric.share(sum(marks.values()), len(marks))
        return Scores({"accuracy": shares, "longest": length}, {"by letter": groups})


@pytest.fixture
def suite(tmp_path: Path) -> FakeSuite:
    file = tmp_path / "questions.txt"
    file.write_text("whatever")
    right = {"a1": "yes", "a2": "yes", "b1": "no", "b2": "yes"}
    return FakeSuite(right, [file])


def test_settings_hold_all_that_changes_an_answer(tiny_model: Model, suite: FakeSuite) -> None:
    """Each of them changes the settings, and nothing is there that no test changes."""

    def settings(model: Model = tiny_model, suite: FakeSuite = suite, **options: Any) -> Any:
        origin = options.pop("origin", Origin("1"))
        wishes = GenerationOptions(**{"max_new_tokens": 4, **options})
        return {**model_settings(model, origin, wishes), **answer_settings(suite, wishes)}

    def other_model(exif: bool = True, **changes: Any) -> Model:
        config = replace(tiny_model.config, **changes)
        return Model(tiny_model.llava, tiny_model.tokenizer, config, exif)

    def in_folder(folder: Path) -> FakeSuite:
        return replace(suite, folder=folder)

    plain = settings()
    changed = [
        settings(other_model(pad=False)),
        settings(other_model(exif=False)),
        settings(other_model(name="another")),
        settings(template="plain"),
        settings(system="Be brief."),
        settings(max_new_tokens=5),
        settings(temperature=0.5),
        settings(top_p=0.5),
        settings(top_k=3),
        settings(seed=3),
        settings(stop="."),
        settings(reduction=Reduction(ToMe(keep=6))),
        settings(origin=Origin("2")),
        settings(origin=Origin("1", quantize="int8")),
        settings(origin=Origin("1", compile=True)),
        settings(suite=replace(suite, settings={"language": "cn"})),
        settings(suite=replace(suite, name="other")),
        settings(suite=replace(suite, files=[])),
        settings(suite=in_folder(Path("val2014"))),
    ]
    names = [difference.split()[0] for one in changed for difference in differences(plain, one)]
    assert len(names) == len(changed)
    assert set(plain) - set(names) == {"dtype", "device", "llava_lite"}
    assert (plain["dtype"], plain["device"]) == ("float32", "cpu")
    assert json.loads(json.dumps(plain)) == plain
    beside = settings(suite=in_folder(suite.files[0].parent))
    assert (plain["images"], beside["images"], changed[-1]["images"]) == (None, ".", "val2014")
    assert settings(template="v1") == settings(template="vicuna_v1") == plain


# ---- report --------------------------------------------------------------------------------------


def evaluation(
    suite: FakeSuite, tmp_path: Path, *parts: Sequence[dict[str, Any]], **changes: Any
) -> Evaluation:
    """Of files with these lines."""
    files = [{"name": path.name, "sha256": file_hash(path)} for path in suite.files]
    settings = {**SETTINGS, "files": files}
    found = []
    for number, lines in enumerate(parts):
        path = tmp_path / f"{number}.jsonl"
        run_line = {**RUN, **(changes.get("runs") or [{}] * len(parts))[number]}
        with PredictionsWriter(path) as writer:
            writer.begin(settings, run_line)
            for record in lines:
                writer.append(record)
        found.append((path.name, read_predictions(path)))
    return Evaluation.of(suite, found)


def test_scores_counts_and_costs(suite: FakeSuite, tmp_path: Path) -> None:
    """All by hand: two of four right, one wrong, one broken."""
    lines = [line("b1", "no", 2.0), line("a1", "yes", 4.0), line("a2", None), line("b2", "no", 5.0)]
    lines[3]["finish_reason"] = "length"
    content = report(evaluation(suite, tmp_path, lines))
    assert content["scores"]["accuracy"]["value"] == 0.5
    assert content["scores"]["accuracy"]["interval"] == pytest.approx([0.15004, 0.84996], abs=1e-5)
    assert content["scores"]["longest"] == {"value": 3, "count": 3, "interval": None}
    assert {k: v["value"] for k, v in content["groups"]["by letter"].items()} == {
        "a": 0.5,
        "b": 0.5,
    }
    assert content["samples"] == {"total": 4, "asked": 4, "answered": 3, "failed": 1, "cut_off": 1}
    assert content["failures"] == [{"reason": "broken image", "count": 1, "ids": ["a2"]}]
    assert content["tokens"] == {
        "prompt_tokens": 40.0,
        "image_patches": 16.0,
        "image_tokens": 0.0,
        "kept_image_tokens": 0.0,
        "completion_tokens": 0.0,
    }
    assert content["measured"] == {
        "wall_seconds": 5.0,
        "images": 0,
        "images_per_second": 0.0,
        "questions_per_second": 0.8,
        "seconds_per_image": dict.fromkeys(("preprocess", "vision", "prefill", "decode")),
        "peak_memory_bytes": 10**9,
    }
    assert json.loads(json.dumps(content, allow_nan=False)) == content


class WithImages(FakeSuite):
    """Two images with two questions each."""

    def samples(self) -> list[Sample]:
        return [Sample(name, "?", (name[0],), name[0]) for name in self.right]


def test_seconds_are_those_of_an_image(suite: FakeSuite, tmp_path: Path) -> None:
    shared = WithImages(suite.right, suite.files)
    lines = [line(name, "yes", 8.0) for name in suite.right]
    measured = report(evaluation(shared, tmp_path, lines))["measured"]
    assert (measured["images"], measured["images_per_second"]) == (2, 0.25)
    assert measured["seconds_per_image"] == {
        "preprocess": 1.0,
        "vision": 2.0,
        "prefill": 4.0,
        "decode": 0.5,
    }


def test_the_time_of_all_runs_counts(suite: FakeSuite, tmp_path: Path) -> None:
    first = [line("a1", "yes", 3.0), line("a2", "yes", 4.5)]
    second = [line("b1", "no", 1.0), line("b2", "yes", 2.0)]
    content = report(evaluation(suite, tmp_path, first, second))
    assert content["measured"]["wall_seconds"] == 6.5
    assert content["scores"]["accuracy"]["value"] == 1.0
    assert [run["samples"] for run in content["runs"]] == [2, 2]


def test_a_limit_scores_what_was_asked_and_missing_ones_fail(
    suite: FakeSuite, tmp_path: Path
) -> None:
    content = report(
        evaluation(suite, tmp_path, [line("a1"), line("b1", "no")], runs=[{"limit": 3}])
    )
    assert content["scores"]["accuracy"] == {
        "value": pytest.approx(2 / 3),
        "count": 3,
        "interval": pytest.approx([0.20766, 0.93851], abs=1e-5),
    }
    assert content["samples"]["failed"] == 1
    assert content["failures"] == [{"reason": "not asked yet", "count": 1, "ids": ["a2"]}]


def test_shards_make_one_report(suite: FakeSuite, tmp_path: Path) -> None:
    runs = [{"shard": [1, 2]}, {"shard": [2, 2]}]
    one, two = [line("a1"), line("b1", "no")], [line("a2"), line("b2", None)]
    content = report(evaluation(suite, tmp_path, one, two, runs=runs))
    assert content["samples"] == {"total": 4, "asked": 4, "answered": 3, "failed": 1, "cut_off": 0}
    (tmp_path / "half").mkdir()
    half = report(evaluation(suite, tmp_path / "half", one, runs=runs[:1]))
    assert half["samples"]["asked"] == 2 and half["scores"]["accuracy"]["value"] == 1.0


def test_an_answer_stands_before_an_error_of_another_part(suite: FakeSuite, tmp_path: Path) -> None:
    parts = [[line("a1", None)], [line("a1", "yes")], [line("a1", None)]]
    assert evaluation(suite, tmp_path, *parts).answers == {"a1": "yes"}


def test_what_does_not_belong_together_is_refused(suite: FakeSuite, tmp_path: Path) -> None:
    found = evaluation(suite, tmp_path, [line("a1")])
    other = {**found.settings, "reduction": "tome-72"}
    write(tmp_path / "other", line("a2"), settings=other)
    parts = [(name, read_predictions(tmp_path / name)) for name in ("0.jsonl", "other")]
    with pytest.raises(EvaluationError, match="other settings than 0.jsonl: reduction none, now"):
        Evaluation.of(suite, parts)
    with pytest.raises(EvaluationError, match="predictions are of fake, not another"):
        Evaluation.of(replace(suite, name="another"), parts[:1])
    other_file = tmp_path / "others.txt"
    other_file.write_text("others")
    both = [*suite.files, other_file]
    with pytest.raises(EvaluationError, match="were asked from questions.txt, got 2 files"):
        Evaluation.of(replace(suite, files=both), parts[:1])
    _, part = parts[0]
    files = answer_settings(replace(suite, files=both), GenerationOptions())["files"]
    of_both = replace(part, settings={**part.settings, "files": files})
    Evaluation.of(replace(suite, files=both), [("both", of_both)])
    with pytest.raises(EvaluationError, match="others.txt differs .* from, questions.txt"):
        Evaluation.of(replace(suite, files=both[::-1]), [("both", of_both)])
    suite.files[0].write_text("changed")
    with pytest.raises(EvaluationError, match="questions.txt differs from the file that"):
        Evaluation.of(suite, parts[:1])


def test_a_record_holds_an_answer_or_the_reason_for_none() -> None:
    sample = Sample("7", "?")
    answer = Answer("a dog", "length", {"prompt_tokens": 3})
    found = record_of(Outcome(sample, answer, seconds={"decode": 0.12345678}), None)
    assert found == {
        "id": "7",
        "answer": "a dog",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 3},
        "seconds": {"decode": 0.123457},
        "peak_bytes": None,
    }
    reasons = {
        "x.png: broken": ImageError("x.png: broken\nand more"),
        "row 3": "row 3",
        "MemoryError": MemoryError(),
    }
    for reason, error in reasons.items():
        failed = record_of(Outcome(sample, error=error), None)
        assert (failed["error"], failed["finish_reason"]) == (reason, "error")
        assert "answer" not in failed


def test_the_table_says_it_in_lines(suite: FakeSuite, tmp_path: Path) -> None:
    shared = WithImages(suite.right, suite.files)
    lines = [line("a1"), line("a2", None), line("b1", "no", 2.0)]
    found = list(table(report(evaluation(shared, tmp_path, lines))))
    assert found[0].startswith("fake: model None")
    assert f"{'accuracy':<32}{'50.0%':>9}{'15.0% to 85.0%':>20}{4:>8}" in found
    assert f"{'longest':<32}{'3.000':>9}{'':>20}{2:>8}" in found
    assert "2 answered, 2 failed" in found
    assert "  1 x broken image (first: a2)" in found
    assert "1.50 questions/s, 1.00 images/s over 2 s" in found
    assert found[-1] == "peak memory 1.00 GB"


# ---- page ----------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would take from a page: its text, its elements, and whether they close."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_the_page_holds_all_it_shows(suite: FakeSuite, tmp_path: Path) -> None:
    shared = WithImages({**suite.right, "<script>alert(1)</script>": "yes"}, suite.files)
    lines = [line("a1"), line("a2", None), line("b1", "no", 2.0)]
    content = report(evaluation(shared, tmp_path, lines))
    content["settings"]["model"] = "<b>model</b> & co"
    text = page(content)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "b>model"} & set(reader.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "<b>model</b> & co" in reader.text and "alert(1)" in reader.text
    assert "40.0%" in reader.text  # two of five
    bars = [value for name, value in reader.attributes if name == "fill" and value == "#67b3c4"]
    assert len(bars) == 3  # a group each
    for words in ("accuracy", "broken image", "Settings", "vision 1", "image patches", "Runs"):
        assert words in reader.text


def test_the_page_of_nothing_is_a_page(suite: FakeSuite, tmp_path: Path) -> None:
    content = report(evaluation(replace(suite, right={}), tmp_path, []))
    assert content["scores"]["accuracy"] == {"value": None, "count": 0, "interval": None}
    reader = Reader()
    reader.feed(page(content))
    assert reader.open == [] and "Settings" in reader.text
    assert "-" in list(table(content))[3]


# ---- runs ----------------------------------------------------------------------------------------


def ask(model: Model) -> Ask:
    engine = Engine(model, GenerationOptions(max_new_tokens=3), batch_size=2, workers=1)
    return ask_here(engine, {"model": "random"})


def test_a_run_asks_what_is_missing(tiny_model: Model, tmp_path: Path) -> None:
    samples = [Sample(str(n), f"star {n}?") for n in range(6)] + [Sample("bad", "", error="no")]
    settings = {"suite": "fake"}
    heard: list[Any] = []

    def go(selection: Selection, **options: bool) -> list[str]:
        heard.clear()
        run(
            *(samples, ask(tiny_model), Files(tmp_path, **options), settings, selection),
            on_start=lambda *counts: heard.append(counts),
            on_record=lambda record: heard.append(record["id"]),
        )
        return heard[1:]

    assert go(Selection(limit=3)) == ["0", "1", "2"]
    assert heard[0] == (3, 0)
    assert go(Selection(shard=(2, 2)), reuse=True) == ["3", "5"]
    assert heard[0] == (3, 1)
    assert go(Selection(), reuse=True) == ["bad", "4"]  # what cannot be asked is there at once
    assert go(Selection(), reuse=True) == []
    assert go(Selection(), reuse=True, retry_errors=True) == ["bad"]
    found = read_predictions(tmp_path / predictions.FILE_NAME)
    for sample in samples[:6]:
        assert found.answers[sample.id] == tiny_model.generate(
            None, sample.prompt, max_new_tokens=3
        )
    assert [entry["samples"] for entry in found.runs] == [3, 2, 2, 0, 1]
    assert found.settings == {"model": "random", "suite": "fake"}
    assert found.runs[0]["threads"] == torch.get_num_threads()
    assert found.runs[0]["seconds"] == max(found.records[n]["elapsed"] for n in "012") > 0
    assert Selection.read(found.runs[1]) == Selection(None, (2, 2))


# A process that imports torch once, and for each line of its input forks a child that evaluates.
SERVER = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from PIL import Image
from helpers.models import CORPUS, TINY_TEXT, random_llava
from llava_lite.evaluation.engine import Engine
from llava_lite.evaluation.runner import Files, Selection, ask_here, run
from llava_lite.evaluation.suite import Sample
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.tokenizer import train_tokenizer

model = Model(random_llava(), train_tokenizer(CORPUS, TINY_TEXT.sampled_vocab_size))
image = Image.linear_gradient("L")
samples = [
    Sample(f"{{n:03}}", f"{{'star ' * (n % 5)}}{{n}}?", (image,), str(n // 3)) for n in range(90)
]
samples.insert(40, Sample("bad", "red", (b"nothing",)))
for line in sys.stdin:
    folder, reuse = line.split()
    pid = os.fork()
    if not pid:
        engine = Engine(model, GenerationOptions(max_new_tokens=3), batch_size=4, workers=1)
        files = Files(Path(folder), reuse == "reuse")
        run(samples, ask_here(engine, {{}}), files, {{"suite": "kill"}}, Selection())
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    script = SERVER.format(tests=str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    yield process
    process.kill()
    process.communicate()


def evaluate_in(server: subprocess.Popen[str], folder: Path, kill_after: int | None) -> int:
    """Run an evaluation; kill -9 it once its file has grown by so many bytes. Returns its exit
    code."""
    assert server.stdin is not None and server.stdout is not None
    path = folder / predictions.FILE_NAME
    before = path.stat().st_size if path.exists() else 0
    server.stdin.write(f"{folder} {'reuse' if path.exists() else 'new'}\n")
    server.stdin.flush()
    pid = int(server.stdout.readline())
    while kill_after is not None:
        if path.exists() and path.stat().st_size > before + kill_after:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    return int(server.stdout.readline())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_killed_twenty_times_the_report_is_that_of_a_clean_run(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Nothing written is lost, nothing asked twice, whenever the process is killed."""
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    assert evaluate_in(server, clean, None) == 0
    rng, seen = random.Random(0), {}
    for _ in range(20):
        assert evaluate_in(server, killed, rng.randrange(1000)) == -signal.SIGKILL
        found = read_predictions(killed / predictions.FILE_NAME).records
        assert found.items() >= seen.items()
        seen = found
    assert 0 < len(seen) < 91  # there was something left to do each time
    assert evaluate_in(server, killed, None) == 0
    lines = (killed / predictions.FILE_NAME).read_text().splitlines()
    names = [record["id"] for record in map(json.loads, lines) if "id" in record]
    assert len(names) == len(set(names)) == 91

    suite = FakeSuite({name: "star" for name in sorted(names)}, [], "kill")
    reports = []
    for folder in (clean, killed):
        found_file = read_predictions(folder / predictions.FILE_NAME)
        settings = {**found_file.settings, "files": []}
        content = report(Evaluation.of(suite, [("", replace(found_file, settings=settings))]))
        assert content["measured"].pop("wall_seconds") > 0
        for measured in ("measured", "runs"):
            del content[measured]
        reports.append(json.dumps(content))
    assert reports[0] == reports[1]
    assert '"failed": 1' in reports[0]
    answers = [read_predictions(f / predictions.FILE_NAME).answers for f in (clean, killed)]
    assert answers[0] == answers[1] and len(set(answers[0].values())) > 10


# ---- parts ---------------------------------------------------------------------------------------


def test_a_part_does_not_look_whole(suite: FakeSuite, tmp_path: Path) -> None:
    words = "only 2 of 4 samples of the data set"
    part = report(evaluation(suite, tmp_path, [line("a1"), line("a2")], runs=[{"limit": 2}]))
    assert (part["samples"]["total"], part["samples"]["asked"]) == (4, 2)
    assert words in list(table(part))[1] and words in page(part)
    (tmp_path / "all").mkdir()
    whole = report(evaluation(suite, tmp_path / "all", [line(name) for name in suite.right]))
    assert "no score of the whole" not in "\n".join(table(whole)) + page(whole)


def test_every_run_of_a_file_says_what_is_asked(suite: FakeSuite, tmp_path: Path) -> None:
    """A last run of less must not hide answers whose seconds count."""
    path = tmp_path / "0.jsonl"
    settings = evaluation(suite, tmp_path, []).settings
    for limit, names in ((3, ("a1", "a2", "b1")), (1, ())):
        with PredictionsWriter(path, reuse=True) as writer:
            writer.begin(settings, {**RUN, "limit": limit})
            for name in names:
                writer.append(line(name, "yes", 3.0))
    found = read_predictions(path)
    runs = [run for run in found.runs if run["limit"]]
    content = report(Evaluation.of(suite, [("0", replace(found, runs=runs))]))
    assert content["samples"]["asked"] == content["samples"]["answered"] == 3
    assert content["measured"]["questions_per_second"] == 1.0


class Counted(FakeSuite):
    """A suite whose settings depend on its samples."""

    def select(self, ids: Collection[str]) -> "FakeSuite":
        return replace(super().select(ids), settings={"of": len(ids)})


def test_the_settings_of_a_part_are_its_own(suite: FakeSuite, tmp_path: Path) -> None:
    counted = Counted(suite.right, suite.files, settings={"of": 4})
    content = report(evaluation(counted, tmp_path, [line("a1")], runs=[{"limit": 1}]))
    assert content["settings"]["suite_settings"] == {"of": 1}


def test_many_reasons_are_a_few(suite: FakeSuite, tmp_path: Path) -> None:
    many = replace(suite, right={str(n): "yes" for n in range(30)})
    lines = [{**line(str(n), None), "error": f"{max(n, 3)}.png: no file"} for n in range(30)]
    failures = report(evaluation(many, tmp_path, lines))["failures"]
    assert len(failures) == 10
    assert failures[0] == {"reason": "3.png: no file", "count": 4, "ids": ["0", "1", "2", "3"]}
    assert failures[-1] == {
        "reason": "other reasons",
        "count": 18,
        "ids": ["12", "13", "14", "15", "16"],
    }
