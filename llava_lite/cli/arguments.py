"""Arguments that several commands share: types that check one value, and groups of flags."""

import argparse
import re
from collections.abc import Callable
from typing import Any

from llava_lite.checkpoints.convert import METHODS
from llava_lite.cli.reduction import add_reduction_arguments
from llava_lite.inputs.prompt import ALIASES, TEMPLATES
from llava_lite.integrations.ray_batch import Cluster

DTYPES = {
    "auto": "auto",
    **dict.fromkeys(("float32", "fp32", "f32"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), "float16"),
}


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on."""
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
    """A dtype's full name."""
    if text not in DTYPES:
        names = ", ".join(dict.fromkeys(DTYPES.values()))
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {names}")
    return DTYPES[text]


def port(text: str) -> int:
    """A port, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


EXIT_CODES = "exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted"


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    usage: str,
    summary: str,
    details: str = "",
    within: str = "",
) -> argparse.ArgumentParser:
    """One subcommand, `within` another one; `details` stand below its arguments in the help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=" ".join(f"llava-lite {within}{name} {usage} [options]".split()),
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"{details}\n\n{EXIT_CODES}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_counts(
    parser: argparse.ArgumentParser, name: str, default: tuple[int, ...], text: str
) -> None:
    """An option of several numbers."""
    shown = " ".join(map(str, default)) or "none"
    parser.add_argument(
        name,
        type=positive,
        nargs="+",
        default=list(default),
        metavar="N",
        help=f"{text} (default: {shown})",
    )


def add_image_sources(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "-i", "--image", nargs="+", action="extend", default=[], metavar="IMAGE", help=text
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, longest: str = "512") -> None:
    """How answers are generated (`longest` by default), and what stands around the prompt."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n",
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest answer in tokens (default: {longest})",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 = greedy, the default"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P only"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K best only (0 = all)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    group.add_argument("--system", metavar="TEXT", help="instead of the template's system text")
    group.add_argument(
        "--template",
        choices=[*TEMPLATES, *ALIASES],
        metavar="NAME",
        help=f"prompt format: {', '.join(TEMPLATES)} (default: the model's)",
    )
    add_reduction_arguments(parser)
    images = parser.add_argument_group("image preparation")
    images.add_argument(
        "--no-pad", action="store_true", help="crop the middle square instead of padding to one"
    )
    images.add_argument(
        "--no-exif", action="store_true", help="ignore the camera's rotation, as LLaVA does"
    )


def add_notice_arguments(group: argparse._ArgumentGroup, stats: bool = True) -> None:
    """What is said on stderr."""
    if stats:
        group.add_argument(
            "--stats", action="store_true", help="token counts and timings on stderr"
        )
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def add_model_arguments(
    parser: argparse.ArgumentParser,
    quantize_help: str = "round the decoder's weights to so many bits while loading",
) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    parser.set_defaults(tensor_parallel=False)  # only `generate` has it
    group.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="converted folder, official checkpoint of any layout, or hub id "
        "(default: $LLAVA_LITE_MODEL, else the embedded model)",
    )
    add_source_arguments(group)
    group.add_argument("--download", action="store_true", help="fetch a hub id that is not here")
    group.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="NAME",
        help="auto (the default), cpu, cuda, cuda:1, mps",
    )
    group.add_argument(
        "--dtype",
        type=dtype,
        default="auto",
        metavar="NAME",
        help="auto (the file's, the default), float32, bfloat16, float16, or fp32, bf16, fp16",
    )
    group.add_argument(
        "--quantize",
        choices=METHODS,
        help=quantize_help,
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="decode in steps of fixed shapes: a CUDA graph, elsewhere torch.compile",
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def add_source_arguments(group: argparse._ActionsContainer) -> None:
    """What a model's name alone does not say."""
    group.add_argument("--base", metavar="DIR", help="model below a LoRA adapter or a projector")
    group.add_argument(
        "--vision-tower", metavar="DIR", help="CLIP folder or file for a checkpoint without one"
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_true", help="never use the network for a model")


# ---- command line --------------------------------------------------------------------------------


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that can run on a cluster."""
    group = parser.add_argument_group("many machines")
    group.add_argument(
        "--ray", action="store_true", help="run on Ray: on this machine, or with --ray-address"
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running cluster; auto finds that of here"
    )
    group.add_argument(
        "--ray-actors",
        type=positive,
        metavar="N",
        help="models that work at once (default: one per GPU, else one; --threads are of each)",
    )


def parse_cluster(args: argparse.Namespace) -> Cluster | None:
    """What the flags say; None without --ray. The others without it are wrong usage."""
    if args.ray:
        return Cluster(args.ray_address, args.ray_actors, args.threads)
    for name in ("ray_address", "ray_actors"):
        if getattr(args, name) is not None:
            args.parser.error(f"--{name.replace('_', '-')} needs --ray")
    return None
