"""Arguments that several commands share: types that check one value, and groups of flags."""

import argparse
import re
from collections.abc import Callable
from typing import Any

from llava_lite.checkpoints.convert import METHODS
from llava_lite.cli.reduction import add_reduction_arguments
from llava_lite.inputs.prompt import ALIASES, TEMPLATES
from llava_lite.integrations.ray_batch import Cluster

EXIT_CODES = "exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted"
DTYPE_NAMES = {
    "auto": "auto",
    **dict.fromkeys(("float32", "fp32", "f32"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N")
    return int(found[1]), int(found[2])


def device(text: str) -> str:
    """A device name that torch knows."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return text


def dtype(text: str) -> str:
    """The full name of a dtype."""
    if text not in DTYPE_NAMES:
        names = ", ".join(dict.fromkeys(DTYPE_NAMES.values()))
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {names}")
    return DTYPE_NAMES[text]


def port(text: str) -> int:
    """A port number, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    usage: str,
    summary: str,
    details: str = "",
    within: str = "",
) -> argparse.ArgumentParser:
    """Add one subcommand (of the command `within`). The help ends with `details`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=" ".join(f"llava-lite {within} {name} {usage} [options]".split()),
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"{details}\n\n{EXIT_CODES}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_flags(group: argparse._ActionsContainer, texts: dict[str, str]) -> None:
    """Add flags without a value: help text by name."""
    for name, text in texts.items():
        group.add_argument(name, action="store_true", help=text)


def add_counts(
    parser: argparse.ArgumentParser, name: str, default: tuple[int, ...], text: str
) -> None:
    """Add an option that takes several numbers."""
    shown = " ".join(map(str, default)) or "none"
    text = f"{text} (default: {shown})"
    parser.add_argument(
        name, type=positive, nargs="+", default=list(default), metavar="N", help=text
    )


def add_image_sources(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "-i", "--image", nargs="+", action="extend", default=[], metavar="IMAGE", help=text
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, longest: str = "512") -> None:
    """Options of generation, reduction and image preparation. `longest`: default answer length."""
    add = parser.add_argument_group("generation").add_argument
    text = f"longest answer in tokens (default: {longest})"
    add("-n", "--max-new-tokens", type=int, metavar="N", help=text)
    text = "0 = greedy, the default"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    text = "sample from the likeliest P only"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    text = "sample from the K best only (0 = all)"
    add("--top-k", type=int, default=0, metavar="K", help=text)
    add("--seed", type=int, metavar="N", help="same seed, same answer")
    text = "end there; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=text)
    add("--system", metavar="TEXT", help="instead of the template's system text")
    text = f"prompt format: {', '.join(TEMPLATES)} (default: the model's)"
    add("--template", choices=[*TEMPLATES, *ALIASES], metavar="NAME", help=text)
    add_reduction_arguments(parser)
    add_square_arguments(parser.add_argument_group("image preparation"))


def add_square_arguments(group: argparse._ActionsContainer) -> None:
    """How an image becomes a square."""
    add_flags(
        group,
        {
            "--no-pad": "crop the middle square instead of padding to one",
            "--no-exif": "ignore the camera's rotation, as LLaVA does",
        },
    )


def add_notice_arguments(group: argparse._ArgumentGroup, stats: bool = True) -> None:
    """What the command prints to stderr."""
    if stats:
        add_flags(group, {"--stats": "token counts and timings on stderr"})
    add_flags(group, {"--quiet": "nothing on stderr but errors"})


def add_model_arguments(
    parser: argparse.ArgumentParser,
    quantize_help: str = "round the decoder's weights while loading; dynamic: its inputs, too",
) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    parser.set_defaults(tensor_parallel=False)  # only `generate` has the flag
    add = group.add_argument
    text = (
        "converted folder, official checkpoint of any layout, or hub id "
        "(default: $LLAVA_LITE_MODEL, else the embedded model)"
    )
    add("-m", "--model", metavar="MODEL", help=text)
    add_source_arguments(group)
    add_flags(group, {"--download": "fetch a hub id that is not here"})
    text = "auto (the default), cpu, cuda, cuda:1, mps"
    add("--device", type=device, default="auto", metavar="NAME", help=text)
    text = "auto (the file's, the default), float32, bfloat16, float16, or fp32, bf16, fp16"
    add("--dtype", type=dtype, default="auto", metavar="NAME", help=text)
    add("--quantize", choices=METHODS, help=quantize_help)
    text = "decode in steps of fixed shapes: a CUDA graph, elsewhere torch.compile"
    add_flags(group, {"--compile": text})
    add("--threads", type=positive, metavar="N", help="CPU threads")


def add_source_arguments(group: argparse._ActionsContainer) -> None:
    """Where the parts of a model come from, if its name does not say so."""
    for name, metavar, text in (
        ("--base", "DIR", "model below a LoRA adapter or a projector"),
        ("--vision-tower", "DIR", "CLIP folder or file for a checkpoint without one"),
        ("--revision", "NAME", "branch, tag or commit of a hub id"),
    ):
        group.add_argument(name, metavar=metavar, help=text)
    add_flags(group, {"--offline": "never use the network for a model"})


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that can run on a cluster."""
    group = parser.add_argument_group("many machines")
    add_flags(group, {"--ray": "run on Ray: on this machine, or with --ray-address"})
    text = "of a running cluster; auto finds the one on this machine"
    group.add_argument("--ray-address", metavar="ADDRESS", help=text)
    text = "models that work at once (default: one per GPU, else one; each has --threads)"
    group.add_argument("--ray-actors", type=positive, metavar="N", help=text)


def parse_cluster(args: argparse.Namespace) -> Cluster | None:
    """The cluster of the flags; None without --ray. Other Ray flags need --ray."""
    if args.ray:
        return Cluster(args.ray_address, args.ray_actors, args.threads)
    for name in ("ray_address", "ray_actors"):
        if getattr(args, name) is not None:
            args.parser.error(f"--{name.replace('_', '-')} needs --ray")
    return None
