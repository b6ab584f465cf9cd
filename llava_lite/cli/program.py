"""The program `llava-lite`: parse the arguments, run one subcommand, return the exit code.

Each subcommand is a function that takes the parsed arguments. Slow imports happen inside that
function, so help and usage errors appear at once.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from llava_lite.cli.arguments import EXIT_CODES
from llava_lite.cli.batch import add_batch
from llava_lite.cli.bench import add_bench
from llava_lite.cli.chat import add_chat
from llava_lite.cli.console import FAILED, INTERRUPTED, WRONG_USAGE, run_silently, say
from llava_lite.cli.convert import add_convert
from llava_lite.cli.download import add_download
from llava_lite.cli.eval import add_eval, with_command
from llava_lite.cli.generate import add_generate
from llava_lite.cli.info import add_info
from llava_lite.cli.inspect import add_inspect
from llava_lite.cli.serve import add_serve
from llava_lite.cli.thresholds import add_thresholds
from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.version import __version__

COMMANDS = (
    add_generate,
    add_chat,
    add_batch,
    add_convert,
    add_download,
    add_info,
    add_thresholds,
    add_inspect,
    add_eval,
    add_bench,
    add_serve,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with `argv` (default: `sys.argv`) and return its exit code.

    An error that a user can cause becomes one line on stderr."""
    argv = [hyphenate(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    rank = int(os.environ.get("RANK", "0")) if "--tensor-parallel" in argv else 0  # of torchrun
    return run_silently(rank, lambda: run_safely(argv)) if rank else run_safely(argv)


def run_safely(argv: Sequence[str]) -> int:
    """Run the program; turn interrupts and errors of the user into an exit code and one line."""
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
            drop_stdout()  # if stdout failed, it would fail again at exit
        return FAILED


def run(argv: Sequence[str]) -> int:
    """Parse the arguments and run the chosen subcommand."""
    try:
        args, unknown = build_parser().parse_known_args(with_command(argv))
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
    """True for errors that a user can cause. Any other error is a bug and keeps its traceback."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, LlavaLiteError | ValueError | OSError) or out_of_memory


def drop_stdout() -> None:
    """Discard the rest of stdout's buffer, so that Python does not complain at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hyphenate(argument: str) -> str:
    """Read --max_new_tokens as --max-new-tokens. A value after `=` stays unchanged."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
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
        metavar="COMMAND [...]",  # as wide as the longest name, or argparse breaks its line
        required=True,
    )
    for add_to in COMMANDS:
        add_to(commands)
    return parser
