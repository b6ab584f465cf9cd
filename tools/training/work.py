"""The work folder: the states of the stages of one training."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_lite.checkpoints.tensors import read_json
from llava_lite.saving import replace_json

ORDER = ("crops", "tower", "decoder", "joint", "export")
ORIGIN_FILE = "started_from.json"


def load_state(work: Path, stage: str) -> dict[str, Any]:
    """The saved state of a stage. Raises SystemExit if the stage never ran."""
    path = work / f"{stage}.state.pt"
    if not has_begun(work, stage):
        raise SystemExit(f"no {path}: run --stage {stage} first, or give --start-from")
    state: dict[str, Any] = torch.load(path, "cpu", weights_only=True, mmap=True)
    return state


def has_begun(work: Path, stage: str) -> bool:
    """Whether the stage has saved anything."""
    return (work / f"{stage}.state.pt").exists()


def find_conflict(args: argparse.Namespace, stages: Sequence[str]) -> str | None:
    """The reason why the stages must not run in this work folder, or None. They must not resume
    from other weights or scenes, follow an unfinished stage, or precede a stage that has begun."""
    begun = [name for name in ORDER if has_begun(args.work, name)]
    if begun and (args.work / ORIGIN_FILE).exists():
        before, now = read_json(args.work / ORIGIN_FILE), origin(args)
        if before["weights_sha256"] != now["weights_sha256"]:
            was, wanted = (one["start_from"] or "nothing" for one in (before, now))
            return f"{args.work} has a training that started from {was}, not from {wanted} as it is"
        seeds = before["scene_seed"], now["scene_seed"]
        if seeds[0] != seeds[1] and stages[0] != "export":  # export uses no scenes
            return f"{args.work} has a training of --scene-seed {seeds[0]}, not {seeds[1]}"
    earlier = [name for name in begun if ORDER.index(name) < ORDER.index(stages[0])]
    if earlier and stages[0] != "export":
        state = load_state(args.work, earlier[-1])
        if state["step"] < state["steps"]:
            return (
                f"{earlier[-1]} of {args.work} was cut off, it has had {state['step']} of "
                f"{state['steps']} steps; go on with it, or end it there by --stage {earlier[-1]} "
                f"--{option(earlier[-1])} {state['step']}"
            )
    for name in stages:
        later = [one for one in begun if ORDER.index(one) > ORDER.index(name)]
        if not later:
            continue
        if not has_begun(args.work, name):
            return f"{args.work} has a training that is at {later[-1]}, past {name}"
        step = load_state(args.work, name)["step"]
        if step < getattr(args, option(name).replace("-", "_")):
            return (
                f"{args.work} has a training that is at {later[-1]}, past {name} with its {step} "
                f"steps; go on with --{option(name)} {step}"
            )
    return None


def option(stage: str) -> str:
    """The name of the flag with the stage's number of steps, without dashes."""
    return f"{stage.removesuffix('s')}-steps"


def write_origin(args: argparse.Namespace) -> None:
    """Create the work folder, and write the origin of its training."""
    args.work.mkdir(parents=True, exist_ok=True)
    replace_json(args.work / ORIGIN_FILE, origin(args))


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """The identity of a training: the weights it starts from, and its scenes."""
    given: dict[str, Any] = {"start_from": None, "weights_sha256": None}
    if args.start_from:
        digest = hashlib.sha256()
        for path in sorted(args.start_from.glob("*.safetensors")):
            digest.update(path.read_bytes())
        folder = str(args.start_from.resolve())
        given = {"start_from": folder, "weights_sha256": digest.hexdigest()}
    return {**given, "scene_seed": args.scene_seed}
