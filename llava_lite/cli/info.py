"""`llava-lite info`: architecture, tensors and memory of a model, as text or JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

from llava_lite.cli.arguments import add_command, add_flags, add_source_arguments
from llava_lite.cli.console import OK
from llava_lite.cli.wanted import default_source
from llava_lite.config import PRESETS


def add_info(commands: Any) -> None:
    summary = "show a model's architecture, tensors and memory needs"
    parser = add_command(commands, "info", run_info, "[MODEL]", summary)
    text = "folder, file or hub id of any layout, or a preset name (default: as for generate)"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=text)
    flags = {
        "--tensors": "list every tensor",
        "--presets": "list the known architectures, and the presets of token reduction",
        "--machine": "show this machine's instructions, and the kernels chosen for LLaVA-1.5-7B",
        "--again": "with --machine: measure the kernels anew",
        "--checksums": "compare a converted folder with its manifest",
        "--json": "print one object",
    }
    add_flags(parser, flags)
    add_source_arguments(parser)


def run_info(args: argparse.Namespace) -> int:
    """`llava-lite info`."""
    from llava_lite.checkpoints.download import resolve
    from llava_lite.checkpoints.info import describe_preset, describe_source, verify_checksums
    from llava_lite.cli.info_text import format_info

    if args.again and not args.machine:
        raise ValueError("--again goes with --machine")
    if args.presets:
        return show_presets(args.json)
    if args.machine:
        return show_machine(args.again, args.json)
    name = default_source(args.model)
    if name in PRESETS and not Path(name).exists():
        info = describe_preset(name)
    else:
        path = resolve(
            name, revision=args.revision, offline=args.offline, vision_tower=args.vision_tower
        )
        info = describe_source(path, args.base, args.vision_tower)
    verified = verify_checksums(info) if args.checksums else None
    if args.json:
        print(json.dumps({**info.to_dict(), "verified_tensors": verified}))
    else:
        print(format_info(info, args.tensors))
        if verified is not None:
            print(f"\nchecksums: all {verified} tensors equal the manifest")
    return OK


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


def show_machine(again: bool, as_json: bool) -> int:
    """`llava-lite info --machine`."""
    from llava_lite.checkpoints.skeleton import meta_model
    from llava_lite.cli.info_text import format_machine
    from llava_lite.config import LLAVA_1_5_7B
    from llava_lite.fast.kernels import time_model
    from llava_lite.fast.timings import machine_facts

    times, facts = time_model(meta_model(LLAVA_1_5_7B).bfloat16(), again), machine_facts()
    print(json.dumps({**facts, "seconds": times}) if as_json else format_machine(facts, times))
    return OK
