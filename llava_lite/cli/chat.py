"""`llava-lite chat`: talk about images, turn by turn."""

import argparse
from typing import Any

from llava_lite.cli.arguments import (
    add_command,
    add_image_sources,
    add_model_arguments,
    add_notice_arguments,
    add_sampling_arguments,
)
from llava_lite.cli.console import (
    OK,
    say,
)
from llava_lite.cli.repl import CHAT_HELP, Repl
from llava_lite.cli.wanted import generation_options, image_opener, load_model


def add_chat(commands: Any) -> None:
    details = f"commands during the chat:\n{CHAT_HELP}\nCtrl-C stops an answer, not the program."
    parser = add_command(
        commands, "chat", run_chat, "-i IMAGE", "talk about images, turn by turn", details
    )
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
