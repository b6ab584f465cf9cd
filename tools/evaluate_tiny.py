"""Accuracy of the embedded model (or another) on fresh drawn scenes, by family of question.

python tools/evaluate_tiny.py --scenes 500
"""

import argparse
import json

from tqdm import tqdm

import llava_lite
from llava_lite.evaluate import FRESH_SEED, evaluate_scenes, fresh_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder (default: the embedded model)")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=FRESH_SEED)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mistakes", type=int, default=0, help="wrong answers to show per family")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = llava_lite.load(args.model or llava_lite.embedded_model(), dtype=args.dtype)
    scenes = tqdm(fresh_scenes(args.scenes, args.seed, args.families), total=args.scenes)
    tallies = evaluate_scenes(model, scenes)
    if args.json:
        print(json.dumps({name: [t.right, t.asked, t.accuracy] for name, t in tallies.items()}))
        return
    for name, tally in tallies.items():
        low, high = tally.interval()
        print(f"{name:12} {tally.accuracy:6.1%}  [{low:.1%}, {high:.1%}]  of {tally.asked}")
        for question, right, given in tally.mistakes[: args.mistakes]:
            print(f"    {question}  right: {right}  given: {given}")


if __name__ == "__main__":
    main()
