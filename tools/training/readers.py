"""The readers of the tower, which only the training has, and what they lose by."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.evaluation.scenes.world import COLORS, PLACES, SHAPES
from training.labels import IGNORE, PatchLabels


class PatchHeads(nn.Module):
    """Linear readers of the tower's features, for training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.shape = nn.Linear(width, len(SHAPES))
        self.digit = nn.Linear(width, 11)
        self.third = nn.Linear(width, len(PLACES))
        self.center = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 2)
        self.place = nn.Linear(width, 2)
        self.spot = nn.Linear(width, 2)
        self.extent = nn.Linear(width, 2)
        self.share = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = self.norm(features)
        heads = {name: head for name, head in self.named_children() if name != "norm"}
        return {name: head(x).float() for name, head in heads.items()}


def labelled_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the patches that have a label; 0 where none has."""
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


# Smooth L1 counts a distance below its beta quadratically, that is less and less. A tower gets as
# exact as that and not much more, so these are below a pixel or two: 0.8 pixels of a place and 1.7
# of an extent, whose units are half and whole sides of the image, and 0.4 of an offset, in patches.
SMOOTH_L1_BETA, OFFSET_BETA = 0.005, 0.03


def known_loss(read: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 distance to the targets that are numbers; 0 where none is."""
    known = targets.isfinite()
    total = F.smooth_l1_loss(read[known], targets[known], beta=SMOOTH_L1_BETA, reduction="sum")
    return total / known.sum().clamp(min=1)


def patch_loss(read: dict[str, Tensor], labels: PatchLabels) -> Tensor:
    """How badly the heads read the labels."""
    on_object = labels.color > 0
    background_weight = torch.full((1 + len(COLORS),), 1.0, device=labels.color.device)
    background_weight[0] = 0.3
    color = F.cross_entropy(read["color"].flatten(0, 1), labels.color.flatten(), background_weight)
    shape = labelled_loss(read["shape"], labels.shape)
    digit = labelled_loss(read["digit"], labels.digit)
    center = F.binary_cross_entropy_with_logits(
        read["center"].squeeze(-1), labels.center, pos_weight=labels.center.new_tensor(5.0)
    )
    offset = F.smooth_l1_loss(read["offset"][on_object], labels.offset[on_object], beta=OFFSET_BETA)
    loss = color + shape + 0.7 * digit + center + 0.5 * offset
    if labels.whole:
        third = labelled_loss(read["third"], labels.third)
        # Three objects in four lie within a tenth of the image of a border between thirds: what
        # must become sharp is the centre. It takes the size of the image without its padding, which
        # an object's patches learn from far away. Both are small numbers beside the others,
        # which are about kinds: hence 8.
        spot = known_loss(read["spot"][on_object], labels.spot[on_object])
        extent = known_loss(read["extent"], labels.extent)
        extent = extent + 3 * known_loss(read["extent"][on_object], labels.extent[on_object])
        loss = loss + third + 8 * (spot + extent) + place_loss(read["place"], labels)
        loss = loss + share_loss(read["share"].squeeze(-1), labels.area)
    return loss


def share_loss(read: Tensor, area: Tensor) -> Tensor:
    """How far each object patch (B, P) is from knowing its share of the object, one over its area,
    and the sum of an image's shares from its number of objects: what a decoder that can only
    average over patches counts by."""
    on_object = area > 0
    shares = torch.where(on_object, 1 / area.clamp(min=1), 0)
    each = F.smooth_l1_loss((read * area)[on_object], torch.ones_like(read[on_object]), beta=0.1)
    total = F.smooth_l1_loss(read.sum(1), shares.sum(1), beta=0.1)
    # What multiplies and sums over patches has steep slopes, which would drown the other losses.
    return 0.05 * each + 0.01 * total


def place_loss(read: Tensor, labels: PatchLabels) -> Tensor:
    """How far from its own row and column each patch of a whole image (B, P, 2) believes to be, in
    halves of the image. Left to themselves, the tower's features forget it, those of objects first,
    and then the decoder cannot say where anything is."""
    distances = F.smooth_l1_loss(read, labels.own, beta=SMOOTH_L1_BETA, reduction="none").mean(-1)
    return distances.mean() + 3 * distances[labels.color > 0].mean()
