"""The work folder of a training: its states, and that it holds one training from its beginning."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_lite.files import read_json, replace_json

ORDER = ("crops", "tower", "decoder", "joint", "export")
ORIGIN_FILE = "started_from.json"


def state_of(work: Path, stage: str) -> dict[str, Any]:
    """What a stage has saved. Raises SystemExit where it never ran."""
    path = work / f"{stage}.state.pt"
    if not has_begun(work, stage):
        raise SystemExit(f"no {path}: run --stage {stage} first, or give --start-from")
    state: dict[str, Any] = torch.load(path, "cpu", weights_only=True, mmap=True)
    return state


def has_begun(work: Path, stage: str) -> bool:
    """Whether the stage has saved anything."""
    return (work / f"{stage}.state.pt").exists()


def misplaced(args: argparse.Namespace, stages: Sequence[str]) -> str | None:
    """Why the stages must not run in this work folder: one would go on from another training's
    tower, export another one's tokenizer, or train what the later stages, which have begun, would
    never hear of."""
    begun = [name for name in ORDER if has_begun(args.work, name)]
    for name in stages:
        later = [one for one in begun if ORDER.index(one) > ORDER.index(name)]
        if later and not is_done(args, name):
            return f"{args.work} has a training that is at {later[-1]}, past {name}"
    path = args.work / ORIGIN_FILE
    if not begun or not path.exists():
        return None
    before = read_json(path)
    now = origin(args)
    if "export" in stages[:1]:
        del now["scene_seed"]  # it sees none
    for name, value in now.items():
        if before.get(name) != value:
            was, wanted = (one or "nothing" for one in (before.get(name), value))
            return f"{args.work} has a training with {name} {was}, not {wanted}"
    return None


def is_done(args: argparse.Namespace, stage: str) -> bool:
    """Whether the stage has had all of its steps."""
    steps: int = getattr(args, f"{stage.removesuffix('s')}_steps")
    return has_begun(args.work, stage) and state_of(args.work, stage)["step"] >= steps


def remember(args: argparse.Namespace) -> None:
    """Note in the work folder, made if need be, which training it holds."""
    args.work.mkdir(parents=True, exist_ok=True)
    replace_json(args.work / ORIGIN_FILE, origin(args))


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """What tells one training from another: weights that it goes on from, and its scenes."""
    given: dict[str, Any] = {"start_from": None, "weights_sha256": None}
    if args.start_from:
        digest = hashlib.sha256()
        for path in sorted(args.start_from.glob("*.safetensors")):
            digest.update(path.read_bytes())
        folder = str(args.start_from.resolve())
        given = {"start_from": folder, "weights_sha256": digest.hexdigest()}
    return {**given, "scene_seed": args.scene_seed}
