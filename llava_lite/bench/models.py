"""The settings of a run of `llava-lite bench`, and the models that they name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llava_lite.bench.cases import LLAMACPP, OURS, TRANSFORMERS
from llava_lite.checkpoints.checkpoint import load_tokenizer
from llava_lite.checkpoints.load import embedded_model, load
from llava_lite.checkpoints.skeleton import meta_model
from llava_lite.config import LLAVA_1_5_7B, LLAVA_1_5_13B, PRESETS, TINY, LlavaConfig
from llava_lite.errors import LlavaLiteError
from llava_lite.fast.compiled import CompiledModel
from llava_lite.fast.device import pick_tower_dtype
from llava_lite.fast.kernels import choose_kernels
from llava_lite.fast.quantize import quantize as quantize_model
from llava_lite.fastvithd import FastViTHD
from llava_lite.generation.model import Model
from llava_lite.llava import Llava
from llava_lite.reduction import REDUCTIONS

SIZES = {"7b": LLAVA_1_5_7B, "13b": LLAVA_1_5_13B, "tiny": TINY} | {
    name: config for name, config in PRESETS.items() if name.startswith("fastvlm-")
}


NOISE = 0.02  # standard deviation of random weights


class BenchError(LlavaLiteError):
    """The request cannot be measured here."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run, in plain values that another process can receive.

    source, options: arguments of `load`. source None: random weights of a `size`, with `layers`
    decoder layers (None: all). against: compare with transformers. compile: decode our tokens in
    compiled steps (compiled.py). profile: also profile each part (profile.py). llamacpp: compare
    with llama.cpp in these formats (gguf_files.py). gguf_folder: keep its files there. quick:
    choose sizes so that a table stands soon (quick.py)."""

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
    llamacpp: tuple[str, ...] = ()
    gguf_folder: str | None = None
    quick: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        """The names of our models."""
        return (OURS, self.quantized) if self.quantize else (OURS,)

    @property
    def contenders(self) -> tuple[str, ...]:
        """The names of all contenders, ours first."""
        theirs = (TRANSFORMERS,) if self.against else ()
        return (*self.ours, *theirs, *(f"{LLAMACPP} {form}" for form in self.llamacpp))

    @property
    def quantized(self) -> str:
        """The name of our model with quantized weights."""
        return f"{OURS} {self.quantize}"


def open_model(settings: Settings, quantize: str | None = None) -> Model:
    """The model to measure, on request with quantized weights."""
    if settings.source is not None:
        options = {**settings.options, "quantize": quantize, "compile": settings.compile}
        return load(settings.source, device=settings.device, dtype=settings.dtype, **options)
    llava = random_model(random_config(settings), random_dtype(settings), settings.device)
    if quantize:
        quantize_model(llava, quantize)
    choose_kernels(llava)  # as `load` does
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
    weights repeat one block of noise, which takes seconds at any size.

    FastViTHD has long chains of convolutions without a norm. Their noise has variance 1 / fan-in:
    smaller values would fade to denormal numbers, with which a CPU is many times slower."""
    model = meta_model(config).to(dtype)
    model.vision.to(pick_tower_dtype(config.vision, dtype, torch.device(device)))
    model.to_empty(device=device)  # never in memory in float32
    model.decoder.tie_head()
    generator = torch.Generator().manual_seed(0)
    noise = (NOISE * torch.randn((1 << 22) + 4099, generator=generator)).to(device, dtype)
    block, start = 1 << 21, 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "embed" not in name:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
            continue
        for piece in parameter.view(-1).split(block):
            piece.copy_(noise[start : start + len(piece)])
            start = (start + 7919) % block
        fan_in = parameter[0].numel()
        if fan_in > 1 and name.startswith("vision.") and isinstance(model.vision, FastViTHD):
            parameter.mul_(fan_in**-0.5 / NOISE)
    for name, statistic in model.named_buffers():  # of the norms of FastViTHD
        statistic.fill_(float(name.endswith("running_var")))
    return model


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def twin(model: Model) -> Model:
    """A second model on the same tensors. Its layers may be replaced."""
    llava = meta_model(model.llava.config)
    llava.load_state_dict(model.llava.state_dict(keep_vars=True), assign=True)
    copy = Model(
        llava.requires_grad_(False), model.tokenizer, model.config, thresholds=model.own_thresholds
    )
    return CompiledModel(copy) if isinstance(model, CompiledModel) else copy
