#!/usr/bin/env python3
"""Time and memory, side by side in one run.

    python tools/benchmark.py                  # what reductions save: 7B widths, 4 layers, bf16
    python tools/benchmark.py --size tiny --repeat 2
    python tools/benchmark.py --device cuda --json figures.json     # everything, twice

`all`, which is the default on a GPU, is `llava-lite bench` with random weights of all layers,
whatever of it there is here: int4 weights, too, where the device has an operator for them, and
transformers where it is installed. On a GPU a second run follows with compiled steps (`--compile`),
its figures in `figures-compiled.json`.

`reduction` measures what each kind of token reduction saves: the vision tower, the decoder's
prefill of one image prompt (35 words, image, 29 words; 640 positions without reduction), one
decoded token, and the bytes of the KV cache. Weights are random: speed does not depend on their
values. All settings take turns within every round, so that a slow moment of the machine hits all of
them; figures are medians over the rounds, ratios those of medians to the same without reduction.

The decoder has few layers to fit anywhere; the times of one full and one pruned layer, taken from
the same rounds, are extrapolated to all layers of the model. The table goes to stdout, progress to
stderr.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from llava_lite.bench.machine import quartiles, time_in_turns
from llava_lite.bench.report import FEWEST_ROUNDS
from llava_lite.bench.run import BenchError, random_model
from llava_lite.cache import KVCache
from llava_lite.cli import program as cli
from llava_lite.cli.arguments import positive
from llava_lite.config import LLAVA_1_5_7B, TINY, LlavaConfig
from llava_lite.fast.device import machine, pick_device
from llava_lite.fast.quantize import check_operator
from llava_lite.llava import IMAGE_TOKEN_ID, EncodedImage, Llava
from llava_lite.reduction import NO_REDUCTION, REDUCTIONS, Reduction, ToMe
from llava_lite.saving import check_output

RunKey = tuple[str, str]  # part, setting

WORDS_BEFORE, WORDS_AFTER = 35, 29
DECODED = 8  # tokens per timing
SIZES = {"7b": LLAVA_1_5_7B, "tiny": TINY}
DECODER_SETTINGS = [name for name, reduction in REDUCTIONS.items() if name != "dymu-72"]
TOWER_SETTINGS = {
    "none": NO_REDUCTION,
    "keep=288": Reduction(ToMe(keep=288)),
    "keep=144": Reduction(ToMe(keep=144)),
    "r=21": Reduction(ToMe(r=21)),
    "keep=72": Reduction(ToMe(keep=72)),
}
# What the 7B model should reach on a CPU in bfloat16, as a share of the time without reduction.
BOUNDS = {
    ("prefill", "tome-72-logical"): 0.28,
    ("prefill", "hybrid-72-36"): 0.25,
    ("tower", "keep=72"): 0.65,
}


@dataclass(frozen=True)
class Measurement:
    """One setting of one part: median seconds, quartiles, ratio to no reduction, the bound on that
    (None: there is none), tokens that the decoder gets, and the cache's bytes if there is one."""

    part: str
    setting: str
    seconds: float
    quartiles: tuple[float, float]
    ratio: float
    bound: float | None = None
    image_tokens: int | None = None
    kv_bytes: int | None = None

    @property
    def verdict(self) -> str:
        """PASS or SHORT beside a bound."""
        if self.bound is None:
            return ""
        return f"{'PASS' if self.ratio <= self.bound else 'SHORT'} (at most {self.bound:.2f})"


# ---- token reduction ---------------------------------------------------------------------------


def prompt_ids(config: LlavaConfig) -> list[int]:
    """Any words, with the image between them."""
    words = [3 + n % (config.text.vocab_size - 3) for n in range(WORDS_BEFORE + WORDS_AFTER)]
    return words[:WORDS_BEFORE] + [IMAGE_TOKEN_ID] + words[WORDS_BEFORE:]


def prefill(
    model: Llava, input_ids: list[int], image: EncodedImage, reduction: Reduction
) -> tuple[KVCache, int]:
    """One prompt whose image is encoded already: the cache, and the next position."""
    rows, layout = model.splice(input_ids, [image], positions=reduction.positions)
    _, [cache], _ = model([rows], [layout], [None], [reduction.fastv])
    return cache, layout.next_position


def decode(model: Llava, cache: KVCache, position: int) -> None:
    """A few tokens after a prompt."""
    token = torch.tensor([5], device=model.device)
    for step in range(DECODED):
        _, cache = model.decode(token, position + step, cache)


def measure_reduction(
    model: Llava, repeat: int, device: str, judged: bool
) -> tuple[list[Measurement], dict[str, float]]:
    """All settings, with their bounds where these hold, and the prefill ratios extrapolated to all
    layers of the model."""
    vision = model.config.vision
    shape = (1, 3, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, device=device, dtype=model.dtype)
    input_ids = prompt_ids(model.config)
    images = {name: model.encode_image(pixels, REDUCTIONS[name])[0] for name in DECODER_SETTINGS}
    prefills = {
        name: partial(prefill, model, input_ids, image, REDUCTIONS[name])
        for name, image in images.items()
    }
    caches = {name: run() for name, run in prefills.items()}
    timer = LayerTimer(model, device)
    runs: dict[RunKey, Callable[[], Any]] = {}
    for name, reduction in TOWER_SETTINGS.items():
        steps = reduction.merge.steps(vision) if reduction.merge else None
        runs["tower", name] = partial(model.vision, pixels, steps)
    for name, run in prefills.items():
        runs["prefill", name] = partial(timer.watch, name, run)
    for name, cache in caches.items():
        runs["decode", name] = partial(decode, model, *cache)
    seconds = time_in_turns(runs, repeat, device)
    layers = {name: rounds[1:] for name, rounds in timer.seconds().items()}  # as time_in_turns
    rows = [
        measurement(key, seconds, images.get(key[1]), caches.get(key[1], (None, 0))[0], judged)
        for key in seconds
    ]
    return rows, extrapolate(layers)


def measurement(
    key: RunKey,
    seconds: dict[RunKey, list[float]],
    image: EncodedImage | None,
    cache: KVCache | None,
    judged: bool,
) -> Measurement:
    """One line of the table, from the seconds of all runs, the image and the cache of this one."""
    part, name = key
    calls = DECODED if part == "decode" else 1
    values = [value / calls for value in seconds[key]]
    median = statistics.median(values)
    ratio = median / (statistics.median(seconds[part, "none"]) / calls)
    counts: tuple[int | None, int | None] = (None, None)
    if part != "tower" and image is not None and cache is not None:
        counts = len(image.image_embeds), sum(k.nbytes + v.nbytes for k, v in cache)
    bound = BOUNDS.get(key) if judged else None
    return Measurement(part, name, median, quartiles(values), ratio, bound, *counts)


class LayerTimer:
    """Notes when each decoder layer of a watched forward starts and ends. On a GPU these are events
    in its queue: to wait for every layer would slow down what is measured."""

    def __init__(self, model: Llava, device: str) -> None:
        self.layers, self.on_gpu = model.decoder.layers, device.startswith("cuda")
        self.marks: list[Any] = []
        self.rounds: dict[str, list[list[Any]]] = {}

    def mark(self, *_: object) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(perf_counter())

    def watch(self, name: str, run: Callable[[], Any]) -> None:
        """One forward, to be found under `name`."""
        self.marks = []
        hooks = [layer.register_forward_pre_hook(self.mark) for layer in self.layers]
        hooks += [layer.register_forward_hook(self.mark) for layer in self.layers]
        run()
        for hook in hooks:  # nothing else is to be noted, nor slowed down
            hook.remove()
        self.rounds.setdefault(name, []).append(self.marks)

    def seconds(self) -> dict[str, list[list[float]]]:
        """By name, for each watched forward the seconds of every layer. The GPU must be idle."""
        return {
            name: [list(map(self.between, marks[::2], marks[1::2])) for marks in rounds]
            for name, rounds in self.rounds.items()
        }

    def between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start


def extrapolate(layers: dict[str, list[list[float]]]) -> dict[str, float]:
    """Ratio of the decoder layers' time to no reduction, if the model had all of its layers: those
    in front of the pruned one cost what the first ones do, the others what the last one does."""
    num_layers = LLAVA_1_5_7B.text.num_layers
    totals = {}
    for name, rounds in layers.items():
        medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
        fastv = REDUCTIONS[name].fastv
        early = min(fastv.layer if fastv else len(medians), len(medians))
        first = statistics.mean(medians[:early])
        last = statistics.mean(medians[early:]) if early < len(medians) else first
        totals[name] = first * early + last * (num_layers - early)
    return {name: total / totals["none"] for name, total in totals.items()}


# ---- output ------------------------------------------------------------------------------------


def table(rows: list[Measurement], extrapolated: dict[str, float]) -> Iterator[str]:
    """Lines for people."""
    titles = {
        "tower": "vision tower",
        "prefill": "decoder prefill",
        "decode": "one decoded token",
    }
    part = ""
    for row in rows:
        if row.part != part:
            part = row.part
            yield f"\n{titles[part]:<20}{'ms':>9}{'quartiles':>17}{'ratio':>8}"
        low, high = (1000 * value for value in row.quartiles)
        line = f"  {row.setting:<18}{1000 * row.seconds:>9.1f}{f'{low:.1f}-{high:.1f}':>17}"
        line += f"{row.ratio:>8.3f}"
        if row.part == "prefill":
            line += f"   {extrapolated[row.setting]:.3f} extrapolated to 32 layers"
        if row.part == "decode" and row.kv_bytes is not None:
            line += f"   KV cache {row.kv_bytes / 2**20:.1f} MiB"
        yield f"{line}   {row.verdict}".rstrip()


def bench_everything(args: argparse.Namespace) -> int:
    """`llava-lite bench`, on a GPU once more in compiled steps; its exit code."""
    asked = bench_arguments(args)
    output = ["-o", str(args.json)] if args.json else []
    code = cli.main([*asked, *output])
    if code == 0 and args.device.startswith("cuda"):
        if args.json:
            output[1] = str(args.json.with_stem(f"{args.json.stem}-compiled"))
        code = cli.main([*asked, "--compile", *output])
    return code


def bench_arguments(args: argparse.Namespace) -> list[str]:
    """What `llava-lite bench` is asked for everything."""
    asked = ["bench", "--size", args.size, "--device", args.device, "--dtype", args.dtype]
    options = {"--layers": args.layers, "--threads": args.threads, "--repeat": args.repeat}
    for name, value in options.items():
        asked += [name, str(value)] if value is not None else []
    asked += ["--strict"] if args.strict else []
    if find_spec("transformers") is None:
        print("without transformers: it is not installed", file=sys.stderr)
    else:
        asked += ["--against", "transformers"]
    try:
        check_operator("int4", torch.device(args.device), getattr(torch, args.dtype))
    except ValueError as error:
        print(f"without int4: {error}", file=sys.stderr)
    else:
        asked += ["--quantize", "int4"]
    return asked


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--what", choices=["reduction", "all"], help="default: all on a GPU, else reduction"
    )
    parser.add_argument("--size", choices=[*SIZES], default="7b", help="widths of the model")
    parser.add_argument("--layers", type=positive, help="decoder layers (default: 4; of all: all)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads")
    parser.add_argument("--repeat", type=positive, default=7, metavar="N", help="rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--strict", action="store_true", help="exit code 1 where a bound is missed")
    args = parser.parse_args(argv)
    try:
        args.device = str(pick_device(args.device))
        if args.json:
            check_output(args.json, BenchError)
    except (ValueError, BenchError) as error:
        parser.error(str(error))
    if (args.what or ("all" if args.device.startswith("cuda") else "reduction")) == "all":
        return bench_everything(args)
    args.layers = 4 if args.layers is None else args.layers
    if args.layers < 4:
        parser.error("needs at least 4 layers, of which one is pruned")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = SIZES[args.size]
    config = replace(config, text=replace(config.text, num_layers=args.layers))
    torch.manual_seed(0)
    with torch.inference_mode():
        model = random_model(config, getattr(torch, args.dtype), args.device)
        here = args.size, args.dtype, args.device
        judged = here == ("7b", "bfloat16", "cpu") and args.repeat >= FEWEST_ROUNDS
        rows, extrapolated = measure_reduction(model, args.repeat, args.device, judged)
    facts = machine(args.device, torch.get_num_threads())
    print(f"{config.name} widths, {args.layers} layers, {args.dtype}, medians of {args.repeat} on")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n".join(table(rows, extrapolated)))
    if args.json:
        content = {
            "machine": facts,
            "settings": {"size": args.size, "layers": args.layers, "dtype": args.dtype},
            "repeat": args.repeat,
            "measurements": [{**asdict(row), "verdict": row.verdict} for row in rows],
            "extrapolated_prefill_ratios": extrapolated,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    short = any(row.bound is not None and row.ratio > row.bound for row in rows)
    return int(args.strict and short)


if __name__ == "__main__":
    sys.exit(main())
