"""The options of one call for fewer image tokens: merge in the tower, place, prune in the decoder.

    Reduction(merge=ToMe(keep=72), positions="vtu", fastv=FastV(keep=36))

All classes are immutable and check their values when they are made (ValueError). Values that need a
model are checked by `Reduction.check`. `REDUCTIONS` are the named presets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral, Real

from llava_lite.config import FastViTHDConfig, LlavaConfig, TowerConfig
from llava_lite.layout import PLACEMENTS
from llava_lite.tome import SCHEDULES, MergeStep, cap_merges, spread, spread_to_keep

POSITIONS = tuple(PLACEMENTS)
SCORES = ("sum", "mean")
RESTS = ("drop", "fold")
PRUNE_LAYER = 3
MAX_ROUNDS = 8  # of DToMe behind FastViTHD; 8 rounds can merge the 256 tokens of 1024 px into one


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

    def most_tokens(self, vision: TowerConfig) -> int:
        """The image tokens that are left, which is the same number for every image."""
        counts = [step.r or 0 for step in self.steps(vision)]
        return vision.num_patches - sum(cap_merges(counts, vision.num_patches))

    def steps(self, vision: TowerConfig) -> tuple[MergeStep, ...]:
        """One step for each block that runs, or for each round behind FastViTHD. Raises ValueError
        if `keep` cannot be reached."""
        patches = vision.num_patches
        if self.keep is None:
            if isinstance(vision, FastViTHDConfig):
                raise ValueError("FastViTHD merges after the tower: use keep, not r")
            counts = spread((self.r or 0) * vision.num_layers, vision.num_layers, self.schedule)
            return tuple(MergeStep(r=count) for count in counts[: vision.num_blocks])
        if isinstance(vision, FastViTHDConfig):  # as few rounds as halving allows
            num_steps, fewest = (math.ceil(patches / self.keep) - 1).bit_length(), 1
        else:
            num_steps = vision.num_blocks
            # Every block can merge at most half of its tokens.
            fewest = patches - sum(cap_merges([patches] * num_steps, patches))
        if not fewest <= self.keep <= patches:
            raise ValueError(f"ToMe keep {self.keep} must be in {fewest}..{patches}")
        counts = spread_to_keep(self.keep, patches, num_steps)
        return tuple(MergeStep(r=count) for count in counts)


@dataclass(frozen=True)
class DToMe:
    """Merge all pairs above a threshold: many tokens of a simple image, few of a detailed one
    (DyMU, arXiv 2504.17040).

    thresholds: one cosine per block of the tower, or per round behind FastViTHD. None: the model's
        own thresholds, which `llava-lite thresholds` finds."""

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

    def most_tokens(self, vision: TowerConfig) -> int:
        """The most image tokens that can be left; the number depends on the image."""
        return vision.num_patches

    def steps(self, vision: TowerConfig) -> tuple[MergeStep, ...]:
        """One step for each block that runs, or for each round behind FastViTHD. Raises ValueError
        unless each has a threshold."""
        if self.thresholds is None:
            raise ValueError(
                "the model has no thresholds of its own: find some with `llava-lite thresholds`"
            )
        if isinstance(vision, FastViTHDConfig):
            if len(self.thresholds) > MAX_ROUNDS:
                raise ValueError(
                    f"{len(self.thresholds)} DToMe thresholds, but FastViTHD merges after the "
                    f"tower: name 1 to {MAX_ROUNDS}"
                )
            return tuple(MergeStep(threshold=t) for t in self.thresholds)
        if len(self.thresholds) not in (vision.num_blocks, vision.num_layers):
            raise ValueError(
                f"{len(self.thresholds)} DToMe thresholds, but the tower runs {vision.num_blocks} "
                f"of {vision.num_layers} blocks: name {vision.num_blocks} or {vision.num_layers}"
            )
        return tuple(MergeStep(threshold=t) for t in self.thresholds[: vision.num_blocks])


@dataclass(frozen=True)
class FastV:
    """Keep the image tokens with the most attention from the last prompt token (FastV, arXiv
    2403.06764). Give one of keep, drop and stages.

    keep: the number of image tokens that stay; or drop: the share that goes, 0.7 for 70 %.
    layer: the first layer without the other tokens, counted from 0, at least 1 (K in the paper).
        The layer before it gives the scores.
    stages: several prunings, ((1, 144), (3, 72)): a layer, and the tokens to keep or the share to
        drop from there on (PyramidDrop, arXiv 2410.17247). Layers rise, numbers of tokens fall.
    rest: "drop" leaves the other tokens out. "fold" makes each a part of the most similar kept
        token of its image, needs `folded` positions, and keeps a token of every image.
    score: the score of a merged token is the "sum" or the "mean" over its positions. None: the
        "mean" with folding, else the "sum".
    per_image: the amounts count for each image, instead of for all images together."""

    keep: int | None = None
    drop: float | None = None
    layer: int = PRUNE_LAYER
    score: str | None = None
    per_image: bool = False
    rest: str = "drop"
    stages: tuple[tuple[int, int | float], ...] | None = None

    def __post_init__(self) -> None:
        if sum(amount is not None for amount in (self.keep, self.drop, self.stages)) != 1:
            raise ValueError("FastV needs keep, drop or stages, one of the three")
        if not isinstance(self.per_image, bool):
            raise ValueError(f"FastV per_image {self.per_image!r} must be True or False")
        if self.score not in (None, *SCORES):
            raise ValueError(f"FastV score {self.score!r} is not one of {', '.join(SCORES)}")
        if self.rest not in RESTS:
            raise ValueError(f"FastV rest {self.rest!r} is not one of {', '.join(RESTS)}")
        object.__setattr__(self, "layer", check_count("FastV layer", self.layer))
        if self.stages is not None:
            if self.layer != PRUNE_LAYER:
                raise ValueError("FastV stages name their own layers: leave layer out")
            object.__setattr__(self, "stages", check_stages(self.stages))
        elif self.drop is None:
            object.__setattr__(self, "keep", check_count("FastV keep", self.keep))
        else:
            object.__setattr__(self, "drop", check_share("FastV drop", self.drop))

    @property
    def score_of_merged(self) -> str:
        """The score of a merged token, with its default."""
        # By sums, folding would keep tokens for their size: most often large background.
        return self.score or ("mean" if self.rest == "fold" else "sum")

    @property
    def amounts(self) -> dict[int, int | float]:
        """Every stage: its layer, and the number of tokens that stay (int) or the share that goes
        (float)."""
        if self.stages is not None:
            return dict(self.stages)
        amount = self.drop if self.keep is None else self.keep
        assert amount is not None
        return {self.layer: amount}

    def num_kept(self, num_tokens: int, layer: int | None = None) -> int:
        """How many of `num_tokens` image tokens stay in front of `layer` (None: of the first
        stage)."""
        amounts = self.amounts
        amount = amounts[next(iter(amounts)) if layer is None else layer]
        if isinstance(amount, int):
            return min(amount, num_tokens)
        # Python rounds half to even, in double precision, as the reference does.
        return min(num_tokens, max(1, round(num_tokens * (1 - amount))))

    def budgets(
        self, counts: Sequence[int], layer: int | None = None, num_images: int = 1
    ) -> list[int] | None:
        """How many tokens stay in front of `layer` (None: of the first stage), given the tokens of
        each image: one number per image, or one for all `num_images` together. None if all stay."""
        if layer is not None and layer not in self.amounts:
            return None
        groups = list(counts) if self.per_image else [sum(counts)]
        least = num_images if self.rest == "fold" and not self.per_image else 1
        kept = [min(count, max(least, self.num_kept(count, layer))) for count in groups]
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

    positions: where merged tokens stand in the decoder: "vtu", "folded", "logical" or "plain"
        (layout.py).
    image_size: pixels of a side of the image, None for those of the model. Only FastViTHD takes
        other sizes; a smaller image is FastVLM's own reduction."""

    merge: ToMe | DToMe | None = None
    positions: str = "vtu"
    fastv: FastV | None = None
    image_size: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", check_count("image_size", self.image_size))
        if not isinstance(self.merge, ToMe | DToMe | None):
            raise ValueError(f"merge {self.merge!r} must be a ToMe, a DToMe or None")
        if not isinstance(self.fastv, FastV | None):
            raise ValueError(f"fastv {self.fastv!r} must be a FastV or None")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions {self.positions!r} is not one of {', '.join(POSITIONS)}")
        if self.fastv is not None and self.fastv.rest == "fold" and self.positions != "folded":
            raise ValueError(f"FastV rest 'fold' needs positions 'folded', not {self.positions!r}")

    def __str__(self) -> str:
        """The name of the preset with these parts, or else all parts."""
        names = {reduction: name for name, reduction in REDUCTIONS.items()}
        text = names.get(replace(self, image_size=None)) or repr(self)
        return text if self.image_size is None else f"{text} at {self.image_size} px"

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

    def most_positions(self, vision: TowerConfig) -> int:
        """The most positions that one image takes in the decoder, whatever it shows."""
        vision = vision.at(self.image_size)
        patches = vision.num_patches
        tokens = patches if self.merge is None else self.merge.most_tokens(vision)
        return PLACEMENTS[self.positions].num_positions(patches, tokens)

    def check(self, config: LlavaConfig, thresholds: Sequence[float] | None = None) -> "Reduction":
        """Check the values against a model, and fill in its own `thresholds` for a bare `DToMe()`.
        Raises ValueError that names the allowed range."""
        checked, vision = self, config.vision.at(self.image_size)
        if self.merge is not None:
            if self.merge == DToMe() and thresholds is not None:
                checked = replace(self, merge=DToMe(tuple(thresholds)))
            assert checked.merge is not None
            checked.merge.steps(vision)  # raises
        last = config.text.num_layers - 1
        for layer in () if self.fastv is None else self.fastv.amounts:
            if layer > last:
                raise ValueError(f"FastV layer {layer} must be in 1..{last}")
        return checked


def check_count(name: str, value: object) -> int:
    """The value as an int. Raises ValueError unless it is a whole number from 1 on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {value!r} must be a whole number of at least 1")
    return int(value)


def check_share(name: str, value: object) -> float:
    """The value as a float. Raises ValueError unless it is above 0 and below 1."""
    if not (isinstance(value, Real) and 0 < float(value) < 1):
        raise ValueError(f"{name} {value!r} must be a number above 0 and below 1")
    return float(value)


def check_stages(stages: object) -> tuple[tuple[int, int | float], ...]:
    """The stages as pairs of numbers. Raises ValueError unless layers rise and amounts fall."""
    name, checked = "FastV stages", []
    try:
        pairs = [(layer, amount) for layer, amount in stages]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"{name} {stages!r} must be pairs of a layer and an amount") from None
    if not pairs:
        raise ValueError(f"{name} must be at least one pair of a layer and an amount")
    for layer, amount in pairs:
        layer = check_count("the layer of a FastV stage", layer)
        share = isinstance(amount, Real) and not isinstance(amount, Integral)
        check = check_share if share else check_count
        checked.append((layer, check("the amount of a FastV stage", amount)))
    layers = [layer for layer, _ in checked]
    if any(layer >= later for layer, later in pairwise(layers)):
        raise ValueError(f"{name}: each layer must be above the one before, not {layers}")
    kept = [amount for _, amount in checked if isinstance(amount, int)]
    if any(amount <= later for amount, later in pairwise(kept)):
        raise ValueError(f"{name}: each number of tokens must be below the one before, not {kept}")
    return tuple(checked)


NO_REDUCTION = Reduction()
REDUCTIONS = {
    "none": NO_REDUCTION,
    # Folded: the rows of `logical`, and no patch loses its weight.
    "folded-72": Reduction(ToMe(keep=72), "folded"),
    "folded-144-72": Reduction(ToMe(keep=144), "folded", FastV(keep=72, layer=1, rest="fold")),
    "folded-144-36": Reduction(
        ToMe(keep=144), "folded", FastV(stages=((1, 48), (3, 36)), rest="fold")
    ),
    "folded-72-36": Reduction(ToMe(keep=72), "folded", FastV(keep=36, rest="fold")),
    "folded-72-36-18": Reduction(
        ToMe(keep=72), "folded", FastV(stages=((1, 36), (3, 18)), rest="fold")
    ),
    "folded-72-18-9": Reduction(
        ToMe(keep=72), "folded", FastV(stages=((1, 18), (3, 9)), rest="fold")
    ),
    "fastv-72-folded": Reduction(None, "folded", FastV(keep=72, rest="fold")),
    # As published.
    "tome-72": Reduction(ToMe(keep=72)),
    "tome-72-logical": Reduction(ToMe(keep=72), "logical"),
    "dymu-72": Reduction(DToMe()),
    "fastv-50": Reduction(fastv=FastV(drop=0.5)),
    "hybrid-72-36": Reduction(ToMe(keep=72), "logical", FastV(keep=36)),
    "hybrid-vtu-72-36": Reduction(ToMe(keep=72), "vtu", FastV(keep=36)),
}
