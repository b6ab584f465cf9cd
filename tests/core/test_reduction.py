"""The wishes of a call about fewer tokens: what they mean in numbers, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import TINY_CONFIG
from llava_lite.config import LLAVA_1_5_7B, LlavaConfig, VisionConfig
from llava_lite.reduction import NO_REDUCTION, REDUCTIONS, DToMe, FastV, Reduction, ToMe

CLIP = LLAVA_1_5_7B.vision
NAN, INF = math.nan, math.inf


# ---- FASTV_K -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "  ", "none", "NONE", "off", "Off", "0", "0.0", 0, 0.0])
def test_fastv_k_that_is_off(text: str | float | None) -> None:
    assert FastV.parse(text) is None


@pytest.mark.parametrize("text", ["72", 72, "72.0", 72.0, " 72 ", "7.2e1"])
def test_fastv_k_that_counts(text: str | float) -> None:
    assert FastV.parse(text) == FastV(keep=72)
    assert FastV.parse(text, layer=5) == FastV(keep=72, layer=5)


@pytest.mark.parametrize(("text", "share"), [("0.7", 0.7), (0.7, 0.7), (".5", 0.5), ("1e-3", 1e-3)])
def test_fastv_k_that_is_a_share(text: str | float, share: float) -> None:
    assert FastV.parse(text, layer=2) == FastV(drop=share, layer=2)


def test_one_is_a_token_and_not_everything() -> None:
    assert FastV.parse("1") == FastV.parse(1.0) == FastV(keep=1)
    assert FastV.parse("1") != FastV.parse("0.999999")


REFUSED = ["-1", -1, "-0.5", "nan", NAN, "inf", INF, "-inf", "1.5", 1.5, 575.999, "seventy", "72%"]
REFUSED += ["0.5x", "1/2", "0x48", True, False, [72], (72,), {}, 10**400, "1e999"]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[:12])
def test_fastv_k_that_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="FASTV_K .* whole number of tokens .* between 0 and 1"):
        FastV.parse(text)


# How many of M image tokens stay.
KEPT = {
    "36": (36, 36, 36, 36),
    "72": (72, 72, 72, 72),
    "144": (144, 144, 105, 72),
    "0.25": (432, 124, 79, 54),
    "0.3": (403, 115, 74, 50),
    "0.5": (288, 82, 52, 36),
    "0.7": (173, 50, 32, 22),
    "0.75": (144, 41, 26, 18),
    "0.9": (58, 16, 10, 7),
}


@pytest.mark.parametrize(
    ("text", "num_tokens", "kept"),
    [
        (text, m, k)
        for text, row in KEPT.items()
        for m, k in zip((576, 165, 105, 72), row, strict=True)
    ],
)
def test_how_many_stay(text: str, num_tokens: int, kept: int) -> None:
    """Half to even (165 * 0.5 and 105 * 0.5), and in double precision: 165 * (1 - 0.3) is a hair
    under 115.5."""
    fastv = FastV.parse(text)
    assert fastv is not None
    assert fastv.num_kept(num_tokens) == kept
    assert fastv.budgets([num_tokens]) == (None if kept == num_tokens else [kept])


def test_rounding_half_to_even_as_the_reference() -> None:
    assert FastV(drop=0.84375).num_kept(16) == 2  # 2.5
    assert FastV(drop=0.78125).num_kept(16) == 4  # 3.5


@given(st.integers(1, 700), st.floats(1e-6, 1 - 1e-6))
def test_a_share_leaves_at_least_one_and_at_most_all(num_tokens: int, drop: float) -> None:
    kept = FastV(drop=drop).num_kept(num_tokens)
    assert 1 <= kept <= num_tokens
    exact = num_tokens * (1 - Fraction(drop))
    assert abs(kept - max(exact, 1)) <= Fraction(1, 2) + Fraction(1, 10**6)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 60))
def test_budgets_together_and_for_each(sizes: list[int], keep: int) -> None:
    together = FastV(keep=keep).budgets(sizes)
    assert together == (None if keep >= sum(sizes) else [keep])
    each = FastV(keep=keep, per_image=True).budgets(sizes)
    assert each == (None if keep >= max(sizes) else [min(keep, size) for size in sizes])


def test_budgets_of_stages() -> None:
    """A share is one of the tokens that reach the stage."""
    stages = FastV(stages=((1, 6), (2, 0.5), (5, 2)))
    assert list(stages.amounts) == [1, 2, 5]
    assert stages.num_kept(9) == stages.num_kept(9, 1) == 6
    assert (stages.num_kept(6, 2), stages.num_kept(3, 5)) == (3, 2)
    assert stages.budgets([5, 4], 1) == [6]
    assert stages.budgets([5, 4], 3) is None
    each = replace(stages, per_image=True)
    assert each.budgets([9, 4], 1) == [6, 4]
    assert each.budgets([6, 4], 2) == [3, 2]
    assert each.budgets([2, 2], 5) is None
    assert FastV(stages=[[1, 6], [2, 0.5]]) == FastV(stages=((1, 6), (2, 0.5)))


def test_folding_leaves_every_image_a_token() -> None:
    """So the fewest tokens are as many as there are images; dropping may leave fewer."""
    drop, fold = FastV(keep=2), FastV(keep=2, rest="fold")
    assert drop.budgets([3, 3, 2], None, 3) == [2]
    assert fold.budgets([3, 3, 2], None, 3) == [3]
    assert fold.budgets([1, 1, 1], None, 3) is None
    assert replace(fold, per_image=True).budgets([3, 1, 2], None, 3) == [2, 1, 2]
    share = FastV(drop=0.9, rest="fold")
    assert share.budgets([6, 4], None, 2) == [2]
    assert share.budgets([30, 10], None, 2) == [4]


def test_a_prompt_without_images_has_no_budget() -> None:
    for per_image in (False, True):
        assert FastV(keep=3, per_image=per_image).budgets([]) is None
        assert FastV(drop=0.5, per_image=per_image).budgets([]) is None


# ---- what is refused ---------------------------------------------------------------------------

COUNT = "whole number of at least 1"
SHARE = "above 0 and below 1"
FOLD = FastV(keep=3, rest="fold")
INVALID: list[tuple[Callable[[], Any], str]] = [
    (lambda: ToMe(), "keep or r, one of the two"),
    (lambda: ToMe(keep=72, r=21), "keep or r, one of the two"),
    (lambda: ToMe(keep=3, schedule="linear"), "goes with r, not with keep"),
    (lambda: ToMe(r=3, schedule="cubic"), "'cubic' is not one of constant, linear, reverse_linear"),
    (lambda: ToMe(r=3, schedule=None), "None is not one of"),
    (lambda: FastV(), "keep, drop or stages, one of the three"),
    (lambda: FastV(keep=3, drop=0.5), "keep, drop or stages, one of the three"),
    (lambda: FastV(keep=3, score="max"), "'max' is not one of sum, mean"),
    (lambda: FastV(keep=3, rest="merge"), "'merge' is not one of drop, fold"),
    (lambda: FastV(keep=3, stages=((1, 3),)), "keep, drop or stages, one of the three"),
    (lambda: FastV(layer=2, stages=((1, 3),)), "stages name their own layers"),
    (lambda: FastV(stages=()), "at least one pair"),
    (lambda: FastV(stages=5), "5 must be pairs"),
    (lambda: FastV(stages=(1, 72)), "must be pairs"),
    (lambda: FastV(stages=((1, 72, 36),)), "must be pairs"),
    (lambda: FastV(stages=((0, 72),)), f"layer of a FastV stage 0 .*{COUNT}"),
    (lambda: FastV(stages=((1.0, 72),)), f"layer of a FastV stage 1.0 .*{COUNT}"),
    (lambda: FastV(stages=((1, 0),)), f"amount of a FastV stage 0 .*{COUNT}"),
    (lambda: FastV(stages=((1, True),)), f"amount of a FastV stage True .*{COUNT}"),
    (lambda: FastV(stages=((1, "72"),)), f"amount of a FastV stage '72' .*{COUNT}"),
    (lambda: FastV(stages=((1, 72.0),)), f"amount of a FastV stage 72.0 .*{SHARE}"),
    (lambda: FastV(stages=((1, NAN),)), f"amount of a FastV stage nan .*{SHARE}"),
    (lambda: FastV(stages=((3, 72), (1, 36))), r"layer must be above the one before, not \[3, 1\]"),
    (lambda: FastV(stages=((3, 72), (3, 36))), r"layer must be above the one before, not \[3, 3\]"),
    (lambda: FastV(stages=((1, 36), (3, 72))), r"below the one before, not \[36, 72\]"),
    (lambda: FastV(stages=((1, 36), (3, 36))), r"below the one before, not \[36, 36\]"),
    (lambda: FastV(stages=((1, 9), (2, 0.5), (3, 9))), r"below the one before, not \[9, 9\]"),
    (lambda: Reduction(fastv=FOLD), "rest 'fold' needs positions 'folded', not 'vtu'"),
    (lambda: Reduction(ToMe(keep=72), "logical", FOLD), "'folded', not 'logical'"),
    (lambda: Reduction(ToMe(keep=72), "plain", FOLD), "'folded', not 'plain'"),
    (lambda: DToMe(()), "at least one"),
    (lambda: DToMe((0.9, NAN)), "finite"),
    (lambda: DToMe((0.9, INF)), "finite"),
    (lambda: DToMe("0.9"), "'0.9' are no numbers"),
    (lambda: DToMe("12"), "'12' are no numbers"),
    (lambda: DToMe(0.9), "0.9 are no numbers"),
    (lambda: DToMe((0.9, None)), "are no numbers"),
    (lambda: DToMe((0.9, "0.9")), "are no numbers"),
    (lambda: DToMe((0.9, True)), "are no numbers"),
    (lambda: Reduction("tome-72"), "'tome-72' must be a ToMe, a DToMe or None"),
    (lambda: Reduction(FastV(keep=3)), "must be a ToMe"),
    (lambda: Reduction(fastv=36), "36 must be a FastV or None"),
    (lambda: Reduction(fastv=True), "True must be a FastV"),
    (lambda: Reduction(positions="raster"), "'raster' is not one of vtu, folded, logical, plain"),
    (lambda: Reduction(positions=None), "None is not one of vtu"),
    (lambda: Reduction.of("tome-73"), "'tome-73'; there are none, folded-72, .*hybrid-vtu-72-36"),
    (lambda: Reduction.of(36), "neither a Reduction nor a preset"),
    (lambda: Reduction.of(True), "neither a Reduction nor a preset"),
    (lambda: Reduction.of(ToMe(keep=3)), "neither a Reduction"),
]
for bad in (0, -1, True, False, 3.0, 3.5, NAN, INF, "3", (3,)):
    INVALID += [
        (lambda bad=bad: ToMe(keep=bad), f"ToMe keep .*{COUNT}"),
        (lambda bad=bad: ToMe(r=bad), f"ToMe r .*{COUNT}"),
        (lambda bad=bad: FastV(keep=bad), f"FastV keep .*{COUNT}"),
        (lambda bad=bad: FastV(keep=3, layer=bad), f"FastV layer .*{COUNT}"),
    ]
INVALID.append((lambda: FastV(keep=3, layer=None), COUNT))
for bad in (0, 1, 0.0, 1.0, -0.5, 1.5, NAN, INF, -INF, True, False, "0.5", (0.5,)):
    INVALID.append((lambda bad=bad: FastV(drop=bad), f"FastV drop .*{SHARE}"))


@pytest.mark.parametrize(("make", "message"), INVALID)
def test_bad_wishes_are_refused_when_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


AGAINST_THE_MODEL = [
    (Reduction(ToMe(keep=17)), r"ToMe keep 17 must be in 4\.\.16"),
    (Reduction(ToMe(keep=3)), r"ToMe keep 3 must be in 4\.\.16"),
    (Reduction(fastv=FastV(keep=3, layer=3)), r"FastV layer 3 must be in 1\.\.2"),
    (Reduction(fastv=FastV(drop=0.5, layer=99)), r"FastV layer 99 must be in 1\.\.2"),
    (Reduction(fastv=FastV(stages=((1, 6), (3, 2)))), r"FastV layer 3 must be in 1\.\.2"),
    (Reduction(DToMe((0.9,))), "1 DToMe thresholds, but the tower runs 2 of 3 blocks"),
    (Reduction(DToMe((0.9,) * 4)), "4 DToMe thresholds, but the tower runs 2 of 3 blocks"),
    (Reduction(DToMe()), "no thresholds of its own"),
]


@pytest.mark.parametrize(("reduction", "message"), AGAINST_THE_MODEL)
def test_wishes_beyond_a_model_are_refused(reduction: Reduction, message: str) -> None:
    """A tower of 16 patches that runs 2 of 3 blocks, a decoder of 3 layers."""
    with pytest.raises(ValueError, match=message):
        reduction.check(TINY_CONFIG)


def test_the_ends_of_the_ranges_are_in() -> None:
    for reduction in (
        Reduction(ToMe(keep=16), "plain", FastV(keep=1, layer=1)),
        Reduction(ToMe(keep=4), "logical", FastV(keep=10**6, layer=2)),
        Reduction(ToMe(r=10**6)),
        Reduction(None, "folded", FastV(stages=((1, 10**6), (2, 1)), rest="fold")),
        Reduction(DToMe((0.9, 0.8))),
        Reduction(DToMe((0.9, 0.8, 0.7))),
        NO_REDUCTION,
    ):
        assert reduction.check(TINY_CONFIG) is reduction


def test_the_models_thresholds_stand_in() -> None:
    checked = Reduction(DToMe(), "logical", FastV(keep=3, layer=1)).check(TINY_CONFIG, [0.9, 0.8])
    assert checked == Reduction(DToMe((0.9, 0.8)), "logical", FastV(keep=3, layer=1))
    own = Reduction(DToMe((0.5, 0.5)))
    assert own.check(TINY_CONFIG, [0.9, 0.8]) is own
    with pytest.raises(ValueError, match="3 of 4 blocks"):
        deeper = replace(TINY_CONFIG, vision=replace(TINY_CONFIG.vision, num_layers=4))
        Reduction(DToMe()).check(deeper, [0.9, 0.8])


# ---- what wishes mean --------------------------------------------------------------------------


def test_presets_are_what_they_are_called() -> None:
    """The table of names, and that each fits LLaVA-1.5-7B, DToMe with some thresholds."""
    tome, more = ToMe(keep=72), ToMe(keep=144)

    def fold(**amount: Any) -> FastV:
        return FastV(rest="fold", **amount)

    assert REDUCTIONS == {
        "none": Reduction(None, "vtu", None),
        "folded-72": Reduction(tome, "folded", None),
        "folded-144-72": Reduction(more, "folded", fold(keep=72, layer=1)),
        "folded-144-36": Reduction(more, "folded", fold(stages=((1, 48), (3, 36)))),
        "folded-72-36": Reduction(tome, "folded", fold(keep=36, layer=3)),
        "folded-72-36-18": Reduction(tome, "folded", fold(stages=((1, 36), (3, 18)))),
        "folded-72-18-9": Reduction(tome, "folded", fold(stages=((1, 18), (3, 9)))),
        "fastv-72-folded": Reduction(None, "folded", FastV(keep=72, layer=3, rest="fold")),
        "tome-72": Reduction(tome, "vtu", None),
        "tome-72-logical": Reduction(tome, "logical", None),
        "dymu-72": Reduction(DToMe(None), "vtu", None),
        "fastv-50": Reduction(None, "vtu", FastV(drop=0.5, layer=3)),
        "hybrid-72-36": Reduction(tome, "logical", FastV(keep=36, layer=3)),
        "hybrid-vtu-72-36": Reduction(tome, "vtu", FastV(keep=36, layer=3)),
    }
    for name, reduction in REDUCTIONS.items():
        assert Reduction.of(name) is Reduction.of(reduction) is reduction
        reduction.check(LLAVA_1_5_7B, [0.9] * 23)
    assert Reduction.of(None) is NO_REDUCTION


def test_the_score_of_a_merged_token_follows_the_rest() -> None:
    assert FastV(keep=3).score_of_merged == "sum"
    assert FastV(keep=3, rest="fold").score_of_merged == "mean"
    assert replace(FastV(keep=3), rest="fold") == FastV(keep=3, rest="fold")
    assert FastV(keep=3, rest="fold", score="sum").score_of_merged == "sum"
    assert FastV(keep=3, score="mean").score_of_merged == "mean"


def test_wishes_never_change() -> None:
    """And can be the keys of a dict, also with thresholds given as a list."""
    wishes = [Reduction(DToMe([0.9, 0.8])), Reduction(DToMe((0.9, 0.8)))]
    assert len(set(wishes)) == 1
    with pytest.raises(FrozenInstanceError):
        wishes[0].positions = "plain"


@given(st.integers(1, 16), st.integers(2, 25), st.data())
def test_keep_is_exact(grid: int, num_layers: int, data: st.DataObject) -> None:
    """For every number that halving in every block can reach; the rest is refused."""
    vision = VisionConfig(image_size=14 * grid, num_layers=num_layers)
    config = LlavaConfig(vision=vision)
    fewest = vision.num_patches
    for _ in range(vision.num_blocks):
        fewest -= fewest // 2
    merge = ToMe(keep=data.draw(st.integers(fewest, vision.num_patches)))
    steps = merge.steps(vision)
    assert len(steps) == vision.num_blocks
    assert merge.most_tokens(vision) == merge.keep
    counts = [step.r or 0 for step in steps]
    assert sum(counts) == vision.num_patches - (merge.keep or 0)
    Reduction(merge).check(config)
    if fewest > 1:
        with pytest.raises(ValueError, match=rf"must be in {fewest}\.\.{vision.num_patches}"):
            Reduction(ToMe(keep=fewest - 1)).check(config)


@pytest.mark.parametrize(("r", "tokens"), [(21, 93), (16, 208), (8, 392), (4, 484), (600, 1)])
def test_r_spreads_over_all_blocks_of_clip(r: int, tokens: int) -> None:
    """The reference's "72out" is r = 21: 72 after 24 blocks, 93 after the 23 that LLaVA runs."""
    assert ToMe(r=r).most_tokens(CLIP) == tokens
    assert {step.r for step in ToMe(r=r).steps(CLIP)} == {r}


def test_schedules_put_the_merges_early_or_late() -> None:
    linear = [step.r or 0 for step in ToMe(r=21, schedule="linear").steps(CLIP)]
    late = [step.r or 0 for step in ToMe(r=21, schedule="reverse_linear").steps(CLIP)]
    assert linear[:4] == [42, 40, 38, 36] and linear[-3:] == [4, 0, 0]
    assert late[:4] == [0, 0, 0, 4] and late[-1] == 40
    assert ToMe(r=21, schedule="linear").most_tokens(CLIP) == 72
    assert ToMe(r=21, schedule="reverse_linear").most_tokens(CLIP) == 114


def test_thresholds_limit_nothing_in_advance() -> None:
    steps = DToMe((0.9,) * 24).steps(CLIP)
    assert len(steps) == 23 and all(step.r is None and step.threshold == 0.9 for step in steps)
    assert DToMe().most_tokens(CLIP) == 576
