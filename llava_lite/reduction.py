"""The wishes of one call about fewer image tokens: what to merge in the vision tower, at which
positions merged tokens stand, and what to prune in the decoder.

    Reduction(merge=ToMe(keep=72), positions="vtu", fastv=FastV(keep=36))

Immutable, and checked when made as far as no model is needed for it (ValueError); `Reduction.check`
does the rest. `REDUCTIONS` are the named presets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

from llava_lite.config import LlavaConfig, VisionConfig
from llava_lite.layout import PLACEMENTS
from llava_lite.tome import SCHEDULES, MergeStep, capped, spread, spread_to_keep

POSITIONS = tuple(PLACEMENTS)
SCORES = ("sum", "mean")
PRUNE_LAYER = 3


@dataclass(frozen=True)
class ToMe:
    """Merge the same number of tokens in every image (ToMe, arXiv 2210.09461).

    keep: image tokens that reach the decoder, exactly; or
    r: tokens merged per block on average over all blocks of CLIP, the one that LLaVA leaves out
        too: the reference's "72out" is r=21, of which LLaVA-1.5 then sees 576 - 23 * 21 = 93.
    schedule: how `r` is spread: "constant", or more in early blocks ("linear") or in late ones
        ("reverse_linear")."""

    keep: int | None = None
    r: int | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.r is None):
            raise ValueError("ToMe needs keep or r, one of the two")
        for name in ("keep", "r"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_count(f"ToMe {name}", getattr(self, name)))
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"ToMe schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        if self.keep is not None and self.schedule != "constant":
            raise ValueError("a ToMe schedule goes with r, not with keep")

    def most_tokens(self, vision: VisionConfig) -> int:
        """Image tokens that are left, known before looking at an image."""
        counts = [step.r or 0 for step in self.steps(vision)]
        return vision.num_patches - sum(capped(counts, vision.num_patches))

    def steps(self, vision: VisionConfig) -> tuple[MergeStep, ...]:
        """What each block that runs merges. Raises ValueError for more tokens than patches, and for
        fewer than are left when every block merges half of what it gets."""
        patches, blocks = vision.num_patches, vision.num_blocks
        fewest = patches - sum(capped([patches] * blocks, patches))
        if self.keep is None:
            counts = spread((self.r or 0) * vision.num_layers, vision.num_layers, self.schedule)
        elif not fewest <= self.keep <= patches:
            raise ValueError(f"ToMe keep {self.keep} must be in {fewest}..{patches}")
        else:
            counts = spread_to_keep(self.keep, patches, blocks)
        return tuple(MergeStep(r=count) for count in counts[:blocks])


@dataclass(frozen=True)
class DToMe:
    """Merge what is similar enough, so many tokens of a plain image and few of a busy one (DyMU,
    arXiv 2504.17040).

    thresholds: one cosine per block of the tower; a pair above it merges. None: the model's own,
        found with `llava-lite thresholds`."""

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
        """At most so many image tokens are left; how many, only the image can tell."""
        return vision.num_patches

    def steps(self, vision: VisionConfig) -> tuple[MergeStep, ...]:
        """What each block that runs merges. Raises ValueError without a threshold for each."""
        if self.thresholds is None:
            raise ValueError(
                "this model has no thresholds of its own: find some with `llava-lite thresholds`"
            )
        if len(self.thresholds) not in (vision.num_blocks, vision.num_layers):
            raise ValueError(
                f"{len(self.thresholds)} DToMe thresholds, but the tower runs {vision.num_blocks} "
                f"of {vision.num_layers} blocks: there must be one for each of these or of those"
            )
        return tuple(MergeStep(threshold=t) for t in self.thresholds[: vision.num_blocks])


@dataclass(frozen=True)
class FastV:
    """Drop the image tokens that the last prompt token looks at least (FastV, arXiv 2403.06764).

    keep: image tokens that stay; or drop: the share of them that goes, 0.7 for 70 %.
    layer: index of the first pruned layer, counted from 0 and at least 1, K in the paper. The
        scores are the attention of the layer before it.
    score: a merged token that fills several positions scores their "sum" or their "mean".
    per_image: several images get `keep` or `drop` each, instead of sharing it."""

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
        object.__setattr__(self, "layer", checked_count("FastV layer", self.layer))
        if self.drop is None:
            object.__setattr__(self, "keep", checked_count("FastV keep", self.keep))
        elif not (isinstance(self.drop, Real) and 0 < float(self.drop) < 1):
            raise ValueError(f"FastV drop {self.drop!r} must be a number above 0 and below 1")
        else:
            object.__setattr__(self, "drop", float(self.drop))
        if self.score not in SCORES:
            raise ValueError(f"FastV score {self.score!r} is not one of {', '.join(SCORES)}")

    def num_kept(self, num_tokens: int) -> int:
        """How many of so many image tokens stay. Rounds half to even, in double precision, as the
        reference does."""
        if self.drop is None:
            return min(self.keep or 0, num_tokens)
        return min(num_tokens, max(1, round(num_tokens * (1 - self.drop))))

    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """How many tokens of images of these sizes stay: of each, or one number for all together.
        None where that would be all of them."""
        groups = list(sizes) if self.per_image else [sum(sizes)]
        kept = [self.num_kept(size) for size in groups]
        return None if kept == groups else kept

    @staticmethod
    def parse(
        text: str | float | None, layer: int = PRUNE_LAYER, name: str = "FASTV_K"
    ) -> "FastV | None":
        """The amount as `FASTV_K` and `--fastv-k` write it: a whole number from 1 on is how many
        tokens stay, one between 0 and 1 the share that goes; None, "", "none", "off" and 0 are no
        pruning. Raises ValueError, by `name`, for anything else."""
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
    """All wishes together; None is none.

    positions: where merged tokens stand in the decoder, see layout.py: "vtu", "logical", "plain".
    """

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
        """The name of the preset that it equals, or else all of its parts."""
        names = {reduction: name for name, reduction in REDUCTIONS.items()}
        return names.get(self) or repr(self)

    @staticmethod
    def of(wish: "Reduction | str | None") -> "Reduction":
        """A reduction, a preset's name, or None for nothing. Raises ValueError."""
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
        """The same, checked against a model, whose `thresholds` stand in where none are named.
        Raises ValueError with the range that is allowed."""
        checked = self
        if self.merge is not None:
            if self.merge == DToMe() and thresholds is not None:
                checked = replace(self, merge=DToMe(tuple(thresholds)))
            assert checked.merge is not None
            checked.merge.steps(config.vision)
        last = config.text.num_layers - 1
        if self.fastv is not None and self.fastv.layer > last:
            raise ValueError(f"FastV layer {self.fastv.layer} must be in 1..{last}")
        return checked


def checked_count(name: str, value: object) -> int:
    """The value as an int. Raises ValueError for anything but a whole number from 1 on."""
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
