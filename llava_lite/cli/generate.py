"""`llava-lite generate`: answer one prompt."""

import argparse
import json
import sys
from typing import Any

from llava_lite.cli.arguments import (
    add_command,
    add_flags,
    add_image_sources,
    add_model_arguments,
    add_notice_arguments,
    add_sampling_arguments,
)
from llava_lite.cli.console import OK, format_stats, print_pieces, say
from llava_lite.cli.wanted import (
    generation_options,
    join_ranks,
    load_model,
    open_images,
    read_prompt,
)

GENERATE_HELP = """\
examples:
  llava-lite generate -i photo.jpg -p "What is in this picture?"
  llava-lite generate -i a.png b.png -p "What differs between <image> and <image>?"
  echo "Describe the image." | llava-lite generate -m weights/llava-1.5-7b -i photo.jpg --json"""


def add_generate(commands: Any) -> None:
    summary, usage = "answer one prompt", "-i IMAGE -p TEXT"
    parser = add_command(commands, "generate", run_generate, usage, summary, GENERATE_HELP)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the question (default: stdin)")
    add_image_sources(parser, "image to ask about: path, URL, or - for stdin; repeat for more")
    add_sampling_arguments(parser)
    output = parser.add_argument_group("output")
    text = "print the answer while it is written (default: when stdout is a terminal)"
    output.add_argument("--stream", action=argparse.BooleanOptionalAction, help=text)
    flags = {
        "--json": "print one object: text, finish_reason, usage, timings",
        "--trace": "with --json: the fate of the image tokens, layer by layer, and its cost",
    }
    add_flags(output, flags)
    add_notice_arguments(output)
    add_model_arguments(parser)
    text = (
        "spread the decoder over several GPUs: torchrun --nproc-per-node 2 -m llava_lite "
        "generate --tensor-parallel ..."
    )
    add_flags(parser, {"--tensor-parallel": text})


def run_generate(args: argparse.Namespace) -> int:
    """`llava-lite generate`."""
    if args.json and args.stream:
        args.parser.error("--json prints one object at the end: it does not go with --stream")
    if args.trace and not args.json:
        args.parser.error("--trace is part of the object that --json prints")
    ranks = join_ranks(args)
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
