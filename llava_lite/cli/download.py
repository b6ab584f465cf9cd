"""`llava-lite download`: fetch a checkpoint from the Hugging Face hub."""

import argparse
from typing import Any

from llava_lite.cli.arguments import add_command
from llava_lite.cli.console import OK
from llava_lite.cli.wanted import choose_download_bars


def add_download(commands: Any) -> None:
    details = "Prints the folder. An interrupted download is resumed."
    summary = "fetch a checkpoint from the Hugging Face hub"
    parser = add_command(commands, "download", run_download, "REPO", summary, details)
    parser.add_argument("repo", metavar="REPO", help="hub id, such as llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: the hub's cache)")
    parser.add_argument("--offline", action="store_true", help="only look into the cache")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run_download(args: argparse.Namespace) -> int:
    """`llava-lite download`."""
    from llava_lite.checkpoints.download import download

    choose_download_bars(args.quiet)
    folder = download(args.repo, revision=args.revision, offline=args.offline, destination=args.out)
    print(folder)
    return OK
