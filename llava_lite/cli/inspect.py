"""`llava-lite inspect`: one answer, and a picture of the image tokens behind it."""

import argparse
from pathlib import Path
from typing import Any

from llava_lite.cli.arguments import (
    add_command,
    add_image_sources,
    add_model_arguments,
    add_notice_arguments,
    add_sampling_arguments,
)
from llava_lite.cli.console import OK, format_stats, say
from llava_lite.cli.wanted import generation_options, image_opener, load_model, read_prompt

PICTURES = (".html", ".png")
INSPECT_HELP = """\
The page holds everything it shows, without scripts. The PNG shows the same. Times are from a second
run of the prompt, because the first run of a process is slower.

examples:
  llava-lite inspect -i photo.jpg -p "What is this?" --reduction folded-144-36 -o run.html
  llava-lite inspect -i photo.jpg -p "What is this?" --fastv-k 0.5 -o run.png --force"""


def add_inspect(commands: Any) -> None:
    summary = "draw what became of a prompt's image tokens, and what that cost"
    usage = "-i IMAGE -p TEXT -o FILE"
    parser = add_command(commands, "inspect", run_inspect, usage, summary, INSPECT_HELP)
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", help="the question (default: stdin)")
    add_image_sources(parser, "image to ask about: path, URL, or - for stdin; repeat for more")
    text = "picture to write: .html or .png"
    add("-o", "--output", required=True, metavar="FILE", help=text)
    add("--force", action="store_true", help="overwrite FILE")
    add_sampling_arguments(parser)
    add_notice_arguments(parser.add_argument_group("output"))
    add_model_arguments(parser)


def run_inspect(args: argparse.Namespace) -> int:
    """`llava-lite inspect`."""
    if Path(args.output).suffix.lower() not in PICTURES:
        args.parser.error(f"{args.output}: the picture must end in {' or '.join(PICTURES)}")
    if not args.image:
        args.parser.error("an image is needed: -i IMAGE")
    prompt = read_prompt(args)
    from llava_lite.study import inspection

    output = inspection.check_picture(args.output, args.force)
    options = generation_options(args)
    images = [image_opener(args)(source) for source in args.image]
    seen = inspection.inspect(load_model(args), images, prompt, **options)
    print(seen.answer, flush=True)  # before the picture: the answer is worth more
    seen.save(output, args.force)
    if args.stats:
        say(format_stats(seen.answer))
    if not args.quiet:
        say(f"{args.output}: written")
    return OK
