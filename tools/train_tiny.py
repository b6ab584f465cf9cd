"""Train the embedded model `weights/tiny` from nothing: crops, tower, decoder, joint, export.

    python tools/train_tiny.py                     # all stages; continues where it was interrupted
    python tools/train_tiny.py --stage tower       # one stage
    python tools/train_tiny.py --device cuda
    python tools/train_tiny.py --stage joint --work runs/next --start-from weights/tiny    # go on

The stages are a small version of LLaVA's stages:

    crops    the vision tower learns shape, color, digit and center of each patch's object, and the
             patch's place. It sees cheap crops around objects
    tower    the same on images of the full size, mostly on few of their patches
    decoder  projector and decoder, on the frozen tower's features of new scenes, without most
             background patches
    joint    everything, on other new scenes. The tower sees few patches until near the end
    export   write the folder for `llava_lite.load`

The scenes of crops and tower are drawn once, at the start. The parts are in `training/`: scenes.py,
labels.py (of patches), seeing.py (few patches instead of all), readers.py (heads that train the
tower), start.py (initial weights), questions.py (many questions after one image), trainer.py
(steps, log, resuming), work.py (the work folder).
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llava_lite.checkpoints.checkpoint import load_model, save_model
from llava_lite.config import TINY
from llava_lite.errors import LlavaLiteError, one_line
from llava_lite.evaluation.scenes.questions import questions
from llava_lite.evaluation.scenes.world import Scene, sample_scene
from llava_lite.inputs.tokenizer import Tokenizer, train_tokenizer
from llava_lite.llama import LlamaDecoder
from llava_lite.llava import Llava
from llava_lite.projector import Projector
from llava_lite.vision import VisionTower
from training.labels import (
    IGNORE,
    PatchLabels,
    crop_batch,
    label_scenes,
    mosaic_batch,
    to_pixel_values,
    whole_batch,
)
from training.questions import Packed, Writer, answer_loss, conversation, pack, pick_turns
from training.readers import PatchHeads, patch_loss, place_loss
from training.scenes import (
    DECODER_SEED,
    GRID,
    HELD_OUT_SEED,
    TRAIN_SEED,
    SceneSet,
    difficulty,
    fresh_batches,
)
from training.seeing import (
    FEW_PATCHES_UNTIL,
    choose_patches,
    object_patches,
    see,
    see_crops,
    see_patches,
)
from training.start import carry_places, fit_heads, fit_places, show_extent, start_local
from training.trainer import Trainer, attention, autocast, initialize
from training.work import find_conflict, has_begun, load_state, write_origin

HELD_OUT_SCENES = 64
TOKENIZER_SCENES = 1500


def train_crops(args: argparse.Namespace) -> None:
    """Stage `crops`: train the tower on small windows around objects, which are cheap."""
    torch.manual_seed(0)
    tower, heads = VisionTower(TINY.vision), PatchHeads(TINY.vision.hidden_size)
    initialize(tower, TINY.vision.num_blocks)
    start_local(tower)

    train = SceneSet(args.work, TRAIN_SEED, args.scenes)

    def batch(rng: np.random.Generator, progress: float) -> tuple[Tensor, PatchLabels]:
        pixel_values, labels = crop_batch(train, rng, 64)
        return see_crops(tower, pixel_values.to(args.device), rng), labels

    fit_tower("crops", tower, heads, batch, args.crop_steps, args.crop_rate, args)


def train_tower(args: argparse.Namespace) -> None:
    """Stage `tower`: train the tower on images of the full size, mosaics of crops and whole scenes.
    Attention over 576 patches must be sharper than over the 64 of a crop."""
    begins = not has_begun(args.work, "tower")
    tower, heads = trained_tower(args, "crops" if begins and not args.start_from else "tower")
    train = SceneSet(args.work, TRAIN_SEED, args.scenes)
    if begins:
        scenes = train.head(2048)
        if args.start_from:
            fit_heads(tower, heads, scenes.head(512))
        else:
            carry_places(tower, heads, scenes)
            show_extent(tower, scenes)
        fit_places(tower, heads, scenes.head(256))

    weights = np.array([difficulty(scene) for scene in train.scenes], float)
    weights /= weights.sum()

    def batch(rng: np.random.Generator, progress: float) -> tuple[Tensor, PatchLabels]:
        if rng.random() < 0.2:
            pixel_values, labels = mosaic_batch(train, rng, 8)
            return tower(pixel_values.to(args.device)).image_features, labels
        count = 16 if progress < FEW_PATCHES_UNTIL else 8
        indices = rng.choice(len(train), count, p=weights)
        pixel_values, labels = whole_batch(train, indices)
        patches, size = choose_patches(labels, progress, rng)
        features = see_patches(tower, pixel_values.to(args.device), patches, size)
        return features, labels.at(patches)

    fit_tower("tower", tower, heads, batch, args.tower_steps, args.tower_rate, args)


def fit_tower(
    name: str,
    tower: VisionTower,
    heads: PatchHeads,
    batch: Callable[[np.random.Generator, float], tuple[Tensor, PatchLabels]],
    steps: int,
    rate: float,
    args: argparse.Namespace,
) -> None:
    """Train tower and heads on batches of (features, labels). batch: called with a generator and
    the progress of the stage, 0..1."""
    held_out = SceneSet(args.work, HELD_OUT_SEED, HELD_OUT_SCENES)
    modules: dict[str, nn.Module] = {"tower": tower.to(args.device), "heads": heads.to(args.device)}
    trainer = Trainer(name, args.work, modules, dict.fromkeys(modules, rate), steps)
    for step in trainer.run():
        with autocast(args.device), attention(args.device):
            rng = np.random.default_rng([args.scene_seed, step, *name.encode()])
            features, labels = batch(rng, step / steps)
            loss = patch_loss(heads(features), labels.to(args.device))
        trainer.update(loss)
        if trainer.is_due(250):
            trainer.log(250, **measure_tower(tower, heads, held_out, args))


@torch.no_grad()
def measure_tower(
    tower: VisionTower, heads: PatchHeads, scenes: SceneSet, args: argparse.Namespace
) -> dict[str, float]:
    """Accuracy of the heads on held-out crops and whole images, over all labeled patches."""
    results = {}
    rng = np.random.default_rng(0)
    for name in ("crop", "whole"):
        with autocast(args.device):
            if name == "crop":
                pixel_values, labels = crop_batch(scenes, rng, 128)
                read = heads(see_crops(tower, pixel_values.to(args.device), rng))
            else:
                pixel_values, labels = whole_batch(scenes, range(min(32, len(scenes))))
                read = heads(tower(pixel_values.to(args.device)).image_features)
        for key in ("color", "shape", "digit", "third"):
            target = getattr(labels, key)
            valid = (target > 0) if key == "color" else (target != IGNORE)
            if not valid.any():
                continue
            right = read[key].argmax(-1).cpu()[valid] == target[valid]
            results[f"{name}_{key}"] = round(right.float().mean().item(), 3)
        found = read["center"].squeeze(-1).cpu() > 0
        results[f"{name}_center_iou"] = round(
            float((found & (labels.center > 0)).sum() / (found | (labels.center > 0)).sum()), 3
        )
    labels = labels.to(args.device)
    on_object = labels.color > 0
    results["whole_place_loss"] = round(place_loss(read["place"], labels).item(), 4)
    counted = read["share"].squeeze(-1).sum(1).cpu().round()
    objects = torch.tensor([len(scene.objects) for scene in scenes.scenes[: len(counted)]])
    results["whole_count"] = round((counted == objects).float().mean().item(), 3)
    for key in ("spot", "extent"):
        misses = (read[key] - getattr(labels, key)).abs()[on_object]
        results[f"whole_{key}_error"] = round(misses.mean().item(), 4)
    return results


# Background patches kept in an image of the decoder stage. Few are fast, but a decoder that never
# saw all patches misses objects among 576.
BACKGROUND_PATCHES = (24, 24, 128, GRID * GRID)


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of the embedded model, trained once on prompts about scenes."""
    if args.start_from:
        return Tokenizer.from_file(args.start_from / "tokenizer.json")
    path = args.work / "tokenizer.json"
    if not path.exists():
        rng = np.random.default_rng(0)
        texts = []
        for _ in range(TOKENIZER_SCENES):
            scene = sample_scene(rng)
            asked = questions(scene, rng, 0.75)[::2] + questions(scene, rng, 1.0)[-1:]
            texts += [conversation(((one.text, one.answer),)) for one in asked]
        train_tokenizer(texts, TINY.text.vocab_size).save(path)
    return Tokenizer.from_file(path)


def new_decoder(args: argparse.Namespace) -> tuple[Projector, LlamaDecoder]:
    """Projector and decoder with new weights, or with those of `--start-from`."""
    torch.manual_seed(1)
    projector, decoder = Projector(TINY), LlamaDecoder(TINY.text)
    for module in (projector, decoder):
        initialize(module, TINY.text.num_layers)
    for layer in projector.layers:
        nn.init.xavier_uniform_(layer.weight)
    if args.start_from:
        earlier = load_model(args.start_from, dtype="float32")
        projector.load_state_dict(earlier.projector.state_dict())
        decoder.load_state_dict(earlier.decoder.state_dict())
    return projector.to(args.device), decoder.to(args.device)


def trained_tower(args: argparse.Namespace, stage: str = "tower") -> tuple[VisionTower, PatchHeads]:
    """The tower and its heads after the stage. If the stage never ran: the tower of `--start-from`
    with new heads."""
    torch.manual_seed(0)
    tower, heads = VisionTower(TINY.vision), PatchHeads(TINY.vision.hidden_size)
    if args.start_from and not has_begun(args.work, stage):
        tower.load_state_dict(load_model(args.start_from, dtype="float32").vision.state_dict())
        return tower.to(args.device), heads.to(args.device)
    state = load_state(args.work, stage)
    tower.load_state_dict(state["tower"])
    heads.load_state_dict(state["heads"])
    return tower.to(args.device), heads.to(args.device)


def train_decoder(args: argparse.Namespace) -> None:
    """Stage `decoder`: train projector and decoder on the frozen tower's features of new scenes."""
    tower, _ = trained_tower(args)
    held_out = SceneSet(args.work, HELD_OUT_SEED, HELD_OUT_SCENES)
    writer = Writer(load_tokenizer(args))
    projector, decoder = new_decoder(args)
    rates = {"projector": args.decoder_rate, "decoder": args.decoder_rate}
    modules: dict[str, nn.Module] = {"projector": projector, "decoder": decoder}
    trainer = Trainer("decoder", args.work, modules, rates, args.decoder_steps)
    late = args.start_from is not None
    steps = range(trainer.step, args.decoder_steps)
    batches = fresh_batches(args, steps, args.decoder_batch, late)
    for step, (scenes, pixels) in zip(trainer.run(), batches, strict=True):
        rng = np.random.default_rng([step, 8])
        kept = [object_patches(one, rng, int(rng.choice(BACKGROUND_PATCHES))) for one in scenes]
        packed = pack_scenes(scenes, kept, writer, rng, args.questions, late, args.device)
        features = see(tower, pixels, args.device)
        rows = [seen[some] for seen, some in zip(features, packed.patches, strict=True)]
        with autocast(args.device), attention(args.device):
            image_embeds = projector(torch.cat(rows).float())
            loss, _, _ = answer_loss(decoder, packed, image_embeds, args.device)
        trainer.update(loss)
        if trainer.is_due(100):
            trainer.log(100, **measure_answers(tower, projector, decoder, held_out, writer, args))


def pack_scenes(
    scenes: Sequence[Scene],
    patches: list[np.ndarray],
    writer: Writer,
    rng: np.random.Generator,
    count: int,
    late: bool,
    device: str,
) -> Packed:
    """A description and `count` question blocks about each scene. patches: those that the decoder
    sees."""
    asked = [questions(scene, rng, 0.4) for scene in scenes]
    blocks = [pick_turns(one, rng, count, late) for one in asked]
    return pack(writer, blocks, patches, device)


@torch.no_grad()
def measure_answers(
    tower: VisionTower,
    projector: Projector,
    decoder: LlamaDecoder,
    scenes: SceneSet,
    writer: Writer,
    args: argparse.Namespace,
) -> dict[str, float]:
    """By family: the share of held-out answers in which every token has the highest logit. The
    decoder sees all 576 patches."""
    right: dict[str, list[float]] = {}
    for start in range(0, len(scenes), 8):
        indices = range(start, min(start + 8, len(scenes)))
        asked = [questions(scenes.scenes[i], np.random.default_rng([i, 9]), 0.0) for i in indices]
        asked = [one[:1] + one[1::3] + one[-1:] for one in asked]
        blocks = [[((one.text, one.answer),) for one in each] for each in asked]
        everything = [np.arange(GRID * GRID)] * len(indices)
        packed = pack(writer, blocks, everything, args.device)
        with autocast(args.device):
            features = see(tower, scenes.pixels[start : start + 8], args.device)
            embeds = projector(features.flatten(0, 1).float())
            _, hits, rows = answer_loss(decoder, packed, embeds, args.device)
        runs = np.split(hits.cpu().numpy(), np.flatnonzero(np.diff(rows.cpu().numpy()) > 1) + 1)
        families = [one.family for each in asked for one in each]
        for family, run in zip(families, runs, strict=True):
            right.setdefault(family, []).append(bool(run.all()))
    return {family: round(float(np.mean(values)), 3) for family, values in right.items()}


JOINT_PATCHES = (64, 64, GRID * GRID)  # background patches that the decoder sees
HEADS_SHARE = 0.3  # weight of the heads' loss beside that of the answers


def train_joint(args: argparse.Namespace) -> None:
    """Stage `joint`: train tower, projector and decoder together on new scenes. The tower sees few
    patches of most scenes, and all 576 of the last ones. The decoder sees objects and some
    background, or all patches of the tower."""
    tower, heads = trained_tower(args)
    if has_begun(args.work, "joint"):
        has_heads = "heads" in load_state(args.work, "joint")
    else:  # a tower from a model folder has new heads, which would teach it nothing
        has_heads = has_begun(args.work, "tower")
    projector, decoder = new_decoder(args)
    first = args.decoder_steps
    if has_begun(args.work, "decoder") or not args.start_from:
        state = load_state(args.work, "decoder")
        projector.load_state_dict(state["projector"])
        decoder.load_state_dict(state["decoder"])
        first = state["step"]
    held_out = SceneSet(args.work, HELD_OUT_SEED, HELD_OUT_SCENES)
    writer = Writer(load_tokenizer(args))
    modules: dict[str, nn.Module] = {"tower": tower, "projector": projector, "decoder": decoder}
    if has_heads:
        modules["heads"] = heads
    rates = dict.fromkeys(modules, args.joint_rate)
    trainer = Trainer("joint", args.work, modules, rates, args.joint_steps)
    # The scenes continue those of the decoder stage.
    steps = range(first + trainer.step, first + args.joint_steps)
    batches = fresh_batches(args, steps, args.joint_batch, late=True)
    for step, (scenes, pixels) in zip(trainer.run(), batches, strict=True):
        rng = np.random.default_rng([step, 9])
        pixel_values, labels = to_pixel_values(pixels).to(args.device), label_scenes(scenes)
        patches, size = choose_patches(labels, step / args.joint_steps, rng)
        shown = show_patches(scenes, patches.numpy(), rng)
        kept = [seen[some] for seen, some in zip(patches.numpy(), shown, strict=True)]
        asked = args.joint_questions
        packed = pack_scenes(scenes, kept, writer, rng, asked, True, args.device)
        with autocast(args.device), attention(args.device):
            features = see_patches(tower, pixel_values, patches, size)
            image_embeds = projector(features[torch.from_numpy(shown)])
            loss, _, _ = answer_loss(decoder, packed, image_embeds, args.device)
            if has_heads:
                read = heads(features)
                loss = loss + HEADS_SHARE * patch_loss(read, labels.at(patches).to(args.device))
        trainer.update(loss)
        if trainer.is_due(100):
            trainer.log(100, **measure_answers(tower, projector, decoder, held_out, writer, args))


def show_patches(
    scenes: Sequence[Scene], patches: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Which of the tower's patches (B, N) the decoder sees: (B, N) bool."""
    chosen = [object_patches(one, rng, int(rng.choice(JOINT_PATCHES))) for one in scenes]
    return np.stack([np.isin(seen, some) for seen, some in zip(patches, chosen, strict=True)])


def export(args: argparse.Namespace) -> None:
    """Write the newest weights as a model folder in bfloat16, or their mean with the weights of
    `--average-with`, such as other ends of the same training (Izmailov et al. 2018, Averaging
    Weights Leads to Wider Optima and Better Generalization)."""
    last = next((name for name in ("joint", "decoder") if has_begun(args.work, name)), None)
    if last is None:
        raise SystemExit(f"nothing to export: no decoder.state.pt or joint.state.pt in {args.work}")
    state = load_state(args.work, last)
    tower = state.get("tower") or trained_tower(args)[0].state_dict()
    tokenizer = load_tokenizer(args)
    text = replace(TINY.text, sampled_vocab_size=tokenizer.vocab_size)
    config = replace(TINY, text=text)
    model = Llava(config)
    model.vision.load_state_dict(tower)
    model.projector.load_state_dict(state["projector"])
    model.decoder.load_state_dict(state["decoder"])
    if args.average_with:
        every = [model, *(load_model(folder, dtype="float32") for folder in args.average_with)]
        states = [one.state_dict() for one in every]
        mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
        model.load_state_dict(mean)
    save_model(
        model.to(torch.bfloat16),
        config,
        args.out,
        tokenizer,
        source="tools/train_tiny.py",
        force=True,
    )
    others = len(args.average_with or ())
    mean = f", averaged with {others} other{'s' * (others > 1)}" if others else ""
    print(f"{last} of {args.work} at step {state['step']}{mean} -> {args.out}")


STAGES = {
    "crops": train_crops,
    "tower": train_tower,
    "decoder": train_decoder,
    "joint": train_joint,
    "export": export,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--stage", choices=[*STAGES, "all"], default="all", help="only this one")
    add("--work", type=Path, default=Path("runs/tiny"), help="folder for scenes, states and log")
    folder: dict[str, Any] = {"type": Path, "default": argparse.SUPPRESS}
    add("--out", **folder, help="model folder (default: WORK/model)")
    start_help = "model folder from which tower, decoder or joint starts; needs a new --work"
    add("--start-from", **folder, metavar="DIR", help=start_help)
    mean_help = "export the mean of the trained weights and those of these model folders; "
    mean_help += "a folder that is named twice counts twice"
    add("--average-with", **folder, nargs="+", metavar="DIR", help=mean_help)
    add("--device", default="cpu", help="cpu or cuda")
    add("--scenes", type=int, default=16000, help="scenes of crops and tower")
    seed_help = "seed of the scenes of decoder and joint, and of their order in tower; "
    seed_help += f"at least {DECODER_SEED}; use another one with every --start-from"
    add("--scene-seed", type=int, default=DECODER_SEED, metavar="N", help=seed_help)
    draw_help = "processes that draw scenes for decoder and joint; 0: draw in this process"
    add("--drawers", type=int, default=os.cpu_count(), metavar="N", help=draw_help)
    for stage, steps, rate in (
        ("crops", 4000, 1.2e-3),
        ("tower", 15000, 8e-4),
        ("decoder", 7000, 1e-3),
        ("joint", 1500, 3e-4),
    ):
        name = stage.removesuffix("s")
        add(f"--{name}-steps", type=int, default=steps, help=f"steps of {stage}")
        add(f"--{name}-rate", type=float, default=rate, help=f"highest learning rate of {stage}")
    add("--decoder-batch", type=int, default=20, help="images of a step of decoder")
    add("--joint-batch", type=int, default=24, help="images of a step of joint")
    add("--questions", type=int, default=14, help="question blocks about an image of decoder")
    add("--joint-questions", type=int, default=5, help="question blocks about an image of joint")
    return parser


def main() -> None:
    parser = build_parser()
    unsaid = argparse.Namespace(out=None, start_from=None, average_with=None)
    args = parser.parse_args(namespace=unsaid)
    if args.start_from and args.stage not in ("tower", "decoder", "joint", "export"):
        parser.error("--start-from goes with --stage tower, decoder, joint or export")
    if args.average_with and args.stage != "export":
        parser.error("--average-with goes with --stage export")
    if args.scene_seed < DECODER_SEED:  # lower seeds are the tower's and held out
        parser.error(f"--scene-seed must be {DECODER_SEED} or more")
    for folder in (args.start_from, *(args.average_with or ())):
        if folder and not (folder / "config.json").is_file():
            parser.error(f"{folder} is no model folder: it has no config.json")
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    if problem := find_conflict(args, stages):
        parser.error(f"{problem}, or give another --work")
    if args.stage != "export":
        write_origin(args)
    args.out = args.out or args.work / "model"
    try:
        for name in stages:
            STAGES[name](args)
    except (LlavaLiteError, OSError) as error:
        raise SystemExit(f"{parser.prog}: error: {one_line(error)}") from None


if __name__ == "__main__":
    main()
