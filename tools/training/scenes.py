"""The scenes of the training, their difficulty, and their pixels."""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import copy
from itertools import count as count_from
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava_lite.evaluation.scenes.world import Scene, SceneObject, draw_scene, sample_scene
from llava_lite.inputs.pixels import pad_to_square

SIZE, PATCH, GRID = 336, 14, 24
TRAIN_SEED, HELD_OUT_SEED, DECODER_SEED = 1, 2, 3
SCENES_OF_A_STEP = 100_000  # range of scene indices for each step of decoder and joint

Task = tuple[int, int]  # seed and index of a scene


def make_scene(seed: int, index: int) -> Scene:
    """Scene `index` of a seed: the same every time, so only its pixels are stored."""
    rng = np.random.default_rng([seed, index])
    sizes = (224, 480) if rng.random() < 0.8 else (480, 1024)
    return sample_scene(rng, short_side=sizes)


def difficulty(scene: Scene) -> int:
    """The number of objects, in which a hard object counts as three. An object is hard if it has a
    digit, is small in the model's image, or is close to a border between thirds."""

    def is_hard(one: SceneObject) -> bool:
        small = one.radius * SIZE / max(scene.width, scene.height) < 16
        spot = one.x / scene.width, one.y / scene.height
        border = min(abs(value - third / 3) for value in spot for third in (1, 2))
        return one.digit is not None or small or border < 0.02

    return sum(3 if is_hard(one) else 1 for one in scene.objects)


def render(task: Task) -> np.ndarray:
    """Draw one scene at the model's input size, as pixels.py does: (S, S, 3) uint8."""
    scene = make_scene(*task)
    image = pad_to_square(draw_scene(scene, supersample=1 + task[1] % 3))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class SceneSet:
    """`count` scenes of a seed with their pixels (count, S, S, 3) in a memory-mapped file."""

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        path = folder / f"scenes_{seed}_{count}.npy"
        if not path.exists():
            draw_all(path, seed, count)
        self.pixels = np.load(path, mmap_mode="r")
        self.scenes = [make_scene(seed, index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def head(self, count: int) -> "SceneSet":
        """The first `count` scenes."""
        first = copy(self)
        first.pixels, first.scenes = self.pixels[:count], self.scenes[:count]
        return first


def draw_all(path: Path, seed: int, count: int) -> None:
    """Draw all scenes with every core into a file that takes its name only when it is complete."""
    partial = path.with_suffix(".partial.npy")
    shape = (count, SIZE, SIZE, 3)
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    tasks = [(seed, index) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        drawn = pool.imap(render, tasks, chunksize=32)
        for index, image in enumerate(tqdm(drawn, "draw scenes", count)):
            pixels[index] = image
    pixels.flush()
    partial.rename(path)


def fresh_batches(
    args: argparse.Namespace, steps: range, batch: int, late: bool
) -> Iterator[tuple[list[Scene], np.ndarray]]:
    """Yield `batch` scenes and their pixels (batch, S, S, 3) for each step. No scene comes twice: a
    decoder memorizes repeated scenes. Scenes are drawn during the previous step. Unless `late`, the
    first scenes have few objects."""

    def collect(started: tuple[list[Task], Iterator[np.ndarray]]) -> tuple[list[Scene], np.ndarray]:
        tasks, images = started
        return [make_scene(*task) for task in tasks], np.stack(list(images))

    before = None
    with drawers(args.drawers) as draw:
        for step in steps:
            most = curriculum(1.0 if late else step / steps.stop)
            tasks = scene_tasks(args.scene_seed, step, batch, most, late)
            started = tasks, draw(render, tasks)
            if before:
                yield collect(before)
            before = started
        if before:
            yield collect(before)


@contextmanager
def drawers(count: int) -> Iterator[Callable[..., Iterator[np.ndarray]]]:
    """A `map` over `count` processes; 0: a lazy `map` in this process."""
    if count == 0:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield pool.map


EVERY_TIME = 12  # no scene of at least this difficulty is skipped


def scene_tasks(seed: int, step: int, batch: int, most: int, late: bool) -> list[Task]:
    """The `batch` scenes of one step, with at most `most` objects each. late: difficult scenes come
    more often, up to the difficulty EVERY_TIME."""
    found: list[Task] = []
    for index in count_from(step * SCENES_OF_A_STEP):
        scene = make_scene(seed, index)
        skipped = difficulty(scene) <= np.random.default_rng([seed, index, 1]).random() * EVERY_TIME
        if len(scene.objects) <= most and not (late and skipped):
            found.append((seed, index))
        if len(found) == batch:
            return found


def curriculum(progress: float) -> int:
    """The largest number of objects in a scene: 2 at first, no limit from 30 % on."""
    return 2 + int(progress / 0.075)
