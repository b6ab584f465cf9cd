#!/usr/bin/env python3
"""Questions per second of an evaluation: one by one, and through the batched engine.

    python tools/eval_throughput.py                             # the embedded model
    python tools/eval_throughput.py --size 7b --layers 4        # random weights of 7B widths
    python tools/eval_throughput.py --images 256 --questions 1 4 --json figures.json --strict

The images are drawn scenes, as PNG files in memory. "One by one" calls `Model.generate` for every
question with its image. "Batched" uses evaluation/engine.py: threads open images ahead, each image
is encoded once, prompts share their beginnings, and questions run in batches. Both ways take turns
and answer the same questions in every round. Figures are medians over the rounds; the first round
does not count. Different answers give exit code 1, except for random weights in 16 bit: their
logits are often almost equal, so the tool only counts the differences.

The bounds (batched at least 1.5 times as fast with one question per image, 2.5 times with four)
hold for the embedded model on two cores.
"""

import argparse
import io
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count as count_from
from pathlib import Path
from typing import Any

import torch

import llava_lite
from llava_lite.bench.machine import time_in_turns
from llava_lite.bench.models import SIZES, Settings, open_model
from llava_lite.bench.targets import Row
from llava_lite.config import TINY
from llava_lite.evaluation.engine import Engine
from llava_lite.evaluation.scenes.accuracy import fresh_scenes
from llava_lite.evaluation.scenes.questions import PARAPHRASES
from llava_lite.evaluation.scenes.world import draw_scene
from llava_lite.evaluation.suite import Sample
from llava_lite.fast.allocator import keep_freed_memory
from llava_lite.fast.device import machine
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.saving import replace_json
from llava_lite.tables import table_lines

BOUNDS = {1: 1.5, 4: 2.5}  # by questions per image: times as many questions per second
WAYS = ONE_BY_ONE, BATCHED = "one by one", "batched"


@dataclass
class Asking:
    """Questions to ask in both ways; `answers` of the last round, by way and question."""

    model: Model
    samples: Sequence[Sample]
    options: GenerationOptions
    batch_size: int
    workers: int
    answers: dict[str, dict[str, str]] = field(default_factory=dict)

    def one_by_one(self) -> None:
        wanted = {name: getattr(self.options, name) for name in ("max_new_tokens", "reduction")}
        self.answers[ONE_BY_ONE] = {
            sample.id: str(self.model.generate(list(sample.images), sample.prompt, **wanted))
            for sample in self.samples
        }

    def batched(self) -> None:
        engine = Engine(self.model, self.options, self.batch_size, self.workers)
        outcomes = list(engine.answer(self.samples))
        failed = [outcome.error for outcome in outcomes if outcome.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} questions failed, first: {failed[0]}")
        self.answers[BATCHED] = {outcome.sample.id: str(outcome.answer) for outcome in outcomes}


def scene_samples(images: int, questions: int, seed: int) -> Iterator[Sample]:
    """`questions` of different families about each of `images` scenes."""
    for number in count_from(1):
        [(scene, asked)] = fresh_scenes(1, seed, first=number - 1)
        if len(asked) < questions:
            continue
        file = io.BytesIO()
        draw_scene(scene).save(file, "PNG", compress_level=1)
        start = number % (len(asked) - questions + 1)
        for index, question in enumerate(asked[start : start + questions]):
            yield Sample(f"{number}-{index}", question.text, (file.getvalue(),), str(number))
        images -= 1
        if not images:
            return


def make_model(args: argparse.Namespace) -> Model:
    """The named model, the embedded one, or random weights with the embedded tokenizer's ids."""
    if not args.size:
        source = args.model or str(llava_lite.embedded_model())
        return open_model(Settings(source, device=args.device, dtype=args.dtype))
    device = "cpu" if args.device == "auto" else args.device
    named = {name: getattr(args, name) for name in ("size", "layers", "dtype")}
    model = open_model(Settings(device=device, **named))
    text = replace(model.config.text, sampled_vocab_size=TINY.text.sampled_vocab_size)
    return Model(model.llava, model.tokenizer, replace(model.config, text=text))


def measure(args: argparse.Namespace, model: Model) -> list[dict[str, Any]]:
    """A row for each number of questions per image."""
    options = GenerationOptions(args.max_new_tokens, reduction=args.reduction)
    ask = partial(Asking, model, options=options, batch_size=args.batch_size, workers=args.workers)
    asking = {
        count: ask(samples=list(scene_samples(args.images, count, args.seed)))
        for count in args.questions
    }
    runs = {}
    for count, one in asking.items():
        runs |= {(count, ONE_BY_ONE): one.one_by_one, (count, BATCHED): one.batched}
    device = str(model.llava.device)
    seconds = time_in_turns(runs, args.rounds, device, not sys.stderr.isatty())
    return [summarize(count, one, seconds) for count, one in asking.items()]


def summarize(
    count: int, asking: Asking, seconds: Mapping[tuple[int, str], list[float]]
) -> dict[str, Any]:
    """Rates and their ratio, from medians of the rounds."""
    asked = len(asking.samples)
    rates = {way: asked / statistics.median(seconds[count, way]) for way in WAYS}
    ratio, bound = rates[BATCHED] / rates[ONE_BY_ONE], BOUNDS.get(count)
    one, other = asking.answers[ONE_BY_ONE], asking.answers[BATCHED]
    return {
        "questions_per_image": count,
        "questions": asked,
        "questions_per_second": rates,
        "images_per_second": {way: rate / count for way, rate in rates.items()},
        "ratio": ratio,
        "bound": bound,
        "verdict": Row("", ratio, bound, at_least=True).verdict,
        "different_answers": sum(one[name] != other[name] for name in one),
        "seconds": {way: seconds[count, way] for way in rates},
    }


def table(content: Mapping[str, Any]) -> Iterator[str]:
    """The lines to print."""
    yield ", ".join(f"{name} {value}" for name, value in content["settings"].items())
    yield from table_lines([cells(row) for row in content["rows"]], ("verdict",))
    for row in content["rows"]:
        if row["different_answers"]:
            yield f"  {row['different_answers']} of {row['questions']} answers differ"


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a row, by title of the column."""
    return {
        "questions": str(row["questions_per_image"]),
        **{way: f"{row['questions_per_second'][way]:.2f}/s" for way in WAYS},
        "ratio": f"{row['ratio']:.2f}",
        "bound": str(row["bound"] or "-"),
        "verdict": row["verdict"],
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-m", "--model", help="model to measure (default: the embedded one)")
    add("--size", choices=sorted(SIZES), help="random weights of that size instead")
    add("--layers", type=int, help="with --size: number of decoder layers")
    add("--images", type=int, default=64, help="images (default: 64)")
    add("--questions", type=int, nargs="+", default=[1, 4], help="per image (default: 1 4)")
    add("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    add("--batch-size", type=int, default=16, help="questions at once (default: 16)")
    add("--workers", type=int, default=2, help="threads that open images (default: 2)")
    add("--max-new-tokens", type=int, default=128)
    add("--reduction", help="preset of token reduction")
    add("--seed", type=int, default=30_000, help="seed of the scenes (default: 30000)")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--threads", type=int, help="CPU threads")
    add("--json", metavar="FILE", help="write all figures there")
    add("--strict", action="store_true", help="exit code 1 where a bound is missed")
    args = parser.parse_args(argv)
    if not all(1 <= count <= len(PARAPHRASES) for count in args.questions):
        parser.error(f"--questions: must be 1 to {len(PARAPHRASES)}, the families of questions")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = make_model(args)
    names = ("images", "rounds", "batch_size", "workers", "reduction")
    settings = {"model": model.config.name, "dtype": str(model.llava.dtype).removeprefix("torch.")}
    settings |= {name: getattr(args, name) for name in names}
    facts = machine(str(model.llava.device), torch.get_num_threads())
    rows = measure(args, model)
    content = {"settings": settings, "machine": facts, "rows": rows}
    print("\n".join(table(content)))
    if args.json:
        replace_json(Path(args.json), content)
    exact = not args.size or model.llava.dtype == torch.float32
    different = exact and any(row["different_answers"] for row in rows)
    short = args.strict and any(row["verdict"] == "SHORT" for row in rows)
    return int(different or short)


if __name__ == "__main__":
    sys.exit(main())
