"""Draw scenes of the embedded model's world, each with its questions and answers.

python tools/draw_scenes.py --out scenes --count 10        # scene_0.png, scene_0.json, ...
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llava_lite.evaluation.scenes.questions import questions
from llava_lite.evaluation.scenes.world import MAX_OBJECTS, draw_scene, sample_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objects", type=int, choices=range(1, MAX_OBJECTS + 1), metavar="1..6")
    parser.add_argument("--short-side", type=int, metavar="PX", help="default: random")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = (args.short_side, args.short_side) if args.short_side else (224, 1024)
    for index in range(args.count):
        rng = np.random.default_rng([args.seed, index])
        scene = sample_scene(rng, args.objects, sizes)
        draw_scene(scene, supersample=3).save(args.out / f"scene_{index}.png", optimize=True)
        asked = [asdict(question) for question in questions(scene, rng)]
        (args.out / f"scene_{index}.json").write_text(json.dumps(asked, indent=1) + "\n")


if __name__ == "__main__":
    main()
