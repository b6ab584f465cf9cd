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
    text = "preset, such as folded-144-36 (info --presets: all)"
    add("--reduction", metavar="NAME", help=text)
    text = "FastVLM only: smaller images, which have fewer tokens; a multiple of 64 in 256..2048"
    add("--image-size", type=int, metavar="PIXELS", help=text)
    text = f"merge image tokens in the vision tower: {MERGE_FORMS}"
    add("--merge", metavar="HOW", help=text)
    text = "for --merge dtome: JSON, or a checkpoint of DyMU (default: the model's own)"
    add("--thresholds", metavar="FILE", help=text)
    text = "where merged tokens stand in the decoder: vtu (the default), folded, logical, plain"
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
    text = (
        "prune in several layers, in place of --fastv-k and --fastv-layer: 1:144,3:72 keeps 144 "
        "from layer 1 on and 72 from layer 3 on; 1:0.5 drops half"
    )
    add("--fastv-stages", metavar="LAYER:AMOUNT,...", help=text)
    text = (
        "what happens to pruned tokens: drop (the default), or fold them into the kept ones, which "
        "needs --positions folded"
    )
    add("--fastv-rest", metavar="WHAT", help=text)


def build_reduction(args: argparse.Namespace) -> "Reduction | None":
    """The reduction of the flags; None without any.

    Raises ValueError for a bad value, CheckpointError for an unusable file of thresholds."""
    if args.fastv_k is None and args.fastv_stages is None:
        amount, flag = os.environ.get("FASTV_K") or None, "FASTV_K"
    else:
        amount, flag = args.fastv_k, "--fastv-k"
    parts = (args.reduction, args.merge, args.thresholds, args.positions, args.image_size)
    fastv_flags = (amount, args.fastv_stages, args.fastv_layer, args.fastv_rest)
    if all(given is None for given in parts + fastv_flags):
        return None
    from llava_lite.reduction import Reduction

    preset = Reduction.of(args.reduction)
    return Reduction(
        merge=parse_merge(args.merge, args.thresholds, preset.merge),
        positions=args.positions or preset.positions,
        fastv=parse_fastv(*fastv_flags, preset.fastv, flag),
        image_size=args.image_size,
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
    amount: str | None,
    stages: str | None,
    layer: int | None,
    rest: str | None,
    preset: "FastV | None",
    flag: str,
) -> "FastV | None":
    """The amount that `flag` gave, and the other flags of FastV, over a preset's part. Raises
    ValueError."""
    from llava_lite.reduction import PRUNE_LAYER, FastV

    fastv = preset
    if stages is not None:
        if amount is not None:
            raise ValueError("--fastv-stages and --fastv-k both say how many: give one of them")
        fastv = FastV(stages=parse_stages(stages))
    elif amount is not None:
        fastv = FastV.parse(amount, PRUNE_LAYER if preset is None else preset.layer, flag)
    if fastv is None:
        if layer is not None:
            raise ValueError("--fastv-layer needs --fastv-k or a preset that prunes")
        if rest is not None:
            raise ValueError("--fastv-rest needs --fastv-k, --fastv-stages or a preset that prunes")
        return None
    if preset is not None:  # only its amount is replaced
        fastv = replace(fastv, score=preset.score, per_image=preset.per_image, rest=preset.rest)
    if layer is not None and fastv.stages is not None:
        raise ValueError("--fastv-layer does not go with stages: each stage names its own layer")
    return replace(
        fastv,
        layer=fastv.layer if layer is None else layer,
        rest=fastv.rest if rest is None else rest,
    )


def parse_stages(text: str) -> tuple[tuple[int, int | float], ...]:
    """`--fastv-stages`: 1:144,3:0.5 is ((1, 144), (3, 0.5)). Raises ValueError."""
    stage = r"\d+:(\d+|\d*\.\d+)"
    if re.fullmatch(f"{stage}(,{stage})*", text) is None:
        raise ValueError(
            f"--fastv-stages {text!r} must be layers with their amounts, such as 1:144,3:72"
        )
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((int(layer), float(n) if "." in n else int(n)) for layer, n in pairs)
