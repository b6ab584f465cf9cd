"""LLaVA-1.5 (arXiv 2310.03744) in one page: look, project, splice, decode.

    pixel_values   one image, 336 px                                            (1, 3, 336, 336)
    vision         24 x 24 = 576 patches + class token, 23 blocks, token dropped  (1, 576, 1024)
    projector      image features become image embeds                             (1, 576, 4096)
    splice         the image slot (-200) among T prompt ids gives way to 576 rows     (N, 4096)
    decoder        32 layers; the last row's logits choose the first token        (1, 1, 32000)

Then one token at a time over the tuple cache ((k, v), ...), each (1, H, length, D) per layer.

A `Reduction` makes it fewer: in `vision` similar patches merge, 576 -> U (tome.py); `splice` says
where merged tokens stand (layout.py); in front of one layer the decoder drops those that nobody
looks at (fastv.py). Without one, every step is plain LLaVA.

A batch is a list of items. `forward` runs any number of them, of any lengths, with or without a
cache; `prefill` and `decode` are its two uses for a single item.

Shapes: P patches and U <= P tokens of an image, N positions and R rows of a prompt, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_lite.cache import KVCache
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig
from llava_lite.errors import PromptError
from llava_lite.fastv import Pruning
from llava_lite.layout import PLACEMENTS, Layout, join, place_image
from llava_lite.llama import LlamaDecoder
from llava_lite.projector import Projector
from llava_lite.reduction import NO_REDUCTION, DToMe, FastV, Reduction
from llava_lite.vision import VisionTower


@dataclass(frozen=True)
class EncodedImage:
    """An image the model has already looked at, reusable wherever it accepts an image.

    image_embeds (U, C); mapping (P,) the row that each patch is part of, None where none merged;
    the reduction it was encoded with; and how many tokens there were after each vision block."""

    image_embeds: Tensor
    mapping: Tensor | None = None
    reduction: Reduction = NO_REDUCTION
    tokens_per_block: tuple[int, ...] = ()

    @property
    def num_patches(self) -> int:
        """P, before any merging."""
        return len(self.image_embeds if self.mapping is None else self.mapping)

    def num_positions(self, positions: str) -> int:
        """By how many positions the image moves the text behind it (layout.py)."""
        return PLACEMENTS[positions].num_positions(self.num_patches, len(self.image_embeds))


class Llava(nn.Module):
    """The whole model: `vision`, `projector`, `decoder`. Holds weights, never state of a call."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config)
        self.decoder = LlamaDecoder(config.text)

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    def encode_image(
        self, pixel_values: Tensor, reduction: Reduction = NO_REDUCTION
    ) -> list[EncodedImage]:
        """pixel_values (B, 3, S, S) -> for each image its embeds (U, C), to stand among words.

        Thresholds leave every image its own U, so then they pass the tower one by one."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        merge = reduction.merge
        steps = None if merge is None else merge.steps(self.config.vision)
        encoded = []
        for images in pixel_values.split(1) if isinstance(merge, DToMe) else [pixel_values]:
            seen = self.vision(images, steps)
            mappings = [None] * len(images) if seen.mapping is None else seen.mapping
            for embeds, mapping in zip(self.projector(seen.image_features), mappings, strict=True):
                encoded.append(EncodedImage(embeds, mapping, reduction, seen.tokens_per_block))
        return encoded

    def splice(
        self,
        input_ids: Sequence[int],
        images: Sequence[EncodedImage],
        position: int = 0,
        positions: str = "vtu",
    ) -> tuple[Tensor, Layout]:
        """Embed T ids and put the images in their slots (id -200), in order -> rows (R, C), and
        where they stand from `position` on; `positions` as in layout.py.

        Raises PromptError when slots and images differ in number."""
        slots = [row for row, token in enumerate(input_ids) if token == IMAGE_TOKEN_ID]
        if len(slots) != len(images):
            raise PromptError.of_counts(len(slots), len(images))
        pieces, layouts, start = [], [], 0
        for slot, image in zip([*slots, len(input_ids)], [*images, None], strict=True):
            if start < slot:
                pieces.append(self.decoder.embed_tokens(self.upload(input_ids[start:slot])))
                layouts.append(Layout.text(slot - start, position, self.device))
                position = layouts[-1].next_position
            if image is not None:
                embeds = image.image_embeds.to(self.device, self.dtype)
                mapping = None if image.mapping is None else image.mapping.to(self.device)
                layout, order = place_image(mapping, len(embeds), position, positions, self.device)
                pieces.append(embeds if order is None else embeds[order])
                layouts.append(layout)
                position = layout.next_position
            start = slot + 1
        return torch.cat(pieces), join(layouts)

    def upload(self, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Ids as a tensor on the device, without waiting for what runs there."""
        ids = torch.tensor(input_ids, pin_memory=self.device.type == "cuda")
        return ids.to(self.device, non_blocking=True)

    def forward(
        self,
        input_embeds: Sequence[Tensor],
        layouts: Sequence[Layout],
        past_key_values: Sequence[KVCache | None],
        fastv: Sequence[FastV | None] | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, list[KVCache], list[Pruning | None]]:
        """Run a batch: per item its rows (R, C), where they stand, its cache (None at prefill), and
        what to prune. Returns the logits of each item's last position (B, V), or of all rows that
        are left, packed; the grown caches; and what was pruned."""
        run = self.decoder(torch.cat(list(input_embeds)), layouts, past_key_values, fastv)
        x = run.hidden_states  # (R', C)
        if not all_logits:
            x = run.layout.last_rows(x)  # (B, C)
        return self.decoder.lm_head(x), run.past_key_values, run.prunings

    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        reduction: Reduction = NO_REDUCTION,
        all_logits: bool = False,
    ) -> tuple[Tensor, KVCache, int]:
        """The whole prompt at once: input_ids (1, T) with -200 for each image of pixel_values
        (images, 3, S, S). Returns logits (1, 1, V), or (1, R, V) of all rows with `all_logits`, the
        cache, and the position of the next token."""
        images = [] if pixel_values is None else self.encode_image(pixel_values, reduction)
        rows, layout = self.splice(
            input_ids.flatten().tolist(), images, positions=reduction.positions
        )
        logits, caches, _ = self([rows], [layout], [None], [reduction.fastv], all_logits)
        return logits[None], caches[0], layout.next_position

    def decode(
        self, token: Tensor, position: int, past_key_values: KVCache
    ) -> tuple[Tensor, KVCache]:
        """One token (one element, any shape) at `position` -> logits (1, 1, V), the grown cache."""
        input_embeds = self.decoder.embed_tokens(token.to(self.device).reshape(1))  # (1, C)
        layout = Layout.text(1, position, self.device)
        logits, caches, _ = self([input_embeds], [layout], [past_key_values])
        return logits[None], caches[0]
