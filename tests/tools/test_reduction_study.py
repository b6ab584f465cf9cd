"""The study of token reduction on a random model: what is asked, kept, resumed, counted, drawn."""

import csv
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

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
from llava_lite.evaluation.scenes.questions import Question
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.fastv import ImageRows, choose
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.reduction import REDUCTIONS, DToMe, FastV, Reduction, ToMe

SOME = ["none", "tome-36-*", "dtome-72-logical", "*-k2-36*", "random-144-*", "hybrid-72-36-*"]
SOME += ["stages-36-*"]
NAMES = [*("none", "tome-36-folded", "tome-36-vtu", "tome-36-logical", "tome-36-plain")]
NAMES += ["dtome-72-logical", "fastv-k2-36", "fastv-k2-36-folded", "random-144-k1-36-folded"]
RESTS = ("folded", "logical", "folded-sum", "vtu", "dropped", "dropped-mean")
NAMES += [f"hybrid-72-36-{rest}" for rest in RESTS]
NAMES += [f"stages-36-18-9-{rest}" for rest in ("folded", "dropped", "dropped-mean")]


FACTS = {"model": "random", "questions": 90, "scenes": 10, "timed_on": "a machine"}


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    module = load_tool("reduction_study")
    module.CHUNK, module.MAX_NEW_TOKENS = 2, 4  # type: ignore[attr-defined]
    yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> str:
    """A random model with enough patches, blocks and decoder layers for all configurations."""
    return save_random(tmp_path_factory.mktemp("study") / "model", 4, tiny_tokenizer)


def save_random(path: Path, num_layers: int, tokenizer: Tokenizer) -> str:
    config = LlavaConfig(
        vision=replace(TINY_VISION, image_size=336, num_layers=6),
        text=replace(TINY_TEXT, num_layers=num_layers, max_positions=1024),
        name="random",
    )
    save_model(random_llava(config), config, path, tokenizer)
    return str(path)


@pytest.fixture
def run(study: ModuleType, folder: str, tmp_path: Path) -> Any:
    """The tool's main with few scenes, in a folder of this test."""

    def run(*words: str, configs: Sequence[str] = ("none", "tome-36-vtu"), count: int = 3) -> int:
        fixed = ["--out", str(tmp_path), "--model", folder, "--n", str(count), "--seed", "5"]
        fixed += ["--calibration-scenes", "3", "--kl-scenes", "0", "--configs", *configs]
        code: int = study.main([*fixed, *words])
        return code

    return run


def lines_of(folder: Path, name: str = "answers") -> list[dict[str, Any]]:
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    return {row["configuration"]: row for row in read_csv(folder / "study.csv")}


# ---- configurations ------------------------------------------------------------------------------


def test_configurations(study: ModuleType) -> None:
    found = {one.name: one for one in study.configurations()}
    kinds = [one.kind for one in found.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"none": 1, "tome": 17, "dtome": 3, "fastv": 11, "random": 2, "hybrid": 32, "stages": 16}
    }
    fold = partial(FastV, rest="fold")
    wishes = {
        "none": Reduction(),
        "tome-72-plain": Reduction(ToMe(keep=72), "plain"),
        "dtome-72-folded": Reduction(DToMe(), "folded"),
        "fastv-k1-72": Reduction(fastv=FastV(keep=72, layer=1)),
        "fastv-k3-288": REDUCTIONS["fastv-50"],
        "fastv-k3-36-folded": Reduction(None, "folded", fold(keep=36, layer=3)),
        "random-k3-36": Reduction(fastv=FastV(keep=36)),
        "hybrid-144-72-logical": Reduction(ToMe(keep=144), "logical", FastV(keep=72)),
        "hybrid-72-36-vtu": Reduction(ToMe(keep=72), "vtu", FastV(keep=36)),
        "hybrid-72-36-dropped": Reduction(ToMe(keep=72), "folded", FastV(keep=36)),
        "hybrid-72-36-dropped-mean": Reduction(
            ToMe(keep=72), "folded", FastV(keep=36, score="mean")
        ),
        "hybrid-72-36-folded-sum": Reduction(
            ToMe(keep=72), "folded", FastV(keep=36, rest="fold", score="sum")
        ),
        "stages-576-144-36-folded": Reduction(None, "folded", fold(stages=((1, 144), (3, 36)))),
        "stages-72-18-9-dropped": Reduction(
            ToMe(keep=72), "folded", FastV(stages=((1, 18), (3, 9)))
        ),
    }
    assert {name: found[name].reduction for name in wishes} == wishes
    control, choice = found["random-144-k1-36-folded"], found["hybrid-144-k1-36-folded"]
    assert control.reduction == choice.reduction
    assert [REDUCTIONS[name] for name in ("folded-144-36", "folded-72-36-18", "hybrid-72-36")] == [
        found[name].reduction
        for name in ("stages-144-48-36-folded", "stages-72-36-18-folded", "hybrid-72-36-logical")
    ]


def test_places_in_plots(study: ModuleType) -> None:
    """The panel, the color and the label of each kind."""
    found = {one.name: (one.panel, one.way, one.path) for one in study.configurations()}
    expected = {
        "none": ("", "none", ""),
        "tome-18-logical": ("merged", "logical", "18"),
        "dtome-72-vtu": ("merged", "vtu", "72"),
        "fastv-k2-36": ("pruned", "dropped", "36, K2"),
        "fastv-k1-72-folded": ("pruned", "folded", "72, K1"),
        "random-k3-36": ("pruned", "random", "36, K3"),
        "random-144-k1-36-folded": ("both", "random", "144→36, K1"),
        "hybrid-72-36-folded": ("both", "folded", "72→36, K3"),
        "hybrid-72-36-folded-sum": ("both", "summed", "72→36, K3"),
        "hybrid-72-36-vtu": ("both", "vtu", "72→36, K3"),
        "hybrid-72-36-logical": ("both", "logical", "72→36, K3"),
        "hybrid-72-36-dropped": ("both", "dropped", "72→36, K3"),
        "stages-576-144-72-36-dropped": ("pruned", "dropped", "144→72→36"),
        "stages-72-18-9-folded": ("both", "folded", "72→18→9"),
    }
    assert {name: found[name] for name in expected} == expected
    assert {panel for panel, _, _ in found.values()} == {"", *study.PANELS}
    assert {way for _, way, _ in found.values()} == set(study.WAYS)
    assert len(set(found.values())) == len(found) - 3  # a hollow marker tells DToMe from ToMe


def test_list(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--list", "--configs", *SOME, "hybrid-144-??-folded"]) == 0
    first = NAMES.index("hybrid-72-36-folded")
    expected = [*NAMES[:first], "hybrid-144-72-folded", "hybrid-144-36-folded", *NAMES[first:]]
    assert capsys.readouterr().out.split() == expected


def test_claims(study: ModuleType) -> None:
    """Each treatment once against folding, and both controls."""
    names = [one.name for one in study.configurations()]
    found = list(study.claims(names))
    assert len(set(found)) == len(found) == 56
    expected = {(f"tome-{n}-folded", f"tome-{n}-vtu") for n in (144, 72, 36, 18, 9)}
    expected |= {("tome-72-folded", "tome-72-logical"), ("tome-72-folded", "tome-72-plain")}
    for name in ("k1-72", "k1-36", "k2-36", "k3-72", "k3-36"):
        expected.add((f"fastv-{name}-folded", f"fastv-{name}"))
    for name in ("144-k1-36", "72-36", "36-18"):
        rests = ("logical", "vtu", "dropped", "dropped-mean", "folded-sum")
        expected |= {(f"hybrid-{name}-folded", f"hybrid-{name}-{rest}") for rest in rests}
        expected.add((f"hybrid-{name}-folded-sum", f"hybrid-{name}-dropped"))
    expected.add(("hybrid-36-9-folded", "hybrid-36-9-logical"))
    for name in ("576-144-72-36", "576-144-36", "144-48-36", "72-36-18", "72-18-9", "36-18-9"):
        expected.add((f"stages-{name}-folded", f"stages-{name}-dropped"))
    for name in ("144-48-36", "72-36-18", "72-18-9", "36-18-9"):
        expected.add((f"stages-{name}-folded", f"stages-{name}-dropped-mean"))
    expected.add(("fastv-k3-36", "random-k3-36"))
    expected.add(("hybrid-144-k1-36-folded", "random-144-k1-36-folded"))
    assert expected <= set(found)
    assert list(study.claims(["none", "tome-72-vtu", "tome-72-folded"])) == [
        ("tome-72-folded", "tome-72-vtu")
    ]


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
    """All kinds in one run."""
    model = llava_lite.load(folder)
    scenes = answerable(model, fresh_scenes(3, 5))

    def same_scenes(count: int, seed: int, first: int = 0) -> Iterable[AskedScene]:
        return scenes[first : first + count] if seed == 5 else fresh_scenes(count, seed)

    monkeypatch.setattr(study, "fresh_scenes", same_scenes)
    assert run("--no-plots", configs=SOME) == 0
    table, compared = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == NAMES
    pairs = read_csv(tmp_path / "pairs.csv")
    assert [tuple(line.split()[:2]) for line in compared.splitlines()[1:]] == [
        (pair["first"], pair["second"]) for pair in pairs
    ]
    rows = rows_of(tmp_path)
    assert list(rows) == NAMES
    tokens = {name: float(row["image_tokens"]) for name, row in rows.items()}
    kept = {name: float(row["kept_tokens"]) for name, row in rows.items()}
    assert (tokens["none"], tokens["tome-36-plain"], tokens["fastv-k2-36"]) == (576, 36, 576)
    assert (kept["none"], kept["tome-36-plain"], kept["fastv-k2-36-folded"]) == (576, 36, 36)
    assert (tokens["stages-36-18-9-folded"], kept["stages-36-18-9-folded"]) == (36, 9)
    thresholds = json.loads((tmp_path / "settings.json").read_text())["thresholds"]
    assert list(thresholds) == ["72"] and len(thresholds["72"]) == model.config.vision.num_blocks
    assert 0.3 < float(rows["none"]["accuracy"]) < 0.7
    assert len({row["accuracy"] for row in rows.values()}) > 3
    wishes = {
        "none": None,
        "tome-36-logical": Reduction(ToMe(keep=36), "logical"),
        "dtome-72-logical": Reduction(DToMe(tuple(thresholds["72"])), "logical"),
        "fastv-k2-36": Reduction(fastv=FastV(keep=36, layer=2)),
        "hybrid-72-36-folded": REDUCTIONS["folded-72-36"],
        "stages-36-18-9-folded": Reduction(
            ToMe(keep=36), "folded", FastV(stages=((1, 18), (3, 9)), rest="fold")
        ),
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


def test_too_few_layers(
    run: Any, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model cannot do is left out with a word."""
    shallow = save_random(tmp_path / "shallow", 3, tiny_tokenizer)
    configs = ["fastv-k2-36", "fastv-k3-36", "stages-36-*-folded"]
    assert run("--no-plots", "--model", shallow, configs=configs, count=1) == 0
    errors = capsys.readouterr().err
    assert "fastv-k3-36: left out, FastV layer 3 must be in 1..2" in errors
    assert "stages-36-18-9-folded: left out, FastV layer 3 must be in 1..2" in errors
    assert list(rows_of(tmp_path)) == ["fastv-k2-36"]


def test_columns(run: Any, study: ModuleType, tmp_path: Path) -> None:
    assert run("--no-plots", configs=["none", "tome-36-vtu", "tome-36-folded", "*-k2-36*"]) == 0
    rows = rows_of(tmp_path)
    none, folded, vtu, dropped, kept = rows.values()
    first = "configuration kind positions layer rest target image_tokens kept_tokens scenes asked"
    first += " accuracy low high macro difference difference_low difference_high"
    first += " kl_asked kl kl_low kl_high decoder_flops kv_bytes seconds time_ratio"
    families = [f"{name}_{x}" for name in FAMILIES for x in ("asked", "accuracy", "low", "high")]
    assert list(none) == [*first.split(), *families]
    assert (vtu["kind"], vtu["positions"], vtu["target"]) == ("tome", "vtu", "36")
    assert (none["seconds"], none["layer"], none["scenes"]) == ("", "", "3")
    assert [none[name] for name in ("difference", "difference_low", "difference_high")] == [
        *("0.0", "0.0", "0.0")
    ]
    assert [(row["positions"], row["layer"], row["rest"]) for row in (folded, dropped, kept)] == [
        *(("folded", "", ""), ("", "2", "drop"), ("folded", "2", "fold"))
    ]
    content = json.loads((tmp_path / "study.json").read_text())
    assert [row["configuration"] for row in content["rows"]] == list(rows)
    assert content["settings"]["seed"] == 5 and len(content["settings"]["weights_sha256"]) == 64
    pairs = read_csv(tmp_path / "pairs.csv")
    columns = "first second asked only_first_right only_second_right difference low high p"
    assert list(pairs[0]) == columns.split()
    assert [(pair["first"], pair["second"]) for pair in pairs] == [
        ("tome-36-folded", "tome-36-vtu"),
        ("fastv-k2-36-folded", "fastv-k2-36"),
    ]
    assert [pair["first"] for pair in content["pairs"]] == [pair["first"] for pair in pairs]
    assert {pair["asked"] for pair in pairs} == {none["asked"]}


def test_layers_and_positions(study: ModuleType) -> None:
    """Layers of all stages. Without merging and folding, all positions are the same."""
    line = {"scenes": 1, "image_tokens": 1, "kept_tokens": 1, "right": {"count": "1"}}
    rows = {one.name: study.summary(one, [line], []) for one in study.configurations()}
    expected = {
        "tome-72-logical": ("logical", "", ""),
        "stages-576-144-72-36-folded": ("folded", "1+2+3", "fold"),
        "stages-576-144-36-dropped": ("", "1+3", "drop"),
        "stages-144-48-36-dropped": ("folded", "1+3", "drop"),
        "hybrid-144-k1-36-vtu": ("vtu", "1", "drop"),
        "fastv-k3-72-folded": ("folded", "3", "fold"),
    }
    for name, found in expected.items():
        row = rows[name]
        assert (row["positions"], row["layer"], row["rest"]) == found
        assert row["difference"] is None


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
    row = study.summary(one, own, reference) | study.family_columns(own)
    assert (row["asked"], row["accuracy"]) == (5, 3 / 5)
    assert (row["low"], row["high"]) == Tally(3, 5).interval()
    assert row["macro"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert (row["count_asked"], row["count_accuracy"], row["digit_accuracy"]) == (3, 2 / 3, 1)
    assert (row["describe_asked"], row["describe_accuracy"]) == (0, None)
    assert (row["image_tokens"], row["kept_tokens"], row["scenes"]) == (3, 7 / 3, 3)
    assert row["difference"] == pytest.approx(1 / 5)


# ---- pairs ---------------------------------------------------------------------------------------


def test_paired_difference(study: ModuleType) -> None:
    assert study.paired_difference("0110", "0110") == (0, 0, 0)
    middle, low, high = study.paired_difference("1" * 30 + "0" * 70, "0" * 90 + "1" * 10)
    assert middle == pytest.approx(0.2)
    # 30 better, 10 worse: variance of a mean of +1 and -1 (0.4 - 0.04) / 100.
    assert (low, high) == pytest.approx((0.2 - 1.95996 * 0.06, 0.2 + 1.95996 * 0.06), abs=1e-5)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 0, 2 / 32),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (4, 5, 1),
        (5, 5, 1),
    ],
)
def test_mcnemar(study: ModuleType, wins: int, losses: int, p: float) -> None:
    assert study.mcnemar(wins, losses) == p


def test_mcnemar_of_many_pairs(study: ModuleType) -> None:
    """As by the normal distribution, with the continuity correction."""
    normal = statistics.NormalDist(0, 1)
    expected = 2 * normal.cdf(-(abs(1070 - 930) - 1) / math.sqrt(2000))
    assert study.mcnemar(1070, 930) == pytest.approx(expected, rel=0.01)


def test_pairs_are_of_the_same_questions(study: ModuleType) -> None:
    """Chunks may list the families in any order."""
    lines = {
        "a": [{"right": {"count": "110", "where": "1"}}, {"right": {"where": "0", "count": "1"}}],
        "b": [{"right": {"where": "0", "count": "101"}}, {"right": {"where": "0", "count": "0"}}],
    }
    row = study.compare("a", "b", lines)
    assert (row["first"], row["second"], row["asked"]) == ("a", "b", 6)
    assert (row["only_first_right"], row["only_second_right"]) == (3, 1)
    assert row["difference"] == pytest.approx(2 / 6)
    # Variance of a mean of +1, +1, +1, -1, 0, 0.
    half = 1.95996 * math.sqrt((4 / 6 - (2 / 6) ** 2) / 6)
    assert (row["low"], row["high"]) == pytest.approx((2 / 6 - half, 2 / 6 + half), abs=1e-5)
    assert row["p"] == 2 * 5 / 16


# ---- distances and costs -------------------------------------------------------------------------


def test_distances_and_costs(run: Any, study: ModuleType, folder: str, tmp_path: Path) -> None:
    """Of every question as a slow computation finds them; costs as traces count them."""
    model = llava_lite.load(folder)
    configs = ["none", "tome-36-folded", "tome-36-vtu", "fastv-k2-36-folded", "stages-36-*-folded"]
    assert run("--no-plots", "--kl-scenes", "1", configs=configs, count=2) == 0
    rows = rows_of(tmp_path)
    lines = {line["configuration"]: line for line in lines_of(tmp_path, "distances")}
    assert list(lines) == list(rows) and {line["scenes"] for line in lines.values()} == {1}
    [(scene, asked)] = fresh_scenes(1, 5)
    image = draw_scene(scene)
    texts = [question.text for question in asked]
    wishes = {one.name: one.reduction for one in study.configurations()}
    expected = [slow_logits(model, image, question, Reduction()) for question in asked]
    for name, line in lines.items():
        logits = [slow_logits(model, image, question, wishes[name]) for question in asked]
        found = list(map(slow_distance, expected, logits))
        assert line["kl"] == pytest.approx(found, rel=1e-3, abs=1e-9)
        answers = model.generate(
            [image] * len(texts), texts, max_new_tokens=1, reduction=wishes[name], trace=True
        )
        costs = [answer.trace for answer in answers if answer.trace]
        assert line["decoder_flops"] == sum(cost.decoder_flops["gated"].total for cost in costs)
        assert line["kv_bytes"] == sum(cost.kv_bytes for cost in costs)
        row = {column: float(rows[name][column]) for column in ("kl", "decoder_flops", "kv_bytes")}
        assert row["kl"] == pytest.approx(statistics.fmean(found), rel=1e-3, abs=1e-9)
        assert float(rows[name]["kl_low"]) <= row["kl"] <= float(rows[name]["kl_high"])
        for column in ("decoder_flops", "kv_bytes"):
            ratio = line[column] / lines["none"][column]
            assert row[column] == pytest.approx(ratio, rel=1e-4)
    assert max(map(abs, lines["none"]["kl"])) < 1e-9
    assert min(lines["tome-36-folded"]["kl"]) > 1e-6
    assert float(rows["tome-36-folded"]["kv_bytes"]) < 0.3 < float(rows["tome-36-vtu"]["kv_bytes"])


def slow_logits(model: Model, image: Image.Image, question: Question, wish: Reduction) -> Tensor:
    """Logits (T, V) in front of each token of the right answer: without pruning one forward of all
    tokens, else a prefill and single tokens behind it."""
    prompt = model.request([image], question.text, GenerationOptions(reduction=wish))
    ids = [*prompt.state.pending_ids]
    answer = model.tokenizer.encode(question.answer, bos=False)
    pixels = model.prepare(image)
    if wish.fastv is None:
        whole = torch.tensor([[*ids, *answer[:-1]]])
        logits = model.prefill(whole, pixels, wish, all_logits=True)[0][0, -len(answer) :]
    else:
        row, cache, position = model.prefill(torch.tensor([ids]), pixels, wish)
        rows = [row]
        for number, token in enumerate(answer[:-1]):
            row, cache = model.decode(torch.tensor(token), position + number, cache)
            rows.append(row)
        logits = torch.cat(rows).flatten(0, 1)
    return logits[:, : model.config.text.sampled_vocab_size]


def slow_distance(reference: Tensor, logits: Tensor) -> float:
    """KL in plain Python, the mean over the rows."""
    total = 0.0
    for expected, given in zip(reference.tolist(), logits.tolist(), strict=True):
        p, q = ([math.exp(x - max(row)) for x in row] for row in (expected, given))
        pairs = ((x / sum(p), y / sum(q)) for x, y in zip(p, q, strict=True))
        total += sum(x * math.log(x / y) for x, y in pairs)
    return total / len(reference)


def test_cost_columns(study: ModuleType) -> None:
    own = [{"kl": [0.0, 0.3], "decoder_flops": 10, "kv_bytes": 3}]
    own += [{"kl": [0.6], "decoder_flops": 20, "kv_bytes": 4}]
    reference = [{"kl": [0.0] * 3, "decoder_flops": 120, "kv_bytes": 14}]
    row = study.cost_columns(own, reference)
    assert (row["kl"], row["decoder_flops"], row["kv_bytes"]) == pytest.approx((0.3, 0.25, 0.5))
    assert 0 <= row["kl_low"] < 0.3 < row["kl_high"] <= 0.6
    assert row["kl_asked"] == 3
    assert study.cost_columns([], reference) == {**dict.fromkeys(row), "kl_asked": 0}
    alone = study.cost_columns(own, [])
    assert alone == {**row, "decoder_flops": None, "kv_bytes": None}


def test_interval_of_a_mean(study: ModuleType) -> None:
    """Of many values as by the normal distribution."""
    values = np.random.default_rng(1).exponential(size=400)
    middle, low, high = study.mean_interval(list(values))
    half = 1.96 * values.std() / 20
    assert middle == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.15 * half)


def test_without_distances_the_columns_are_blank(run: Any, tmp_path: Path) -> None:
    assert run("--no-plots", count=1) == 0
    for row in rows_of(tmp_path).values():
        assert row["kl"] == row["kl_low"] == row["decoder_flops"] == row["kv_bytes"] == ""
        assert row["accuracy"] and row["kl_asked"] == "0"


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
    image_rows = ImageRows.of([(4, 16)], scores.device)
    with study.prune_at_random([3]):
        for _ in range(2000):
            kept = llama.choose(scores, image_rows, [3], 1).kept_indices
            counts[kept] += 1
    assert (counts[[0, 1, 2, 3, 16, 17, 18, 19]] == 2000).all()
    # 500 expected of each of 12; the standard deviation is 19.
    assert (counts[4:16] - 500).abs().max() < 85


@pytest.mark.parametrize("name", ["fastv-k3-36", "hybrid-144-k1-36-folded"])
def test_a_choice_and_its_control_are_asked_the_same(run: Any, tmp_path: Path, name: str) -> None:
    control = "random" + name.removeprefix("fastv").removeprefix("hybrid")
    assert run("--no-plots", "--kl-scenes", "1", configs=[name, control], count=2) == 0
    lines = {line["configuration"]: line for line in lines_of(tmp_path)}
    assert set(lines) == {name, control}
    shared = ("first", "scenes", "image_tokens", "kept_tokens")
    assert len({tuple(line[key] for key in shared) for line in lines.values()}) == 1
    for family, marks in lines[name]["right"].items():
        assert len(lines[control]["right"][family]) == len(marks)
    costs = {line["configuration"]: line for line in lines_of(tmp_path, "distances")}
    assert costs[name]["kl"] != costs[control]["kl"]
    assert costs[name]["kv_bytes"] == costs[control]["kv_bytes"]


# ---- resuming ------------------------------------------------------------------------------------


def test_what_is_answered_is_not_asked_again(
    run: Any, study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unbroken run's lines; after a crash in the middle of a line the rest of them."""
    configs, words = ["none", "random-k3-36", "dtome-72-vtu"], ("--no-plots", "--kl-scenes", "3")
    assert run(*words, configs=configs, count=5) == 0
    whole = (tmp_path / "answers.jsonl").read_bytes()
    distances = lines_of(tmp_path, "distances")
    rows = rows_of(tmp_path)
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 9
    assert sorted({(one["first"], one["scenes"]) for one in lines_of(tmp_path)}) == [
        *((0, 2), (2, 2), (4, 1))
    ]
    assert [(one["first"], one["scenes"]) for one in distances] == [(0, 2)] * 3 + [(2, 1)] * 3
    cut = b"".join(lines[:4]) + lines[4][:30]
    (tmp_path / "answers.jsonl").write_bytes(cut)
    (tmp_path / "distances.jsonl").write_text(json.dumps(distances[1]) + "\n" + '{"conf')
    (tmp_path / "study.csv").unlink()
    monkeypatch.setattr(study, "find_thresholds", None)  # those of the first run are kept
    assert run(*words, configs=configs, count=5) == 0
    after = (tmp_path / "answers.jsonl").read_bytes()
    assert after.startswith(cut + b"\n")
    assert sorted(after[len(cut) + 1 :].splitlines()) == sorted(line.strip() for line in lines[4:])
    assert rows_of(tmp_path) == rows
    resumed = study.read_lines(tmp_path / "distances.jsonl")
    assert sorted(map(str, resumed.values())) == sorted(map(str, distances))
    monkeypatch.setattr(study, "answer_questions", None)  # nothing is left to ask
    monkeypatch.setattr(study, "forced", None)
    assert run(*words, configs=configs, count=5) == 0
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
    configs = ["tome-36-plain", "*-k3-36"]
    assert run("--no-plots", "--time", "--repeat", "2", configs=configs) == 0
    content = json.loads((tmp_path / "times.json").read_text())
    measured = content["measurements"]
    assert list(measured) == ["none", "tome-36-plain", "fastv-k3-36"]  # and no control
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
    assert float(rows["fastv-k3-36"]["time_ratio"]) > 0 and rows["none"]["time_ratio"] == "1.0"
    assert rows["random-k3-36"]["time_ratio"] == ""


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
    drawn: dict[str, Image.Image] = {}
    compressed = study.compress_png

    def spy(path: Path) -> Path:
        with Image.open(path) as image:
            drawn[path.name] = image.convert("RGB")
        written: Path = compressed(path)
        return written

    monkeypatch.setattr(study, "compress_png", spy)
    paths = study.draw_plots(rows, every, FACTS, tmp_path)
    assert [path.name for path in paths] == ["answers.png", "answers_time.png", "distances.png"]
    for path in paths:
        assert path.stat().st_size <= 150_000
        with Image.open(path) as image:
            assert min(image.size) >= 500
            shown = np.array(image.convert("RGB")).astype(int)
        wanted = np.array(drawn[path.name])
        assert np.abs(shown - wanted).mean() < 1
        strong = shown.max(-1) - shown.min(-1) > 60  # lines, no text or grid
        assert 0.003 < strong.mean() < 0.2
        ways = {one.way for one in every if one.kind == "tome" or "answers" in path.name}
        for way in ways - {"random"}:
            rgb = [*bytes.fromhex(study.WAYS[way][1].removeprefix("#"))]
            there = (wanted == rgb).all(-1)
            assert there.sum() > 20 and np.abs(shown[there] - rgb).max() <= 8, way


@pytest.mark.parametrize("x", ["decoder_flops", "time_ratio"])
def test_answers_show_every_point(study: ModuleType, x: str) -> None:
    """With its color, at its cost and height: on a line, or in the column of its path."""
    pyplot = peer("matplotlib.pyplot")
    every = study.configurations()
    rows = [made_up_row(study, one, number) for number, one in enumerate(every)]
    rows = [row for row in rows if row[x] is not None]
    figure = study.answer_plot(rows, every, FACTS, x)
    named = {one.name: one for one in every}
    assert [axes.get_title() for axes in figure.axes] == list(study.PANELS.values())
    for panel, axes in zip(study.PANELS, figure.axes, strict=True):
        ticks = [tick.get_text() for tick in axes.get_xticklabels()]
        found = []
        for bars in axes.containers:
            [place], [height] = bars.lines[0].get_data()
            found.append((bars.get_label(), bars.lines[0].get_color(), place, height))
        for row in rows:
            one = named[row["configuration"]]
            if one.panel != panel and not (one.kind == "none" and panel == "merged"):
                continue
            label, color, *_ = study.WAYS[one.way]
            label += ", DToMe" if one.kind == "dtome" else ""
            [place] = [
                place
                for name, drawn, place, height in found
                if (name, drawn, height) == (label, color, 100 * row["accuracy"])
                and (panel == "merged" or ticks[round(place)].startswith(f"{one.path}  ("))
            ]
            found.remove((label, color, place, 100 * row["accuracy"]))
            if panel == "merged":
                assert place == row[x]
        assert not found
    for panel, axes in list(zip(study.PANELS, figure.axes, strict=True))[1:]:
        costs: dict[str, float] = {}
        for row in sorted(rows, key=lambda row: float(row[x])):
            if named[row["configuration"]].panel == panel:
                costs.setdefault(named[row["configuration"]].path, row[x])
        ticks = [tick.get_text() for tick in axes.get_xticklabels()]
        assert ticks == [f"{path}  ({cost:.0%})" for path, cost in costs.items()]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(numbers) == sorted(one.path for one in every if one.kind == "tome")
    ways = {study.WAYS[named[row["configuration"]].way][0] for row in rows}
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == ways | {f"{way}, DToMe" for way in ("folded", "vtu", "logical")}
    assert (FACTS["timed_on"] in figure.get_suptitle()) == (x == "time_ratio")
    pyplot.close(figure)


def test_distances_show_every_point(study: ModuleType) -> None:
    pyplot = peer("matplotlib.pyplot")
    every = study.configurations()
    rows = [made_up_row(study, one, number) for number, one in enumerate(every)]
    figure = study.distance_plot(rows, every, FACTS)
    [axes] = figure.axes
    drawn = {bars.get_label(): bars.lines[0].get_data() for bars in axes.containers}
    assert list(drawn) == ["folded", "vtu", "logical", "plain"]
    for way, (tokens, heights) in drawn.items():
        own = [row for row in rows if row["kind"] == "tome" and row["positions"] == way]
        assert list(tokens) == [row["target"] for row in own]
        assert list(heights) == [row["kl"] for row in own]
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.xaxis_inverted()
    pyplot.close(figure)


def made_up_row(study: ModuleType, one: Any, number: int) -> dict[str, Any]:
    marks = {"count": "1" * (number + 9) + "0" * (90 - number)}
    line = {"scenes": 10, "image_tokens": 10 * one.target, "kept_tokens": 10 * one.target}
    mixed = number * 31 % 74  # costs in another order than configurations
    kl = [0.001 * (number + 1), 0.004 * (number + 1)]
    costs = [{"kl": kl, "decoder_flops": 20 + mixed, "kv_bytes": 20 + mixed}]
    row: dict[str, Any] = study.summary(one, [{**line, "right": marks}], [])
    row |= study.cost_columns(costs, [{"kl": kl, "decoder_flops": 100, "kv_bytes": 100}])
    return row | {"time_ratio": None if one.kind == "random" else 0.2 + mixed / 80}


def test_plots_of_an_unfinished_study(run: Any, tmp_path: Path) -> None:
    """Few configurations, no times. Without distances there is nothing to draw."""
    peer("matplotlib")
    assert run(count=1) == 0
    assert not list(tmp_path.glob("*.png"))
    assert run("--kl-scenes", "1", count=1) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["answers.png", "distances.png"]
