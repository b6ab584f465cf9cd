"""Token reduction on the command line: `--reduction NAME`, and flags for each of its parts.

A flag replaces that part of the preset. Imports nothing heavy, so help appears at once.
"""

import argparse
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_lite.reduction import DToMe, FastV, Reduction, ToMe

MERGE_FORMS = "none, tome:72 (keeps 72), tome:r=21 (21 per block), tome:r=21,linear, dtome"


def add_reduction_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags."""
    summary = "fewer image tokens: faster, with answers that may change"
    add = parser.add_argument_group("token reduction", summary).add_argument
    text = "preset, such as hybrid-72-36 (info --presets: all)"
    add("--reduction", metavar="NAME", help=text)
    text = f"merge image tokens in the vision tower: {MERGE_FORMS}"
    add("--merge", metavar="HOW", help=text)
    text = "for --merge dtome: JSON, or a checkpoint of DyMU (default: the model's own)"
    add("--thresholds", metavar="FILE", help=text)
    text = "where merged tokens stand in the decoder: vtu (the default), logical, plain"
    add("--positions", metavar="WHERE", help=text)
    text = (
        "prune image tokens in the decoder: 36 keeps so many, 0.7 drops that share, none "
        "(default: $FASTV_K, else what --reduction says)"
    )
    add("--fastv-k", metavar="AMOUNT", help=text)
    text = (
        "first pruned layer, counted from 0 and at least 1: the layer before it gives the scores "
        "(default: 3)"
    )
    add("--fastv-layer", type=int, metavar="K", help=text)


def build_reduction(args: argparse.Namespace) -> "Reduction | None":
    """The reduction of the flags; None without any.

    Raises ValueError for a bad value, CheckpointError for an unusable file of thresholds."""
    amount, flag = args.fastv_k, "--fastv-k"
    if amount is None:
        amount, flag = os.environ.get("FASTV_K") or None, "FASTV_K"
    given = (args.reduction, args.merge, args.thresholds, args.positions, amount, args.fastv_layer)
    if all(flag is None for flag in given):
        return None
    from llava_lite.reduction import Reduction

    preset = Reduction.of(args.reduction)
    return Reduction(
        merge=parse_merge(args.merge, args.thresholds, preset.merge),
        positions=args.positions or preset.positions,
        fastv=parse_fastv(amount, args.fastv_layer, preset.fastv, flag),
    )


def parse_merge(
    text: str | None, thresholds: str | None, preset: "ToMe | DToMe | None"
) -> "ToMe | DToMe | None":
    """`--merge` and `--thresholds` over a preset's part. Raises ValueError naming the forms."""
    from llava_lite.checkpoints.thresholds import read_thresholds
    from llava_lite.reduction import DToMe, ToMe

    if thresholds is not None:
        if text not in (None, "dtome"):
            raise ValueError(f"--thresholds goes with --merge dtome, not with --merge {text}")
        return DToMe(read_thresholds(thresholds))
    if text is None:
        return preset
    if text in ("none", "dtome"):
        return None if text == "none" else DToMe()
    found = re.fullmatch(r"tome:(?:(\d+)|r=(\d+)(?:,(\w+))?)", text)
    if found is None:
        raise ValueError(f"--merge {text!r} is none of these: {MERGE_FORMS}")
    if found[1]:
        return ToMe(keep=int(found[1]))
    return ToMe(r=int(found[2]), schedule=found[3] or "constant")


def parse_fastv(
    amount: str | None, layer: int | None, preset: "FastV | None", flag: str
) -> "FastV | None":
    """The amount that `flag` gave, and `--fastv-layer`, over a preset's part. Raises ValueError."""
    from llava_lite.reduction import FastV

    fastv = preset if amount is None else FastV.parse(amount, name=flag)
    if layer is None:
        return fastv
    if fastv is None:
        raise ValueError("--fastv-layer needs --fastv-k or a preset that prunes")
    return replace(fastv, layer=layer)
