"""Heads that read the tower's features, for training only, and their losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_lite.evaluation.scenes.world import COLORS, PLACES, SHAPES
from training.labels import IGNORE, PatchLabels


class PatchHeads(nn.Module):
    """Linear heads on the tower's features."""

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


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the labeled patches; 0 if there are none."""
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


# Smooth L1 is quadratic below its beta, so a tower gets little more exact than beta. In pixels,
# these are 0.8 of a place and 1.7 of an extent (units: half and whole image sides), and 0.4 of an
# offset (unit: patches).
SMOOTH_L1_BETA, OFFSET_BETA = 0.005, 0.03


def known_loss(read: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 distance to the finite targets; 0 if there are none."""
    known = targets.isfinite()
    total = F.smooth_l1_loss(read[known], targets[known], beta=SMOOTH_L1_BETA, reduction="sum")
    return total / known.sum().clamp(min=1)


def patch_loss(read: dict[str, Tensor], labels: PatchLabels) -> Tensor:
    """The sum of the losses of all heads."""
    on_object = labels.color > 0
    background_weight = torch.full((1 + len(COLORS),), 1.0, device=labels.color.device)
    background_weight[0] = 0.3
    color = F.cross_entropy(read["color"].flatten(0, 1), labels.color.flatten(), background_weight)
    shape = label_loss(read["shape"], labels.shape)
    digit = label_loss(read["digit"], labels.digit)
    center = F.binary_cross_entropy_with_logits(
        read["center"].squeeze(-1), labels.center, pos_weight=labels.center.new_tensor(5.0)
    )
    offset = F.smooth_l1_loss(read["offset"][on_object], labels.offset[on_object], beta=OFFSET_BETA)
    loss = color + shape + 0.7 * digit + center + 0.5 * offset
    if labels.whole:
        third = label_loss(read["third"], labels.third)
        # Three objects in four lie within a tenth of the image of a border between thirds, so the
        # center must become sharp. It depends on the unpadded image's size, which an object's
        # patches learn from far away. Both losses are small beside those of classes: hence 8.
        spot = known_loss(read["spot"][on_object], labels.spot[on_object])
        extent = known_loss(read["extent"], labels.extent)
        extent = extent + 3 * known_loss(read["extent"][on_object], labels.extent[on_object])
        loss = loss + third + 8 * (spot + extent) + place_loss(read["place"], labels)
        loss = loss + share_loss(read["share"].squeeze(-1), labels.area)
    return loss


def share_loss(read: Tensor, area: Tensor) -> Tensor:
    """Distance of each object patch (B, P) from its share of the object, 1 / area, and of an
    image's sum of shares from its number of objects. A decoder needs the sum to count objects."""
    on_object = area > 0
    shares = torch.where(on_object, 1 / area.clamp(min=1), 0)
    each = F.smooth_l1_loss((read * area)[on_object], torch.ones_like(read[on_object]), beta=0.1)
    total = F.smooth_l1_loss(read.sum(1), shares.sum(1), beta=0.1)
    # Products and sums over patches have steep gradients, which would drown the other losses.
    return 0.05 * each + 0.01 * total


def place_loss(read: Tensor, labels: PatchLabels) -> Tensor:
    """Distance of each patch's read place (B, P, 2) from its row and column, in halves of the
    image. Without this loss features forget their place, and the decoder cannot say where anything
    is."""
    distances = F.smooth_l1_loss(read, labels.own, beta=SMOOTH_L1_BETA, reduction="none").mean(-1)
    return distances.mean() + 3 * distances[labels.color > 0].mean()
