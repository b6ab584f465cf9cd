"""What the program writes while it works: answers on stdout, notices on stderr.

Imports nothing heavy: errors of usage are said before torch is there.
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

OK, FAILED, WRONG_USAGE = 0, 1, 2


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


GRACE = 10.0  # seconds


INTERRUPTED = 130


def behind_first_rank(rank: int, program: Callable[[], int]) -> int:
    """Run the program as one of several processes that do the same (ranks.py), of which only the
    first, rank 0, shows what it has to say.

    What fails here mostly fails there as well, and has to be said there before this process ends,
    since then torchrun ends all of them: so a failure waits. Only if nothing ends this process
    meanwhile does it say what it alone knows."""
    said = io.StringIO()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(said):
        try:
            code = program()
        except Exception:
            traceback.print_exc()
            code = 1
    if code not in (0, INTERRUPTED):
        time.sleep(GRACE)
        say(f"rank {rank}: {said.getvalue().rstrip()}")
    return code


def print_pieces(pieces: "Generator[str, None, Answer]") -> "Answer":
    """Print the pieces as they come, and the end of the line however it ends."""
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
