#!/usr/bin/env python3
"""Time and memory, side by side in one run.

    python tools/benchmark.py                  # what reductions save: 7B widths, 4 layers, bf16
    python tools/benchmark.py --size tiny --repeat 2
    python tools/benchmark.py --device cuda --json figures.json     # everything, twice

`all`, the default on a GPU, is `llava-lite bench` with random weights of all layers. It includes
int4 weights if the device has an operator for them, and transformers if it is installed. On a GPU a
second run uses compiled steps (`--compile`) and writes `figures-compiled.json`.

`reduction` measures what each kind of token reduction saves, with the cases of `llava-lite bench`:
the vision tower, the prefill of a prompt with one image, one decoded token, and the bytes of the KV
cache. Weights are random: speed does not depend on their values. Figures are medians over the
rounds, and ratios to the same part without reduction.

Four decoder layers fit anywhere. The times of the full and the pruned layers are extrapolated to
all layers of the model. The table goes to stdout, progress to stderr.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from operator import sub
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llava_lite.bench.cases import OURS, Contender, Work, prompt_cases, random_pixels, walk_all
from llava_lite.bench.machine import Case, Measurement, time_cases
from llava_lite.bench.models import BenchError, Settings, open_model
from llava_lite.bench.targets import FEWEST_ROUNDS, Row
from llava_lite.cli import program as cli
from llava_lite.cli.arguments import positive
from llava_lite.config import LLAVA_1_5_7B
from llava_lite.fast.device import machine, pick_device, synchronize
from llava_lite.fast.quantize import check_operator
from llava_lite.generation.model import Model
from llava_lite.reduction import REDUCTIONS, ToMe
from llava_lite.saving import check_output
from llava_lite.tables import table_lines

TITLES = {"tower": "vision tower", "prefill": "decoder prefill", "decode": "one decoded token"}
MERGES = {"keep=288": ToMe(keep=288), "keep=144": ToMe(keep=144), "r=21": ToMe(r=21)}
MERGES |= {"keep=72": ToMe(keep=72)}  # of the tower
# At most this share of the time of another setting, for the 7B model in bfloat16 on a CPU.
BOUNDS = {
    ("prefill", "tome-72-logical"): ("none", 0.28),
    ("prefill", "hybrid-72-36"): ("none", 0.25),
    ("tower", "keep=72"): ("none", 0.65),
    # Folding costs no more than dropping.
    ("prefill", "folded-72"): ("tome-72-logical", 1.05),
    ("prefill", "folded-72-36"): ("hybrid-72-36", 1.05),
    ("decode", "folded-72-36"): ("hybrid-72-36", 1.05),
}


# ---- token reduction ---------------------------------------------------------------------------


def make_cases(model: Model) -> list[Case]:
    """Every setting of the tower, the prefill and a decoded token."""
    one = Contender(OURS, model, Work.of(model.llava))
    tower = partial(model.llava.vision, random_pixels(one.work, model.llava.device))
    steps = {name: merge.steps(model.config.vision) for name, merge in MERGES.items()}
    cases = [Case(OURS, "tower", "none", tower)]
    cases += [Case(OURS, "tower", name, partial(tower, merged)) for name, merged in steps.items()]
    walks, _ = walk_all(model, [name for name in REDUCTIONS if name != "dymu-72"])
    prompts = [case for name, walked in walks.items() for case in prompt_cases(one, name, walked)]
    return cases + [case for case in prompts if case.part in ("prefill", "decode")]


def measure_reduction(
    model: Model, repeat: int, judged: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The figures of every setting, and the prefill ratios extrapolated to all layers. judged:
    bounds hold."""
    llava, cases = model.llava, make_cases(model)
    _, measured = time_cases(cases, repeat, llava.dtype, str(llava.device), hidden=False)
    seconds = {(row.part, row.setting): row.seconds for row in measured}
    figures = [make_figure(row, seconds, judged) for row in measured]
    prefill = [case for case in cases if case.part == "prefill"]
    return figures, extrapolate(time_layers(llava.decoder.layers, prefill, repeat))


def make_figure(
    row: Measurement, seconds: dict[tuple[str, str], float], judged: bool
) -> dict[str, Any]:
    """A measurement, its ratio to no reduction, the bound with the setting that the bound compares
    to (None: no bound), and the verdict. seconds: of every part and setting."""
    figure = {**asdict(row), "ratio": row.seconds / seconds[row.part, "none"]}
    against, bound = BOUNDS.get((row.part, row.setting), (None, None)) if judged else (None, None)
    if against is None or bound is None:
        return {**figure, "against": None, "bound": None, "verdict": ""}
    ratio = row.seconds / seconds[row.part, against]
    verdict = f"{Row('', ratio, bound, False).verdict}: {ratio:.2f} of {against}, at most {bound}"
    return {**figure, "against": against, "bound": bound, "verdict": verdict}


def time_layers(
    layers: Sequence[torch.nn.Module], cases: Sequence[Case], repeat: int
) -> dict[str, list[list[float]]]:
    """By setting: seconds of each layer in `repeat` rounds, in which all cases take turns."""
    device, marks = str(next(layers[0].parameters()).device), []

    def mark(*_: object) -> None:
        synchronize(device)
        marks.append(perf_counter())

    hooks = [layer.register_forward_pre_hook(mark) for layer in layers]
    hooks += [layer.register_forward_hook(mark) for layer in layers]
    rounds: dict[str, list[list[float]]] = {case.setting: [] for case in cases}
    for _ in range(repeat):
        for case in cases:
            marks.clear()
            case.run()
            rounds[case.setting].append(list(map(sub, marks[1::2], marks[::2])))
    for hook in hooks:
        hook.remove()
    return rounds


def extrapolate(layers: dict[str, list[list[float]]]) -> dict[str, float]:
    """Ratio of the decoder's time to no reduction, for all layers of the model. A layer costs as
    much as the measured layers with the same image tokens, on average."""
    num_layers = LLAVA_1_5_7B.text.num_layers
    totals = {}
    for name, rounds in layers.items():
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        fastv = REDUCTIONS[name].fastv
        pruned = [] if fastv is None else [layer for layer in fastv.amounts if layer < len(medians)]
        starts, stops = [0, *pruned], [*pruned, num_layers]
        totals[name] = sum(
            statistics.mean(medians[start:stop]) * (stop - start)
            for start, stop in zip(starts, stops, strict=True)
        )
    return {name: total / totals["none"] for name, total in totals.items()}


def table(figures: list[dict[str, Any]], extrapolated: dict[str, float]) -> Iterator[str]:
    """The lines to print."""
    for part in dict.fromkeys(row["part"] for row in figures):
        yield f"\n{TITLES[part]}"
        rows = [row for row in figures if row["part"] == part]
        yield from table_lines([make_cells(row, extrapolated) for row in rows], ("", "verdict"))


def make_cells(figure: dict[str, Any], extrapolated: dict[str, float]) -> dict[str, str]:
    """The cells of a figure, by title of the column."""
    low, high = (1000 * value for value in figure["quartiles"])
    part, setting = figure["part"], figure["setting"]
    return {
        "": f"  {setting}",
        "ms": f"{1000 * figure['seconds']:.1f}",
        "quartiles": f"{low:.1f}-{high:.1f}",
        "ratio": f"{figure['ratio']:.3f}",
        "of 32 layers": f"{extrapolated[setting]:.3f}" if part == "prefill" else "",
        "KV cache": f"{figure['kv_bytes'] / 2**20:.1f} MiB" if part == "decode" else "",
        "verdict": figure["verdict"],
    }


def bench_reduction(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit code."""
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(size=args.size, layers=args.layers, device=args.device, dtype=args.dtype)
    with torch.inference_mode():
        model = open_model(settings)
        here = args.size, args.dtype, args.device
        judged = here == ("7b", "bfloat16", "cpu") and args.repeat >= FEWEST_ROUNDS
        figures, extrapolated = measure_reduction(model, args.repeat, judged)
    facts = machine(args.device, torch.get_num_threads())
    name = model.config.name
    print(f"{name} widths, {args.layers} layers, {args.dtype}, medians of {args.repeat} on")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n".join(table(figures, extrapolated)))
    if args.json:
        content = {
            "machine": facts,
            "settings": {"size": args.size, "layers": args.layers, "dtype": args.dtype},
            "repeat": args.repeat,
            "measurements": figures,
            "extrapolated_prefill_ratios": extrapolated,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(args.strict and any(row["verdict"].startswith("SHORT") for row in figures))


# ---- everything --------------------------------------------------------------------------------


def bench_everything(args: argparse.Namespace) -> int:
    """`llava-lite bench`, on a GPU a second time in compiled steps; the exit code."""
    words = bench_arguments(args)
    output = ["-o", str(args.json)] if args.json else []
    code = cli.main([*words, *output])
    if code == 0 and args.device.startswith("cuda"):
        if args.json:
            output[1] = str(args.json.with_stem(f"{args.json.stem}-compiled"))
        code = cli.main([*words, "--compile", *output])
    return code


def bench_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of `llava-lite bench`, without the output."""
    words = ["bench", "--strict"] if args.strict else ["bench"]
    for name in ("size", "device", "dtype", "layers", "threads", "repeat"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name}", str(value)]
    if find_spec("transformers") is None:
        print("without transformers: it is not installed", file=sys.stderr)
    else:
        words += ["--against", "transformers"]
    try:
        check_operator("int4", torch.device(args.device), getattr(torch, args.dtype))
    except ValueError as error:
        print(f"without int4: {error}", file=sys.stderr)
    else:
        words += ["--quantize", "int4"]
    return words


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--what", choices=["reduction", "all"], help="default: all on a GPU, else reduction")
    add("--size", choices=["7b", "tiny"], default="7b", help="widths of the model")
    add("--layers", type=positive, help="decoder layers (default: 4; of all: all)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--device", default="cpu")
    add("--threads", type=positive, help="CPU threads")
    add("--repeat", type=positive, default=7, metavar="N", help="rounds")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add("--strict", action="store_true", help="exit code 1 where a bound is missed")
    args = parser.parse_args(argv)
    try:
        args.device = str(pick_device(args.device))
        if args.json:
            check_output(args.json, BenchError)
    except (ValueError, BenchError) as error:
        parser.error(str(error))
    if (args.what or ("all" if args.device.startswith("cuda") else "reduction")) == "all":
        return bench_everything(args)
    args.layers = 4 if args.layers is None else args.layers
    if args.layers < 4:
        parser.error("needs at least 4 layers, of which one is pruned")
    return bench_reduction(args)


if __name__ == "__main__":
    sys.exit(main())
