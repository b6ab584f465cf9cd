"""`llava-lite chat`: talk about images, turn by turn. Commands begin with a slash."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_image_sources,
    add_model_arguments,
    add_notice_arguments,
    add_sampling_arguments,
)
from llava_lite.cli.console import OK, format_stats, print_pieces, say
from llava_lite.cli.wanted import generation_options, image_opener, load_model
from llava_lite.errors import LlavaLiteError, one_line

if TYPE_CHECKING:
    from llava_lite.generation.answer import Answer
    from llava_lite.generation.chat import Chat

CHAT_HELP = """\
  /image PATH ...  show one or more images with the next question
  /clear           start over; the images shown last stay
  /stats           token counts and timings of the last answer
  /help            this list
  /quit            leave (also /exit, Ctrl-D)"""


def add_chat(commands: Any) -> None:
    details = f"commands during the chat:\n{CHAT_HELP}\nCtrl-C stops an answer, not the program."
    summary = "talk about images, turn by turn"
    parser = add_command(commands, "chat", run_chat, "-i IMAGE", summary, details)
    add_image_sources(parser, "image of the first question: path or URL; repeat for more")
    add_sampling_arguments(parser)
    add_notice_arguments(parser.add_argument_group("output"))
    add_model_arguments(parser)


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


class Repl:
    """Reads lines and answers them. Hints are printed only if stdin is a terminal.

    `images` are the images shown last. `unseen` are the images for the next question."""

    def __init__(
        self, chat: "Chat", open_image: Callable[[str], Any], images: list[Any], stats: bool = False
    ) -> None:
        self.chat, self.open_image, self.stats = chat, open_image, stats
        self.images, self.unseen = images, list(images)
        self.last: Answer | None = None
        self.interactive = sys.stdin.isatty()
        if self.interactive:
            try:
                import readline  # noqa: F401 (makes input() edit lines and remember them)
            except ImportError:
                pass

    def run(self) -> None:
        """Answer lines until the user leaves: by command, end of input, or Ctrl-C twice."""
        hinted = False
        while True:
            try:
                line = self.read_line()
                hinted = False
                if not self.handle(line.strip()):
                    return
            except EOFError:
                if self.interactive:
                    say("")
                return
            except AnswerStopped:
                say("(stopped)")
            except KeyboardInterrupt:
                if hinted or not self.interactive:
                    raise
                hinted = True
                say("\n(Ctrl-C again or /quit leaves)")
            except BrokenPipeError:
                raise
            except (LlavaLiteError, ValueError, OSError) as error:
                say(f"error: {one_line(error)}")

    def read_line(self) -> str:
        """The next line. Raises EOFError at the end."""
        if self.interactive and sys.stdout.isatty():
            return input("> ")
        if self.interactive:
            print("> ", end="", file=sys.stderr, flush=True)  # stdout is a file, for answers only
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def handle(self, line: str) -> bool:
        """Answer a question or run a command. Returns False to leave."""
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif command in ("/quit", "/exit"):
            return False
        elif command == "/image":
            self.show(rest.strip())
        elif command == "/clear":
            self.chat.clear()
            self.unseen = list(self.images)
            if self.interactive:
                say("(starting over" + (", the images shown last stay)" if self.images else ")"))
        elif command == "/stats":
            say(format_stats(self.last) if self.last is not None else "no answer yet")
        elif command == "/help":
            say(CHAT_HELP)
        else:
            raise ValueError(f"unknown command {command}; /help lists them")
        return True

    def ask(self, question: str) -> None:
        """Stream one answer. If it is stopped, its beginning stays in the conversation."""
        turns = len(self.chat.history)
        try:
            self.last = print_pieces(self.chat.stream(question, self.unseen or None))
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            raise AnswerStopped from None
        finally:
            if len(self.chat.history) > turns:
                self.unseen = []
        if self.stats:
            say(format_stats(self.last))

    def show(self, text: str) -> None:
        """Open images for the next question. If this raises ImageError, nothing changes."""
        paths = [text] if os.path.exists(text) else shlex.split(text, posix=os.name != "nt")
        if not paths:
            raise ValueError("/image needs a path")
        self.images = [self.open_image(os.path.expanduser(path)) for path in paths]
        self.unseen = list(self.images)
        if self.interactive:
            say(f"({', '.join(paths)}: shown with the next question)")


class AnswerStopped(Exception):
    """Ctrl-C while an answer was being written."""
