"""The program `llava-lite`: arguments in, the answer on stdout, everything else on stderr.

Each subcommand is one function that takes the parsed arguments and returns the exit code. What is
slow to import is imported there, so that help and usage errors come at once.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite import (
    __version__,
    batch,
    convert,
    embedded_model,
    eval_cli,
    reduction_flags,
    serve_cli,
    thresholds,
)
from llava_lite.argument_types import device, dtype, positive, shard
from llava_lite.console import (
    INTERRUPTED,
    behind_first_rank,
    format_stats,
    one_line,
    print_pieces,
    say,
)
from llava_lite.errors import LlavaLiteError
from llava_lite.integrations import ray_batch
from llava_lite.prompt import ALIASES, TEMPLATES
from llava_lite.repl import CHAT_HELP, Repl

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_lite.batch import Row, Summary
    from llava_lite.bench import Settings
    from llava_lite.generation import Model
    from llava_lite.json_lines import JsonObject
    from llava_lite.ranks import Ranks
    from llava_lite.reduction import Reduction

OK, FAILED, WRONG_USAGE = 0, 1, 2

PICTURES = (".html", ".png")
EXIT_CODES = "exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted"

BATCH_HELP = """\
input:
  JSONL  one object a line: id (optional), image or images, prompt (or question, text)
  CSV    with a header naming the same fields
  folder every image in it, asked the one --prompt
  Image paths are relative to the folder of the input file. A row without an image is text only.

output: one JSON line per row, in order: id, prompt, image, answer or error, finish_reason, usage,
  and the reduction where one was asked for.
  A row that fails (bad image, prompt too long) gets an error line and costs no other row.
  After a crash or Ctrl-C the same command with --resume goes on where it stopped.

exit code 0 means that every row is answered, 1 that some rows failed.

examples:
  llava-lite batch questions.jsonl -o answers.jsonl --resume
  llava-lite batch photos/ -o captions.jsonl -p "Describe the image." --batch-size 16"""


BENCH_HELP = """\
Everything takes turns within every round: what is timed, transformers on the same weights, and the
machine's own limits. Figures are medians. Each that has a bound (of a 7B model in bfloat16 on a
CPU) is a row of its own with PASS or SHORT. Let the machine do nothing else meanwhile.

examples:
  llava-lite bench -m weights/llava-1.5-7b --against transformers --plot speed.png
  llava-lite bench --size 7b --layers 4 --against transformers
  llava-lite bench --size 7b --device cuda -o figures.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with `argv` (default: the process's own) and return its exit code.

    What a user can cause becomes one line on stderr."""
    argv = [hyphenated(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    rank = int(os.environ.get("RANK", "0")) if "--tensor-parallel" in argv else 0  # of torchrun
    return behind_first_rank(rank, lambda: speak(argv)) if rank else speak(argv)


def speak(argv: Sequence[str]) -> int:
    """`main` of the process that shows what it has to say."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack letters that answers have
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        drop_stdout()
        return FAILED
    except Exception as error:
        if "--debug" in argv or not is_users(error):
            raise
        say(f"error: {one_line(error)}")
        if isinstance(error, OSError):
            drop_stdout()  # if that is what failed, it would fail again at exit
        return FAILED


def run(argv: Sequence[str]) -> int:
    """Parse the arguments and run the chosen subcommand."""
    try:
        args, unknown = build_parser().parse_known_args(eval_cli.with_command(argv))
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {one_line(message)}")
            if getattr(args, "quiet", False):
                warnings.simplefilter("ignore")
            code: int = args.run(args)
            return code
    except SystemExit as end:  # argparse, after help or wrong usage
        return end.code if isinstance(end.code, int) else WRONG_USAGE


def is_users(error: Exception) -> bool:
    """True for errors that a user can cause; any other is a bug and keeps its traceback."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, LlavaLiteError | ValueError | OSError) or out_of_memory


def drop_stdout() -> None:
    """Send what is still in stdout's buffer nowhere, so that Python does not complain at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hyphenated(argument: str) -> str:
    """--max_new_tokens means --max-new-tokens; what follows a `=` stays as it is."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


# ---- arguments ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="llava-lite",
        usage="llava-lite COMMAND [options]",
        description="LLaVA-1.5: ask questions about images.",
        epilog=f"llava-lite COMMAND --help explains a command\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llava-lite {__version__}")
    commands = parser.add_subparsers(
        prog="llava-lite",
        metavar="COMMAND [...]",  # as wide as the longest, or argparse breaks that one's line
        required=True,
    )
    add_generate(commands)
    add_chat(commands)
    add_batch(commands)
    add_convert(commands)
    add_download(commands)
    add_info(commands)
    add_thresholds(commands)
    add_inspect(commands)
    add_eval(commands)
    add_bench(commands)
    add_serve(commands)
    return parser


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


def add_generate(commands: Any) -> None:
    details = """examples:
  llava-lite generate -i photo.jpg -p "What is in this picture?"
  llava-lite generate -i a.png b.png -p "What differs between <image> and <image>?"
  echo "Describe the image." | llava-lite generate -m weights/llava-1.5-7b -i photo.jpg --json"""
    parser = add_command(
        commands, "generate", run_generate, "-i IMAGE -p TEXT", "answer one prompt", details
    )
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the question (default: stdin)")
    add_image_sources(parser, "image to ask about: path, URL, or - for stdin; repeat for more")
    add_sampling_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer while it is written (default: when stdout is a terminal)",
    )
    output.add_argument(
        "--json", action="store_true", help="print one object: text, finish_reason, usage, timings"
    )
    output.add_argument(
        "--trace",
        action="store_true",
        help="with --json: what became of the image tokens, layer by layer, and what that cost",
    )
    add_notice_arguments(output)
    add_model_arguments(parser)
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="spread the decoder over several GPUs: torchrun --nproc-per-node 2 -m llava_lite "
        "generate --tensor-parallel ...",
    )


def add_chat(commands: Any) -> None:
    details = f"commands during the chat:\n{CHAT_HELP}\nCtrl-C stops an answer, not the program."
    parser = add_command(
        commands, "chat", run_chat, "-i IMAGE", "talk about images, turn by turn", details
    )
    add_image_sources(parser, "image of the first question: path or URL; repeat for more")
    add_sampling_arguments(parser)
    add_notice_arguments(parser.add_argument_group("output"))
    add_model_arguments(parser)


def add_batch(commands: Any) -> None:
    parser = add_command(
        commands, "batch", run_batch, "INPUT -o FILE", "answer many prompts from a file", BATCH_HELP
    )
    parser.add_argument("input", metavar="INPUT", help="JSONL file, CSV file, or folder of images")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="prompt of rows that have none")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--resume", action="store_true", help="skip rows that FILE already holds")
    rows.add_argument(
        "--retry-errors", action="store_true", help="with --resume: run rows again that failed"
    )
    rows.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="only every N-th row from the I-th on, I = 1..N, for N machines with an output each",
    )
    rows.add_argument(
        "--batch-size",
        type=positive,
        default=batch.DEFAULT_BATCH_SIZE,
        metavar="N",
        help=f"rows that run at once (default: {batch.DEFAULT_BATCH_SIZE})",
    )
    ray_batch.add_arguments(parser)
    add_sampling_arguments(parser)
    add_notice_arguments(parser.add_argument_group("output"), stats=False)
    add_model_arguments(parser)


def add_convert(commands: Any) -> None:
    summary = "write a checkpoint of any layout as a folder that loads fast"
    usage = "SOURCE DESTINATION"
    convert.add_arguments(add_command(commands, "convert", convert.run, usage, summary))


def add_download(commands: Any) -> None:
    details = "Prints the folder. A download that was cut off goes on where it stopped."
    summary = "fetch a checkpoint from the Hugging Face hub"
    parser = add_command(commands, "download", run_download, "REPO", summary, details)
    parser.add_argument("repo", metavar="REPO", help="hub id, such as llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: the hub's cache)")
    parser.add_argument("--offline", action="store_true", help="only look into the cache")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_info(commands: Any) -> None:
    summary = "show a model's architecture, tensors and memory needs"
    parser = add_command(commands, "info", run_info, "[MODEL]", summary)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder, file or hub id of any layout, or a preset name (default: as for generate)",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--presets",
        action="store_true",
        help="list the known architectures, and the presets of token reduction",
    )
    parser.add_argument(
        "--checksums", action="store_true", help="compare a converted folder with its manifest"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    add_source_arguments(parser)


def add_thresholds(commands: Any) -> None:
    details = """A thresholds.json in the model's folder is what --merge dtome and dymu-72 use.

example:
  llava-lite thresholds photos/ -m weights/llava-1.5-7b -o weights/llava-1.5-7b/thresholds.json"""
    summary = "find thresholds for merging image tokens by likeness (DToMe)"
    usage = "IMAGES -o FILE"
    parser = add_command(commands, "thresholds", run_thresholds, usage, summary, details)
    thresholds.add_arguments(parser)
    add_model_arguments(parser)


def add_inspect(commands: Any) -> None:
    details = """The page holds all it shows, without scripts; the PNG shows the same. Times are
those of a second run of the prompt: the first one of a process is slower.

examples:
  llava-lite inspect -i photo.jpg -p "What is this?" --reduction hybrid-72-36 -o run.html
  llava-lite inspect -i photo.jpg -p "What is this?" --fastv-k 0.5 -o run.png --force"""
    summary = "draw what became of a prompt's image tokens, and what that cost"
    usage = "-i IMAGE -p TEXT -o FILE"
    parser = add_command(commands, "inspect", run_inspect, usage, summary, details)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the question (default: stdin)")
    add_image_sources(parser, "image to ask about: path, URL, or - for stdin; repeat for more")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="picture to write: .html or .png"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    add_sampling_arguments(parser)
    add_notice_arguments(parser.add_argument_group("output"))
    add_model_arguments(parser)


def add_eval(commands: Any) -> None:
    summary = "measure how often answers are right: MMBench, COCO, POPE, VQA, your own data"
    usage = "WHAT FILES -o DIR"
    parser = add_command(
        commands, "eval", lambda _: WRONG_USAGE, usage, summary, eval_cli.EVAL_HELP
    )
    shared = (add_sampling_arguments, add_model_arguments, generation_options, parse_reduction)
    program = eval_cli.Program(add_command, *shared, load_model, load_options, default_source)
    eval_cli.add_commands(parser, program)


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


def add_serve(commands: Any) -> None:
    summary = "answer over HTTP as OpenAI's chat completions do"
    parser = add_command(commands, "serve", run_serve, "[-m MODEL]", summary, serve_cli.HELP)
    serve_cli.add_arguments(parser)
    reduction_flags.add_arguments(parser)
    add_model_arguments(parser)


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
    reduction_flags.add_arguments(parser)
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
        choices=convert.METHODS,
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


# ---- what the commands share -------------------------------------------------------------------


def load_model(args: argparse.Namespace) -> "Model":
    """The model of the arguments, prepared as they say."""
    import torch

    import llava_lite
    from llava_lite.allocator import keep_freed_memory

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.download:
        choose_download_bars(args.quiet)
    # With --quiet the source is named, and then `load` has no reason to say which it took.
    source = default_source(args.model) if args.quiet else args.model
    return llava_lite.load(source, **load_options(args))


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say to `llava_lite.load`, beside the source."""
    names = "device dtype download revision offline base vision_tower quantize compile"
    names += " tensor_parallel"
    options = {name: getattr(args, name) for name in names.split()}
    return options | {"pad": False if args.no_pad else None, "exif": not args.no_exif}


def joined_ranks(args: argparse.Namespace) -> "Ranks | None":
    """The processes that share the model, where the arguments ask for several."""
    if not args.tensor_parallel:
        return None
    from llava_lite.ranks import join

    return join()


def choose_download_bars(quiet: bool) -> None:
    """The hub's progress bars only at a terminal, and not when quiet."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def default_source(named: str | None) -> str:
    """What is loaded when no model is named."""
    return named or os.environ.get("LLAVA_LITE_MODEL") or str(embedded_model())


def parse_reduction(args: argparse.Namespace) -> "Reduction | None":
    """What the flags of token reduction ask for; what cannot be is wrong usage."""
    try:
        return reduction_flags.parse_reduction(args)
    except ValueError as error:
        parser: argparse.ArgumentParser = args.parser
        parser.error(str(error))


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Model.generate`. Raises before any model is loaded: SystemExit for flags of
    token reduction that cannot be, ValueError for other values."""
    from llava_lite.sampling import GenerationOptions

    names = "max_new_tokens temperature top_p top_k seed stop system template"
    options = {name: getattr(args, name) for name in names.split()}
    options["reduction"] = parse_reduction(args)
    GenerationOptions(**options)
    return options


def image_opener(args: argparse.Namespace) -> "Callable[[str], Image]":
    """Opens a path, a URL, or - for stdin, as the arguments say. Raises ImageError."""
    from llava_lite.image import load_image

    def open_image(source: str) -> "Image":
        return load_image(sys.stdin.buffer if source == "-" else source, exif=not args.no_exif)

    return open_image


# ---- generate ----------------------------------------------------------------------------------


def run_generate(args: argparse.Namespace) -> int:
    """`llava-lite generate`."""
    if args.json and args.stream:
        args.parser.error("--json prints one object at the end: it does not go with --stream")
    if args.trace and not args.json:
        args.parser.error("--trace is part of the object that --json prints")
    ranks = joined_ranks(args)
    prompt = read_prompt(args) if ranks is None else ranks.from_first(lambda: read_prompt(args))
    options = {**generation_options(args), "trace": args.trace}
    images = open_images(args, ranks)
    model = load_model(args)
    if args.stream or (args.stream is None and not args.json and sys.stdout.isatty()):
        answer = print_pieces(model.stream(images, prompt, **options))
    else:
        answer = model.generate(images, prompt, **options)
        print(json.dumps(answer.to_dict()) if args.json else answer)
    if args.stats:
        say(format_stats(answer))
    return OK


def open_images(args: argparse.Namespace, ranks: "Ranks | None") -> "list[Image | None]":
    """The images of the arguments; of several ranks only the first opens them, for all."""
    images: list[Image | None] = []

    def open_all() -> None:
        images.extend(map(image_opener(args), args.image))

    if ranks is None:
        open_all()
    else:
        ranks.from_first(open_all)
    return images or [None] * len(args.image)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt of the arguments, or all of stdin when that is no terminal."""
    prompt = args.prompt
    if args.image.count("-") > 1 or (prompt is None and "-" in args.image):
        args.parser.error("stdin can be one image or the prompt: give the prompt with -p")
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            args.parser.error("a prompt is needed: -p TEXT, or on stdin")
        prompt = sys.stdin.read().strip()
    if not prompt:
        args.parser.error("the prompt is empty")
    return prompt


# ---- chat --------------------------------------------------------------------------------------


def run_chat(args: argparse.Namespace) -> int:
    """`llava-lite chat`."""
    if "-" in args.image:
        args.parser.error("stdin holds the questions, it cannot be an image as well")
    options = generation_options(args)
    open_image = image_opener(args)
    images = [open_image(source) for source in args.image]
    chat = Repl(load_model(args).chat(**options), open_image, images, args.stats)
    if chat.interactive and not args.quiet:
        shown = f"about {', '.join(args.image)}" if args.image else "without an image (/image PATH)"
        say(f"Chat {shown}. /help lists the commands.")
    chat.run()
    return OK


# ---- batch -------------------------------------------------------------------------------------


def run_batch(args: argparse.Namespace) -> int:
    """`llava-lite batch`."""
    if args.retry_errors and not args.resume:
        args.parser.error("--retry-errors needs --resume")
    cluster = ray_batch.parse_cluster(args)
    options = generation_options(args)
    rows = batch.select_shard(batch.read_rows(args.input, args.prompt), args.shard)
    resume = {"resume": args.resume, "retry_errors": args.retry_errors}
    reduction = options["reduction"]
    plan = batch.plan(rows, args.output, **resume, reduction=reduction)  # problems show at once
    if plan.todo:
        summary = run_rows(args, rows, len(plan.todo), cluster, {**resume, **options})
    else:
        summary = batch.Summary(failed=plan.failed, present=plan.answered)
    if not args.quiet:
        say(format_summary(summary, args.output))
    return FAILED if summary.failed else OK


def run_rows(
    args: argparse.Namespace,
    rows: "list[Row]",
    total: int,
    cluster: "ray_batch.Cluster | None",
    options: dict[str, Any],
) -> "Summary":
    """Answer the rows, `total` of which are left to do, with a bar of progress."""
    options = {**options, "batch_size": args.batch_size}
    model = None if cluster else load_model(args)
    try:
        with Progress(total, args.quiet) as progress:
            options["on_record"] = progress
            if cluster:
                source = ray_batch.ModelSource(default_source(args.model), load_options(args))
                return ray_batch.run_batch(rows, args.output, source, cluster, **options)
            assert model is not None
            return batch.run_batch(
                model, rows, args.output, open_image=image_opener(args), **options
            )
    except KeyboardInterrupt:
        if not args.quiet:
            say(f"{args.output} keeps what was answered; --resume goes on from there")
        raise


class Progress:
    """A bar of finished rows on stderr, only where that is a terminal."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.failed, self.total = 0, total
        self.hidden = quiet or not sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit="row", file=sys.stderr, disable=self.hidden)
        return self

    def __call__(self, record: "JsonObject") -> None:
        if "error" in record:
            self.failed += 1
            self.bar.set_postfix(failed=self.failed, refresh=False)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def format_summary(summary: "Summary", output: str) -> str:
    """What a batch did, in one line, or two if rows failed."""
    parts = [f"{summary.answered} answered", f"{summary.failed} failed"]
    if summary.present:
        parts.insert(0, f"{summary.present} were there")
    text = f"{output}: {', '.join(parts)}"
    if summary.first_error:
        first = summary.first_error
        text += f"\nfirst to fail: {first['id']!r}: {first['error']}"
    return text + ("\n(--resume --retry-errors runs them again)" if summary.failed else "")


# ---- thresholds --------------------------------------------------------------------------------


def run_thresholds(args: argparse.Namespace) -> int:
    """`llava-lite thresholds`."""
    return thresholds.run(args, load_model(args))


# ---- inspect -----------------------------------------------------------------------------------


def run_inspect(args: argparse.Namespace) -> int:
    """`llava-lite inspect`."""
    if Path(args.output).suffix.lower() not in PICTURES:
        args.parser.error(f"{args.output}: the picture must end in {' or '.join(PICTURES)}")
    if not args.image:
        args.parser.error("an image is needed: -i IMAGE")
    prompt = read_prompt(args)
    from llava_lite import inspection

    output = inspection.check_output(args.output, args.force)
    options = generation_options(args)
    images = [image_opener(args)(source) for source in args.image]
    seen = inspection.inspect(load_model(args), images, prompt, **options)
    print(seen.answer, flush=True)  # first: it is worth more than its picture
    seen.save(output, args.force)
    if args.stats:
        say(format_stats(seen.answer))
    if not args.quiet:
        say(f"{args.output}: written")
    return OK


# ---- bench -------------------------------------------------------------------------------------


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
    from llava_lite import bench, bench_report
    from llava_lite.allocator import keep_freed_memory
    from llava_lite.files import replace_json
    from llava_lite.reduction import REDUCTIONS

    unknown = [name for name in args.reductions or () if name not in REDUCTIONS]
    if unknown:
        args.parser.error(f"no reduction {unknown[0]!r}; there are {', '.join(REDUCTIONS)}")
    if args.output:
        bench_report.check_output(Path(args.output))
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
    import llava_lite
    from llava_lite.bench import Settings
    from llava_lite.reduction import REDUCTIONS

    if args.download:
        choose_download_bars(args.quiet)
    names = "base vision_tower revision offline download"
    return Settings(
        None if args.size else default_source(args.model),
        {name: getattr(args, name) for name in names.split()},
        args.size or "",
        args.layers,
        str(llava_lite._pick_device(args.device)),
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


# ---- serve -------------------------------------------------------------------------------------


def run_serve(args: argparse.Namespace) -> int:
    """`llava-lite serve`."""
    serve_cli.require_packages()
    settings = serve_cli.settings(args, parse_reduction(args))
    return serve_cli.run(args, settings, lambda: load_model(args))


# ---- download, info ----------------------------------------------------------------------------


def run_download(args: argparse.Namespace) -> int:
    """`llava-lite download`."""
    from llava_lite.download import download

    choose_download_bars(args.quiet)
    folder = download(args.repo, revision=args.revision, offline=args.offline, destination=args.out)
    print(folder)
    return OK


def show_presets(as_json: bool) -> int:
    """`llava-lite info --presets`."""
    from llava_lite import info
    from llava_lite.config import PRESETS

    if as_json:
        models = {name: info.describe_preset(name).to_dict() for name in PRESETS}
        for content in models.values():
            del content["tensors"]
        print(json.dumps({"models": models, "reductions": info.describe_reductions()}))
    else:
        print(f"{info.format_presets()}\n\n{info.format_reductions()}")
    return OK


def run_info(args: argparse.Namespace) -> int:
    """`llava-lite info`."""
    from llava_lite import info
    from llava_lite.config import PRESETS
    from llava_lite.download import resolve

    if args.presets:
        return show_presets(args.json)
    named = default_source(args.model)
    if named in PRESETS and not Path(named).exists():
        described = info.describe_preset(named)
    else:
        path = resolve(
            named, revision=args.revision, offline=args.offline, vision_tower=args.vision_tower
        )
        described = info.describe_source(path, args.base, args.vision_tower)
    verified = info.verify_checksums(described) if args.checksums else None
    if args.json:
        print(json.dumps({**described.to_dict(), "verified_tensors": verified}))
    else:
        print(info.format_info(described, args.tensors))
        if verified is not None:
            print(f"\nchecksums: all {verified} tensors equal the manifest")
    return OK
