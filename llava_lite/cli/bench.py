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
GGUF_FORMATS = ("bf16", "f16", "q8_0", "q4_k")
DEFAULT_FORMATS = ("bf16", "q8_0", "q4_k")
SOURCE_OPTIONS = ("base", "vision_tower", "revision", "offline", "download")
BENCH_HELP = """\
In every round, llava-lite, transformers (on the same weights), llama.cpp (on random weights of the
same shapes) and the machine's limits take turns.
Figures are medians. A figure with a bound (for a 7B model in bfloat16 on a CPU) gets a row with
PASS or SHORT. Let the machine do nothing else meanwhile. Ctrl-C ends the rounds, and prints the
table of everything that was measured until then.

examples:
  llava-lite bench -m weights/llava-1.5-7b --against transformers --plot speed.png
  llava-lite bench --size 7b --quick --against transformers llamacpp
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
    text = "with --size: a table within three minutes, from sizes that fit this machine"
    add("--quick", action="store_true", help=text)
    text = "compare with transformers (the same weights) and llama.cpp (the same shapes)"
    add("--against", nargs="+", choices=["transformers", "llamacpp"], default=[], help=text)
    text = f"formats of llama.cpp: {', '.join(GGUF_FORMATS)} (default: bf16 q8_0 q4_k)"
    add("--gguf-formats", nargs="+", choices=GGUF_FORMATS, metavar="FORMAT", help=text)
    text = "keep the files of llama.cpp in this folder, and use them again"
    add("--gguf-folder", metavar="DIR", help=text)
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
    if report.interrupted:
        raise KeyboardInterrupt
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
    if args.quick and not args.size:
        args.parser.error("--quick goes with --size: it chooses the layers of random weights")
    for option in ("gguf_formats", "gguf_folder"):
        if getattr(args, option) and "llamacpp" not in args.against:
            name = option.replace("_", "-")
            args.parser.error(f"--{name} goes with --against llamacpp")
    unknown = [name for name in args.reductions or () if name not in REDUCTIONS]
    if unknown:
        args.parser.error(f"no reduction {unknown[0]!r}; there are {', '.join(REDUCTIONS)}")


def bench_settings(args: argparse.Namespace) -> "Settings":
    """The settings of the run."""
    from llava_lite.bench.models import Settings
    from llava_lite.bench.quick import QUICK_REDUCTIONS
    from llava_lite.fast.device import pick_device
    from llava_lite.reduction import REDUCTIONS

    if args.download:
        choose_download_bars(args.quiet)
    same = "layers dtype threads repeat quantize quiet compile profile quick gguf_folder"
    formats = args.gguf_formats or DEFAULT_FORMATS
    presets = QUICK_REDUCTIONS if args.quick else REDUCTIONS
    return Settings(
        source=None if args.size else default_source(args.model),
        options={name: getattr(args, name) for name in SOURCE_OPTIONS},
        size=args.size or "",
        device=str(pick_device(args.device)),
        reductions=tuple(dict.fromkeys(args.reductions or presets)),
        batch_sizes=tuple(dict.fromkeys(args.batch_sizes)),
        lengths=tuple(dict.fromkeys(args.lengths)),
        against="transformers" in args.against,
        llamacpp=tuple(dict.fromkeys(formats)) if "llamacpp" in args.against else (),
        **{name: getattr(args, name) for name in same.split()},
    )
