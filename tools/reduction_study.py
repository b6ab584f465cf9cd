#!/usr/bin/env python3
"""Measure what token reduction costs in answers and saves in work, on the same fresh scenes.

    python tools/reduction_study.py --out runs/study --n 1000           # resumes
    python tools/reduction_study.py --out runs/study --n 1000 --time    # alone on the machine
    python tools/reduction_study.py --out runs/study --n 200 --configs none 'tome-72-*' 'fastv-k3-*'

Configurations (`--list` shows them), named after the number of remaining image tokens:

    none                     no reduction, 576 image tokens
    tome-72-folded           merging to the same number for every image; folded, vtu, logical, plain
    dtome-72-folded          merging by thresholds to about that number on average. Thresholds come
                             from scenes of another seed; the study counts the tokens
    fastv-k3-36              pruning before decoder layer 3, the rest is dropped
    fastv-k3-36-folded       the same, the rest is folded into the kept tokens
    random-k3-36             the control: as many tokens stay there, chosen at random
    random-144-k1-36-folded  the control of hybrid-144-k1-36-folded
    hybrid-144-72-folded     merging to 144, then pruning to 72 before layer 3, the rest is folded
    hybrid-144-72-logical    the rest is dropped, at logical positions (or vtu)
    hybrid-144-k1-36-*       pruning before layer 1. dropped: the rest is dropped, at folded
                             positions; dropped-mean: the same, but scores are means over positions;
                             folded-sum: folded, but scores are sums. All other folded
                             configurations take means, all other dropped ones sums
    stages-72-36-18-folded   merging to 72, then pruning in stages, before layers 1 and 3; dropped
                             is again at folded positions. 576: no merging

A right answer is exactly the expected text. Intervals are 95 %: Wilson for an accuracy, paired
differences for two configurations, bootstrap for a mean distance. `--out` gets these files:

    answers.jsonl            right and wrong answers, one line per configuration and chunk of
                             scenes; a later run skips existing lines
    distances.jsonl          the same for `--kl-scenes` scenes: distance to `none` and costs
    settings.json            settings that must not change between runs, and the thresholds
    times.json               the latest `--time` of each configuration
    study.csv                a row for each configuration that has all scenes
    pairs.csv                a row for each pair of them that is compared
    study.json               the rows of both, with settings and times
    answers.png, answers_time.png, distances.png

The distance of a question is KL(none || reduced) in nats, the mean over the tokens of the right
answer, each behind the right tokens. `kl` is their mean over `kl_asked` questions. `decoder_flops`
and `kv_bytes` are those of the prompt, `time_ratio` is measured; all are ratios to `none`. `p` is
that of McNemar's exact test, two-sided, not corrected for the number of pairs.

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
from llava_lite.tables import table_lines

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
RIVALS = ("-vtu", "-logical", "-plain", "", "-dropped", "-dropped-mean", "-folded-sum")
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
    def way(self) -> str:
        """What becomes of the tokens that go, a key of WAYS."""
        positions, fastv = self.reduction.positions, self.reduction.fastv
        if self.kind in ("none", "random"):
            return self.kind
        if fastv is None:
            return positions
        if fastv.rest == "fold":
            return "summed" if fastv.score_of_merged == "sum" else "folded"
        if fastv.score_of_merged == "mean":
            return "averaged"
        return "dropped" if self.reduction.merge is None else positions.replace("folded", "dropped")

    @property
    def panel(self) -> str:
        """The part of a plot that shows it, a key of PANELS."""
        if self.kind == "none":
            return ""
        if self.reduction.fastv is None:
            return "merged"
        return "pruned" if self.reduction.merge is None else "both"

    @property
    def path(self) -> str:
        """The numbers of image tokens on the way, and the first layer of a single pruning."""
        merge, fastv = self.reduction.merge, self.reduction.fastv
        first = [] if merge is None else [merge.keep if isinstance(merge, ToMe) else self.target]
        amounts = {} if fastv is None else fastv.amounts
        if fastv and fastv.stages is None:
            return f"{ARROW.join(map(str, (*first, self.target)))}, K{fastv.layer}"
        return ARROW.join(map(str, (*first, *amounts.values())))

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
    add("fastv", "k3-288", 288, None, "vtu", FastV(drop=0.5))
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
            add("hybrid", f"{name}-dropped-mean", keep, merge, "folded", average(fastv))
    for first, stages in STAGES:
        staged = None if first == PATCHES else ToMe(keep=first)
        fastv, keep = FastV(stages=tuple(stages.items())), min(stages.values())
        name = "-".join(map(str, (first, *stages.values())))
        add("stages", f"{name}-folded", keep, staged, "folded", fold(fastv))
        add("stages", f"{name}-dropped", keep, staged, "folded", fastv)
        if staged is not None:
            add("stages", f"{name}-dropped-mean", keep, staged, "folded", average(fastv))
    return found


def average(fastv: FastV) -> FastV:
    """The same pruning by scores that are means over positions."""
    return replace(fastv, score="mean")


def fold(fastv: FastV) -> FastV:
    """The same pruning, with the rest folded instead of dropped."""
    return replace(fastv, rest="fold")


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
    """The lines so far, without one that a crash cut off."""
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
    encoded: dict[Any, list[EncodedImage]]
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
    for first in range(0, len(asked), args.batch_size):
        requests, answers = zip(*asked[first : first + args.batch_size], strict=True)
        targets = [tuple(model.tokenizer.encode(answer, bos=False)) for answer in answers]
        before, _ = model.encode_requests(requests, args.batch_size)
        logits, after = model.target_logits(before, targets)
        for request, start, end, rows in zip(requests, before, after, logits, strict=True):
            yield rows, model.trace(start, end, request.counts)


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


def complete(lines: dict[Key, Line], name: str, count: int) -> list[Line]:
    """All lines of a configuration over `count` scenes; none at all if some are missing."""
    found = [lines.get((name, *chunk)) for chunk in chunks(count)]
    return [] if None in found else [line for line in found if line is not None]


def summarize(
    answers: dict[Key, Line],
    distances: dict[Key, Line],
    every: Sequence[Configuration],
    count: int,
    kl_count: int,
    times: Line,
) -> tuple[list[Line], list[Line]]:
    """A row for each configuration that has all `count` scenes, and one for each pair of them.
    Distances and costs are those over `kl_count` scenes."""
    measurements: Line = times.get("measurements", {})
    full = {one.name: complete(answers, one.name, count) for one in every}
    full = {name: lines for name, lines in full.items() if lines}
    costs = {name: complete(distances, name, kl_count) for name in full}
    rows = []
    for one in every:
        if one.name not in full:
            continue
        row = summary(one, full[one.name], full.get("none", []))
        row |= cost_columns(costs[one.name], costs.get("none", []))
        time = measurements.get(one.name, {})
        row |= {"seconds": time.get("seconds"), "time_ratio": time.get("ratio")}
        rows.append(row | family_columns(full[one.name]))
    return rows, [compare(*pair, full) for pair in claims(list(full))]


def summary(one: Configuration, own: Sequence[Line], reference: Sequence[Line]) -> Line:
    """What one configuration is, its tokens, and its accuracy with intervals."""
    fastv = one.reduction.fastv
    folds = fastv is not None and fastv.rest == "fold"
    tallies = tally_families(own)
    scenes = sum(line["scenes"] for line in own)
    row: Line = {
        "configuration": one.name,
        "kind": one.kind,
        "positions": one.reduction.positions if one.reduction.merge or folds else "",
        "layer": "+".join(map(str, fastv.amounts)) if fastv else "",
        "rest": fastv.rest if fastv else "",
        "target": one.target,
        "image_tokens": sum(line["image_tokens"] for line in own) / scenes,
        "kept_tokens": sum(line["kept_tokens"] for line in own) / scenes,
        "scenes": scenes,
    }
    row |= accuracy_columns("", overall(tallies)) | {"macro": macro_accuracy(tallies)}
    difference: Sequence[float | None] = (None,) * 3
    if reference:
        difference = paired_difference(all_marks(own), all_marks(reference))
    names = ("difference", "difference_low", "difference_high")
    return row | dict(zip(names, difference, strict=True))


def cost_columns(own: Sequence[Line], reference: Sequence[Line]) -> Line:
    """The mean distance with its interval, and costs as ratios to `none`; None without lines."""
    distances = [kl for line in own for kl in line["kl"]]
    row: Line = {"kl_asked": len(distances)}
    row |= dict.fromkeys(("kl", "kl_low", "kl_high", "decoder_flops", "kv_bytes"))
    if own:
        row |= dict(zip(("kl", "kl_low", "kl_high"), mean_interval(distances), strict=True))
    if own and reference:
        for name in ("decoder_flops", "kv_bytes"):
            total, full = (sum(line[name] for line in lines) for lines in (own, reference))
            row[name] = total / full
    return row


def family_columns(own: Sequence[Line]) -> Line:
    tallies = tally_families(own)
    row: Line = {}
    for family in FAMILIES:
        row |= accuracy_columns(f"{family}_", tallies.get(family, Tally()))
    return row


def accuracy_columns(prefix: str, tally: Tally) -> Line:
    values = (tally.accuracy, *tally.interval()) if tally.asked else (None,) * 3
    named = dict(zip(("accuracy", "low", "high"), values, strict=True))
    return {f"{prefix}{name}": value for name, value in ({"asked": tally.asked} | named).items()}


def join_marks(lines: Sequence[Line]) -> dict[str, str]:
    """The marks of all chunks, by family."""
    return {
        family: "".join(line["right"].get(family, "") for line in lines)
        for family in FAMILIES
        if any(family in line["right"] for line in lines)
    }


def all_marks(lines: Sequence[Line]) -> str:
    """The marks of all questions, in the same order for every configuration."""
    return "".join(join_marks(lines).values())


def tally_families(lines: Sequence[Line]) -> dict[str, Tally]:
    marks = join_marks(lines)
    return {family: Tally(text.count("1"), len(text)) for family, text in marks.items()}


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95 % interval from 1000 resamples: distances are never negative, and few
    large ones make most of their sum."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (1000, len(values))).mean(-1)
    low, high = np.quantile(means, (0.025, 0.975))
    return statistics.fmean(values), float(low), float(high)


def paired_difference(right: str, reference: str) -> tuple[float, float, float]:
    """The mean difference to `reference` on the same questions, and its 95 % interval. Both are
    strings of 0 and 1."""
    pairs = zip(right, reference, strict=True)
    differences = [int(one) - int(other) for one, other in pairs]
    middle = statistics.fmean(differences)
    z = statistics.NormalDist().inv_cdf(0.975)
    half = z * statistics.pstdev(differences) / math.sqrt(len(differences))
    return middle, middle - half, middle + half


def claims(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The pairs of configurations to compare: folded and each other treatment of the same tokens,
    then FastV's choice and chance."""
    found = []
    for name in names:
        base = name.removesuffix("-folded")
        if base != name and not name.startswith("random"):
            found += [(name, f"{base}{rest}") for rest in RIVALS]
            found.append((f"{base}-folded-sum", f"{base}-dropped"))  # with the same scores
    chance = [name for name in names if name.startswith("random")]
    found += [
        (name.replace("random", kind), name) for name in chance for kind in ("fastv", "hybrid")
    ]
    return (pair for pair in found if set(pair) <= set(names))


def compare(first: str, second: str, lines: dict[str, list[Line]]) -> Line:
    """The row of a pair: McNemar's exact test on the questions that only one answers right."""
    right, other = all_marks(lines[first]), all_marks(lines[second])
    both = list(zip(right, other, strict=True))
    wins, losses = both.count(("1", "0")), both.count(("0", "1"))
    difference, low, high = paired_difference(right, other)
    return {
        "first": first,
        "second": second,
        "asked": len(both),
        "only_first_right": wins,
        "only_second_right": losses,
        "difference": difference,
        "low": low,
        "high": high,
        "p": mcnemar(wins, losses),
    }


def mcnemar(wins: int, losses: int) -> float:
    """The chance of a split at least as uneven, if both sides were equally likely."""
    total, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def write_csv(path: Path, rows: Sequence[Line]) -> None:
    """Write the rows with six significant digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


# ---- plots ---------------------------------------------------------------------------------------

# The colors of Okabe and Ito, which color-blind people can tell apart.
WAYS = {  # label, color, marker, place of a number beside a point
    "none": ("no reduction", "#666666", "*", (0, 0)),
    "folded": ("folded", "#0072B2", "o", (-5, 4)),
    "summed": ("folded, ranked by sums", "#56B4E9", "o", (0, 0)),
    "vtu": ("vtu", "#E69F00", "s", (5, 4)),
    "logical": ("logical", "#009E73", "^", (6, -4)),
    "plain": ("plain", "#CC79A7", "D", (6, -4)),
    "dropped": ("dropped", "#D55E00", "v", (0, 0)),
    "averaged": ("dropped, ranked by means", "#8C2D04", "<", (0, 0)),
    "random": ("ranked by chance", "#000000", "x", (0, 0)),
}
SHIFTS = {
    "summed": -0.4,
    "vtu": -0.2,
    "dropped": 0.2,
    "averaged": 0.4,
}  # in a column, so that points do not hide
PANELS = {
    "merged": "merged in the vision tower",
    "pruned": "pruned in the decoder",
    "both": "merged, then pruned",
}
COSTS = {"decoder_flops": "FLOPs of the decoder", "time_ratio": "measured time of a question"}
ARROW = "\N{RIGHTWARDS ARROW}"
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

    plots: dict[str, Callable[..., Any]] = {
        "answers.png": partial(answer_plot, x="decoder_flops"),
        "answers_time.png": partial(answer_plot, x="time_ratio"),
        "distances.png": distance_plot,
    }
    needed = ("decoder_flops", "time_ratio", "kl")
    paths = []
    with pyplot.rc_context(STYLE):
        for (name, draw), column in zip(plots.items(), needed, strict=True):
            known = [row for row in rows if row[column] is not None]
            if any(row["kind"] != "none" for row in known):
                figure = draw(known, every, facts)
                figure.savefig(out / name, dpi=130)
                pyplot.close(figure)
                paths.append(compress_png(out / name))
    return paths


def compress_png(path: Path) -> Path:
    """Rewrite a PNG with 256 colors: about a third of the bytes."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return path


@dataclass(frozen=True)
class Point:
    """A configuration in a plot. cost: as a ratio to `none`."""

    one: Configuration
    row: Line
    cost: float

    @property
    def height(self) -> float:
        """Right answers in percent."""
        return float(100 * self.row["accuracy"])


def answer_plot(rows: Sequence[Line], every: Sequence[Configuration], facts: Line, x: str) -> Any:
    """Right answers by cost. Where tokens only merge: lines. With pruning: a column for each path
    of the tokens, in the order of costs, with a point for each treatment of the other tokens."""
    from matplotlib import pyplot

    named = {one.name: one for one in every}
    points = [Point(named[row["configuration"]], row, row[x]) for row in rows]
    figure, panels = pyplot.subplots(
        *(1, 3), figsize=(12, 5.5), layout="constrained", width_ratios=(10, 7, 14)
    )
    panels[2].sharey(panels[1])
    panels[2].tick_params(labelleft=False)
    for axes, (panel, title) in zip(panels, PANELS.items(), strict=True):
        draw = draw_lines if panel == "merged" else draw_columns
        draw(axes, [point for point in points if point.one.panel == panel])
        axes.set_title(title, fontweight="bold")
        for row in (point.row for point in points if point.one.kind == "none"):
            axes.axhspan(100 * row["low"], 100 * row["high"], color="0.9", zorder=0)
            axes.axhline(100 * row["accuracy"], color=WAYS["none"][1], linewidth=1, zorder=1)
    for point in points:
        if point.one.kind == "none":
            draw_point(panels[0], point, point.cost)
    panels[0].set_ylabel("right answers, %")
    panels[0].set_xlabel(f"{COSTS[x]}, 100 % without reduction")
    panels[2].set_xlabel(f"image tokens, K: pruned in front of this layer, %: {COSTS[x]}")
    shown = [axes.get_legend_handles_labels() for axes in panels]
    legend = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=6)
    figure.suptitle(title_of(facts, timed=x == "time_ratio"), fontsize=10)
    return figure


def draw_lines(axes: Any, points: Sequence[Point]) -> None:
    """A point for each configuration by its cost, and a line for each kind of positions."""
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lines: dict[str, list[Point]] = {}
    for point in points:
        draw_point(axes, point, point.cost)
        if point.one.kind == "tome":
            lines.setdefault(point.one.way, []).append(point)
    for way, members in lines.items():
        _, color, _, beside = WAYS[way]
        places = [(point.cost, point.height) for point in members]
        axes.plot(*zip(*places, strict=True), color=color, linewidth=1.5, zorder=1)
        for point, place in zip(members, places, strict=True):
            axes.annotate(
                *(point.one.path, place, beside),
                textcoords="offset points",
                ha="left" if beside[0] > 0 else "right",
                va="bottom" if beside[1] > 0 else "top",
                color=color,
            )


def draw_columns(axes: Any, points: Sequence[Point]) -> None:
    """A column for each path of the tokens. Its cost is the least of its points: only vtu costs
    much more than the others."""
    columns: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.cost):
        columns.setdefault(point.one.path, []).append(point)
    for place, members in enumerate(columns.values()):
        heights = [point.height for point in members]
        axes.plot([place] * len(heights), heights, color="0.8", linewidth=2, zorder=1)
        for point in members:
            draw_point(axes, point, place + SHIFTS.get(point.one.way, 0))
    labels = [f"{path}  ({members[0].cost:.0%})" for path, members in columns.items()]
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.grid(visible=False, axis="x")


def draw_point(axes: Any, point: Point, place: float) -> None:
    """A point with its interval. DToMe's are hollow."""
    label, color, marker, _ = WAYS[point.one.way]
    hollow = point.one.kind == "dtome"
    below = point.height - 100 * point.row["low"]
    above = 100 * point.row["high"] - point.height
    axes.errorbar(
        *(place, point.height, [[below], [above]]),
        label=f"{label}, DToMe" if hollow else label,
        color=color,
        marker=marker,
        markerfacecolor="white" if hollow else color,
        markersize=10 if point.one.kind == "none" else 6,
        linestyle="",
        elinewidth=0.8,
        zorder=4 if point.one.way == "folded" else 3,
    )


def distance_plot(rows: Sequence[Line], every: Sequence[Configuration], facts: Line) -> Any:
    """The distance to the unreduced logits by merged tokens, a line for each kind of positions."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    named = {one.name: one for one in every}
    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    axes.set(xscale="log", yscale="log")
    lines: dict[str, list[Line]] = {}
    for row in rows:
        if row["kind"] == "tome":
            lines.setdefault(named[row["configuration"]].way, []).append(row)
    for way, members in lines.items():
        label, color, marker, _ = WAYS[way]
        tokens = [row["kept_tokens"] for row in members]
        below = [row["kl"] - row["kl_low"] for row in members]
        above = [row["kl_high"] - row["kl"] for row in members]
        axes.errorbar(
            *(tokens, [row["kl"] for row in members], [below, above]),
            label=label,
            color=color,
            marker=marker,
            elinewidth=0.8,
            zorder=4 if way == "folded" else 3,
        )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(MERGED, map(str, MERGED))
    axes.invert_xaxis()
    axes.set_xlabel("image tokens after merging")
    axes.set_ylabel("distance to no reduction (KL, nats)")
    if lines:
        axes.legend(loc="lower right")
    figure.suptitle(f"{facts['model']}: {rows[0]['kl_asked']} questions", fontsize=10)
    return figure


def title_of(facts: Line, timed: bool = False) -> str:
    asked = f"{facts['questions']} questions about {facts['scenes']} fresh scenes"
    return f"{facts['model']}: {asked}" + (f"\n{facts['timed_on']}" if timed else "")


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
    """Write CSV, JSON and plots of the complete configurations, and print tables."""
    path = args.out / "times.json"
    times = read_json(path) if path.exists() else {}
    answers, distances = (
        read_lines(args.out / f"{name}.jsonl") for name in ("answers", "distances")
    )
    rows, compared = summarize(
        answers, distances, every, args.n, min(args.n, args.kl_scenes), times
    )
    if not rows:
        print(f"no configuration has all {args.n} scenes yet (--n); what was found is kept")
        return
    write_csv(args.out / "study.csv", rows)
    content = {"settings": settings, "times": times, "rows": rows, "pairs": compared}
    replace_json(args.out / "study.json", content)
    print("\n".join(table(rows)))
    if compared:
        write_csv(args.out / "pairs.csv", compared)
        print("\n".join(("", *pair_table(compared))))
    if not args.no_plots:
        facts = {"model": settings["model"], "questions": rows[0]["asked"], "scenes": args.n}
        if times:
            used = times["machine"]
            threads = f", CPU threads: {used['threads']}" if used["device"] == "cpu" else ""
            facts["timed_on"] = f"{used['name']}{threads}, {times['dtype']}"
        draw_plots(rows, every, facts, args.out)


def table(rows: Sequence[Line]) -> Iterator[str]:
    """The lines to print about the configurations. FLOPs and time are ratios to `none`."""
    shown = [
        {
            "configuration": row["configuration"],
            "tokens": f"{row['kept_tokens']:.1f}",
            "right": f"{100 * row['accuracy']:.1f}",
            "95 % interval": f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            "KL": "" if row["kl"] is None else f"{row['kl']:.2g}",
            "FLOPs": "" if row["decoder_flops"] is None else f"{row['decoder_flops']:.3f}",
            "time": "" if row["time_ratio"] is None else f"{row['time_ratio']:.3f}",
        }
        for row in rows
    ]
    return table_lines(shown, left=("configuration",))


def pair_table(pairs: Sequence[Line]) -> Iterator[str]:
    """The lines to print about pairs, with differences in points."""
    shown = [
        {
            "first": pair["first"],
            "second": pair["second"],
            "points": f"{100 * pair['difference']:+.1f}",
            "95 % interval": f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}",
            "p": f"{pair['p']:.2g}",
        }
        for pair in pairs
    ]
    return table_lines(shown, left=("first", "second"))


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
