#!/usr/bin/env python3
"""How the time of a linear layer grows with the number of rows, in every number format.

    python tools/benchmark_rows.py
    python tools/benchmark_rows.py --formats bfloat16 int4 --out 11008 --width 4096 --json rows.json

A decoded token is one row, a batch is a few, a prompt is hundreds. Layers multiply as in a loaded
model: the kernels are chosen on this machine (fast/kernels.py). Formats and numbers of rows take
turns. Figures are medians over the rounds.

A row must not become expensive where another kernel takes over. So the time per row may rise by at
most half from one number of rows to the next. The table goes to stdout, progress to stderr.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from llava_lite.bench.machine import Run, time_in_turns
from llava_lite.bench.models import BenchError
from llava_lite.cli.arguments import positive
from llava_lite.fast.device import machine
from llava_lite.fast.kernels import choose_kernels
from llava_lite.fast.quantize import METHODS
from llava_lite.fast.timings import numba_version
from llava_lite.saving import check_output
from llava_lite.tables import table_lines

# int4-dynamic runs with numba only.
METHODS_HERE = [name for name in METHODS if name != "int4-dynamic" or numba_version()]
FORMATS = ("bfloat16", "float16", "float32", *METHODS_HERE)
# Powers of two, and one row more where another kernel may take over.
ROWS = (1, 2, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256, 512, 1024, 2048)
HIGHEST_RISE = 1.5  # of the time per row, from one number of rows to the next


def make_layer(name: str, out: int, width: int) -> nn.Module:
    """A linear layer with random weights in a format, as a loaded model has it. Quantized layers
    take rows in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator) * width**-0.5
    if name in METHODS:
        kind = METHODS[name]
        model = nn.Sequential(kind(kind.round(weight, torch.bfloat16)))
    else:
        layer = nn.Linear(width, out, bias=False, dtype=getattr(torch, name), device="meta")
        layer.weight = nn.Parameter(weight.to(getattr(torch, name)), requires_grad=False)
        model = nn.Sequential(layer)
    choose_kernels(model)
    return model


def make_runs(formats: Sequence[str], out: int, width: int) -> dict[tuple[str, str], Run]:
    """One product for every format and number of rows."""
    runs: dict[tuple[str, str], Run] = {}
    for name in formats:
        layer = make_layer(name, out, width)
        dtype = torch.bfloat16 if name in METHODS else getattr(torch, name)
        for rows in ROWS:
            runs[name, str(rows)] = partial(layer, torch.randn(rows, width).to(dtype))
    return runs


def find_rise(seconds: Sequence[float]) -> tuple[float, int]:
    """The highest ratio of the time per row to that of the number of rows before, and the number of
    rows where it is. seconds: for each number in ROWS."""
    per_row = [value / rows for value, rows in zip(seconds, ROWS, strict=True)]
    ratios = [after / before for before, after in zip(per_row, per_row[1:], strict=False)]
    highest = max(ratios)
    return highest, ROWS[ratios.index(highest) + 1]


def judge(rise: float, rows: int) -> str:
    """The verdict on the highest rise."""
    verdict = "PASS" if rise <= HIGHEST_RISE else "SHORT"
    return f"{verdict}: {rise:.2f} at {rows} rows, at most {HIGHEST_RISE}"


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    add("--out", type=positive, default=4096, metavar="N", help="out_features (default: 4096)")
    add("--width", type=positive, default=4096, metavar="K", help="in_features (default: 4096)")
    add("--threads", type=positive, help="CPU threads")
    add("--repeat", type=positive, default=7, metavar="N", help="rounds")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add("--strict", action="store_true", help="exit code 1 where a bound is missed")
    args = parser.parse_args(argv)
    try:
        if args.json:
            check_output(args.json, BenchError)
    except BenchError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        runs = make_runs(args.formats, args.out, args.width)
        seconds = time_in_turns(runs, args.repeat, "cpu", hidden=False)
    curves = {name: [median(seconds[name, str(n)]) for n in ROWS] for name in args.formats}
    rises = {name: find_rise(curve) for name, curve in curves.items()}
    facts = machine("cpu", torch.get_num_threads())
    print(f"a weight of {args.out} x {args.width}, medians of {args.repeat} rounds on")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\nmilliseconds for all rows")
    table = [
        {"rows": str(rows)} | {name: f"{1000 * curves[name][i]:.2f}" for name in args.formats}
        for i, rows in enumerate(ROWS)
    ]
    print("\n".join(table_lines(table, ())))
    print("\nhighest rise of the time per row")
    verdicts = [{"format": name, "verdict": judge(*rise)} for name, rise in rises.items()]
    print("\n".join(table_lines(verdicts, ("format", "verdict"))))
    if args.json:
        content = {"machine": facts, "rows": ROWS, "seconds": curves, "rises": rises}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(args.strict and any(rise > HIGHEST_RISE for rise, _ in rises.values()))


if __name__ == "__main__":
    sys.exit(main())
