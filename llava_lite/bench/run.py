"""`llava-lite bench`: how fast a model is on this machine, compared with the machine's limits.

Contenders take turns within every round: this package, on request also with quantized weights, and
`transformers` on the same weights (transformers_peer.py) and llama.cpp on others of the same shapes
(llamacpp_peer.py). Two limits of the machine take turns too: matrix products and memory reads
(machine.py). Models that do not fit in memory together run one after another. Load time and memory
are measured in a fresh process (footprint.py). The user can interrupt the rounds: what was measured
until then is the report.

cases.py has the cases to time, targets.py the figures with a target, report.py the table.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llava_lite.bench.cases import (
    DECODED,
    LLAMACPP,
    OURS,
    TRANSFORMERS,
    count_positions,
)
from llava_lite.bench.footprint import (
    Footprint,
    find_footprint,
    find_llamacpp_footprint,
    find_peer_footprint,
)
from llava_lite.bench.gguf_files import check_files, count_bytes, gguf_files
from llava_lite.bench.llamacpp_peer import (
    describe_build,
    import_xllamacpp,
)
from llava_lite.bench.machine import READ_BYTES, Clock, Measurement
from llava_lite.bench.memory import free_bytes
from llava_lite.bench.models import (
    BenchError,
    Settings,
    name_of,
    random_config,
    random_dtype,
)
from llava_lite.bench.phases import run_phases
from llava_lite.bench.profile import Profile
from llava_lite.bench.quick import SECONDS, choose_sizes
from llava_lite.bench.transformers_peer import import_transformers
from llava_lite.checkpoints.quantized import read_kind
from llava_lite.checkpoints.skeleton import expected_shapes
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.compiled import buckets, check_way, power_of_two
from llava_lite.fast.device import machine
from llava_lite.generation.trace import kv_bytes

SHARE_OF_PLAIN = {
    "int4": 0.35,
    "int8": 0.55,
    "int8-dynamic": 0.55,
    "int4-dynamic": 0.32,
}  # bytes of quantized weights, scales included
NO_TIME = "no time left for it in a quick look"
PEER_FOOTPRINT = "load and memory of transformers"
SPARE_BYTES = 1_000_000_000
GIGA = 1e9


@dataclass(frozen=True)
class Report:
    """All figures of one run.

    phases: groups of contenders that took turns. footprints: by contender. limits: operations and
    bytes per second by way; "read" is the fastest way to read. skipped: presets and prompts that
    this model does not allow, with the reason. transformers: its version. difference: the largest
    difference between our first logits and theirs, as a share of the largest logit. llamacpp: its
    version and instructions. rounds: how many were completed in every phase (None: all).
    interrupted: by the user. choice: the sizes of a quick look, in a line."""

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
    llamacpp: str | None = None
    rounds: int | None = None
    interrupted: bool = False
    choice: str = ""

    @property
    def method(self) -> str | None:
        """The quantization of the source itself, such as an int4 folder; None if it is plain."""
        return self.footprints[OURS].method

    @property
    def counted_rounds(self) -> int:
        """The rounds behind every figure; fewer than wanted if the run ended early."""
        return self.settings.repeat if self.rounds is None else self.rounds

    def find(self, contender: str, part: str, setting: str = "none") -> Measurement | None:
        """One measurement; None if it was not run."""
        wanted = contender, part, setting
        for row in self.measurements:
            if (row.contender, row.part, row.setting) == wanted:
                return row
        return None


def bench(settings: Settings) -> Report:
    """Measure everything. Raises BenchError, PeerError, and the errors of `load`."""
    start, choice = perf_counter(), ""
    clock = Clock(show=(lambda line: None) if settings.quiet else show_line)
    check(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.quick:
        clock.deadline = start + SECONDS
        settings, choice = choose_sizes(settings)
        clock.show(choice)
        check_random(settings)
    footprints = find_our_footprints(settings)
    plain, not_loaded = footprints[OURS], {}
    if settings.against:
        try:
            footprints[TRANSFORMERS] = find_peer_footprint(settings, plain)
        except (BenchError, CheckpointError) as error:
            not_loaded[PEER_FOOTPRINT] = str(error)
    with gguf_files(plain.config, settings.llamacpp, settings.gguf_folder) as files:
        for form in settings.llamacpp:
            name = f"{LLAMACPP} {form}"
            if not settings.quick:
                footprints[name] = find_llamacpp_footprint(settings, plain, form, files)
        phases = plan(settings, plain, free_bytes(settings.device), count_bytes(files))
        found = run_phases(settings, plain, phases, files, clock)
    logits = {name: tensor for phase in found for name, tensor in phase.logits.items()}
    return Report(
        settings,
        plain.config,
        plain.dtype,
        machine(settings.device, torch.get_num_threads()),
        tuple(phases[: len(found)]),
        footprints,
        found[0].limits,
        tuple(row for phase in found for row in phase.measurements),
        found[0].skipped | not_loaded | {" ".join(key): NO_TIME for key in clock.left_out},
        tuple(one for phase in found for one in phase.profiles),
        import_transformers().__version__ if settings.against else None,
        difference(logits[OURS], logits[TRANSFORMERS]) if TRANSFORMERS in logits else None,
        describe_build() if settings.llamacpp else None,
        min(phase.rounds for phase in found),
        clock.interrupted,
        choice,
    )


def find_our_footprints(settings: Settings) -> dict[str, Footprint]:
    """The footprints of our models. A quick look measures none: loading takes too long."""
    if not settings.quick:
        return {name: find_footprint(settings, name) for name in settings.ours}
    config, dtype = random_config(settings), random_dtype(settings)
    size = random_bytes(config, dtype)
    return {OURS: Footprint(config, name_of(dtype), size, None, None, None, None)}


def random_bytes(config: LlavaConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model."""
    return sum(map(math.prod, expected_shapes(config).values())) * dtype.itemsize


def show_line(line: str) -> None:
    """Print one line of progress to stderr, above the bar."""
    tqdm.write(line, file=sys.stderr)


def check(settings: Settings) -> None:
    """Raise BenchError or PeerError for an impossible request, before anything slow."""
    if settings.compile:
        check_way(None, torch.device(settings.device))
    if settings.against:
        import_transformers()
    if settings.llamacpp:
        import_xllamacpp()
        if settings.device != "cpu":
            raise BenchError(
                f"llama.cpp runs on the CPU here, not on {settings.device}: use --device cpu"
            )
    if settings.source is not None:
        check_stored(settings, Path(settings.source).expanduser())
    elif not settings.quick:  # which chooses the layers later
        check_random(settings)


def check_random(settings: Settings) -> None:
    """Raise BenchError for random weights that do not fit into memory or on the disk."""
    config, dtype = random_config(settings), random_dtype(settings)
    needed, free = random_bytes(config, dtype), free_bytes(settings.device)
    if free is not None and needed > free:
        raise BenchError(
            f"{config.name} with {config.text.num_layers} layers in {name_of(dtype)} needs "
            f"{needed / GIGA:.1f} GB, but {free / GIGA:.1f} GB are free: use fewer --layers"
        )
    if settings.llamacpp:
        check_files(config, settings.llamacpp, settings.gguf_folder)


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


def plan(
    settings: Settings, plain: Footprint, free: int | None, files: Mapping[str, int] | None = None
) -> list[tuple[str, ...]]:
    """Groups of contenders that run together, as many as free memory (None: unknown) holds: those
    with 16 bits first, then those with fewer. files: bytes of llama.cpp's weights, by contender."""
    names, phases = settings.contenders, [tuple[str, ...]()]
    few = {settings.quantized, f"{LLAMACPP} q8_0", f"{LLAMACPP} q4_k"}
    for name in sorted(names, key=few.__contains__):
        together = tuple(sorted((*phases[-1], name), key=names.index))
        if phases[-1] and free is not None:
            if needed_bytes(settings, plain, together, files) > free:
                phases.append(())
                together = (name,)
        phases[-1] = together
    return sorted(phases, key=lambda phase: names.index(phase[0]))


def needed_bytes(
    settings: Settings,
    plain: Footprint,
    names: Sequence[str],
    files: Mapping[str, int] | None = None,
) -> int:
    """About how many bytes some contenders need together."""
    text, number = plain.config.text, getattr(torch, plain.dtype).itemsize
    theirs = {name: size for name, size in (files or {}).items() if name in names}
    needed = READ_BYTES + SPARE_BYTES + sum(theirs.values())
    needed += plain.weights if len(theirs) < len(names) else 0
    # Quantized weights replace the plain ones, unless another contender needs these.
    if settings.quantize and settings.quantized in names and len(names) > 1:
        needed += int(SHARE_OF_PLAIN[settings.quantize] * plain.weights)
    # Caches of the largest batch, with room to grow, and of a few single prompts.
    largest = max(settings.batch_sizes, default=1)
    prompt = count_positions(plain.config)
    needed += int((1.25 * largest + 3) * kv_bytes(text, [prompt] * text.num_layers, number))
    if settings.compile:  # a slot for each item of the largest batch, as long as any prompt
        words = [length for length in settings.lengths if length <= text.max_positions]
        longest = buckets(max([prompt, *words]) + DECODED + 1)
        slot = kv_bytes(text, [longest] * text.num_layers, number)
        needed += sum(name in settings.ours for name in names) * power_of_two(largest) * slot
    return needed


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits (1, V), as a share of the largest logit."""
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
