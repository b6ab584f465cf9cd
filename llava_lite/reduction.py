"""The options of one call for fewer image tokens: merge in the tower, place, prune in the decoder.

    Reduction(merge=ToMe(keep=72), positions="vtu", fastv=FastV(keep=36))

All classes are immutable and check their values when they are made (ValueError). Values that need a
model are checked by `Reduction.check`. `REDUCTIONS` are the named presets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from llava_lite.config import LlavaConfig, VisionConfig
from llava_lite.layout import PLACEMENTS
from llava_lite.tome import SCHEDULES, MergeStep, cap_merges, spread, spread_to_keep

POSITIONS = tuple(PLACEMENTS)
SCORES = ("sum", "mean")
PRUNE_LAYER = 3


@dataclass(frozen=True)
class ToMe:
    """Merge the same number of tokens in every image (ToMe, arXiv 2210.09461).

    keep: the exact number of image tokens that reach the decoder; or
    r: merges per block, on average over all blocks of CLIP. LLaVA-1.5 leaves the last block out:
        with r=21, CLIP keeps 576 - 24 * 21 = 72 tokens, and LLaVA 576 - 23 * 21 = 93.
    schedule: how to spread `r` over the blocks: "constant", "linear" (more in early blocks) or
        "reverse_linear" (more in late blocks)."""

    keep: int | None = None
    r: int | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.r is None):
            raise ValueError("ToMe needs keep or r, one of the two")
        for name in ("keep", "r"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(f"ToMe {name}", getattr(self, name)))
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"ToMe schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        if self.keep is not None and self.schedule != "constant":
            raise ValueError("a ToMe schedule goes with r, not with keep")

    def most_tokens(self, vision: VisionConfig) -> int:
        """The image tokens that are left, which is the same number for every image."""
        counts = [step.r or 0 for step in self.steps(vision)]
        return vision.num_patches - sum(cap_merges(counts, vision.num_patches))

    def steps(self, vision: VisionConfig) -> tuple[MergeStep, ...]:
        """One step for each block that runs. Raises ValueError if `keep` cannot be reached."""
        patches, blocks = vision.num_patches, vision.num_blocks
        # Every block can merge at most half of its tokens.
        fewest = patches - sum(cap_merges([patches] * blocks, patches))
        if self.keep is None:
            counts = spread((self.r or 0) * vision.num_layers, vision.num_layers, self.schedule)
        elif not fewest <= self.keep <= patches:
            raise ValueError(f"ToMe keep {self.keep} must be in {fewest}..{patches}")
        else:
            counts = spread_to_keep(self.keep, patches, blocks)
        return tuple(MergeStep(r=count) for count in counts[:blocks])


@dataclass(frozen=True)
class DToMe:
    """Merge all pairs above a threshold: many tokens of a simple image, few of a detailed one
    (DyMU, arXiv 2504.17040).

    thresholds: one cosine per block of the tower. None: the model's own thresholds, which
        `llava-lite thresholds` finds."""

    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.thresholds is None:
            return
        try:
            values = tuple(self.thresholds)
            if any(isinstance(value, str | bool) for value in values):
                raise TypeError
            thresholds = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise ValueError(f"DToMe thresholds {self.thresholds!r} are no numbers") from None
        if not thresholds or not all(map(math.isfinite, thresholds)):
            raise ValueError("DToMe thresholds must be finite numbers, at least one")
        object.__setattr__(self, "thresholds", thresholds)

    def most_tokens(self, vision: VisionConfig) -> int:
        """The most image tokens that can be left; the number depends on the image."""
        return vision.num_patches

    def steps(self, vision: VisionConfig) -> tuple[MergeStep, ...]:
        """One step for each block that runs. Raises ValueError unless each has a threshold."""
        if self.thresholds is None:
            raise ValueError(
                "the model has no thresholds of its own: find some with `llava-lite thresholds`"
            )
        if len(self.thresholds) not in (vision.num_blocks, vision.num_layers):
            raise ValueError(
                f"{len(self.thresholds)} DToMe thresholds, but the tower runs {vision.num_blocks} "
                f"of {vision.num_layers} blocks: name {vision.num_blocks} or {vision.num_layers}"
            )
        return tuple(MergeStep(threshold=t) for t in self.thresholds[: vision.num_blocks])


@dataclass(frozen=True)
class FastV:
    """Drop the image tokens with the least attention from the last prompt token (FastV, arXiv
    2403.06764).

    keep: the number of image tokens that stay; or drop: the share that goes, 0.7 for 70 %.
    layer: the first layer without the dropped tokens, counted from 0, at least 1 (K in the paper).
        The layer before it gives the scores.
    score: the score of a merged token is the "sum" or the "mean" over its positions.
    per_image: `keep` or `drop` counts for each image, instead of for all images together."""

    keep: int | None = None
    drop: float | None = None
    layer: int = PRUNE_LAYER
    score: str = "sum"
    per_image: bool = False

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("FastV needs keep or drop, one of the two")
        if not isinstance(self.per_image, bool):
            raise ValueError(f"FastV per_image {self.per_image!r} must be True or False")
        object.__setattr__(self, "layer", check_count("FastV layer", self.layer))
        if self.drop is None:
            object.__setattr__(self, "keep", check_count("FastV keep", self.keep))
        elif not (isinstance(self.drop, Real) and 0 < float(self.drop) < 1):
            raise ValueError(f"FastV drop {self.drop!r} must be a number above 0 and below 1")
        else:
            object.__setattr__(self, "drop", float(self.drop))
        if self.score not in SCORES:
            raise ValueError(f"FastV score {self.score!r} is not one of {', '.join(SCORES)}")

    def num_kept(self, num_tokens: int) -> int:
        """How many of `num_tokens` image tokens stay."""
        if self.drop is None:
            return min(self.keep or 0, num_tokens)
        # Python rounds half to even, in double precision, as the reference does.
        return min(num_tokens, max(1, round(num_tokens * (1 - self.drop))))

    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """How many tokens stay, given the size of each image: one number per image, or one for all
        images together. None if all of them stay."""
        groups = list(sizes) if self.per_image else [sum(sizes)]
        kept = [self.num_kept(size) for size in groups]
        return None if kept == groups else kept

    @staticmethod
    def parse(
        text: str | float | None, layer: int = PRUNE_LAYER, name: str = "FASTV_K"
    ) -> "FastV | None":
        """Read the value of `FASTV_K` or `--fastv-k`.

        A whole number from 1 on is the number of tokens that stay; a number between 0 and 1 is the
        share that goes; None, "", "none", "off" and 0 mean no pruning. Raises ValueError, which
        names `name`, for anything else."""
        if text is None or str(text).strip().lower() in ("", "none", "off"):
            return None
        try:
            amount = math.nan if isinstance(text, bool) else float(text)
        except (TypeError, ValueError, OverflowError):
            amount = math.nan
        if amount == 0:
            return None
        if 0 < amount < 1:
            return FastV(drop=amount, layer=layer)
        if not (amount >= 1 and amount.is_integer()):
            raise ValueError(
                f"{name} {text!r} must be a whole number of tokens to keep, a share between 0 and "
                "1 to drop, or none"
            )
        return FastV(keep=int(amount), layer=layer)


@dataclass(frozen=True)
class Reduction:
    """All options together; None switches a part off.

    positions: where merged tokens stand in the decoder: "vtu", "logical" or "plain" (layout.py)."""

    merge: ToMe | DToMe | None = None
    positions: str = "vtu"
    fastv: FastV | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.merge, ToMe | DToMe | None):
            raise ValueError(f"merge {self.merge!r} must be a ToMe, a DToMe or None")
        if not isinstance(self.fastv, FastV | None):
            raise ValueError(f"fastv {self.fastv!r} must be a FastV or None")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions {self.positions!r} is not one of {', '.join(POSITIONS)}")

    def __str__(self) -> str:
        """The name of the preset with these parts, or else all parts."""
        names = {reduction: name for name, reduction in REDUCTIONS.items()}
        return names.get(self) or repr(self)

    @staticmethod
    def of(wish: "Reduction | str | None") -> "Reduction":
        """The reduction of a preset's name, or of None; a Reduction as it is. Raises ValueError."""
        if wish is None or isinstance(wish, str):
            name = "none" if wish is None else wish
            if name not in REDUCTIONS:
                raise ValueError(f"unknown reduction {name!r}; there are {', '.join(REDUCTIONS)}")
            return REDUCTIONS[name]
        if not isinstance(wish, Reduction):
            raise ValueError(f"reduction {wish!r} is neither a Reduction nor a preset's name")
        return wish

    def most_positions(self, vision: VisionConfig) -> int:
        """The most positions that one image takes in the decoder, whatever it shows."""
        patches = vision.num_patches
        tokens = patches if self.merge is None else self.merge.most_tokens(vision)
        return PLACEMENTS[self.positions].num_positions(patches, tokens)

    def check(self, config: LlavaConfig, thresholds: Sequence[float] | None = None) -> "Reduction":
        """Check the values against a model, and fill in its own `thresholds` for a bare `DToMe()`.
        Raises ValueError that names the allowed range."""
        checked = self
        if self.merge is not None:
            if self.merge == DToMe() and thresholds is not None:
                checked = replace(self, merge=DToMe(tuple(thresholds)))
            assert checked.merge is not None
            checked.merge.steps(config.vision)  # raises
        last = config.text.num_layers - 1
        if self.fastv is not None and self.fastv.layer > last:
            raise ValueError(f"FastV layer {self.fastv.layer} must be in 1..{last}")
        return checked


def check_count(name: str, value: object) -> int:
    """The value as an int. Raises ValueError unless it is a whole number from 1 on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {value!r} must be a whole number of at least 1")
    return int(value)


NO_REDUCTION = Reduction()
REDUCTIONS = {
    "none": NO_REDUCTION,
    "tome-72": Reduction(ToMe(keep=72)),
    "tome-72-logical": Reduction(ToMe(keep=72), "logical"),
    "dymu-72": Reduction(DToMe()),
    "fastv-50": Reduction(fastv=FastV(drop=0.5)),
    "hybrid-72-36": Reduction(ToMe(keep=72), "logical", FastV(keep=36)),
    "hybrid-vtu-72-36": Reduction(ToMe(keep=72), "vtu", FastV(keep=36)),
}
