"""`llava-lite info`: architecture, tensors and memory of a model, for people or as JSON.

Nothing heavy is imported before it is needed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from llava_lite.cli.arguments import (
    add_command,
    add_source_arguments,
)
from llava_lite.cli.console import (
    OK,
)
from llava_lite.cli.wanted import default_source
from llava_lite.config import PRESETS


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


def show_presets(as_json: bool) -> int:
    """`llava-lite info --presets`."""
    from llava_lite.checkpoints.info import describe_preset
    from llava_lite.cli.info_text import describe_reductions, format_presets, format_reductions

    if as_json:
        models = {name: describe_preset(name).to_dict() for name in PRESETS}
        for content in models.values():
            del content["tensors"]
        print(json.dumps({"models": models, "reductions": describe_reductions()}))
    else:
        print(f"{format_presets()}\n\n{format_reductions()}")
    return OK


def run_info(args: argparse.Namespace) -> int:
    """`llava-lite info`."""
    from llava_lite.checkpoints.download import resolve
    from llava_lite.checkpoints.info import describe_preset, describe_source, verify_checksums
    from llava_lite.cli.info_text import format_info

    if args.presets:
        return show_presets(args.json)
    named = default_source(args.model)
    if named in PRESETS and not Path(named).exists():
        described = describe_preset(named)
    else:
        path = resolve(
            named, revision=args.revision, offline=args.offline, vision_tower=args.vision_tower
        )
        described = describe_source(path, args.base, args.vision_tower)
    verified = verify_checksums(described) if args.checksums else None
    if args.json:
        print(json.dumps({**described.to_dict(), "verified_tensors": verified}))
    else:
        print(format_info(described, args.tensors))
        if verified is not None:
            print(f"\nchecksums: all {verified} tensors equal the manifest")
    return OK
