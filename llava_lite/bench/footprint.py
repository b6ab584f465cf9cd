"""Load time and memory of a model, measured in fresh processes."""

import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeVar

import torch

from llava_lite.bench.cases import (
    DECODED,
    OURS,
    WORDS_AFTER,
    Work,
    decode,
    first_token,
    prompt_ids,
    random_pixels,
    stored_bytes,
)
from llava_lite.bench.gguf_files import MMPROJ, PlannedFile
from llava_lite.bench.llamacpp_peer import LlamaCpp, chat_prompt, import_xllamacpp
from llava_lite.bench.memory import MemoryWatch, private_bytes
from llava_lite.bench.models import BenchError, Settings, name_of, open_model
from llava_lite.bench.transformers_peer import Peer, import_transformers
from llava_lite.checkpoints.convert import convert
from llava_lite.checkpoints.download import resolve
from llava_lite.config import LlavaConfig
from llava_lite.fast.allocator import keep_freed_memory
from llava_lite.fast.quantize import find_method
from llava_lite.generation.model import Model
from llava_lite.reduction import NO_REDUCTION

Result = TypeVar("Result")
Loading = tuple[float | None, int | None, int | None]  # seconds, private, loading


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


def find_llamacpp_footprint(
    settings: Settings, plain: Footprint, form: str, files: Mapping[str, PlannedFile]
) -> Footprint:
    """The footprint of llama.cpp with one of its formats, on files that were just written or are
    cached."""
    paths = files[form].path, files[MMPROJ].path
    count = settings.repeat if settings.source is not None else 1
    return repeat_apart(count, llamacpp_footprint, settings, plain, form, *paths)


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


def llamacpp_footprint(
    settings: Settings, plain: Footprint, form: str, text: Path, mmproj: Path, answer: bool
) -> Footprint:
    """`footprint` of llama.cpp: a prompt of the same length and as many tokens, without its
    import."""
    start_process(settings)
    import_xllamacpp()
    picture = chat_prompt(plain.config.vision.image_size, WORDS_AFTER)

    def run(peer: LlamaCpp) -> None:
        peer.run(picture, 1 + DECODED)

    opening = partial(LlamaCpp, text, mmproj, plain.config)
    _, loading, answering = watch(settings.device, opening, run if answer else None)
    weights = text.stat().st_size + mmproj.stat().st_size
    return Footprint(plain.config, form, weights, *loading, answering)


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
