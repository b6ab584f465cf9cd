"""`llava-lite bench`: measure speed and memory."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_counts,
    add_model_arguments,
    positive,
)
from llava_lite.cli.console import (
    FAILED,
    OK,
)
from llava_lite.cli.wanted import choose_download_bars, default_source
from llava_lite.saving import check_output, replace_json

if TYPE_CHECKING:
    from llava_lite.bench.run import Settings

BENCH_HELP = """\
Everything takes turns within every round: what is timed, transformers on the same weights, and the
machine's own limits. Figures are medians. Each that has a bound (of a 7B model in bfloat16 on a
CPU) is a row of its own with PASS or SHORT. Let the machine do nothing else meanwhile.

examples:
  llava-lite bench -m weights/llava-1.5-7b --against transformers --plot speed.png
  llava-lite bench --size 7b --layers 4 --against transformers
  llava-lite bench --size 7b --device cuda -o figures.json"""


def add_bench(commands: Any) -> None:
    summary = "measure speed and memory, beside the machine's limits and transformers"
    parser = add_command(commands, "bench", run_bench, "[-m MODEL]", summary, BENCH_HELP)
    parser.add_argument(
        "--size",
        choices=["7b", "13b", "tiny"],
        help="random weights of that size instead of a model: speed does not depend on values",
    )
    parser.add_argument(
        "--layers", type=positive, metavar="N", help="with --size: so many decoder layers"
    )
    parser.add_argument(
        "--against", choices=["transformers"], help="run the same weights through it, too"
    )
    parser.add_argument(
        "--reductions", nargs="+", metavar="NAME", help="presets to time (default: all)"
    )
    add_counts(parser, "--batch-sizes", (1, 2, 4, 8), "prompts at once")
    add_counts(parser, "--lengths", (128, 256, 512, 1024, 2048), "words of growing prompts")
    parser.add_argument(
        "--repeat", type=positive, default=5, metavar="N", help="rounds that count (default: 5)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="say where the time of each part goes, too"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one object, no table")
    output.add_argument("-o", "--output", metavar="FILE", help="write that object there")
    output.add_argument("--plot", metavar="FILE", help="draw the main figures (.png)")
    output.add_argument("--strict", action="store_true", help="exit code 1 where a bound is missed")
    output.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    parser.set_defaults(no_pad=False, no_exif=False)
    add_model_arguments(parser, "measure quantized weights, too")


def run_bench(args: argparse.Namespace) -> int:
    """`llava-lite bench`."""
    if args.size and args.model:
        args.parser.error("--size is for random weights: it does not go with --model")
    if args.layers and not args.size:
        args.parser.error("--layers goes with --size")
    for option in ("base", "vision_tower", "revision", "offline", "download"):
        if args.size and getattr(args, option):
            name = option.replace("_", "-")
            args.parser.error(f"--size is for random weights: it does not go with --{name}")
    from llava_lite.bench import report as bench_report
    from llava_lite.bench import run as bench
    from llava_lite.bench.run import BenchError
    from llava_lite.fast.allocator import keep_freed_memory
    from llava_lite.reduction import REDUCTIONS

    unknown = [name for name in args.reductions or () if name not in REDUCTIONS]
    if unknown:
        args.parser.error(f"no reduction {unknown[0]!r}; there are {', '.join(REDUCTIONS)}")
    if args.output:
        check_output(Path(args.output), BenchError)
    if args.plot:
        bench_report.check_plot(Path(args.plot))
    keep_freed_memory()  # as the other commands do; transformers has the same of it
    report = bench.bench(bench_settings(args))
    content = bench_report.to_dict(report)
    print(json.dumps(content) if args.json else "\n".join(bench_report.table(report)))
    if args.output:
        replace_json(Path(args.output), content)
    if args.plot:
        bench_report.save_plot(report, Path(args.plot))
    short = any(row["verdict"] == "SHORT" for row in content["rows"])
    return FAILED if args.strict and short else OK


def bench_settings(args: argparse.Namespace) -> "Settings":
    """What the arguments ask for."""
    from llava_lite.bench.run import Settings
    from llava_lite.fast.device import pick_device
    from llava_lite.reduction import REDUCTIONS

    if args.download:
        choose_download_bars(args.quiet)
    names = "base vision_tower revision offline download"
    return Settings(
        None if args.size else default_source(args.model),
        {name: getattr(args, name) for name in names.split()},
        args.size or "",
        args.layers,
        str(pick_device(args.device)),
        args.dtype,
        args.threads,
        args.repeat,
        tuple(dict.fromkeys(args.reductions or REDUCTIONS)),
        tuple(dict.fromkeys(args.batch_sizes)),
        tuple(dict.fromkeys(args.lengths)),
        args.against is not None,
        args.quantize,
        args.quiet,
        args.compile,
        args.profile,
    )
