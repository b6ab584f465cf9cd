#!/usr/bin/env python3
"""Measure what token reduction costs in accuracy and saves in time, on the same fresh scenes.

    python tools/reduction_study.py --out runs/study --n 1000           # resumes
    python tools/reduction_study.py --out runs/study --n 1000 --time    # alone on the machine
    python tools/reduction_study.py --out runs/study --n 200 --configs none 'tome-72-*' 'fastv-k3-*'

Configurations (`--list` shows them), named after the number of remaining image tokens:

    none                     no reduction, 576 image tokens
    tome-72-vtu              merging to the same number for every image; vtu, logical, plain
    dtome-72-vtu             merging by thresholds to about that number on average. Thresholds come
                             from scenes of another seed; the study counts the tokens
    fastv-k3-36              pruning before decoder layer 3
    random-k3-36             the control: as many tokens pruned there, chosen at random
    hybrid-144-72-logical    merging to 144, then pruning to 72 before layer 3

A right answer is exactly the expected text. Intervals are 95 %: Wilson for an accuracy, paired
differences for the difference to `none`. `--out` gets these files:

    answers.jsonl            right and wrong answers, one line per configuration and chunk of
                             scenes; a later run skips existing lines
    settings.json            settings that must not change between runs, and the thresholds
    times.json               the latest `--time` of each configuration
    study.csv, study.json    a row for each configuration that has all scenes
    accuracy_tokens.png, accuracy_time.png, families.png

A time is that of one short question about one image, from pixels to answer. All configurations of a
`--time` take turns in every round. Figures are medians over the rounds, and ratios to `none` of the
same `--time`.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import llava_lite
from llava_lite.bench.machine import quartiles, time_in_turns
from llava_lite.checkpoints.tensors import read_json
from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.evaluation.scenes.accuracy import (
    FAMILIES,
    FRESH_SEED,
    MAX_NEW_TOKENS,
    RENDERERS,
    AskedScene,
    Tally,
    answer_questions,
    encode,
    fresh_scenes,
    macro_accuracy,
    overall,
)
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.fast.device import machine
from llava_lite.fastv import Pruning, choose
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.trace import Trace
from llava_lite.inputs.pixels import pad_to_square
from llava_lite.llava import EncodedImage
from llava_lite.reduction import NO_REDUCTION, PRUNE_LAYER, DToMe, FastV, Reduction, ToMe
from llava_lite.saving import replace_json
from llava_lite.study.find_thresholds import find_thresholds

Line = dict[str, Any]
Key = tuple[str, int, int]  # configuration, first scene, number of scenes

PATCHES = 576
MERGED = (144, 72, 36, 18, 9)
PLAIN = (72, 36)
PRUNED = ((1, 72), (1, 36), (2, 36), (3, 72), (3, 36))  # layer, tokens
HYBRIDS = (  # merged, layer, kept
    *((144, 1, 72), (144, 1, 36), (72, 1, 36), (72, 1, 18)),
    *((144, 3, 72), (144, 3, 36), (72, 3, 36), (72, 3, 18), (36, 3, 18), (36, 3, 9)),
)
DROPPED_HYBRIDS = ((144, 1, 36), (72, 3, 36), (36, 3, 18))  # also dropped, in other ways
STAGES: tuple[tuple[int, dict[int, int]], ...] = (  # tokens of the tower, then layer: tokens
    (PATCHES, {1: 144, 2: 72, 3: 36}),
    (PATCHES, {1: 144, 3: 36}),
    (144, {1: 48, 3: 36}),
    (72, {1: 36, 3: 18}),
    (72, {1: 18, 3: 9}),
    (36, {1: 18, 3: 9}),
)
CHUNK = 25  # scenes
KL_SCENES = 30
CALIBRATION_SEED = 30_000
CALIBRATION_SCENES = 128
TIMED_SCENES = 3
TIMED_QUESTION = "How many objects are there?"
TIMED_TOKENS = 2  # a word and the end


@dataclass(frozen=True)
class Configuration:
    """One kind of reduction. target: image tokens in the last decoder layers; for thresholds, the
    wanted mean."""

    name: str
    kind: str
    reduction: Reduction
    target: int

    @property
    def series(self) -> tuple[str, str]:
        """The key in SERIES of its line in a plot."""
        positions, fastv = self.reduction.positions, self.reduction.fastv
        if fastv is None:
            return self.kind, "" if self.kind == "none" else positions
        rest = "folded" if fastv.rest == "fold" else "dropped"
        if self.kind == "fastv":
            return f"fastv-k{fastv.layer}", rest
        if self.kind == "hybrid" and rest == "dropped":
            rest = positions
        return self.kind, rest

    def kept_tokens(self, count: int) -> int:
        """How many of `count` image tokens reach the last decoder layers."""
        fastv = self.reduction.fastv
        for layer in () if fastv is None else fastv.amounts:
            count = min(count, fastv.num_kept(count, layer)) if fastv else count
        return count


def configurations() -> list[Configuration]:
    """All configurations, still without thresholds."""
    found = [Configuration("none", "none", NO_REDUCTION, PATCHES)]

    def add(kind: str, name: str, target: int, *parts: Any) -> None:
        found.append(Configuration(f"{kind}-{name}", kind, Reduction(*parts), target))

    for keep in MERGED:
        for positions in ("folded", "vtu", "logical", *(("plain",) if keep in PLAIN else ())):
            add("tome", f"{keep}-{positions}", keep, ToMe(keep=keep), positions)
    for positions in ("folded", "vtu", "logical"):
        add("dtome", f"72-{positions}", 72, DToMe(), positions)
    for layer, keep in PRUNED:
        fastv = FastV(keep=keep, layer=layer)
        add("fastv", f"k{layer}-{keep}", keep, None, "vtu", fastv)
        add("fastv", f"k{layer}-{keep}-folded", keep, None, "folded", fold(fastv))
    add("random", "k3-36", 36, None, "vtu", FastV(keep=36))
    add("random", "144-k1-36-folded", 36, ToMe(keep=144), "folded", fold(FastV(keep=36, layer=1)))
    for merged, layer, keep in HYBRIDS:
        merge, fastv = ToMe(keep=merged), FastV(keep=keep, layer=layer)
        name = f"{merged}-{keep}" if layer == PRUNE_LAYER else f"{merged}-k{layer}-{keep}"
        add("hybrid", f"{name}-folded", keep, merge, "folded", fold(fastv))
        add("hybrid", f"{name}-logical", keep, merge, "logical", fastv)
        if (merged, layer, keep) in DROPPED_HYBRIDS:
            summed = replace(fold(fastv), score="sum")
            add("hybrid", f"{name}-folded-sum", keep, merge, "folded", summed)
            add("hybrid", f"{name}-vtu", keep, merge, "vtu", fastv)
            add("hybrid", f"{name}-dropped", keep, merge, "folded", fastv)
    for first, stages in STAGES:
        staged = None if first == PATCHES else ToMe(keep=first)
        fastv, keep = FastV(stages=tuple(stages.items())), min(stages.values())
        name = "-".join(map(str, (first, *stages.values())))
        add("stages", f"{name}-folded", keep, staged, "folded", fold(fastv))
        add("stages", f"{name}-dropped", keep, staged, "folded", fastv)
    return found


def fold(fastv: FastV) -> FastV:
    """The same pruning, with the rest folded instead of dropped. Scores are means over positions:
    a token of many patches is not kept for its size alone."""
    return replace(fastv, rest="fold", score="mean")


def possible(configuration: Configuration, model: Model) -> bool:
    """Whether the model has enough layers and patches."""
    wish = configuration.reduction
    if isinstance(wish.merge, DToMe):
        wish = replace(wish, merge=ToMe(keep=configuration.target))
    try:
        wish.check(model.config)
    except ValueError as error:
        print(f"{configuration.name}: left out, {error}", file=sys.stderr)
        return False
    return True


# ---- thresholds ----------------------------------------------------------------------------------


def calibrate(
    chosen: Sequence[Configuration], model: Model, settings: Line, out: Path, count: int
) -> list[Configuration]:
    """The configurations with thresholds. New thresholds are found and kept in the settings."""
    found: dict[str, list[float]] = settings.setdefault("thresholds", {})
    needed = {one.target for one in chosen if one.kind == "dtome"}
    missing = sorted(keep for keep in needed if str(keep) not in found)
    if missing:
        scenes = fresh_scenes(count, CALIBRATION_SEED)
        images = [draw_scene(scene) for scene, _ in scenes]
        for keep in tqdm(missing, "thresholds", file=sys.stderr):
            found[str(keep)] = list(find_thresholds(model, images, ToMe(keep=keep)))
            replace_json(out / "settings.json", settings)
    return [
        replace(one, reduction=replace(one.reduction, merge=DToMe(tuple(found[str(one.target)]))))
        if one.kind == "dtome"
        else one
        for one in chosen
    ]


# ---- answers -------------------------------------------------------------------------------------


def prune_at_random(seed: Sequence[int]) -> AbstractContextManager[Any]:
    """A context in which FastV prunes by random scores, new ones for every question.

    This is the control of FastV's choice: the number of tokens, the layer and all else are equal.
    It replaces the function that the decoder calls; the core has no such mode. Questions prune in
    their order for every batch size, so a seed always gives the same choices."""
    rng = np.random.default_rng(list(seed))

    def choose_at_random(scores: Tensor, *rest: Any) -> Pruning:
        return choose(torch.from_numpy(rng.random(len(scores))).to(scores), *rest)

    return patch("llava_lite.llama.choose", choose_at_random)


def run_chunk(
    model: Model,
    scenes: Sequence[AskedScene],
    first: int,
    chosen: Sequence[Configuration],
    args: argparse.Namespace,
) -> Iterator[Line]:
    """One line for each configuration. Images are drawn once, and encoded once for all
    configurations with the same merging."""
    images = [RENDERERS[args.renderer](scene) for scene, _ in scenes]
    encoded: dict[Any, list[EncodedImage]] = {}
    for one in chosen:
        merge = one.reduction.merge
        if merge not in encoded:
            encoded[merge] = encode(model, images, Reduction(merge), args.batch_size)
        control: AbstractContextManager[Any] = nullcontext()
        if one.kind == "random":
            control = prune_at_random([args.seed, first, *one.name.encode()])
        with control:
            answers = answer_questions(
                model,
                encoded[merge],
                [asked for _, asked in scenes],
                MAX_NEW_TOKENS,
                reduction=one.reduction,
                batch_size=args.batch_size,
                reuse_prefix=True,
            )
        right: dict[str, str] = {}
        for question, answer in answers:
            mark = "1" if answer == question.answer else "0"
            right[question.family] = right.get(question.family, "") + mark
        tokens = [len(image.image_embeds) for image in encoded[merge]]
        yield {
            "configuration": one.name,
            "first": first,
            "scenes": len(scenes),
            "image_tokens": sum(tokens),
            "kept_tokens": sum(map(one.kept_tokens, tokens)),
            "right": right,
        }


def chunks(count: int) -> list[tuple[int, int]]:
    """First scene and number of scenes of every chunk."""
    return [(first, min(CHUNK, count - first)) for first in range(0, count, CHUNK)]


def run_missing(
    path: Path,
    measure: Callable[..., Iterator[Line]],
    model: Model,
    chosen: Sequence[Configuration],
    count: int,
    args: argparse.Namespace,
) -> None:
    """Write the lines of all configurations and chunks of `count` scenes that `path` lacks."""
    done = read_lines(path)
    todo = {
        chunk: [one for one in chosen if (one.name, *chunk) not in done] for chunk in chunks(count)
    }
    total = sum(map(len, todo.values()))
    with (
        tqdm(total=total, desc=f"{path.stem}, {CHUNK} scenes each", file=sys.stderr) as bar,
        path.open("a", encoding="utf-8") as file,
    ):
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a crash has cut the last line off
        for (first, size), missing in todo.items():
            if not missing:
                continue
            scenes = list(fresh_scenes(size, args.seed, first=first))
            for line in measure(model, scenes, first, missing, args):
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update()


def read_lines(path: Path) -> dict[Key, Line]:
    """The answers so far, without a line that a crash cut off."""
    lines: dict[Key, Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[line["configuration"], line["first"], line["scenes"]] = line
    return lines


# ---- distances and costs -------------------------------------------------------------------------


def measure_distances(
    model: Model,
    scenes: Sequence[AskedScene],
    first: int,
    chosen: Sequence[Configuration],
    args: argparse.Namespace,
) -> Iterator[Line]:
    """One line for each configuration: the distance of every question, and the cost of all."""
    images = [RENDERERS[args.renderer](scene) for scene, _ in scenes]
    none = configurations()[0]
    encoded = {None: encode(model, images, NO_REDUCTION, args.batch_size)}
    expected = [logits for logits, _ in forced(model, scenes, encoded[None], none, args)]
    for one in chosen:
        merge = one.reduction.merge
        if merge not in encoded:
            encoded[merge] = encode(model, images, Reduction(merge), args.batch_size)
        control: AbstractContextManager[Any] = nullcontext()
        if one.kind == "random":
            control = prune_at_random([args.seed, first, *one.name.encode()])
        with control:
            found = list(forced(model, scenes, encoded[merge], one, args))
        yield {
            "configuration": one.name,
            "first": first,
            "scenes": len(scenes),
            "kl": [
                float(f"{distance(reference, logits):.6g}")
                for reference, (logits, _) in zip(expected, found, strict=True)
            ],
            "decoder_flops": sum(trace.decoder_flops["gated"].total for _, trace in found),
            "kv_bytes": sum(trace.kv_bytes for _, trace in found),
        }


def forced(
    model: Model,
    scenes: Sequence[AskedScene],
    images: Sequence[EncodedImage],
    one: Configuration,
    args: argparse.Namespace,
) -> Iterator[tuple[Tensor, Trace]]:
    """For every question the logits (T, V) in front of each token of the right answer, and the
    trace of the prompt."""
    options = GenerationOptions(MAX_NEW_TOKENS, reduction=one.reduction, trace=True)
    asked = [
        (model.request([image], question.text, options), question.answer)
        for image, (_, about_it) in zip(images, scenes, strict=True)
        for question in about_it
    ]
    for start in range(0, len(asked), args.batch_size):
        requests, answers = zip(*asked[start : start + args.batch_size], strict=True)
        targets = [tuple(model.tokenizer.encode(answer, bos=False)) for answer in answers]
        before, _ = model.encode_requests(requests, args.batch_size)
        logits, after = model.target_logits(before, targets)
        for request, *states, rows in zip(requests, before, after, logits, strict=True):
            yield rows, model.trace(*states, request.counts)


def distance(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || reduced) in nats, the mean over the tokens of an answer; logits (T, V)."""
    expected, given = (x.double().log_softmax(-1) for x in (reference, logits))
    return float((expected.exp() * (expected - given)).sum(-1).mean())


# ---- times ---------------------------------------------------------------------------------------


def measure_times(
    model: Model, chosen: Sequence[Configuration], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds per question of every configuration except the control, which equals FastV."""
    scenes = fresh_scenes(TIMED_SCENES, args.seed)
    size = (model.config.vision.image_size,) * 2
    images = [pad_to_square(draw_scene(scene)).resize(size) for scene, _ in scenes]
    runs: dict[tuple[str, str], Any] = {
        ("question", one.name): partial(ask_once, model, images, one.reduction)
        for one in chosen
        if one.kind != "random"
    }
    seconds = time_in_turns(runs, args.repeat, str(model.llava.device))
    medians = {
        name: statistics.median(values) / len(images) for (_, name), values in seconds.items()
    }
    return {
        "machine": machine(str(model.llava.device), torch.get_num_threads()),
        "dtype": dtype_name(model),
        "measurements": {
            name: {
                "repeat": args.repeat,
                "seconds": medians[name],
                "quartiles": [value / len(images) for value in quartiles(values)],
                "ratio": medians[name] / medians["none"],
            }
            for (_, name), values in seconds.items()
        },
    }


def merge_times(times: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The new times, and earlier ones of other configurations if the machine is the same. Each
    ratio is to `none` of the same run."""
    if any(times[name] != earlier.get(name) for name in ("machine", "dtype")):
        return times
    return times | {"measurements": earlier["measurements"] | times["measurements"]}


def ask_once(model: Model, images: Sequence[Image.Image], reduction: Reduction) -> None:
    """Ask one question about each image."""
    for image in images:
        model.generate(image, TIMED_QUESTION, max_new_tokens=TIMED_TOKENS, reduction=reduction)


# ---- results -------------------------------------------------------------------------------------


def paired_difference(right: str, reference: str) -> tuple[float, float, float]:
    """The mean difference to `reference` on the same questions, and its 95 % interval. Both are
    strings of 0 and 1."""
    pairs = zip(right, reference, strict=True)
    differences = [int(one) - int(other) for one, other in pairs]
    middle = statistics.fmean(differences)
    z = statistics.NormalDist().inv_cdf(0.975)
    half = z * statistics.pstdev(differences) / math.sqrt(len(differences))
    return middle, middle - half, middle + half


def complete(lines: dict[Key, Line], name: str, count: int) -> list[Line] | None:
    """All lines of a configuration over `count` scenes; None if some are missing."""
    found = [lines.get((name, *chunk)) for chunk in chunks(count)]
    return None if None in found else [line for line in found if line is not None]


def summarize(
    lines: dict[Key, Line], every: Sequence[Configuration], count: int, times: dict[str, Any]
) -> list[Line]:
    """A row for each configuration that has all scenes."""
    measurements: dict[str, Any] = times.get("measurements", {})
    rows = []
    for one in every:
        own = complete(lines, one.name, count)
        if own is not None:
            reference = complete(lines, "none", count)
            rows.append(summary(one, own, reference, measurements.get(one.name, {})))
    return rows


def summary(
    one: Configuration, own: list[Line], reference: list[Line] | None, time: dict[str, Any]
) -> Line:
    """The row of one configuration: tokens, accuracies with intervals, and time if measured."""
    marks = join_marks(own)
    tallies = {family: Tally(text.count("1"), len(text)) for family, text in marks.items()}
    scenes = sum(line["scenes"] for line in own)
    row: Line = {
        "configuration": one.name,
        "kind": one.kind,
        "positions": "" if one.reduction.merge is None else one.reduction.positions,
        "layer": one.reduction.fastv.layer if one.reduction.fastv else None,
        "target": one.target,
        "image_tokens": sum(line["image_tokens"] for line in own) / scenes,
        "kept_tokens": sum(line["kept_tokens"] for line in own) / scenes,
        "scenes": scenes,
    }
    row |= accuracy_columns("", overall(tallies)) | {"macro": macro_accuracy(tallies)}
    difference: tuple[float | None, ...] = (None,) * 3
    if reference is not None:
        difference = paired_difference(
            "".join(marks.values()), "".join(join_marks(reference).values())
        )
    names = ("difference", "difference_low", "difference_high")
    row |= dict(zip(names, difference, strict=True))
    row |= {"seconds": time.get("seconds"), "time_ratio": time.get("ratio")}
    for family in FAMILIES:
        row |= accuracy_columns(f"{family}_", tallies.get(family, Tally()))
    return row


def join_marks(lines: Sequence[Line]) -> dict[str, str]:
    """The marks of all chunks, by family."""
    return {
        family: "".join(line["right"].get(family, "") for line in lines)
        for family in FAMILIES
        if any(family in line["right"] for line in lines)
    }


def accuracy_columns(prefix: str, tally: Tally) -> Line:
    values = (tally.accuracy, *tally.interval()) if tally.asked else (None,) * 3
    named = dict(zip(("accuracy", "low", "high"), values, strict=True))
    return {f"{prefix}{name}": value for name, value in ({"asked": tally.asked} | named).items()}


def write_csv(path: Path, rows: Sequence[Line]) -> None:
    """Write the rows with four digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


# ---- plots ---------------------------------------------------------------------------------------

# The colors of Okabe and Ito, which color-blind people can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SERIES: dict[tuple[str, str], tuple[str, str, str, str]] = {  # label, color, marker, line
    ("tome", "vtu"): ("ToMe, vtu", BLUE, "o", "-"),
    ("tome", "logical"): ("ToMe, logical", ORANGE, "s", "-"),
    ("tome", "plain"): ("ToMe, plain", GREEN, "^", "-"),
    ("dtome", "vtu"): ("DToMe, vtu", BLUE, "o", ":"),
    ("dtome", "logical"): ("DToMe, logical", ORANGE, "s", ":"),
    ("fastv", "K = 1"): ("FastV, K = 1", RED, "v", "-"),
    ("fastv", "K = 2"): ("FastV, K = 2", PURPLE, "D", "-"),
    ("fastv", "K = 3"): ("FastV, K = 3", "black", "P", "-"),
    ("random", "K = 1"): ("random, K = 1", RED, "v", ":"),
    ("random", "K = 2"): ("random, K = 2", PURPLE, "D", ":"),
    ("random", "K = 3"): ("random, K = 3", "black", "P", ":"),
    ("hybrid", "144, vtu"): ("ToMe 144 + FastV, vtu", BLUE, "d", "-"),
    ("hybrid", "144, logical"): ("ToMe 144 + FastV, logical", ORANGE, "d", "-"),
    ("hybrid", "72, vtu"): ("ToMe 72 + FastV, vtu", BLUE, "d", ":"),
    ("hybrid", "72, logical"): ("ToMe 72 + FastV, logical", ORANGE, "d", ":"),
}
PANELS = {
    "merging in the tower": ("tome", "dtome"),
    "pruning in front of decoder layer K": ("fastv", "random"),
    "both: merged, then pruned (K = 3)": ("hybrid",),
}
FAMILY_SERIES = (
    ("tome", "vtu"),
    ("tome", "logical"),
    ("tome", "plain"),
    ("fastv", "K = 3"),
    ("random", "K = 3"),
    ("hybrid", "72, logical"),
)
FAMILY_TITLES = {
    "count": "How many objects?",
    "count_color": "How many red objects?",
    "count_shape": "How many circles?",
    "color": "What color is the star?",
    "shape": "What is the green object?",
    "exists": "Is there a blue square?",
    "where": "Where is the red ring?",
    "relation": "Is it left of the star?",
    "digit": "What digit is on it?",
    "describe": "Describe the image.",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def check_matplotlib() -> None:
    """Raise SystemExit, before hours of work, if plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(
            "plots need matplotlib: pip install 'llava-lite[viz]', or --no-plots for CSV and JSON"
        )


def draw_plots(
    rows: Sequence[Line], every: Sequence[Configuration], facts: Line, out: Path
) -> list[Path]:
    """Draw every plot that the rows allow, and return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_series: dict[tuple[str, str], list[Line]] = {}
    series_of = {one.name: one.series for one in every}
    for row in rows:
        by_series.setdefault(series_of[row["configuration"]], []).append(row)
    for members in by_series.values():
        members.sort(key=lambda row: row["kept_tokens"])
    timed = any(row["time_ratio"] is not None and row["kind"] != "none" for row in rows)
    drawn = {"accuracy_tokens.png": token_plot, "families.png": family_plot}
    if timed:
        drawn["accuracy_time.png"] = time_plot
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = draw(by_series, facts)
            figure.savefig(out / name, dpi=130)
            pyplot.close(figure)
            paths.append(compress_png(out / name))
    return paths


def compress_png(path: Path) -> Path:
    """Rewrite a PNG with 128 colors: about a third of the bytes."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return path


def draw_series(
    axes: Any,
    by_series: dict[tuple[str, str], list[Line]],
    key: tuple[str, str],
    x: str,
    prefix: str = "",
    shift: float = 0.0,
) -> None:
    """Draw one line with its intervals. shift: percent to the right, so lines do not hide each
    other."""
    label, color, marker, line = SERIES[key]
    rows = [row for row in by_series.get(key, ()) if row[f"{prefix}accuracy"] is not None]
    rows = [row for row in rows if row[x] is not None]
    if not rows:
        return
    places = [row[x] * (1 + shift / 100) for row in rows]
    heights = [100 * row[f"{prefix}accuracy"] for row in rows]
    below = [100 * (row[f"{prefix}accuracy"] - row[f"{prefix}low"]) for row in rows]
    above = [100 * (row[f"{prefix}high"] - row[f"{prefix}accuracy"]) for row in rows]
    face = "white" if line == ":" else color
    axes.errorbar(
        *(places, heights, [below, above]),
        label=label,
        color=color,
        marker=marker,
        linestyle=line,
        markerfacecolor=face,
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
    )


def draw_reference(
    axes: Any, by_series: dict[tuple[str, str], list[Line]], prefix: str = "", named: bool = True
) -> None:
    """Draw the accuracy without reduction as a line, and its interval as a band. named: add it to
    the legend."""
    for row in by_series.get(("none", ""), ()):
        if row[f"{prefix}accuracy"] is None:
            continue
        axes.axhspan(100 * row[f"{prefix}low"], 100 * row[f"{prefix}high"], color="0.9", zorder=0)
        label = f"no reduction ({row['target']})" if named else None
        axes.axhline(100 * row[f"{prefix}accuracy"], color="0.45", linewidth=1, label=label)


def token_axis(axes: Any, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(tick) for tick in ticks])


def panel_plot(
    by_series: dict[tuple[str, str], list[Line]], keys: Sequence[tuple[str, str]], x: str
) -> tuple[Any, Sequence[Any]]:
    """A figure with a panel for each kind of reduction, and its panels."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 3, figsize=(11.5, 5), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (title, kinds) in zip(panels, PANELS.items(), strict=True):
        draw_reference(axes, by_series, named=axes is panels[0])
        shift = 1.5 if x == "kept_tokens" else 0.0
        for number, key in enumerate(key for key in keys if key[0] in kinds):
            draw_series(axes, by_series, key, x, shift=shift * number)
        axes.set_title(title)
        if axes.containers:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
    panels[0].set_ylabel("right answers, %")
    return figure, panels


def token_plot(by_series: dict[tuple[str, str], list[Line]], facts: Line) -> Any:
    """Accuracy by image tokens in the last decoder layers. With pruning before layer K, the first K
    layers see more tokens."""
    figure, panels = panel_plot(by_series, list(SERIES), "kept_tokens")
    for axes in panels:
        token_axis(axes, sorted({*MERGED, *PRUNED}))
        axes.set_xlabel("image tokens in the last layers")
    figure.suptitle(title_of(facts), fontsize=10)
    return figure


def time_plot(by_series: dict[tuple[str, str], list[Line]], facts: Line) -> Any:
    """Accuracy by measured time of a question. The ends of each line show their image tokens."""
    keys = [key for key in SERIES if key[0] != "random"]
    figure, panels = panel_plot(by_series, keys, "time_ratio")
    for axes, kinds in zip(panels, PANELS.values(), strict=True):
        for row in by_series.get(("none", ""), ()):
            axes.plot(1, 100 * row["accuracy"], color="0.45", marker="o", markersize=7)
        for key in keys:
            rows = [row for row in by_series.get(key, ()) if row["time_ratio"] is not None]
            for row in {id(row): row for row in (*rows[:1], *rows[-1:])}.values():
                if key[0] in kinds:
                    write_tokens(axes, row, SERIES[key][1])
        axes.set_xlabel("time per question, 1 = no reduction")
    figure.suptitle(f"{title_of(facts)}\n{facts.get('timed_on', '')}", fontsize=10)
    return figure


def write_tokens(axes: Any, row: Line, color: str) -> None:
    """Write the number of image tokens beside a point of the time plot."""
    place = row["time_ratio"], 100 * row["accuracy"]
    beside = {"xytext": (5, -9), "textcoords": "offset points"}
    axes.annotate(str(row["target"]), place, **beside, fontsize=7, color=color)


def family_plot(by_series: dict[tuple[str, str], list[Line]], facts: Line) -> Any:
    """Accuracy by image tokens for each family of questions."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        2, 5, figsize=(11.5, 5), sharex=True, sharey=True, layout="constrained"
    )
    for axes, family in zip(grid.flat, FAMILIES, strict=True):
        draw_reference(axes, by_series, f"{family}_")
        for number, key in enumerate(FAMILY_SERIES):
            draw_series(axes, by_series, key, "kept_tokens", f"{family}_", 2.0 * number)
        token_axis(axes, PRUNED)
        axes.set_title(FAMILY_TITLES[family])
    for axes in grid[1]:
        axes.set_xlabel("image tokens in the last layers")
    for axes in grid[:, 0]:
        axes.set_ylabel("right answers, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.suptitle(title_of(facts), fontsize=10)
    return figure


def title_of(facts: Line) -> str:
    return f"{facts['model']}: {facts['questions']} questions about {facts['scenes']} fresh scenes"


# ---- the run -------------------------------------------------------------------------------------


def dtype_name(model: Model) -> str:
    return str(model.llava.dtype).removeprefix("torch.")


def weights_sha256(model: Model) -> str:
    """A hash of the weights: answers of other weights must not be mixed with these."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.llava.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_settings(model: Model, args: argparse.Namespace) -> Line:
    """The settings of this run, with the thresholds of an earlier run in the same folder. Raises
    SystemExit if the earlier run had other settings."""
    settings: Line = {
        "model": model.config.name,
        "dtype": dtype_name(model),
        "weights_sha256": weights_sha256(model),
        "seed": args.seed,
        "renderer": args.renderer,
        "chunk": CHUNK,
        "calibration_scenes": args.calibration_scenes,
        # The batch size can change an answer in 16 bits, but not in float32.
        "batch_size": None if model.llava.dtype == torch.float32 else args.batch_size,
    }
    path = args.out / "settings.json"
    if path.exists():
        before = read_json(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise SystemExit(
                    f"{path}: that study has another {name} ({before.get(name)!r}, now {value!r}); "
                    "give this one another --out"
                )
        return before
    replace_json(path, settings)
    return settings


def write_results(every: Sequence[Configuration], settings: Line, args: argparse.Namespace) -> None:
    """Write CSV, JSON and plots of the complete configurations, and print a table."""
    path = args.out / "times.json"
    times = read_json(path) if path.exists() else {}
    rows = summarize(read_lines(args.out / "answers.jsonl"), every, args.n, times)
    if not rows:
        print(f"no configuration has all {args.n} scenes yet (--n); what was found is kept")
        return
    write_csv(args.out / "study.csv", rows)
    replace_json(args.out / "study.json", {"settings": settings, "times": times, "rows": rows})
    print("\n".join(table(rows)))
    if not args.no_plots:
        facts = {"model": settings["model"], "questions": rows[0]["asked"], "scenes": args.n}
        if times:
            used = times["machine"]
            threads = f", CPU threads: {used['threads']}" if used["device"] == "cpu" else ""
            facts["timed_on"] = f"{used['name']}{threads}, {times['dtype']}"
        draw_plots(rows, every, facts, args.out)


def table(rows: Sequence[Line]) -> Iterator[str]:
    """The lines to print."""
    yield f"{'configuration':<24}{'tokens':>8}{'right':>8}{'95 % interval':>17}{'time':>7}"
    for row in rows:
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        time = "" if row["time_ratio"] is None else f"{row['time_ratio']:.3f}"
        yield (
            f"{row['configuration']:<24}{row['kept_tokens']:>8.1f}"
            f"{100 * row['accuracy']:>8.1f}{interval:>17}{time:>7}"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where answers, times and results are kept")
    add("--n", type=int, default=1000, help="scenes (default: 1000)")
    add("--seed", type=int, default=FRESH_SEED, help=f"which scenes (default: {FRESH_SEED})")
    add(
        "--kl-scenes",
        type=int,
        default=KL_SCENES,
        metavar="N",
        help=f"scenes for distances and costs (default: {KL_SCENES})",
    )
    add("--configs", nargs="+", default=["*"], metavar="NAME", help="only these; * and ? as usual")
    add("--list", action="store_true", help="only show the configurations")
    add("--time", action="store_true", help="measure times instead of accuracies")
    add("--repeat", type=int, default=15, metavar="N", help="rounds of --time (default: 15)")
    add("--no-plots", action="store_true", help="CSV and JSON only")
    add("--model", help="model folder (default: the embedded model)")
    add("--device", default="cpu")
    add(
        "--dtype",
        default="float32",
        help="default: float32 (batch size changes no answer)",
    )
    add("--threads", type=int, help="CPU threads")
    add("--batch-size", type=int, default=16, help="questions at once (default: 16)")
    add("--renderer", choices=[*RENDERERS], default="plain", help="renderer of the scenes")
    add("--calibration-scenes", type=int, default=CALIBRATION_SCENES, metavar="N")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    every = configurations()
    chosen = [one for one in every if any(fnmatch(one.name, text) for text in args.configs)]
    if args.list:
        print("\n".join(one.name for one in chosen))
        return 0
    if args.out is None or args.n < 1 or args.repeat < 1:
        parser.error("needs --out, and at least 1 scene and 1 round")
    if args.seed == CALIBRATION_SEED:
        parser.error(f"the scenes of seed {args.seed} are those that thresholds are found on")
    if not chosen:
        parser.error(f"no configuration is called {' or '.join(args.configs)}; see --list")
    if args.time and chosen[0].kind != "none":
        chosen.insert(0, every[0])  # the reference
    if not args.no_plots:
        check_matplotlib()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return run(every, chosen, args)
    except (LlavaLiteError, OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: error: {one_line(error)}") from None


def run(
    every: Sequence[Configuration], chosen: list[Configuration], args: argparse.Namespace
) -> int:
    """Measure answers or times, then write the results."""
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.model or llava_lite.embedded_model()
    model = llava_lite.load(source, device=args.device, dtype=args.dtype)
    settings = run_settings(model, args)
    chosen = [one for one in chosen if possible(one, model)]
    chosen = calibrate(chosen, model, settings, args.out, args.calibration_scenes)
    if args.time:
        path = args.out / "times.json"
        earlier = read_json(path) if path.exists() else {}
        replace_json(path, merge_times(measure_times(model, chosen, args), earlier))
    else:
        run_missing(args.out / "answers.jsonl", run_chunk, model, chosen, args.n, args)
        count = min(args.n, args.kl_scenes)
        run_missing(args.out / "distances.jsonl", measure_distances, model, chosen, count, args)
    write_results(every, settings, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
