"""`llava-lite bench`: how fast a model is on this machine, compared with the machine's limits.

Contenders take turns within every round: this package, on request also with quantized weights, and
`transformers` on the same weights (transformers_peer.py). Two limits of the machine take turns too:
matrix products and memory reads (machine.py). Models that do not fit in memory together run one
after another. Load time and memory are measured in a fresh process (footprint.py).

cases.py has the cases to time, targets.py the figures with a target, report.py the table.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_lite.bench.cases import (
    DECODED,
    OURS,
    PARTS,
    TRANSFORMERS,
    WORDS_AFTER,
    WORDS_BEFORE,
    Contender,
    Work,
    our_cases,
    peer_cases,
    walk_all,
)
from llava_lite.bench.footprint import Footprint, find_footprint, find_peer_footprint
from llava_lite.bench.machine import READ_BYTES, Case, Measurement, time_cases
from llava_lite.bench.memory import free_bytes
from llava_lite.bench.models import (
    BenchError,
    Settings,
    name_of,
    open_model,
    random_config,
    random_dtype,
    twin,
)
from llava_lite.bench.profile import Profile, profile_cases
from llava_lite.bench.transformers_peer import Peer, import_transformers
from llava_lite.checkpoints.quantized import read_kind
from llava_lite.checkpoints.skeleton import expected_shapes
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.compiled import buckets, check_way, power_of_two
from llava_lite.fast.device import machine
from llava_lite.fast.quantize import quantize as quantize_model
from llava_lite.generation.model import Model
from llava_lite.generation.trace import kv_bytes

WITH_QUANTIZED = ("none", "tome-72-logical", "hybrid-72-36")  # reductions
SHARE_OF_PLAIN = {
    "int4": 0.35,
    "int8": 0.55,
    "int8-dynamic": 0.55,
    "int4-dynamic": 0.32,
}  # bytes of quantized weights, scales included
PEER_FOOTPRINT = "load and memory of transformers"
SPARE_BYTES = 1_000_000_000
GIGA = 1e9


@dataclass(frozen=True)
class Report:
    """All figures of one run.

    phases: groups of contenders that took turns. footprints: by contender. limits: operations and
    bytes per second by way; "read" is the fastest way to read. skipped: presets and prompts that
    this model does not allow, with the reason. transformers: its version. difference: the largest
    difference between our first logits and theirs, as a share of the largest logit."""

    settings: Settings
    config: LlavaConfig
    dtype: str
    machine: Mapping[str, Any]
    phases: tuple[tuple[str, ...], ...]
    footprints: Mapping[str, Footprint]
    limits: Mapping[str, float]
    measurements: tuple[Measurement, ...]
    skipped: Mapping[str, str]
    profiles: tuple[Profile, ...] = ()
    transformers: str | None = None
    difference: float | None = None

    @property
    def method(self) -> str | None:
        """The quantization of the source itself, such as an int4 folder; None if it is plain."""
        return self.footprints[OURS].method

    def find(self, contender: str, part: str, setting: str = "none") -> Measurement | None:
        """One measurement; None if it was not run."""
        wanted = contender, part, setting
        for row in self.measurements:
            if (row.contender, row.part, row.setting) == wanted:
                return row
        return None


def bench(settings: Settings) -> Report:
    """Measure everything. Raises BenchError, PeerError, and the errors of `load`."""
    check(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    footprints = {name: find_footprint(settings, name) for name in settings.ours}
    plain, not_loaded = footprints[OURS], {}
    if settings.against:
        try:
            footprints[TRANSFORMERS] = find_peer_footprint(settings, plain)
        except (BenchError, CheckpointError) as error:
            not_loaded[PEER_FOOTPRINT] = str(error)
    phases = plan(settings, plain, free_bytes(settings.device))
    found = [run_phase(settings, names) for names in phases]
    logits = {name: tensor for phase in found for name, tensor in phase.logits.items()}
    return Report(
        settings,
        plain.config,
        plain.dtype,
        machine(settings.device, torch.get_num_threads()),
        tuple(phases),
        footprints,
        found[0].limits,
        tuple(row for phase in found for row in phase.measurements),
        found[0].skipped | not_loaded,
        tuple(one for phase in found for one in phase.profiles),
        import_transformers().__version__ if settings.against else None,
        difference(logits[OURS], logits[TRANSFORMERS]) if settings.against else None,
    )


def check(settings: Settings) -> None:
    """Raise BenchError or PeerError for an impossible request, before anything slow."""
    if settings.compile:
        check_way(None, torch.device(settings.device))
    if settings.against:
        import_transformers()
    if settings.source is not None:
        check_stored(settings, Path(settings.source).expanduser())
    else:
        config, dtype = random_config(settings), random_dtype(settings)
        needed = sum(map(math.prod, expected_shapes(config).values())) * dtype.itemsize
        free = free_bytes(settings.device)
        if free is not None and needed > free:
            raise BenchError(
                f"{config.name} with {config.text.num_layers} layers in {name_of(dtype)} needs "
                f"{needed / GIGA:.1f} GB, but {free / GIGA:.1f} GB are free: use fewer --layers"
            )


def check_stored(settings: Settings, folder: Path) -> None:
    """Raise BenchError for a quantized folder if the settings need plain weights."""
    stored = read_kind(folder)
    wishes = {"--quantize": settings.quantize, "--against transformers": settings.against}
    for wish, wanted in wishes.items():
        if stored and wanted:
            raise BenchError(
                f"{folder}: is {stored.method} already, {wish} needs the plain weights; "
                f"without {wish} the {stored.method} weights are measured"
            )


def plan(settings: Settings, plain: Footprint, free: int | None) -> list[tuple[str, ...]]:
    """Groups of contenders that run together: all, if free memory (None: unknown) holds them; else
    the quantized weights later; else one after another."""
    names = settings.contenders
    others = tuple(name for name in names if name != settings.quantized)
    one_by_one: list[tuple[str, ...]] = [(name,) for name in names]
    for phases in ([names], [others, (settings.quantized,)]):
        if free is None or max(needed_bytes(settings, plain, phase) for phase in phases) <= free:
            return phases
    return one_by_one


def needed_bytes(settings: Settings, plain: Footprint, names: Sequence[str]) -> int:
    """About how many bytes some contenders need together."""
    text, number = plain.config.text, getattr(torch, plain.dtype).itemsize
    needed = plain.weights + READ_BYTES + SPARE_BYTES
    # Quantized weights replace the plain ones, unless another contender needs these.
    if settings.quantize and settings.quantized in names and len(names) > 1:
        needed += int(SHARE_OF_PLAIN[settings.quantize] * plain.weights)
    # Caches of the largest batch, with room to grow, and of a few single prompts.
    largest = max(settings.batch_sizes, default=1)
    prompt = WORDS_BEFORE + plain.config.vision.num_patches + WORDS_AFTER
    needed += int((1.25 * largest + 3) * kv_bytes(text, [prompt] * text.num_layers, number))
    if settings.compile:  # a slot for each item of the largest batch, as long as any prompt
        words = [length for length in settings.lengths if length <= text.max_positions]
        longest = buckets(max([prompt, *words]) + DECODED + 1)
        slot = kv_bytes(text, [longest] * text.num_layers, number)
        needed += sum(name != TRANSFORMERS for name in names) * power_of_two(largest) * slot
    return needed


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits (1, V), as a share of the largest logit."""
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- contenders --------------------------------------------------------------------------------


def build(settings: Settings, names: Sequence[str]) -> list[Contender]:
    """The named contenders. They share the plain weights."""
    model = open_model(settings)
    models: dict[str, Model | Peer] = {OURS: model}
    works = dict.fromkeys(names, Work.of(model.llava))
    if TRANSFORMERS in names:
        models[TRANSFORMERS] = Peer.of(model.llava)
    if settings.quantize and settings.quantized in names:
        copy = model if len(names) == 1 else twin(model)
        quantize_model(copy.llava, settings.quantize)
        models[settings.quantized], works[settings.quantized] = copy, Work.of(copy.llava)
    return [Contender(name, models[name], works[name]) for name in names]


# ---- what is timed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """The figures of contenders that ran together. logits: of the prompt's last row, by name."""

    limits: dict[str, float]
    measurements: list[Measurement]
    skipped: dict[str, str]
    logits: dict[str, Tensor]
    profiles: list[Profile]


def run_phase(settings: Settings, names: Sequence[str]) -> Phase:
    """Build some contenders, time them and the machine in turns, and free them."""
    contenders = build(settings, names)  # not in inference mode: transformers is not built in it
    with torch.inference_mode():
        return time_contenders(settings, contenders)


def time_contenders(settings: Settings, contenders: Sequence[Contender]) -> Phase:
    """Make all cases, and time them and the machine in turns."""
    cases: list[Case] = []
    skipped: dict[str, str] = {}
    logits: dict[str, Tensor] = {}
    for one in contenders:
        if one.name == TRANSFORMERS:
            found, logits[one.name] = peer_cases(one)
        else:
            found, logits[one.name], reasons = make_our_cases(settings, one)
            skipped |= reasons
        cases += found
    cases.sort(key=lambda case: PARTS.index(case.part))
    hidden = settings.quiet or not sys.stderr.isatty()
    dtype = contenders[0].work.dtype
    rates, measured = time_cases(cases, settings.repeat, dtype, settings.device, hidden)
    profiles = profile_cases(cases, settings.device) if settings.profile else []
    return Phase(rates, measured, skipped, logits, profiles)


def make_our_cases(settings: Settings, one: Contender) -> tuple[list[Case], Tensor, dict[str, str]]:
    """The cases of one of our models, its logits (1, V), and the reasons for missing cases."""
    names, lengths = settings.reductions, settings.lengths
    if one.name != OURS:  # fewer for quantized weights
        names, lengths = tuple(name for name in names if name in WITH_QUANTIZED), ()
    walks, reasons = walk_all(one.model, names)
    context = one.work.config.text.max_positions
    too_long = {f"{n} words": f"the context is {context} positions" for n in lengths if n > context}
    cases = our_cases(one, walks, settings.batch_sizes, lengths)
    return cases, walks["none"].logits, reasons | too_long
