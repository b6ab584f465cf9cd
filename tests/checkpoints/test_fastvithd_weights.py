"""Published weights of FastViTHD: their names, and folding of their training form."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from helpers.fastvithd import (
    TAPS,
    TINY,
    Shapes,
    make_state,
    make_tower,
    meta_tower,
    norm_shapes,
    pictures,
    published_shapes,
    run_taps,
    training_shapes,
    unit_shapes,
)
from llava_lite.checkpoints.names_fastvithd import IGNORED, fastvithd_name, published_name
from llava_lite.checkpoints.reparameterize import (
    is_training_form,
    reparameterize,
)
from llava_lite.config import FastViTHDConfig
from llava_lite.errors import CheckpointError
from llava_lite.fastvithd import EPS

FULL = FastViTHDConfig()


@pytest.fixture(scope="module")
def layouts(shared: Path) -> dict[str, Any]:
    file = shared / "goldens" / "fastvlm" / "checkpoint_layouts_fastvlm.json"
    return json.loads(file.read_text())


def expand_blocks(layout: dict[str, Any], depths: dict[str, int]) -> Shapes:
    """Names and shapes of a layout whose blocks are written once, without the ignored tensors."""
    shapes: Shapes = {}
    for name, facts in layout["tensors"].items():
        if IGNORED.fullmatch(name) is None:
            stage = name.partition(".{b}")[0]
            for block in range(depths[stage]) if "{b}" in name else [0]:
                shapes[name.replace("{b}", str(block))] = tuple(facts["shape"])
    return shapes


def test_published_names_and_shapes_of_both_forms(layouts: dict[str, Any]) -> None:
    depths = layouts["tower_folded"]["depths"]
    folded = published_shapes(FULL)
    assert folded == expand_blocks(layouts["tower_folded"], depths)
    assert training_shapes(folded) == expand_blocks(layouts["tower_training_form"], depths)


def test_every_name_goes_there_and_back() -> None:
    names = list(meta_tower(FULL).state_dict())
    assert len({published_name(name) for name in names}) == len(names) == 584
    for name in names:
        stored = published_name(name)
        assert stored is not None and fastvithd_name(stored) == name
        assert IGNORED.fullmatch(stored) is None


@pytest.mark.parametrize(
    "name",
    [
        "head.proj",
        "network.0.0.token_mixer.mixer.rbr_conv.0.conv.weight",
        "network.0.0.convffn.conv.bn.num_batches_tracked",
        "network.0.x.layer_scale",
        "network.1.0.layer_scale",
        "network.11.0.layer_scale",
        "network.6.0.reparam_conv.weight",
        "network.0.0.layer_scale.weight",
        "vision.stem.0.weight",
        "",
    ],
)
def test_unknown_names(name: str) -> None:
    assert fastvithd_name(name) is None


# ---- folding -----------------------------------------------------------------------------------


def test_golden_folding(shared: Path) -> None:
    golden = load_file(shared / "goldens" / "fastvlm" / "tower_tiny_train.safetensors")
    shapes = published_shapes(TINY)
    state = make_state(training_shapes(shapes), torch.float64)
    folded = reparameterize(state)
    assert {name: tuple(tensor.shape) for name, tensor in folded.items()} == shapes
    kernels = [name for name in golden if name.startswith("folded.")]
    assert len(kernels) == 38
    for name in kernels:
        tensor = folded[name.removeprefix("folded.")]
        torch.testing.assert_close(tensor, golden[name], atol=1e-12, rtol=0)
    seen = run_taps(make_tower(TINY, folded), pictures(2, 128, 192).double())
    for tap in TAPS:
        expected = golden[f"tiny_train_128x192.{tap}"].double()
        scale = expected.abs().max().item()
        torch.testing.assert_close(seen[tap], expected, atol=1e-6 * scale, rtol=0)


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A norm of the training form."""
    kinds = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{kind}"] for kind in kinds), eps=EPS)


def branch(state: dict[str, Tensor], name: str, x: Tensor, **options: int) -> Tensor:
    """A convolution of the training form, and its norm."""
    kernel = state[f"{name}.conv.weight"]
    padding = kernel.shape[-1] // 2
    return norm(state, f"{name}.bn", F.conv2d(x, kernel, padding=padding, **options))


def mobile_one(state: dict[str, Tensor], unit: str, x: Tensor, **options: int) -> Tensor:
    """The sum of the branches that are there."""
    total = branch(state, f"{unit}.rbr_conv.0", x, **options)
    if f"{unit}.rbr_scale.conv.weight" in state:
        total = total + branch(state, f"{unit}.rbr_scale", x, **options)
    if f"{unit}.rbr_skip.weight" in state:
        total = total + norm(state, f"{unit}.rbr_skip", x)
    return total


# Each kind of unit: its kernel (O, I, k, k), its stride, and the un-folded computation.
def run_unit(state: dict[str, Tensor], unit: str, x: Tensor, **options: int) -> Tensor:
    if unit.endswith(".proj.0"):
        large = branch(state, f"{unit}.lkb_origin", x, **options)
        return large + branch(state, f"{unit}.small_conv", x, **options)
    if unit.endswith(".token_mixer"):
        mixed = mobile_one(state, f"{unit}.mixer", x, **options)
        normed = norm(state, f"{unit}.norm.rbr_skip", x)
        return x + state[f"{unit}.layer_scale"] * (mixed - normed)
    return mobile_one(state, unit, x, **options)


UNITS = {
    "patch_embed.0": (3, 8, 3, 2, 1),  # channels in and out, kernel, stride, groups
    "patch_embed.1": (8, 8, 3, 2, 8),
    "patch_embed.2": (8, 8, 1, 1, 1),
    "network.0.0.token_mixer": (8, 8, 3, 1, 8),
    "network.1.proj.0": (8, 16, 7, 2, 8),
    "network.1.proj.1": (16, 16, 1, 1, 1),
    "conv_exp": (8, 16, 3, 1, 8),
}


@pytest.mark.parametrize("unit", UNITS)
@given(seed=st.integers(0, 1000), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_a_folded_unit_equals_its_branches(unit: str, seed: int, height: int, width: int) -> None:
    channels, out, size, stride, groups = UNITS[unit]
    kernel = (out, channels // groups, size, size)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        for name, shape in unit_shapes(unit, kernel).items()
    }
    x = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    options = {"stride": stride, "groups": groups}
    folded = reparameterize(state)
    name = "lkb_reparam" if unit.endswith("proj.0") else "reparam_conv"
    assert set(folded) == {f"{unit}.{name}.weight", f"{unit}.{name}.bias"}
    weight, bias = folded[f"{unit}.{name}.weight"], folded[f"{unit}.{name}.bias"]
    ours = F.conv2d(x, weight, bias, padding=size // 2, **options)
    torch.testing.assert_close(ours, run_unit(state, unit, x, **options))


def test_a_positional_convolution_keeps_its_input() -> None:
    kernel, bias = torch.randn(6, 1, 7, 7), torch.randn(6)
    folded = reparameterize({"network.6.pe.weight": kernel, "network.6.pe.bias": bias})
    x = torch.randn(1, 6, 5, 4)
    ours = F.conv2d(x, *folded.values(), padding=3, groups=6)
    torch.testing.assert_close(ours, x + F.conv2d(x, kernel, bias, padding=3, groups=6))
    assert list(folded) == ["network.6.reparam_conv.weight", "network.6.reparam_conv.bias"]


def test_a_folded_tower_stays_as_it_is() -> None:
    state = make_state(published_shapes(TINY))
    folded = reparameterize(state)
    assert folded.keys() == state.keys()
    assert all(folded[name] is state[name] for name in state)
    assert not is_training_form(state)
    assert is_training_form(training_shapes(published_shapes(TINY)))


def test_16_bit_branches_fold_in_float32() -> None:
    shapes = unit_shapes("patch_embed.2", (4, 4, 1, 1))
    state = make_state(shapes, torch.bfloat16)
    wide = reparameterize({name: tensor.float() for name, tensor in state.items()})
    folded = reparameterize(state)
    assert {tensor.dtype for tensor in folded.values()} == {torch.float32}
    assert all(torch.equal(folded[name], wide[name]) for name in wide)


@pytest.mark.parametrize(
    "missing",
    [
        "patch_embed.2.rbr_conv.0.conv.weight",
        "patch_embed.2.rbr_skip.running_mean",
        "network.0.0.token_mixer.layer_scale",
        "network.0.0.token_mixer.norm.rbr_skip.weight",
        "network.0.0.token_mixer.mixer.rbr_scale.conv.weight",
        "network.1.proj.0.small_conv.bn.running_var",
        "network.6.pe.bias",
    ],
)
def test_a_missing_tensor_is_named(missing: str) -> None:
    state = make_state(training_shapes(published_shapes(TINY)))
    del state[missing]
    message = f"tower in training form: '{re.escape(missing)}' is missing"
    with pytest.raises(CheckpointError, match=message):
        reparameterize(state)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.2.rbr_skip.weight", (5,)),
        ("network.1.proj.0.small_conv.conv.weight", (16, 2, 3, 3)),
        ("network.0.0.token_mixer.layer_scale", (7, 1, 1)),
    ],
)
def test_branches_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    state = make_state(training_shapes(published_shapes(TINY)))
    state[name] = torch.ones(shape)
    unit = re.match(r".*(token_mixer|patch_embed\.2|proj\.0)", name)
    assert unit is not None
    with pytest.raises(CheckpointError, match=f"branches '{unit[0]}' do not fit together"):
        reparameterize(state)


def test_an_unknown_branch_is_not_lost() -> None:
    state = make_state(unit_shapes("patch_embed.2", (4, 4, 1, 1)))
    state |= make_state(norm_shapes("patch_embed.2.rbr_conv.1.bn", 4))
    folded = reparameterize(state)
    assert "patch_embed.2.rbr_conv.1.bn.weight" in folded
    assert fastvithd_name("patch_embed.2.rbr_conv.1.bn.weight") is None
