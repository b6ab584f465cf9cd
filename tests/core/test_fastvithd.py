"""The FastViTHD tower of FastVLM, and merging behind it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.fastvithd import (
    FASTVLM,
    TAPS,
    TINY,
    make_state,
    make_tower,
    meta_tower,
    pictures,
    published_shapes,
    random_fastvlm,
    run_taps,
    sample_indices,
    training_shapes,
)
from helpers.peers import peer
from llava_lite.checkpoints.reparameterize import reparameterize
from llava_lite.checkpoints.skeleton import expected_shapes
from llava_lite.config import FastViTHDConfig, LlavaConfig, TextConfig
from llava_lite.fastvithd import FastViTHD, merge_rounds
from llava_lite.layout import PLACEMENTS
from llava_lite.llava import Llava
from llava_lite.reduction import REDUCTIONS, DToMe, Reduction, ToMe
from llava_lite.tome import MergeStep

FULL = FastViTHDConfig()


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "goldens" / "fastvlm"


@pytest.fixture(scope="module")
def tiny() -> FastViTHD:
    return make_tower(TINY, make_state(published_shapes(TINY)))


@pytest.fixture(scope="module")
def llava() -> Llava:
    return random_fastvlm()


# ---- goldens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 256, 256), (2, 64, 128)], ids=["square", "batch of wide"])
def test_golden_taps_of_a_tiny_tower(
    folder: Path, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    golden = load_file(folder / "tower_tiny_folded.safetensors")
    seen = run_taps(
        make_tower(TINY, make_state(published_shapes(TINY), dtype)), pictures(*size).to(dtype)
    )
    for tap in TAPS:
        expected = golden[f"tiny_folded_{size[1]}x{size[2]}.{tap}"]
        torch.testing.assert_close(seen[tap].to(expected.dtype), expected, atol=1e-6, rtol=0)


def test_golden_tokens_of_larger_images(folder: Path, tiny: FastViTHD) -> None:
    golden = load_file(folder / "tower_tiny_folded.safetensors")
    for side in (512, 1024):
        seen = run_taps(tiny, pictures(1, side, side))
        name = f"tiny_folded_{side}x{side}"
        torch.testing.assert_close(seen["tokens"], golden[f"{name}.tokens"], atol=2e-6, rtol=0)
        last = seen["network.10"].flatten()
        expected = golden[f"{name}.network.10.sample"]
        torch.testing.assert_close(last[sample_indices(len(last))], expected, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_golden_tower_of_full_size(folder: Path) -> None:
    golden = load_file(folder / "tower_full.safetensors")
    tower = make_tower(FULL, make_state(published_shapes(FULL)))
    for side, stride in ((256, 1), (512, 4), (1024, 16)):
        seen = run_taps(tower, pictures(1, side, side))
        name = f"full_folded_{side}"
        tokens = seen["tokens"][..., ::stride]
        torch.testing.assert_close(tokens, golden[f"{name}.tokens"], atol=1e-5, rtol=0)
        for tap in list(TAPS)[:-1]:
            flat, expected = seen[tap].flatten(), golden[f"{name}.{tap}.sample"]
            torch.testing.assert_close(flat[sample_indices(len(flat))], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_golden_tower_of_full_size_in_training_form(folder: Path) -> None:
    golden = load_file(folder / "tower_full.safetensors")
    shapes = training_shapes(published_shapes(FULL))
    tower = make_tower(FULL, reparameterize(make_state(shapes, torch.float64)))
    seen = run_taps(tower, pictures(1, 256, 256).double())
    for tap in list(TAPS)[:-1]:
        flat, expected = seen[tap].flatten(), golden[f"full_train_256.{tap}.sample"].double()
        difference = (flat[sample_indices(len(flat))] - expected).abs().max()
        assert difference <= 1e-6 * expected.abs().max(), tap
    tokens, expected = seen["tokens"][..., ::2], golden["full_train_256.tokens"].double()
    assert (tokens - expected).abs().max() <= 1e-6 * expected.abs().max()


# ---- another implementation --------------------------------------------------------------------

# timm's names, in this order, and ours.
TIMM = (
    (".reparam_conv.", "."),
    ("final_conv.se.fc1", "expand.1.reduce"),
    ("final_conv.se.fc2", "expand.1.expand"),
    ("final_conv", "expand.0"),
    ("downsample.proj", "down"),
    ("pos_emb", "position"),
    ("token_mixer.proj", "mixer.o_proj"),
    ("token_mixer", "mixer"),
    (".norm", ".mixer.norm"),
    ("mlp.conv.conv", "ffn.conv"),
    ("mlp.conv.bn", "ffn.norm"),
    ("mlp", "ffn"),
    ("layer_scale_1.gamma", "mixer.scale"),
    ("layer_scale_2.gamma", "ffn.scale"),
    ("layer_scale.gamma", "ffn.scale"),
)


def our_name(timms: str) -> str:
    for theirs, ours in TIMM:
        timms = timms.replace(theirs, ours)
    return timms


def compare_with_timm(tower: FastViTHD, reference: nn.Module, pixel_values: Tensor) -> None:
    """Copy our weights, and compare the features."""
    state = tower.state_dict()
    theirs = {
        name: tensor if name.endswith("num_batches_tracked") else state.pop(our_name(name))
        for name, tensor in reference.state_dict().items()
    }
    assert not state
    reference.load_state_dict(theirs)
    seen: list[Tensor] = []
    reference.final_conv.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        reference.eval()(pixel_values)
        ours = tower(pixel_values).image_features
    theirs_flat = seen[0].flatten(2).mT
    assert theirs_flat.std() > 0.01
    torch.testing.assert_close(ours, theirs_flat, atol=1e-5, rtol=0)


def test_tiny_tower_equals_that_of_timm(tiny: FastViTHD) -> None:
    timm = peer("timm")
    reference = timm.create_model(
        "fastvit_mci3",
        inference_mode=True,
        num_classes=0,
        layers=TINY.depths,
        embed_dims=TINY.widths,
    )
    compare_with_timm(tiny, reference, pictures(2, 128, 192))


@pytest.mark.slow
def test_full_tower_equals_that_of_timm() -> None:
    timm = peer("timm")
    tower = make_tower(FULL, make_state(published_shapes(FULL)))
    reference = timm.create_model("fastvit_mci3", inference_mode=True, num_classes=0)
    compare_with_timm(tower, reference, pictures(1, 256, 256))


# ---- sizes -------------------------------------------------------------------------------------

# Parameters of each part at the official widths (FastVLM, arXiv 2412.13303, table 1: 125.1 M).
COUNTS = {
    "stem": 2_688 + 960 + 9_312,
    "stages.0": 160_320,
    "stages.1.down": 46_656,
    "stages.1.blocks": 3_693_312,
    "stages.2.down": 167_040,
    "stages.2.blocks": 28_929_024,
    "stages.3.down": 628_992,
    "stages.3.position": 38_400,
    "stages.3.blocks": 28_498_944,
    "stages.4.down": 2_437_632,
    "stages.4.position": 76_800,
    "stages.4.blocks": 56_810_496,
    "expand": 1_213_632,
}


def test_parameters_of_each_part() -> None:
    tower = meta_tower(FULL)
    for name, count in COUNTS.items():
        parameters = tower.get_submodule(name).parameters()
        assert sum(parameter.numel() for parameter in parameters) == count, name
    assert sum(parameter.numel() for parameter in tower.parameters()) == 122_714_208


@pytest.mark.parametrize(("side", "tokens"), [(256, 16), (384, 36), (768, 144), (2048, 1024)])
def test_tokens_of_an_image_size(side: int, tokens: int) -> None:
    vision = TINY.at(side)
    assert (vision.num_patches, vision.grid**2, vision.hidden_size) == (tokens, tokens, 256)
    output = meta_tower(vision)(torch.zeros(2, 3, side, side, device="meta"))
    assert output.image_features.shape == (2, tokens, 256)
    assert (output.mapping, output.tokens_per_block) == (None, ())


def test_an_odd_size_rounds_the_grid_up(tiny: FastViTHD) -> None:
    with torch.inference_mode():
        assert tiny(torch.zeros(1, 3, 100, 130)).image_features.shape == (1, 2 * 3, 256)


@pytest.mark.parametrize("size", [0, -64, 64, 192, 300, 336, 2112, 512.5, "512"])
def test_an_impossible_image_size_is_refused(size: Any) -> None:
    message = rf"image_size {size} must be a multiple of 64 in 256\.\.2048"
    with pytest.raises(ValueError, match=message):
        FastViTHDConfig(size)
    with pytest.raises(ValueError, match=message):
        FULL.at(size)


@pytest.mark.parametrize(
    ("depths", "widths"),
    [
        ((2, 12, 24, 4), (96, 192, 384, 768)),
        ((2, 12, 24, 4, 2), (96, 192, 384, 768)),
        ((1, 1, 1, 1, 1), (8, 12, 32, 64, 128)),
        ((1, 1, 1, 1, 1), (8, 16, 32, 48, 96)),
        ((1, 1, 1, 1, 1), (0, 16, 32, 64, 128)),
    ],
    ids=["4 stages", "4 widths", "12 of 8", "48 of 32", "0 wide"],
)
def test_depths_and_widths_must_fit(depths: tuple[int, ...], widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="FastViTHD: depths .* and widths .* must be 5 each"):
        FastViTHDConfig(256, depths, widths)


def test_the_config_survives_json() -> None:
    for config in (FASTVLM, LlavaConfig()):
        content = json.loads(json.dumps(config.to_dict()))
        assert LlavaConfig.from_dict(content) == config
        assert content["vision"].get("kind") == ("fastvithd" if config is FASTVLM else None)
    for change in ({"kind": "swin"}, {"kind": "fastvithd", "hidden_size": 8}):
        content = LlavaConfig().to_dict()
        content["vision"] |= change
        with pytest.raises(ValueError, match="not a llava_lite config"):
            LlavaConfig.from_dict(content)


def test_clip_takes_its_own_size_only() -> None:
    config = LlavaConfig()
    assert config.at(336) == config.at(None) == config
    with pytest.raises(ValueError, match="image_size 512: CLIP takes 336 px only"):
        config.at(512)
    with pytest.raises(ValueError, match="CLIP takes 336 px only"):
        Reduction(image_size=384).check(config)


# ---- properties --------------------------------------------------------------------------------


def test_a_batch_equals_its_images(llava: Llava) -> None:
    pixels = torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    together = llava.encode_image(pixels, Reduction(ToMe(keep=5)))
    for image, one in zip(together, pixels.split(1), strict=True):
        [alone] = llava.encode_image(one, Reduction(ToMe(keep=5)))
        torch.testing.assert_close(image.image_embeds, alone.image_embeds, atol=1e-5, rtol=0)
        assert torch.equal(image.mapping, alone.mapping)


def test_the_image_size_of_a_call_is_that_of_its_pixels(llava: Llava) -> None:
    pixels = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    [image] = llava.encode_image(pixels, Reduction(ToMe(keep=36)))
    assert (image.num_patches, image.mapping) == (36, None)
    # The same weights in a model whose own size is this one.
    other = Llava(replace(FASTVLM, vision=TINY.at(384)))
    other.load_state_dict(llava.state_dict())
    [same] = other.encode_image(pixels)
    assert torch.equal(image.image_embeds, same.image_embeds)
    with pytest.raises(ValueError, match="image_size 300 must be a multiple of 64"):
        llava.encode_image(torch.zeros(1, 3, 300, 300))
    with pytest.raises(ValueError, match=r"ToMe keep 37 must be in 1\.\.36"):
        llava.encode_image(pixels, Reduction(ToMe(keep=37)))


def test_a_decoder_in_16_bit_reads_features_in_float32(llava: Llava) -> None:
    half = Llava(FASTVLM)
    half.load_state_dict(llava.state_dict())
    half.to(torch.bfloat16).vision.to(torch.float32)
    half.vision.load_state_dict(llava.vision.state_dict())
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = llava.vision(pixels).image_features
        expected = half.projector(features.to(torch.bfloat16))
        [image] = half.encode_image(pixels)
    assert torch.equal(image.image_embeds[None], expected)


# ---- merging -----------------------------------------------------------------------------------


def naive_round(x: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Merge the tokens x (T, C) once, pair by pair. Returns the new tokens, and their numbers."""
    sources, destinations = range(0, len(x), 2), range(1, len(x), 2)
    pairs = []
    for source in sources:
        cosines = [torch.cosine_similarity(x[source], x[d], dim=0).item() for d in destinations]
        best = max(range(len(cosines)), key=cosines.__getitem__)
        pairs.append((cosines[best], source, destinations[best]))
    merging = {source: into for _, source, into in sorted(pairs, reverse=True)[:count]}
    order = [source for source in sources if source not in merging] + list(destinations)
    numbers = [order.index(merging.get(token, token)) for token in range(len(x))]
    merged = [
        x[[t for t in range(len(x)) if numbers[t] == number]].mean(0)
        for number in range(len(order))
    ]
    return torch.stack(merged), numbers


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_one_round_equals_merging_pair_by_pair(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(2, 17))
    count = data.draw(st.integers(1, num_tokens // 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64)
    expected, numbers = naive_round(x, count)
    output = merge_rounds(x[None], [MergeStep(r=count)])
    torch.testing.assert_close(output.image_features[0], expected)
    assert output.mapping is not None and output.mapping[0].tolist() == numbers
    assert output.tokens_per_block == (num_tokens - count,)


@given(grid=st.integers(4, 32), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rounds_keep_exactly_what_was_asked_for(grid: int, data: st.DataObject) -> None:
    vision = TINY.at(64 * grid)
    tokens = vision.num_patches
    keep = data.draw(st.integers(1, tokens))
    counts = [step.r or 0 for step in ToMe(keep=keep).steps(vision)]
    assert ToMe(keep=keep).most_tokens(vision) == keep == tokens - sum(counts)
    # As few rounds as halving allows, the larger ones first.
    assert counts == sorted(counts, reverse=True) and 0 not in counts
    halved = tokens
    for _ in counts[:-1]:
        halved = -(-halved // 2)
    assert halved > keep or not counts
    for count in counts:
        assert count <= tokens // 2
        tokens -= count


def test_golden_merges(folder: Path) -> None:
    figures = json.loads((folder / "tiny" / "reduction_goldens.json").read_text())["merge"]
    golden = load_file(folder / "tiny" / "reduction_goldens.safetensors")
    sources = load_file(folder / "tower_full.safetensors")
    assert len(figures) == 11
    for name, case in figures.items():
        x = sources[case["source"]].double()
        merge = ToMe(keep=case["keep"]) if "keep" in case else DToMe(tuple(case["thresholds"]))
        side = int(case["source"].removesuffix(".tokens").rpartition("_")[2])
        output = merge_rounds(x, merge.steps(FULL.at(side)))
        counts = (x.shape[1], *output.tokens_per_block)
        rounds = [before - after for before, after in zip(counts, counts[1:], strict=False)]
        assert rounds == case["rounds"], name
        mapping = golden[f"merge.{name}.mapping"].long()
        if output.mapping is None:
            assert torch.equal(mapping, torch.arange(len(mapping)))
        else:
            assert torch.equal(output.mapping[0], mapping), name
        if f"merge.{name}.merged_first8" in golden:
            expected = golden[f"merge.{name}.merged_first8"].double()
            torch.testing.assert_close(output.image_features[0, :, :8], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("positions", list(PLACEMENTS))
def test_keeping_all_tokens_merges_nothing(llava: Llava, positions: str) -> None:
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 9, -200, 13, 7]])
    with torch.inference_mode():
        plain, _, end = llava.prefill(ids, pixels, all_logits=True)
        kept, _, same_end = llava.prefill(
            ids, pixels, Reduction(ToMe(keep=16), positions), all_logits=True
        )
    assert end == same_end == 5 + 16
    assert torch.equal(plain, kept)


def test_one_token_cannot_merge() -> None:
    x = torch.randn(1, 1, 4)
    output = merge_rounds(x, [MergeStep(r=1), MergeStep(threshold=-1.0)])
    assert output.image_features is x
    assert (output.mapping, output.tokens_per_block) == (None, (1, 1))


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (ToMe(r=4), "FastViTHD merges after the tower: use keep, not r"),
        (ToMe(r=4, schedule="linear"), "FastViTHD merges after the tower: use keep, not r"),
        (ToMe(keep=257), r"ToMe keep 257 must be in 1\.\.256"),
        (DToMe((0.9,) * 23), "23 DToMe thresholds, but FastViTHD merges after the tower: name 1"),
        (
            DToMe((0.9,) * 9),
            "9 DToMe thresholds, but FastViTHD merges after the tower: name 1 to 8",
        ),
        (DToMe(), "the model has no thresholds of its own"),
    ],
)
def test_merges_without_meaning_are_refused(merge: ToMe | DToMe, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction(merge).check(LlavaConfig(vision=FULL))


def test_presets_at_each_size() -> None:
    config = LlavaConfig(vision=FULL, text=TextConfig(num_layers=24))
    for name, preset in REDUCTIONS.items():
        for size, allowed in ((1024, True), (768, True), (512, False)):
            keep = preset.merge.keep if isinstance(preset.merge, ToMe) else None
            if name == "dymu-72":
                continue
            if keep is None or allowed or keep <= 64:
                replace(preset, image_size=size).check(config)
            else:
                with pytest.raises(ValueError, match=rf"ToMe keep {keep} must be in 1\.\.64"):
                    replace(preset, image_size=size).check(config)


def test_a_reduction_with_an_image_size_names_it() -> None:
    assert str(replace(REDUCTIONS["tome-72"], image_size=768)) == "tome-72 at 768 px"
    assert str(Reduction(image_size=512)) == "none at 512 px"
    for size in (0, 1.5, True, "512"):
        with pytest.raises(ValueError, match="image_size .* must be a whole number"):
            Reduction(image_size=size)


def test_state_of_the_whole_model(llava: Llava) -> None:
    shapes = expected_shapes(FASTVLM)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in llava.state_dict().items()}
