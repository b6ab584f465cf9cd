"""Load one rank's share of a model for tensor parallelism (fast/tensor_parallel.py)."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from llava_lite.checkpoints.quantized import QuantizedSource
from llava_lite.checkpoints.skeleton import meta_model
from llava_lite.checkpoints.source import Source
from llava_lite.config import TextConfig
from llava_lite.errors import CheckpointError
from llava_lite.fast.device import pick_tower_dtype
from llava_lite.fast.ranks import Ranks
from llava_lite.fast.tensor_parallel import ParallelLlava, SharedLinear, decoder_plan


def check_divides(text: TextConfig, count: int) -> None:
    """Raise ValueError if `count` ranks cannot share the decoder evenly."""
    sizes = {"heads": text.num_heads, "intermediate_size": text.intermediate_size}
    if text.kv_heads != text.num_heads:
        sizes = {"key/value heads": text.kv_heads, **sizes}
    for name, size in sizes.items():
        if size % count:
            raise ValueError(
                f"{count} ranks cannot share the decoder evenly: {name} {size} must be a multiple "
                "of their number"
            )


def load_share(
    source: Source, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> "ParallelLlava":
    """Build this rank's share of a model. Only the rank's part of a weight is cast or copied.

    Raises ValueError if the ranks cannot share the decoder evenly, and CheckpointError. An error
    of one rank raises on all ranks."""
    check_divides(source.config.text, ranks.count)
    if isinstance(source, QuantizedSource):
        raise CheckpointError(
            f"{source.path}: is {source.method}, but tensor parallel needs unquantized weights"
        )
    # Cut the model on the meta device: no rank ever holds more than its share.
    llava = cast(ParallelLlava, meta_model(source.config, partial(ParallelLlava, ranks)))
    mesh = init_device_mesh(device.type, (ranks.count,))
    cuts = cut_dims(parallelize_module(llava.decoder, mesh, decoder_plan()))
    for name, dim in cuts.items():
        linear = cast(nn.Linear, llava.decoder.get_submodule(name))
        weight = cast(DTensor, linear.weight)
        bias = None if linear.bias is None else cast(DTensor, linear.bias).to_local()
        gathered = weight.shape[0] if name == "lm_head" else None
        shared = SharedLinear(ranks, weight.to_local(), dim, gathered, bias)
        llava.decoder.set_submodule(name, shared)
    state: dict[str, Tensor] = {}
    tower = pick_tower_dtype(source.config.vision, dtype, device)

    def read_all() -> None:
        for name in source.names():
            dim = cuts.get(name.removeprefix("decoder.").rpartition(".")[0])
            whole = source.shape(name)
            part = () if dim is None else (slice(None),) * dim + (ranks.part(whole[dim]),)
            kind = tower if name.startswith("vision.") else dtype
            state[name] = source.read_part(name, part, kind).to(device)

    ranks.gather(read_all)
    llava.load_state_dict(state, strict=True, assign=True)
    llava.requires_grad_(False)
    return llava


def cut_dims(decoder: nn.Module) -> dict[str, int]:
    """For each linear layer that is cut: its name, and the dimension of weight (out, in) to cut."""
    return {
        name.removesuffix(".weight"): placement.dim
        for name, weight in decoder.named_parameters()
        if isinstance(weight, DTensor) and name.endswith(".weight")
        for placement in weight.placements
        if isinstance(placement, Shard)
    }
