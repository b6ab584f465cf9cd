"""`llava-lite bench`: how fast a model is on this machine, compared with the machine's limits.

Contenders take turns within every round: this package, on request also with quantized weights, and
`transformers` on the same weights (transformers_peer.py). Two limits of the machine take turns too:
matrix products and memory reads (machine.py). Models that do not fit in memory together run one
after another. Load time and memory are measured in a fresh process.

cases.py has the cases to time; report.py turns the figures into rows, a table and a plot.
"""

import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
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
    Case,
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
from llava_lite.bench.machine import (
    READ_BYTES,
    Limit,
    MemoryWatch,
    Run,
    free_bytes,
    limit_runs,
    private_bytes,
    quartiles,
    time_in_turns,
)
from llava_lite.bench.profile import Profile, profile_cases
from llava_lite.bench.transformers_peer import Peer, import_transformers
from llava_lite.checkpoints.checkpoint import load_tokenizer, parse_dtype
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.download import resolve
from llava_lite.checkpoints.load import embedded_model, load
from llava_lite.checkpoints.quantized import read_method
from llava_lite.checkpoints.skeleton import meta_model
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, TINY, LlavaConfig
from llava_lite.errors import LlavaLiteError
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
    def contenders(self) -> tuple[str, ...]:
        """The names of all contenders, ours first."""
        ours = (OURS, self.quantized) if self.quantize else (OURS,)
        return (*ours, TRANSFORMERS) if self.against else ours

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
class Measurement:
    """A timed case: median seconds of a step, quartiles and all rounds; rates per second (None: not
    counted), and their shares of the machine's limits."""

    contender: str
    part: str
    setting: str
    seconds: float
    quartiles: tuple[float, float]
    rounds: tuple[float, ...]
    tokens_per_second: float | None
    flops_per_second: float | None = None
    matmul_share: float | None = None
    bytes_per_second: float | None = None
    read_share: float | None = None
    bytes: int = 0
    image_tokens: int | None = None
    kv_bytes: int | None = None


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
    footprints = {
        name: footprint_apart(settings, name)
        for name in settings.contenders
        if name != TRANSFORMERS
    }
    plain = footprints[OURS]
    not_loaded: dict[str, str] = {}
    if settings.against:
        try:
            footprints[TRANSFORMERS] = peer_footprint_apart(settings, plain)
        except BenchError as error:
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
        {**found[0].skipped, **not_loaded},
        tuple(one for phase in found for one in phase.profiles),
        import_transformers().__version__ if settings.against else None,
        difference(logits.get(OURS), logits.get(TRANSFORMERS)),
    )


def check(settings: Settings) -> None:
    """Raise BenchError or PeerError for an impossible request, before anything slow."""
    unknown = [name for name in settings.reductions if name not in REDUCTIONS]
    if unknown:
        raise BenchError(f"no reduction {unknown[0]!r}; there are {', '.join(REDUCTIONS)}")
    if settings.compile:
        check_way(None, torch.device(settings.device))
    if settings.against:
        import_transformers()
    if settings.source is not None:
        check_stored(settings, Path(settings.source).expanduser())
    else:
        config, dtype = random_config(settings), random_dtype(settings)
        needed, free = num_parameters(config) * dtype.itemsize, free_bytes(settings.device)
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
    quantized = tuple(name for name in names if name == settings.quantized)
    others = tuple(name for name in names if name != settings.quantized)
    plans: list[list[tuple[str, ...]]]
    plans = [[names], [others, quantized], [(name,) for name in names]]
    for phases in plans:
        if free is None or max(needed_bytes(settings, plain, phase) for phase in phases) <= free:
            return phases
    return plans[-1]


def needed_bytes(settings: Settings, plain: Footprint, names: Sequence[str]) -> int:
    """About how many bytes some contenders need together."""
    text, patches = plain.config.text, plain.config.vision.num_patches
    needed = plain.weights + READ_BYTES + SPARE_BYTES
    # Quantized weights replace the plain ones, unless another contender needs these.
    if settings.quantize and settings.quantized in names and len(names) > 1:
        needed += int(SHARE_OF_PLAIN[settings.quantize] * plain.weights)
    # Caches of the largest batch, with room to grow, and of a few single prompts.
    copies = 1.25 * max(settings.batch_sizes, default=1) + 3
    prompt = [WORDS_BEFORE + patches + WORDS_AFTER] * text.num_layers
    needed += int(copies * kv_bytes(text, prompt, parse_bytes(plain.dtype)))
    ours = sum(name != TRANSFORMERS for name in names)
    return needed + ours * static_bytes(settings, plain) if settings.compile else needed


def static_bytes(settings: Settings, plain: Footprint) -> int:
    """Bytes of the permanent buffers of compiled steps: a slot for each item of the largest batch,
    with as many positions as the longest prompt."""
    text, patches = plain.config.text, plain.config.vision.num_patches
    words = [length for length in settings.lengths if length <= text.max_positions]
    longest = max([WORDS_BEFORE + patches + WORDS_AFTER, *words]) + DECODED + 1
    positions = [buckets(longest)] * text.num_layers
    slots = power_of_two(max(settings.batch_sizes, default=1))
    return slots * kv_bytes(text, positions, parse_bytes(plain.dtype))


def parse_bytes(dtype: str) -> int:
    """Bytes of one number of a named dtype."""
    return (parse_dtype(dtype) or torch.float32).itemsize


def difference(ours: Tensor | None, theirs: Tensor | None) -> float | None:
    """The largest difference of logits (1, V), as a share of the largest logit."""
    if ours is None or theirs is None:
        return None
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- models ------------------------------------------------------------------------------------


def open_model(settings: Settings, quantize: str | None = None) -> Model:
    """The model to measure. quantize: only for a source, while it is loaded."""
    if settings.source is None:
        llava = random_model(random_config(settings), random_dtype(settings), settings.device)
        choose_kernels(llava.decoder)  # as `load` does
        # Any tokenizer will do: words do not matter here.
        model = Model(llava, load_tokenizer(embedded_model(), TINY))
        return CompiledModel(model) if settings.compile else model
    options = {**settings.options, **({"quantize": quantize} if quantize else {})}
    options |= {"compile": True} if settings.compile else {}
    return load(settings.source, device=settings.device, dtype=settings.dtype, **options)


def random_config(settings: Settings) -> LlavaConfig:
    """The config of the named size, with the wanted number of decoder layers."""
    config = SIZES[settings.size]
    layers = settings.layers or config.text.num_layers
    return replace(config, text=replace(config.text, num_layers=layers))


def random_dtype(settings: Settings) -> torch.dtype:
    """bfloat16, unless the settings name another dtype."""
    return parse_dtype("bfloat16" if settings.dtype == "auto" else settings.dtype) or torch.bfloat16


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


def num_parameters(config: LlavaConfig) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


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


def footprint_apart(settings: Settings, name: str) -> Footprint:
    """The footprint of one of our models, in a fresh process. A folder is loaded
    without further quantization in as many processes as there are rounds."""
    first = apart(footprint, settings, name)
    if first.load_seconds is None:
        return first
    more = settings.repeat - 1 if name == OURS else 0
    return with_loads(
        first, [first.load_seconds, *(apart(load_seconds, settings) for _ in range(more))]
    )


def with_loads(first: Footprint, loads: Sequence[float]) -> Footprint:
    """The footprint with the load times of all processes."""
    return replace(first, loads=tuple(loads), load_seconds=statistics.median(loads))


def start_process(settings: Settings) -> None:
    """Prepare a process as a command does before it loads a model."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)


def load_seconds(settings: Settings) -> float:
    """Seconds to load the source. Call it in a fresh process."""
    start_process(settings)
    start = perf_counter()
    open_model(settings)
    return perf_counter() - start


def footprint(settings: Settings, name: str) -> Footprint:
    """Load one of our models, answer, and measure. Call it in a fresh process."""
    start_process(settings)
    quantize = settings.quantize if name == settings.quantized else None
    from_source = settings.source is not None
    with MemoryWatch(settings.device) as watch:
        start = perf_counter()
        model = open_model(settings, quantize if from_source else None)
        seconds = perf_counter() - start
    private = private_bytes()
    if quantize and not from_source:
        quantize_model(model.llava, quantize)
    with torch.inference_mode(), MemoryWatch(settings.device) as answering:
        pixels = random_pixels(Work.of(model.llava), model.llava.device)
        decode(model, first_token(model, pixels, NO_REDUCTION), DECODED)
    return Footprint(
        model.llava.config,
        name_of(model.llava.dtype),
        stored_bytes(model.llava),
        seconds if from_source else None,
        private if from_source else None,
        watch.anonymous if from_source else None,
        answering.resident,
        find_method(model.llava),
    )


def peer_footprint_apart(settings: Settings, plain: Footprint) -> Footprint:
    """The footprint of `from_pretrained` of transformers, in fresh processes, on a temporary export
    of the model. Raises BenchError if there is no folder to export, or no space."""
    if settings.source is None:
        raise BenchError("of a folder: -m MODEL")
    with TemporaryDirectory(prefix="llava_lite-bench-") as parent:
        folder, size = Path(parent) / "hf", apart(export_for_peer, settings, plain.dtype, None)
        free = shutil.disk_usage(parent).free
        if free < size + SPARE_BYTES:
            raise BenchError(
                f"the copy of the weights needs {size / GIGA:.1f} GB and 1 GB to spare, "
                f"{free / GIGA:.1f} GB are free in {Path(parent).parent}"
            )
        apart(export_for_peer, settings, plain.dtype, folder)
        found = [
            apart(peer_footprint, settings, plain, folder, not more)
            for more in range(settings.repeat)
        ]
    loads = [one.load_seconds for one in found if one.load_seconds is not None]
    return with_loads(found[0], loads)


def export_for_peer(settings: Settings, dtype: str, folder: Path | None) -> int:
    """Bytes of `convert --to hf` of the source. folder None: write nothing."""
    options = settings.options
    tower = options.get("vision_tower")
    where = {name: options[name] for name in ("revision", "offline") if name in options}
    path = resolve(str(settings.source), vision_tower=tower, **where)
    made = convert(
        path,
        folder,
        dtype=dtype,
        base=options.get("base"),
        vision_tower=tower,
        to="hf",
        dry_run=folder is None,
    )
    return made.size


def peer_footprint(settings: Settings, plain: Footprint, folder: Path, answer: bool) -> Footprint:
    """`footprint` of transformers: the same prompt and number of tokens, without its import."""
    start_process(settings)
    import_transformers()
    dtype = parse_dtype(plain.dtype) or torch.float32
    with MemoryWatch(settings.device) as watch:
        start = perf_counter()
        peer = Peer.from_folder(folder, plain.config, dtype, settings.device)
        seconds = perf_counter() - start
    private = private_bytes()
    with torch.inference_mode(), MemoryWatch(settings.device) as answering:
        if answer:
            ids = peer.expand(prompt_ids(plain.config))
            size = plain.config.vision.image_size
            pixels = torch.zeros(1, 3, size, size, dtype=dtype, device=settings.device)
            peer.decode(peer.first_token(ids, pixels)[1], DECODED)
    weights = stored_bytes(peer.model)
    memory = private, watch.anonymous, answering.resident
    return Footprint(plain.config, plain.dtype, weights, seconds, *memory)


# ---- contenders --------------------------------------------------------------------------------


def build(settings: Settings, names: Sequence[str]) -> list[Contender]:
    """The named contenders. They share the plain weights."""
    model = open_model(settings)
    built = {}
    if TRANSFORMERS in names:
        built[TRANSFORMERS] = Contender(TRANSFORMERS, Peer(model.llava), Work.of(model.llava))
    for name in names:
        if settings.quantize and name == settings.quantized:
            copy = model if len(names) == 1 else twin(model)
            quantize_model(copy.llava, settings.quantize)
            built[name] = Contender(name, copy, Work.of(copy.llava))
    if OURS in names:
        built[OURS] = Contender(OURS, model, Work.of(model.llava))
    return [built[name] for name in names]


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
        if isinstance(one.model, Peer):
            found, logits[one.name] = peer_cases(one.model, one.work)
        else:
            whole = one.name == OURS
            wanted = [name for name in settings.reductions if whole or name in WITH_QUANTIZED]
            walks, reasons = walk_all(one.model, wanted)
            lengths = settings.lengths if whole else ()
            found = our_cases(one, one.model, walks, settings.batch_sizes, lengths)
            context = one.work.config.text.max_positions
            too_long = (length for length in lengths if length > context)
            skipped |= reasons
            skipped |= {f"{n} words": f"the context is {context} positions" for n in too_long}
            logits[one.name] = walks["none"].logits
        cases += found
    limits = limit_runs(contenders[0].work.dtype, settings.device)
    runs: dict[tuple[str, ...], Run] = {(limit.kind, limit.way): limit.run for limit in limits}
    runs |= {case.key: case.run for case in sorted(cases, key=lambda case: PARTS.index(case.part))}
    hidden = settings.quiet or not sys.stderr.isatty()
    seconds = time_in_turns(runs, settings.repeat, settings.device, hidden)
    rates = limit_rates(limits, seconds)
    measured = [measure(case, seconds[case.key], rates) for case in cases]
    profiles = profile_cases(cases, settings.device) if settings.profile else []
    return Phase(rates, measured, skipped, logits, profiles)


def limit_rates(
    limits: Sequence[Limit], seconds: Mapping[tuple[str, ...], list[float]]
) -> dict[str, float]:
    """Operations ("matmul") and bytes per second (the fastest "read", and each way to read)."""
    rates: dict[str, float] = {}
    for limit in limits:
        rate = limit.amount / statistics.median(seconds[limit.kind, limit.way])
        rates[limit.kind] = max(rate, rates.get(limit.kind, 0.0))
        if limit.kind == "read":
            rates[f"read, {limit.way}"] = rate
    return rates


def measure(case: Case, rounds: Sequence[float], rates: Mapping[str, float]) -> Measurement:
    """The measurement of a case, from its seconds in every round and the machine's rates."""
    steps = [seconds / case.steps for seconds in rounds]
    median = statistics.median(steps)
    flops = case.flops / median if case.flops else None
    read = case.bytes / median if case.bytes else None
    return Measurement(
        *case.key,
        median,
        quartiles(steps),
        tuple(steps),
        case.tokens / median if case.tokens else None,
        flops,
        None if flops is None else flops / rates["matmul"],
        read,
        None if read is None else read / rates["read"],
        case.bytes,
        case.image_tokens,
        case.kv_bytes,
    )
