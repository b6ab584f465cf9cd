"""Fold a FastViTHD tower from its training form: many branches become one convolution.

In training, a convolution of FastViTHD is a sum of branches: a large kernel, a small one, the
input itself, each with a norm (FastVLM, arXiv 2412.13303; MobileOne, arXiv 2206.04040). A sum of
convolutions of one input is a convolution again, and a norm with fixed statistics only scales and
shifts. So the branches fold into one kernel and one bias. The results are equal up to rounding:

    norm            W' = W g / s and b' = beta - mean g / s, with s = sqrt(variance + eps)
    input           a kernel of zeros with ones in the center
    smaller kernel  zeros around it
    sum             the sum of kernels, and the sum of biases

All functions are pure. States have the published names of the tower, without a prefix. Shapes: O
output channels, I input channels of a group, k x k places.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_lite.errors import CheckpointError
from llava_lite.fastvithd import EPS

State = Mapping[str, Tensor]
Conv = tuple[Tensor, Tensor]  # a kernel (O, I, k, k) and a bias (O,)


def reparameterize(state: State) -> dict[str, Tensor]:
    """The state of the folded tower, from its state in training form. Tensors outside of branches
    stay. Folded kernels are in float32 at least.

    Raises CheckpointError that names a missing tensor, or branches that do not fit together."""
    folded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = find_unit(name)
        if found is None:
            folded[name] = tensor
            continue
        unit, result, fold = found
        if f"{unit}.{result}.weight" in folded:
            continue  # another tensor of the unit has been here
        try:
            kernel, bias = fold(state, unit)
        except KeyError as error:
            raise CheckpointError(f"tower in training form: {error} is missing") from None
        except RuntimeError as error:
            raise CheckpointError(
                f"tower in training form: the shapes of the branches {unit!r} do not fit together"
            ) from error
        folded |= {f"{unit}.{result}.weight": kernel, f"{unit}.{result}.bias": bias}
    return folded


def is_training_form(names: Iterable[str]) -> bool:
    """Whether a tower with these tensors has branches to fold."""
    return any(find_unit(name) is not None for name in names)


# ---- units -------------------------------------------------------------------------------------


def fold_branches(state: State, unit: str) -> Conv:
    """MobileOne: a convolution, a smaller one, and the input. The last two may be missing."""
    convs = [fold_conv(state, f"{unit}.rbr_conv.0")]
    if has(state, f"{unit}.rbr_scale."):
        convs.append(fold_conv(state, f"{unit}.rbr_scale"))
    if has(state, f"{unit}.rbr_skip."):
        identity = identity_kernel(state[f"{unit}.rbr_conv.0.conv.weight"])
        convs.append(fold_norm(state, f"{unit}.rbr_skip", identity))
    return add(*convs)


def fold_mixer(state: State, unit: str) -> Conv:
    """RepMixer: x + scale (mixer(x) - norm(x)). One kernel holds the skip connection, too."""
    mixer, mixer_bias = fold_branches(state, f"{unit}.mixer")
    identity = identity_kernel(mixer)
    norm, norm_bias = fold_norm(state, f"{unit}.norm.rbr_skip", identity)
    scale = state[f"{unit}.layer_scale"][..., None]  # (O, 1, 1, 1)
    return identity + scale * (mixer - norm), scale.flatten() * (mixer_bias - norm_bias)


def fold_large_kernel(state: State, unit: str) -> Conv:
    """The sum of a large and a small convolution."""
    return add(fold_conv(state, f"{unit}.lkb_origin"), fold_conv(state, f"{unit}.small_conv"))


def fold_position(state: State, unit: str) -> Conv:
    """x + conv(x)"""
    kernel, bias = state[f"{unit}.pe.weight"], state[f"{unit}.pe.bias"]
    return kernel + identity_kernel(kernel), bias


Fold = Callable[[State, str], Conv]
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
# The tensors of each kind of unit, behind the unit's name; the name of the folded convolution.
UNITS: tuple[tuple[str, str, Fold], ...] = (
    (
        rf"(.+\.token_mixer)\.(layer_scale|(norm|mixer)\.rbr_.+\.(conv\.weight|{NORM}))",
        "reparam_conv",
        fold_mixer,
    ),
    (
        rf"(.+)\.(lkb_origin|small_conv)\.(conv\.weight|bn\.{NORM})",
        "lkb_reparam",
        fold_large_kernel,
    ),
    (r"(.+)\.pe\.(weight|bias)", "reparam_conv", fold_position),
    (
        rf"(.+)\.(rbr_(conv\.0|scale)\.(conv\.weight|bn\.{NORM})|rbr_skip\.{NORM})",
        "reparam_conv",
        fold_branches,
    ),
)


def find_unit(name: str) -> tuple[str, str, Fold] | None:
    """The unit of a tensor: its name, the name of its convolution, and how to fold its branches.
    None for a tensor outside of branches."""
    for pattern, result, fold in UNITS:
        found = re.fullmatch(pattern, name)
        if found is not None:
            return found[1], result, fold
    return None


# ---- rules -------------------------------------------------------------------------------------


def fold_conv(state: State, branch: str) -> Conv:
    """A convolution without bias, and its norm."""
    return fold_norm(state, f"{branch}.bn", state[f"{branch}.conv.weight"])


def fold_norm(state: State, norm: str, kernel: Tensor) -> Conv:
    """A kernel (O, I, k, k) in front of a norm with fixed statistics."""
    weight, bias, mean, variance = (
        state[f"{norm}.{kind}"].to(torch.promote_types(kernel.dtype, torch.float32))
        for kind in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / torch.sqrt(variance + EPS)  # (O,)
    return kernel * scale[:, None, None, None], bias - mean * scale


def identity_kernel(like: Tensor) -> Tensor:
    """The kernel (O, I, k, k) that returns its input, for O = I times the number of groups."""
    kernel, channels = torch.zeros_like(like), torch.arange(len(like))
    middle = like.shape[-1] // 2
    kernel[channels, channels % like.shape[1], middle, middle] = 1
    return kernel


def add(*convs: Conv) -> Conv:
    """The sum of convolutions of the same input. Zeros around a smaller kernel change nothing."""
    largest = max(kernel.shape[-1] for kernel, _ in convs)
    kernels = [F.pad(kernel, [(largest - kernel.shape[-1]) // 2] * 4) for kernel, _ in convs]
    # A sum of tensors with different numbers of channels must fail, not repeat one of them.
    if len({kernel.shape for kernel in kernels}) > 1:
        raise RuntimeError("kernels of different shapes")
    return torch.stack(kernels).sum(0), torch.stack([bias for _, bias in convs]).sum(0)


def has(state: State, prefix: str) -> bool:
    """Whether a branch is there, whole or in part."""
    return any(name.startswith(prefix) for name in state)
