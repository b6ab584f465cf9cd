"""Exit codes, and how the program prints: answers to stdout, notices to stderr.

Imports nothing heavy: usage errors appear before torch is loaded.
"""

import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer

OK, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
GRACE = 10.0  # seconds


def say(text: str) -> None:
    """Print one line for the user to stderr."""
    print(text, file=sys.stderr, flush=True)


def run_silently(rank: int, program: Callable[[], int]) -> int:
    """Run the program on a rank above 0 (see ranks.py): only rank 0 prints.

    Most failures happen on every rank, and torchrun kills all ranks when one exits. So a failing
    rank waits for rank 0 to print the error. If the rank still runs after `GRACE` seconds, it
    prints its own error."""
    printed = io.StringIO()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(printed):
        try:
            code = program()
        except Exception:
            traceback.print_exc()
            code = FAILED
    if code not in (OK, INTERRUPTED):
        time.sleep(GRACE)
        say(f"rank {rank}: {printed.getvalue().rstrip()}")
    return code


def print_pieces(pieces: "Generator[str, None, Answer]") -> "Answer":
    """Print the pieces of an answer as they arrive. The line always ends with a newline."""
    try:
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                return end.value
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        pieces.close()
        print(flush=True)


def format_stats(answer: "Answer") -> str:
    """Token counts and timings in one line."""
    usage, timings = answer.usage, answer.timings
    parts = ("preprocess", "vision", "prefill", "decode")
    times = ", ".join(f"{part} {timings.get(part, 0.0):.2f} s" for part in parts)
    stages = (usage.get(name, 0) for name in ("image_patches", "image_tokens", "kept_image_tokens"))
    image_tokens = " -> ".join(dict.fromkeys(map(str, stages)))
    return (
        f"[{usage.get('prompt_tokens', 0)} prompt + {image_tokens} image tokens: "
        f"{usage.get('completion_tokens', 0)} new ({answer.finish_reason}); {times}; "
        f"{timings.get('tokens_per_second', 0.0):.1f} tokens/s]"
    )
