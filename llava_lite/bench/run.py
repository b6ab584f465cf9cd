"""`llava-lite bench`: how fast a model is on this machine, compared with the machine's limits.

Contenders take turns within every round: this package, on request also with quantized weights, and
`transformers` on the same weights (transformers_peer.py). Two limits of the machine take turns too:
matrix products and memory reads (machine.py). Models that do not fit in memory together run one
after another. Load time and memory are measured in a fresh process.

cases.py has the cases to time; report.py turns the figures into rows, a table and a plot.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeVar

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
    decode,
    first_token,
    our_cases,
    peer_cases,
    prompt_ids,
    random_pixels,
    stored_bytes,
    walk_all,
)
from llava_lite.bench.machine import READ_BYTES, Case, Measurement, time_cases
from llava_lite.bench.memory import MemoryWatch, free_bytes, private_bytes
from llava_lite.bench.profile import Profile, profile_cases
from llava_lite.bench.transformers_peer import Peer, import_transformers
from llava_lite.checkpoints.checkpoint import load_tokenizer
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.download import resolve
from llava_lite.checkpoints.load import embedded_model, load
from llava_lite.checkpoints.quantized import read_method
from llava_lite.checkpoints.skeleton import expected_shapes, meta_model
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, TINY, LlavaConfig
from llava_lite.errors import CheckpointError, LlavaLiteError
from llava_lite.fast.allocator import keep_freed_memory
from llava_lite.fast.compiled import CompiledModel, buckets, check_way, power_of_two
from llava_lite.fast.device import machine
from llava_lite.fast.kernels import choose_kernels
from llava_lite.fast.quantize import find_method
from llava_lite.fast.quantize import quantize as quantize_model
from llava_lite.generation.model import Model
from llava_lite.generation.trace import kv_bytes
from llava_lite.llava import Llava
from llava_lite.reduction import NO_REDUCTION, REDUCTIONS

SIZES = {"7b": LLAVA_1_5_7B, "13b": LLAVA_1_5_13B, "tiny": TINY}
WITH_QUANTIZED = ("none", "tome-72-logical", "hybrid-72-36")  # reductions
SHARE_OF_PLAIN = {"int4": 0.3, "int8": 0.55}  # bytes of quantized weights, scales included
PEER_FOOTPRINT = "load and memory of transformers"
SPARE_BYTES = 1_000_000_000
GIGA = 1e9

Result = TypeVar("Result")
Loading = tuple[float | None, int | None, int | None]  # seconds, private, loading


class BenchError(LlavaLiteError):
    """The request cannot be measured here."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run, in plain values that another process can receive.

    source, options: arguments of `load`. source None: random weights of a `size`, with `layers`
    decoder layers (None: all). against: compare with transformers. compile: decode our tokens in
    compiled steps (compiled.py). profile: also profile each part (profile.py)."""

    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    size: str = "7b"
    layers: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    repeat: int = 5
    reductions: tuple[str, ...] = tuple(REDUCTIONS)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    against: bool = False
    quantize: str | None = None
    quiet: bool = False
    compile: bool = False
    profile: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        """The names of our models."""
        return (OURS, self.quantized) if self.quantize else (OURS,)

    @property
    def contenders(self) -> tuple[str, ...]:
        """The names of all contenders, ours first."""
        return (*self.ours, TRANSFORMERS) if self.against else self.ours

    @property
    def quantized(self) -> str:
        """The name of our model with quantized weights."""
        return f"{OURS} {self.quantize}"


@dataclass(frozen=True)
class Footprint:
    """Load time and memory of a model in a fresh process, in seconds and bytes.

    load_seconds: the median of `loads`, one per process, without the import of torch; None for
    random weights. private: memory of the process alone after loading. loading: the peak of
    anonymous memory while loading. answering: the peak of all pages while answering, mapped weights
    included. method: of the decoder's quantization, None if it is plain."""

    config: LlavaConfig
    dtype: str
    weights: int
    load_seconds: float | None
    private: int | None
    loading: int | None
    answering: int | None
    method: str | None = None
    loads: tuple[float, ...] = ()


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
    method = read_method(folder)
    wishes = {"--quantize": settings.quantize, "--against transformers": settings.against}
    for wish, wanted in wishes.items():
        if method and wanted:
            raise BenchError(
                f"{folder}: is {method} already, {wish} needs the plain weights; "
                f"without {wish} the {method} weights are measured"
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


# ---- models ------------------------------------------------------------------------------------


def open_model(settings: Settings, quantize: str | None = None) -> Model:
    """The model to measure, on request with quantized weights."""
    if settings.source is not None:
        options = {**settings.options, "quantize": quantize, "compile": settings.compile}
        return load(settings.source, device=settings.device, dtype=settings.dtype, **options)
    llava = random_model(random_config(settings), random_dtype(settings), settings.device)
    choose_kernels(llava.decoder)  # as `load` does
    if quantize:
        quantize_model(llava, quantize)
    # Any tokenizer will do: words do not matter here.
    model = Model(llava, load_tokenizer(embedded_model(), TINY))
    return CompiledModel(model) if settings.compile else model


def random_config(settings: Settings) -> LlavaConfig:
    """The config of the named size, with the wanted number of decoder layers."""
    config = SIZES[settings.size]
    layers = settings.layers or config.text.num_layers
    return replace(config, text=replace(config.text, num_layers=layers))


def random_dtype(settings: Settings) -> torch.dtype:
    """bfloat16, unless the settings name another dtype."""
    return getattr(torch, "bfloat16" if settings.dtype == "auto" else settings.dtype)


def random_model(config: LlavaConfig, dtype: torch.dtype, device: str) -> Llava:
    """An untrained model, the same every time. Norms are 1, so activations stay in range. The other
    weights repeat one block of noise, which takes seconds at any size."""
    model = meta_model(config).to(dtype).to_empty(device=device)  # never in memory in float32
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn((1 << 22) + 4099, generator=generator)).to(device, dtype)
    block, start = 1 << 21, 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "embed" not in name:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
            continue
        for piece in parameter.view(-1).split(block):
            piece.copy_(noise[start : start + len(piece)])
            start = (start + 7919) % block
    return model


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def twin(model: Model) -> Model:
    """A second model on the same tensors. Its layers may be replaced."""
    llava = meta_model(model.llava.config)
    llava.load_state_dict(model.llava.state_dict(), assign=True)
    copy = Model(
        llava.requires_grad_(False), model.tokenizer, model.config, thresholds=model.own_thresholds
    )
    return CompiledModel(copy) if isinstance(model, CompiledModel) else copy


# ---- load time and memory ----------------------------------------------------------------------


def apart(task: Callable[..., Result], *args: Any) -> Result:
    """Run a task in a fresh process. Raises its errors; BenchError if the process is killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(task, *args).result()
        except BrokenProcessPool as error:
            raise BenchError("the process of a model was killed (out of memory?)") from error


def find_footprint(settings: Settings, name: str) -> Footprint:
    """The footprint of one of our models. A folder is loaded without further quantization in as
    many processes as there are rounds."""
    folder = settings.source is not None and name == OURS
    return repeat_apart(settings.repeat if folder else 1, footprint, settings, name)


def find_peer_footprint(settings: Settings, plain: Footprint) -> Footprint:
    """The footprint of `from_pretrained` of transformers, on a temporary export of the model.
    Raises BenchError if there is no folder to export, and CheckpointError if there is no space."""
    if settings.source is None:
        raise BenchError("of a folder: -m MODEL")
    with TemporaryDirectory(prefix="llava_lite-bench-") as parent:
        folder = Path(parent) / "hf"
        apart(export_for_peer, settings, plain.dtype, folder)
        return repeat_apart(settings.repeat, peer_footprint, settings, plain, folder)


def repeat_apart(count: int, task: Callable[..., Footprint], *args: Any) -> Footprint:
    """The footprint of the first of `count` fresh processes, with the load times of all. Only the
    first process answers."""
    found = [apart(task, *args, number == 0) for number in range(count)]
    loads = tuple(one.load_seconds for one in found if one.load_seconds is not None)
    median = statistics.median(loads) if loads else None
    return replace(found[0], loads=loads, load_seconds=median)


def start_process(settings: Settings) -> None:
    """Prepare a process as a command does before it loads a model."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)


def footprint(settings: Settings, name: str, answer: bool) -> Footprint:
    """Load one of our models, answer, and measure. Call it in a fresh process."""
    start_process(settings)
    quantize = settings.quantize if name == settings.quantized else None

    def run(model: Model) -> None:
        pixels = random_pixels(Work.of(model.llava), model.llava.device)
        decode(model, first_token(model, pixels, NO_REDUCTION), DECODED)

    opening = partial(open_model, settings, quantize)
    model, loading, answering = watch(settings.device, opening, run if answer else None)
    llava, weights = model.llava, stored_bytes(model.llava)
    if settings.source is None:
        loading = None, None, None
    return Footprint(
        llava.config, name_of(llava.dtype), weights, *loading, answering, find_method(llava)
    )


def peer_footprint(settings: Settings, plain: Footprint, folder: Path, answer: bool) -> Footprint:
    """`footprint` of transformers: the same prompt and number of tokens, without its import."""
    start_process(settings)
    import_transformers()
    dtype, size = getattr(torch, plain.dtype), plain.config.vision.image_size

    def run(peer: Peer) -> None:
        ids = peer.expand(prompt_ids(plain.config))
        pixels = torch.zeros(1, 3, size, size, dtype=dtype, device=settings.device)
        peer.decode(peer.first_token(ids, pixels)[1], DECODED)

    opening = partial(Peer.from_folder, folder, dtype, settings.device)
    peer, loading, answering = watch(settings.device, opening, run if answer else None)
    return Footprint(plain.config, plain.dtype, stored_bytes(peer.model), *loading, answering)


def watch(
    device: str, opening: Callable[[], Result], run: Callable[[Result], None] | None
) -> tuple[Result, Loading, int | None]:
    """Open a model and run it. Returns the model, the seconds and memory of loading (see
    `Footprint`), and the peak memory of the run."""
    with MemoryWatch(device) as load_watch:
        start = perf_counter()
        model = opening()
        seconds = perf_counter() - start
    private = private_bytes()
    with torch.inference_mode(), MemoryWatch(device) as run_watch:
        if run is not None:
            run(model)
    return model, (seconds, private, load_watch.anonymous), run_watch.resident


def export_for_peer(settings: Settings, dtype: str, folder: Path) -> None:
    """`convert --to hf` of the source."""
    options = settings.options
    tower = options.get("vision_tower")
    where = {name: options[name] for name in ("revision", "offline") if name in options}
    path = resolve(str(settings.source), vision_tower=tower, **where)
    convert(path, folder, dtype=dtype, base=options.get("base"), vision_tower=tower, to="hf")


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
