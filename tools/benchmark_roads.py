#!/usr/bin/env python3
"""Two roads to few image tokens: the time to the first token of LLaVA-1.5 and of FastVLM.

    python tools/benchmark_roads.py
    python tools/benchmark_roads.py --sizes 7b fastvlm-0.5b --image-sizes 512 1024 --layers 8 \\
        --json roads.json --plot roads.png

LLaVA-1.5 reduces image tokens by merging and pruning, FastVLM by its tower and by smaller images.
Both answer the same prompt: one image and 64 words, none of them cached. `tower` is from pixels to
image embeds, `prefill` from there to the logits of the first token.

Weights are random: speed does not depend on their values. One model is in memory at a time, and its
settings take turns. Figures are medians over the rounds. A model that does not fit into memory has
8 decoder layers; the time of a layer behind the last pruning is extrapolated to the others. The
table says so. It goes to stdout, progress to stderr.
"""

import argparse
import gc
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llava_lite.bench.cases import prompt_ids
from llava_lite.bench.machine import Run, time_in_turns
from llava_lite.bench.memory import free_bytes
from llava_lite.bench.models import SIZES, BenchError, Settings, open_model
from llava_lite.bench.plot import check_plot
from llava_lite.checkpoints.skeleton import stored_shapes
from llava_lite.cli.arguments import positive
from llava_lite.config import FastViTHDConfig, LlavaConfig
from llava_lite.fast.device import machine, pick_device
from llava_lite.generation.model import Model
from llava_lite.generation.state import State
from llava_lite.reduction import REDUCTIONS, Reduction
from llava_lite.saving import check_output, replace_file
from llava_lite.tables import table_lines

ROADS = ("7b", "fastvlm-0.5b", "fastvlm-1.5b", "fastvlm-7b")
IMAGE_SIZES = (256, 512, 768, 1024)
PRESETS = ("none", "folded-144-36", "hybrid-72-36")
MEASURED_LAYERS = 8  # of a model that does not fit
BASE_LAYERS = 4  # the presets prune in front of layer 3 at the latest
MOST_OF_MEMORY = 0.7  # the rest is for activations, and for kernels that keep their own weights
COLORS = {"tower": "#56B4E9", "prefill": "#0072B2"}  # of Okabe and Ito


@dataclass(frozen=True)
class Row:
    """One setting of one model. tokens: image tokens that reach the decoder, then those that each
    pruning leaves; tower, prefill: seconds; measured_layers of `layers` in the decoder."""

    model: str
    image_size: int
    reduction: str
    tokens: tuple[int, ...]
    tower: float
    prefill: float
    measured_layers: int
    layers: int

    @property
    def mark(self) -> str:
        """A star behind figures that are extrapolated."""
        return "" if self.measured_layers == self.layers else " *"

    @property
    def label(self) -> str:
        """The model, and what makes its image tokens few."""
        about = "" if self.reduction == "none" else f", {self.reduction}"
        return f"{self.model}, {self.image_size} px{about}"


# ---- measure -----------------------------------------------------------------------------------


def choose_layers(config: LlavaConfig, wish: int | None, dtype: str, device: str) -> int:
    """How many decoder layers to measure: as many as wished, else all if they fit into memory, else
    MEASURED_LAYERS. Raises BenchError for too few to extrapolate from."""
    layers = config.text.num_layers
    if wish is not None and BASE_LAYERS < wish or wish == layers:
        return min(wish, layers)
    if wish is not None:
        raise BenchError(f"--layers {wish}: must be above {BASE_LAYERS}, to extrapolate")
    shapes = stored_shapes(config).values()
    needed = sum(torch.Size(shape).numel() for shape in shapes) * getattr(torch, dtype).itemsize
    free = free_bytes(device)
    return layers if free is None or needed < MOST_OF_MEMORY * free else MEASURED_LAYERS


def settings_of(
    config: LlavaConfig, image_sizes: Sequence[int], presets: Sequence[str]
) -> list[tuple[str, Reduction]]:
    """The settings of a model: FastVLM has image sizes, LLaVA has presets. Raises ValueError."""
    if isinstance(config.vision, FastViTHDConfig):
        return [("none", Reduction(image_size=size).check(config)) for size in image_sizes]
    return [(name, Reduction.of(name).check(config)) for name in presets]


def measure_model(
    model: Model, settings: Sequence[tuple[str, Reduction]], layers: int, repeat: int, device: str
) -> list[Row]:
    """The rows of a model that stands for one of `layers` decoder layers."""
    llava, measured = model.llava, model.config.text.num_layers
    runs: dict[tuple[int, str], Run] = {}
    shapes = []
    for number, (_, reduction) in enumerate(settings):
        side = model.config.vision.at(reduction.image_size).image_size
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        [image] = llava.encode_image(pixels, reduction)
        ids = prompt_ids(model.config)
        state = State(pending_ids=ids, images=(image,), reduction=reduction)
        shapes.append((side, count_tokens(len(image.image_embeds), reduction)))
        runs[number, "tower"] = partial(llava.encode_image, pixels, reduction)
        runs[number, "prefill"] = partial(model.advance, [state])
        if measured < layers:
            runs[number, "base"] = partial(prefill_shallow, model, state, BASE_LAYERS)
    seconds = time_in_turns(runs, repeat, device)
    rows = []
    for number, ((name, _), (side, tokens)) in enumerate(zip(settings, shapes, strict=True)):
        medians = {part: median(seconds[at, part]) for at, part in runs if at == number}
        prefill = extrapolate(medians, measured, layers)
        tower = medians["tower"]
        rows.append(Row(model.config.name, side, name, tokens, tower, prefill, measured, layers))
    return rows


def prefill_shallow(model: Model, state: State, depth: int) -> None:
    """Prefill with the first `depth` decoder layers only."""
    decoder = model.llava.decoder
    layers = decoder.layers
    decoder.layers = layers[:depth]
    try:
        model.advance([state])
    finally:
        decoder.layers = layers


def extrapolate(medians: Mapping[str, float], measured: int, layers: int) -> float:
    """Seconds of a prefill with all `layers`, from that with the measured ones, and from the "base"
    with the first BASE_LAYERS. Layers behind these cost the same."""
    if measured == layers:
        return medians["prefill"]
    one = (medians["prefill"] - medians["base"]) / (measured - BASE_LAYERS)
    return medians["prefill"] + (layers - measured) * one


def count_tokens(tokens: int, reduction: Reduction) -> tuple[int, ...]:
    """The image tokens that reach the decoder, and those that each pruning leaves."""
    counts, fastv = [tokens], reduction.fastv
    for layer in () if fastv is None else fastv.amounts:
        assert fastv is not None
        counts.append(fastv.num_kept(counts[-1], layer))
    return tuple(counts)


# ---- show --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of the table, and a line for every model that is extrapolated."""
    cells = [
        {
            "model": row.model,
            "image": f"{row.image_size} px",
            "reduction": row.reduction,
            "image tokens": ", ".join(map(str, row.tokens)),
            "tower, s": f"{row.tower:.2f}",
            "prefill, s": f"{row.prefill:.2f}{row.mark}",
            "first token, s": f"{row.tower + row.prefill:.2f}",
        }
        for row in rows
    ]
    yield from table_lines(cells, ("model", "reduction"))
    partial_models = {
        row.model: f"* {row.model}: {row.measured_layers} of {row.layers} decoder layers measured"
        for row in rows
        if row.mark
    }
    for line in partial_models.values():
        yield f"{line}, the others extrapolated"


def save_plot(rows: Sequence[Row], about: str, path: Path) -> None:
    """Draw the time to the first token of every row, tower and prefill stacked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.3 + 0.34 * len(rows)), layout="constrained")
    axes, places = figure.subplots(), range(len(rows))
    towers = [row.tower for row in rows]
    prefills = [row.prefill for row in rows]
    axes.barh(places, towers, color=COLORS["tower"], label="tower")
    axes.barh(places, prefills, left=towers, color=COLORS["prefill"], label="prefill")
    totals = [tower + prefill for tower, prefill in zip(towers, prefills, strict=True)]
    offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
    for place, (row, total) in enumerate(zip(rows, totals, strict=True)):
        text = f"{total:.3g}{row.mark}"
        axes.annotate(text, (total, place), va="center", size=9, **offset)
    axes.set_yticks(places, [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(totals))
    note = "; * prefill extrapolated" if any(row.mark for row in rows) else ""
    axes.set_title(f"time to first token, s (random weights{note})\n{about}", size=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    replace_file(path, buffer.getvalue())


# ---- command -----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `plan` has the layers and the settings of each size. Ends the program for
    impossible ones, before any work."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", choices=list(SIZES), default=list(ROADS), metavar="SIZE")
    text = "of FastVLM, in pixels"
    add("--image-sizes", nargs="+", type=positive, default=IMAGE_SIZES, metavar="N", help=text)
    text = "presets of LLaVA"
    choices = {"choices": list(REDUCTIONS), "default": PRESETS, "metavar": "NAME", "help": text}
    add("--reductions", nargs="+", **choices)
    add("--layers", type=positive, metavar="N", help="decoder layers (default: all that fit)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--device", default="cpu")
    add("--threads", type=positive, help="CPU threads")
    add("--repeat", type=positive, default=5, metavar="N", help="rounds")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add("--plot", type=Path, metavar="FILE", help="draw the figures (.png)")
    args = parser.parse_args(argv)
    try:
        args.device = str(pick_device(args.device))
        args.plan = {
            size: (
                choose_layers(SIZES[size], args.layers, args.dtype, args.device),
                settings_of(SIZES[size], args.image_sizes, args.reductions),
            )
            for size in args.sizes
        }
        if args.json:
            check_output(args.json, BenchError)
        if args.plot:
            check_plot(args.plot)
    except (ValueError, BenchError) as error:
        parser.error(str(error))
    return args


def measure_all(args: argparse.Namespace) -> list[Row]:
    """The rows of every size, one model in memory at a time."""
    rows: list[Row] = []
    for size, (layers, settings) in args.plan.items():
        print(f"{size}: {layers} decoder layers", file=sys.stderr)
        opened = Settings(size=size, layers=layers, device=args.device, dtype=args.dtype)
        with torch.inference_mode():
            model, whole = open_model(opened), SIZES[size].text.num_layers
            rows += measure_model(model, settings, whole, args.repeat, args.device)
        del model
        gc.collect()  # before the next model needs the memory
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, facts = measure_all(args), machine(args.device, torch.get_num_threads())
    about = f"{args.dtype}, medians of {args.repeat} rounds, {facts['name']}"
    about += f", threads {facts['threads']}, torch {facts['torch']}"
    print(f"one image and 64 words, random weights, {about}\n")
    print("\n".join(table(rows)))
    if args.json:
        settings = {"dtype": args.dtype, "repeat": args.repeat}
        content = {"machine": facts, **settings, "rows": list(map(asdict, rows))}
        replace_file(args.json, (json.dumps(content, indent=1) + "\n").encode())
    if args.plot:
        save_plot(rows, about, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
