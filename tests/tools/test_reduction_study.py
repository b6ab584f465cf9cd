"""The study of token reduction on a random model: what is asked, kept, resumed, counted, drawn."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llava_lite
from helpers.models import TINY_TEXT, TINY_VISION, load_tool, random_llava
from helpers.peers import peer
from llava_lite import llama
from llava_lite.checkpoints.checkpoint import save_model
from llava_lite.config import LlavaConfig
from llava_lite.evaluation.scenes.accuracy import (
    FAMILIES,
    AskedScene,
    Tally,
    evaluate_scenes,
    fresh_scenes,
    overall,
)
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.fastv import choose
from llava_lite.generation.model import Model
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import DToMe, FastV, Reduction, ToMe

SOME = ["none", "tome-36-*", "dtome-72-logical", "*-k2-36", "hybrid-72-36-*"]
NAMES = ["none", "tome-36-vtu", "tome-36-logical", "tome-36-plain", "dtome-72-logical"]
NAMES += ["fastv-k2-36", "random-k2-36", "hybrid-72-36-vtu", "hybrid-72-36-logical"]


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    module = load_tool("reduction_study")
    module.CHUNK, module.MAX_NEW_TOKENS = 2, 4  # type: ignore[attr-defined]
    yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> str:
    """A random model with enough patches and blocks for all configurations, but only three decoder
    layers: nothing can be pruned in front of layer 3."""
    config = LlavaConfig(
        vision=replace(TINY_VISION, image_size=336, num_layers=6),
        text=replace(TINY_TEXT, num_layers=3, max_positions=1024),
        name="random",
    )
    path = tmp_path_factory.mktemp("study") / "model"
    save_model(random_llava(config), config, path, tiny_tokenizer)
    return str(path)


@pytest.fixture
def run(study: ModuleType, folder: str, tmp_path: Path) -> Any:
    """The tool's main with few scenes, in a folder of this test."""

    def run(*words: str, configs: Sequence[str] = ("none", "tome-36-vtu"), count: int = 3) -> int:
        fixed = ["--out", str(tmp_path), "--model", folder, "--n", str(count), "--seed", "5"]
        fixed += ["--calibration-scenes", "3", "--configs", *configs]
        code: int = study.main([*fixed, *words])
        return code

    return run


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "study.csv").open(encoding="utf-8", newline="") as file:
        return {row["configuration"]: row for row in csv.DictReader(file)}


# ---- configurations ------------------------------------------------------------------------------


def test_configurations(study: ModuleType) -> None:
    found = {one.name: one for one in study.configurations()}
    kinds = [one.kind for one in found.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"none": 1, "tome": 15, "dtome": 10, "fastv": 15, "random": 15, "hybrid": 8}
    }
    assert found["none"].reduction == Reduction()
    assert found["tome-93-plain"].reduction == Reduction(ToMe(keep=93), "plain")
    assert found["dtome-144-logical"].reduction == Reduction(DToMe(), "logical")
    for kind in ("fastv", "random"):
        assert found[f"{kind}-k1-18"].reduction == Reduction(fastv=FastV(keep=18, layer=1))
    wish = Reduction(ToMe(keep=144), "vtu", FastV(keep=72, layer=3))
    assert found["hybrid-144-72-vtu"].reduction == wish
    drawn = {key for panel in study.PANELS.values() for key in study.SERIES if key[0] in panel}
    assert drawn == set(study.SERIES)
    assert {one.series for one in found.values()} == drawn | {("none", "")}


def test_list(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--list", "--configs", *SOME, "hybrid-144-??-vtu"]) == 0
    expected = [*NAMES[:7], "hybrid-144-72-vtu", "hybrid-144-36-vtu", *NAMES[7:]]
    assert capsys.readouterr().out.split() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o", "--configs", "tomme-*"], "no configuration is called tomme-*"),
        (["--out", "o", "--seed", "30000"], "those that thresholds are found on"),
        (["--out", "o", "--n", "0"], "at least 1 scene"),
        ([], "needs --out"),
    ],
)
def test_wrong_usage(
    study: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        study.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# ---- a run ---------------------------------------------------------------------------------------


def answerable(model: Model, scenes: Iterable[AskedScene]) -> list[AskedScene]:
    """The scenes, with what a random model says as the right answer of every second question."""
    found = []
    for scene, asked in scenes:
        texts = [one.text for one in asked]
        said = model.generate([draw_scene(scene)] * len(asked), texts, max_new_tokens=4)
        known = [
            replace(one, answer=str(answer)) if index % 2 else one
            for index, (one, answer) in enumerate(zip(asked, said, strict=True))
        ]
        found.append((scene, known))
    return found


def test_run_counts_what_evaluation_counts(
    run: Any,
    study: ModuleType,
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All kinds in one run; K = 3 is left out with a word, for the model has three layers."""
    model = llava_lite.load(folder)
    scenes = answerable(model, fresh_scenes(3, 5))

    def same_scenes(count: int, seed: int, first: int = 0) -> Iterable[AskedScene]:
        return scenes[first : first + count] if seed == 5 else fresh_scenes(count, seed)

    monkeypatch.setattr(study, "fresh_scenes", same_scenes)
    assert run("--no-plots", configs=SOME) == 0
    out, err = capsys.readouterr()
    assert "hybrid-72-36-vtu: left out, FastV layer 3 must be in 1..2" in err
    names = NAMES[:-2]
    assert [line.split()[0] for line in out.splitlines()[1:]] == names
    rows = rows_of(tmp_path)
    assert list(rows) == names
    tokens = {name: float(row["image_tokens"]) for name, row in rows.items()}
    kept = {name: float(row["kept_tokens"]) for name, row in rows.items()}
    assert (tokens["none"], tokens["tome-36-plain"], tokens["fastv-k2-36"]) == (576, 36, 576)
    assert (kept["none"], kept["tome-36-plain"], kept["random-k2-36"]) == (576, 36, 36)
    thresholds = json.loads((tmp_path / "settings.json").read_text())["thresholds"]
    assert list(thresholds) == ["72"] and len(thresholds["72"]) == model.config.vision.num_blocks
    assert 0.3 < float(rows["none"]["accuracy"]) < 0.7
    assert len({row["accuracy"] for row in rows.values()}) > 3
    wishes = {
        "none": None,
        "tome-36-logical": Reduction(ToMe(keep=36), "logical"),
        "dtome-72-logical": Reduction(DToMe(tuple(thresholds["72"])), "logical"),
        "fastv-k2-36": Reduction(fastv=FastV(keep=36, layer=2)),
    }
    for name, wish in wishes.items():
        tallies = evaluate_scenes(model, scenes, 4, reduction=wish)
        for family, tally in tallies.items():
            assert int(rows[name][f"{family}_asked"]) == tally.asked
            assert float(rows[name][f"{family}_accuracy"]) == pytest.approx(
                tally.accuracy, abs=1e-4
            )
        assert int(rows[name]["asked"]) == overall(tallies).asked
    encoded = [
        model.encode(draw_scene(scene), reduction=wishes["dtome-72-logical"]) for scene, _ in scenes
    ]
    mean = sum(len(image.image_embeds) for image in encoded) / 3
    assert tokens["dtome-72-logical"] == pytest.approx(mean, abs=1e-4) and mean != 72


def test_columns(run: Any, study: ModuleType, tmp_path: Path) -> None:
    assert run("--no-plots") == 0
    [none, merged] = rows_of(tmp_path).values()
    first = "configuration kind positions layer target image_tokens kept_tokens scenes asked"
    first += " accuracy low high macro difference difference_low difference_high seconds time_ratio"
    families = [f"{name}_{x}" for name in FAMILIES for x in ("asked", "accuracy", "low", "high")]
    assert list(none) == [*first.split(), *families]
    assert (merged["kind"], merged["positions"], merged["target"]) == ("tome", "vtu", "36")
    assert (none["seconds"], none["layer"], none["scenes"]) == ("", "", "3")
    assert [none[name] for name in ("difference", "difference_low", "difference_high")] == [
        *("0.0", "0.0", "0.0")
    ]
    content = json.loads((tmp_path / "study.json").read_text())
    assert [row["configuration"] for row in content["rows"]] == ["none", "tome-36-vtu"]
    assert content["settings"]["seed"] == 5 and len(content["settings"]["weights_sha256"]) == 64


def test_right_answers_are_counted_by_family(study: ModuleType) -> None:
    one = study.configurations()[1]
    own = [
        {"scenes": 2, "image_tokens": 8, "kept_tokens": 6, "right": {"count": "10", "where": "0"}},
        {"scenes": 1, "image_tokens": 1, "kept_tokens": 1, "right": {"count": "1", "digit": "1"}},
    ]
    reference = [
        {**own[0], "right": {"count": "11", "where": "0"}},
        {**own[1], "right": {"count": "0", "digit": "0"}},
    ]
    row = study.summary(one, own, reference, {"seconds": 0.5, "ratio": 0.25})
    assert (row["asked"], row["accuracy"]) == (5, 3 / 5)
    assert (row["low"], row["high"]) == Tally(3, 5).interval()
    assert row["macro"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert (row["count_asked"], row["count_accuracy"], row["digit_accuracy"]) == (3, 2 / 3, 1)
    assert (row["describe_asked"], row["describe_accuracy"]) == (0, None)
    assert (row["image_tokens"], row["kept_tokens"], row["scenes"]) == (3, 7 / 3, 3)
    assert (row["seconds"], row["time_ratio"]) == (0.5, 0.25)
    assert row["difference"] == pytest.approx(1 / 5)


def test_paired_difference(study: ModuleType) -> None:
    assert study.paired_difference("0110", "0110") == (0, 0, 0)
    middle, low, high = study.paired_difference("1" * 30 + "0" * 70, "0" * 90 + "1" * 10)
    assert middle == pytest.approx(0.2)
    # 30 better, 10 worse: variance of a mean of +1 and -1 (0.4 - 0.04) / 100.
    assert (low, high) == pytest.approx((0.2 - 1.95996 * 0.06, 0.2 + 1.95996 * 0.06), abs=1e-5)


# ---- the control ---------------------------------------------------------------------------------


@pytest.fixture
def pruned(study: ModuleType, tiny_model: Model) -> Any:
    """Kept tokens and answers of one question about some scenes, at any batch size."""

    def ask(seed: list[int] | None, batch_size: int = 8) -> list[tuple[tuple[int, ...], str]]:
        images = [draw_scene(scene) for scene, _ in fresh_scenes(4, 9)]
        wish = Reduction(fastv=FastV(keep=5, layer=1))
        control = study.prune_at_random(seed) if seed else study.nullcontext()
        with control:
            answers = tiny_model.generate(
                images,
                ["What color is the star?"] * 4,
                max_new_tokens=3,
                reduction=wish,
                trace=True,
                batch_size=batch_size,
            )
        return [(answer.trace.images[0].kept, str(answer)) for answer in answers if answer.trace]

    return ask


def test_the_control_drops_as_many_by_chance(pruned: Any) -> None:
    fastv, control = pruned(None), pruned([1])
    assert [len(kept) for kept, _ in control] == [len(kept) for kept, _ in fastv] == [5] * 4
    assert all(list(kept) == sorted(set(kept)) for kept, _ in control)
    assert all(one[0] != other[0] for one, other in zip(fastv, control, strict=True))
    assert len({kept for kept, _ in control}) == 4  # anew for every question
    assert control == pruned([1]) == pruned([1], batch_size=1) == pruned([1], batch_size=3)
    assert control != pruned([2])
    assert llama.choose is choose
    assert pruned(None) == fastv


def test_the_control_prefers_no_token(study: ModuleType) -> None:
    """Every image token stays as often as any other, and words always."""
    scores = torch.linspace(0, 1, 20)
    counts = torch.zeros(20)
    with study.prune_at_random([3]):
        for _ in range(2000):
            kept = llama.choose(scores, [(4, 16)], [3]).kept_indices
            counts[kept] += 1
    assert (counts[[0, 1, 2, 3, 16, 17, 18, 19]] == 2000).all()
    # 500 expected of each of 12; the standard deviation is 19.
    assert (counts[4:16] - 500).abs().max() < 85


def test_fastv_and_its_control_are_asked_the_same(run: Any, tmp_path: Path) -> None:
    assert run("--no-plots", configs=["*-k1-18"], count=2) == 0
    fastv, control = lines_of(tmp_path)
    shared = ("first", "scenes", "image_tokens", "kept_tokens")
    assert {name: fastv[name] for name in shared} == {name: control[name] for name in shared}
    for family, marks in fastv["right"].items():
        assert len(control["right"][family]) == len(marks)


# ---- resuming ------------------------------------------------------------------------------------


def test_what_is_answered_is_not_asked_again(
    run: Any, study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unbroken run's lines; after a crash in the middle of a line the rest of them."""
    configs = ["none", "random-k2-36", "dtome-36-vtu"]
    assert run("--no-plots", configs=configs, count=5) == 0
    whole = (tmp_path / "answers.jsonl").read_bytes()
    rows = rows_of(tmp_path)
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 9
    assert sorted({(one["first"], one["scenes"]) for one in lines_of(tmp_path)}) == [
        *((0, 2), (2, 2), (4, 1))
    ]
    cut = b"".join(lines[:4]) + lines[4][:30]
    (tmp_path / "answers.jsonl").write_bytes(cut)
    (tmp_path / "study.csv").unlink()
    monkeypatch.setattr(study, "find_thresholds", None)  # those of the first run are kept
    assert run("--no-plots", configs=configs, count=5) == 0
    after = (tmp_path / "answers.jsonl").read_bytes()
    assert after.startswith(cut + b"\n")
    assert sorted(after[len(cut) + 1 :].splitlines()) == sorted(line.strip() for line in lines[4:])
    assert rows_of(tmp_path) == rows
    monkeypatch.setattr(study, "answer_questions", None)  # nothing is left to ask
    assert run("--no-plots", configs=configs, count=5) == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == after


def test_more_scenes_and_configurations_are_added(run: Any, tmp_path: Path) -> None:
    assert run("--no-plots", configs=["none"], count=3) == 0
    before = lines_of(tmp_path)
    assert run("--no-plots", configs=["none"], count=6) == 0
    added = lines_of(tmp_path)[len(before) :]
    assert [(line["first"], line["scenes"]) for line in added] == [(2, 2), (4, 2)]
    assert rows_of(tmp_path)["none"]["scenes"] == "6"
    # What has fewer scenes than the others is not set beside them.
    assert run("--no-plots", configs=["tome-36-vtu"], count=2) == 0
    assert list(rows_of(tmp_path)) == ["none", "tome-36-vtu"]
    assert run("--no-plots", configs=["none"], count=6) == 0
    assert list(rows_of(tmp_path)) == ["none"]


def test_a_model_that_is_not_there_is_one_line(study: ModuleType, tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--model", str(tmp_path / "nowhere"), "--no-plots"]
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        study.main(command)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--seed", "6"], "seed"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--renderer", "smooth"], "renderer"),
        (["--calibration-scenes", "4"], "calibration_scenes"),
    ],
)
def test_another_study_needs_another_folder(
    run: Any, tmp_path: Path, words: list[str], name: str
) -> None:
    assert run("--no-plots", configs=["tome-36-logical"], count=1) == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=f"settings.json: that study has another {name} "):
        run("--no-plots", *words, configs=["tome-36-logical"], count=1)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_sixteen_bits_need_the_same_batches(run: Any, tmp_path: Path) -> None:
    """There a batch may change an answer; in float32 it changes nothing."""
    assert run("--no-plots", configs=["none"], count=1) == 0
    assert run("--no-plots", "--batch-size", "3", configs=["none"], count=1) == 0
    words = ("--no-plots", "--out", str(tmp_path / "half"), "--dtype", "bfloat16")
    assert run(*words, configs=["none"], count=1) == 0
    with pytest.raises(SystemExit, match=r"half/settings.json: that study has another batch_size "):
        run(*words, "--batch-size", "3", configs=["none"], count=1)


# ---- times ---------------------------------------------------------------------------------------


def test_times_are_measured_in_turns_and_apart(
    run: Any,
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Reduction] = []
    ask_once = study.ask_once

    def watched(model: Model, images: Sequence[Image.Image], reduction: Reduction) -> None:
        asked.append(reduction)
        ask_once(model, images, reduction)

    monkeypatch.setattr(study, "ask_once", watched)
    configs = ["tome-36-plain", "*-k2-18"]
    assert run("--no-plots", "--time", "--repeat", "2", configs=configs) == 0
    content = json.loads((tmp_path / "times.json").read_text())
    measured = content["measurements"]
    assert list(measured) == ["none", "tome-36-plain", "fastv-k2-18"]  # and no control
    assert len(asked) == 9 and asked[:3] == asked[3:6] and asked[0] == Reduction()
    assert measured["none"]["ratio"] == 1
    for entry in measured.values():
        assert entry["ratio"] == entry["seconds"] / measured["none"]["seconds"] > 0
        low, high = entry["quartiles"]
        assert 0 < low <= entry["seconds"] <= high
    assert content["machine"]["torch"]
    assert {entry["repeat"] for entry in measured.values()} == {2}
    assert not (tmp_path / "answers.jsonl").exists() and not (tmp_path / "study.csv").exists()
    assert "no configuration has all " in capsys.readouterr().out
    assert run("--no-plots", "--time", "--repeat", "1", configs=["tome-36-logical"]) == 0
    more = json.loads((tmp_path / "times.json").read_text())["measurements"]
    assert sorted(more) == sorted([*measured, "tome-36-logical"])
    assert more["tome-36-plain"] == measured["tome-36-plain"]
    assert more["tome-36-logical"]["repeat"] == more["none"]["repeat"] == 1
    other = {"machine": None, "dtype": "float32", "measurements": {"tome-36-plain": 1}}
    assert study.merge_times(content, other) == study.merge_times(content, {}) == content
    assert run("--no-plots", configs=["none", *configs], count=2) == 0
    rows = rows_of(tmp_path)
    assert float(rows["fastv-k2-18"]["time_ratio"]) > 0 and rows["none"]["time_ratio"] == "1.0"
    assert rows["random-k2-18"]["time_ratio"] == ""


# ---- plots ---------------------------------------------------------------------------------------


def test_without_matplotlib_the_run_ends_before_it_starts(
    run: Any, study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"plots need matplotlib: pip install 'llava-lite\[viz\]'"):
        run()
    assert not list(tmp_path.iterdir())
    assert run("--no-plots", configs=["none"], count=1) == 0
    assert not list(tmp_path.glob("*.png"))


def test_plots(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything, with made-up figures: three small pictures, in the colors they were drawn."""
    peer("matplotlib")
    every = study.configurations()
    rows = [made_up_row(study, one, number) for number, one in enumerate(every)]
    facts = {"model": "random", "questions": 90, "scenes": 10, "timed_on": "a machine"}
    drawn: dict[str, Image.Image] = {}
    compressed = study.compress_png

    def spy(path: Path) -> Path:
        with Image.open(path) as image:
            drawn[path.name] = image.convert("RGB")
        written: Path = compressed(path)
        return written

    monkeypatch.setattr(study, "compress_png", spy)
    paths = study.draw_plots(rows, every, facts, tmp_path)
    assert sorted(path.name for path in paths) == [
        *("accuracy_time.png", "accuracy_tokens.png", "families.png")
    ]
    for path in paths:
        assert path.stat().st_size <= 150_000
        with Image.open(path) as image:
            assert min(image.size) >= 500
            shown = np.array(image.convert("RGB")).astype(int)
        wanted = np.array(drawn[path.name])
        assert np.abs(shown - wanted).mean() < 1
        strong = shown.max(-1) - shown.min(-1) > 60  # lines, no text or grid
        assert 0.005 < strong.mean() < 0.2
        series = study.FAMILY_SERIES if path.name == "families.png" else study.SERIES
        colors = {study.SERIES[key][1] for key in series} - {"black"}
        for color in colors:
            rgb = [*bytes.fromhex(color.removeprefix("#"))]
            there = (wanted == rgb).all(-1)
            assert there.sum() > 20 and np.abs(shown[there] - rgb).max() <= 8, color


@pytest.mark.parametrize("plot", ["token_plot", "time_plot", "family_plot"])
def test_plots_show_every_line(study: ModuleType, plot: str) -> None:
    """With all its points, each where its row says, but for the small shifts sideways."""
    pyplot = peer("matplotlib.pyplot")
    every = study.configurations()
    rows = [made_up_row(study, one, number) for number, one in enumerate(every)]
    by_series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one, row in zip(every, rows, strict=True):
        by_series.setdefault(one.series, []).append(row)
    figure = getattr(study, plot)(by_series, {"model": "m", "questions": 90, "scenes": 10})
    wanted = {
        "token_plot": [key for key in study.SERIES if key[0] != "none"],
        "time_plot": [key for key in study.SERIES if key[0] != "random"],
        "family_plot": list(study.FAMILY_SERIES) * len(FAMILIES),
    }[plot]
    x = "time_ratio" if plot == "time_plot" else "kept_tokens"
    lines = [bars for axes in figure.axes for bars in axes.containers]
    assert [bars.get_label() for bars in lines] == [study.SERIES[key][0] for key in wanted]
    family_of = [family for family in FAMILIES for _ in study.FAMILY_SERIES]
    for number, (key, bars) in enumerate(zip(wanted, lines, strict=True)):
        prefix = f"{family_of[number]}_" if plot == "family_plot" else ""
        heights = [100 * row[f"{prefix}accuracy"] for row in by_series[key]]
        places, drawn = bars.lines[0].get_data()
        assert list(drawn) == heights and len(heights) >= 2
        for place, row in zip(places, by_series[key], strict=True):
            assert row[x] <= place <= 1.1 * row[x]
    pyplot.close(figure)


def made_up_row(study: ModuleType, one: Any, number: int) -> dict[str, Any]:
    marks = {family: "1" * (number % 9) + "0" * (9 - number % 9) for family in FAMILIES}
    line = {"scenes": 10, "image_tokens": 10 * one.target, "kept_tokens": 10 * one.target}
    time = {} if one.kind == "random" else {"seconds": 0.1, "ratio": 0.2 + number / 80}
    row: dict[str, Any] = study.summary(one, [{**line, "right": marks}], None, time)
    return row


def test_plots_of_an_unfinished_study(run: Any, tmp_path: Path) -> None:
    """Few configurations, no times, families that were hardly asked."""
    peer("matplotlib")
    assert run(count=1) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        *("accuracy_tokens.png", "families.png")
    ]
