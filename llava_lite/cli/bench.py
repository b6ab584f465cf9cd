"""`llava-lite bench`: measure speed and memory."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_counts,
    add_flags,
    add_model_arguments,
    positive,
)
from llava_lite.cli.console import FAILED, OK
from llava_lite.cli.wanted import choose_download_bars, default_source
from llava_lite.config import PRESETS
from llava_lite.saving import check_output, replace_json

if TYPE_CHECKING:
    from llava_lite.bench.models import Settings

FASTVLM = tuple(name for name in PRESETS if name.startswith("fastvlm-"))
SOURCE_OPTIONS = ("base", "vision_tower", "revision", "offline", "download")
BENCH_HELP = """\
In every round, llava-lite, transformers (on the same weights) and the machine's limits take turns.
Figures are medians. A figure with a bound (for a 7B model in bfloat16 on a CPU) gets a row with
PASS or SHORT. Let the machine do nothing else meanwhile.

examples:
  llava-lite bench -m weights/llava-1.5-7b --against transformers --plot speed.png
  llava-lite bench --size 7b --layers 4 --against transformers
  llava-lite bench --size 7b --device cuda -o figures.json"""


def add_bench(commands: Any) -> None:
    summary = "measure speed and memory, beside the machine's limits and transformers"
    parser = add_command(commands, "bench", run_bench, "[-m MODEL]", summary, BENCH_HELP)
    add = parser.add_argument
    text = (
        "random weights of that size instead of a model (7b, 13b, tiny, "
        f"{', '.join(FASTVLM)}): speed does not depend on values"
    )
    add("--size", choices=["7b", "13b", "tiny", *FASTVLM], metavar="SIZE", help=text)
    text = "with --size: so many decoder layers"
    add("--layers", type=positive, metavar="N", help=text)
    text = "run the same weights through it, too"
    add("--against", choices=["transformers"], help=text)
    text = "presets to time (default: all)"
    add("--reductions", nargs="+", metavar="NAME", help=text)
    add_counts(parser, "--batch-sizes", (1, 2, 4, 8), "prompts at once")
    add_counts(parser, "--lengths", (128, 256, 512, 1024, 2048), "words of growing prompts")
    text = "rounds that count (default: 5)"
    add("--repeat", type=positive, default=5, metavar="N", help=text)
    add("--profile", action="store_true", help="say where the time of each part goes, too")
    output = parser.add_argument_group("output")
    add_flags(output, {"--json": "print one object, no table"})
    output.add_argument("-o", "--output", metavar="FILE", help="write that object there")
    output.add_argument("--plot", metavar="FILE", help="draw the main figures (.png)")
    flags = {
        "--strict": "exit code 1 where a bound is missed",
        "--quiet": "nothing on stderr but errors",
    }
    add_flags(output, flags)
    parser.set_defaults(no_pad=False, no_exif=False)
    add_model_arguments(parser, "measure quantized weights, too")


def run_bench(args: argparse.Namespace) -> int:
    """`llava-lite bench`."""
    check_arguments(args)
    from llava_lite.bench.models import BenchError
    from llava_lite.bench.plot import check_plot, save_plot
    from llava_lite.bench.report import table, to_dict
    from llava_lite.bench.run import bench
    from llava_lite.fast.allocator import keep_freed_memory

    if args.output:
        check_output(Path(args.output), BenchError)
    if args.plot:
        check_plot(Path(args.plot))
    keep_freed_memory()  # as the other commands do; transformers gains from it, too
    report = bench(bench_settings(args))
    content = to_dict(report)
    print(json.dumps(content) if args.json else "\n".join(table(report)))
    if args.output:
        replace_json(Path(args.output), content)
    if args.plot:
        save_plot(report, Path(args.plot))
    short = any(row["verdict"] == "SHORT" for row in content["rows"])
    return FAILED if args.strict and short else OK


def check_arguments(args: argparse.Namespace) -> None:
    """End with an error for options that exclude each other, and for an unknown reduction."""
    from llava_lite.reduction import REDUCTIONS

    for option in ("model", *SOURCE_OPTIONS):
        if args.size and getattr(args, option):
            name = option.replace("_", "-")
            args.parser.error(f"--size is for random weights: it does not go with --{name}")
    if args.layers and not args.size:
        args.parser.error("--layers goes with --size")
    unknown = [name for name in args.reductions or () if name not in REDUCTIONS]
    if unknown:
        args.parser.error(f"no reduction {unknown[0]!r}; there are {', '.join(REDUCTIONS)}")


def bench_settings(args: argparse.Namespace) -> "Settings":
    """The settings of the run."""
    from llava_lite.bench.models import Settings
    from llava_lite.fast.device import pick_device
    from llava_lite.reduction import REDUCTIONS

    if args.download:
        choose_download_bars(args.quiet)
    same = "layers dtype threads repeat quantize quiet compile profile"
    return Settings(
        source=None if args.size else default_source(args.model),
        options={name: getattr(args, name) for name in SOURCE_OPTIONS},
        size=args.size or "",
        device=str(pick_device(args.device)),
        reductions=tuple(dict.fromkeys(args.reductions or REDUCTIONS)),
        batch_sizes=tuple(dict.fromkeys(args.batch_sizes)),
        lengths=tuple(dict.fromkeys(args.lengths)),
        against=args.against is not None,
        **{name: getattr(args, name) for name in same.split()},
    )
