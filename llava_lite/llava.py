"""LLaVA-1.5 (arXiv 2310.03744) on one page: encode the image, splice it into the prompt, decode.

    pixel_values   one image, 336 px                                              (1, 3, 336, 336)
    vision         23 blocks over 24 x 24 = 576 patches                             (1, 576, 1024)
    projector      image features become image embeds                               (1, 576, 4096)
    splice         576 image rows take the place of the id -200 among T prompt ids       (R, 4096)
    decoder        32 layers; the logits of the last row choose the first token      (1, 1, 32000)

Then the decoder runs one token at a time. Its cache is a tuple ((k, v), ...), one pair per layer,
each (1, H, length, D), or with fewer heads (attention.py). A pair with folded tokens also knows
their sizes (cache.py).

A `Reduction` makes the image smaller. In `vision`, similar patches merge: 576 -> U (tome.py).
`splice` places the merged tokens (layout.py). In front of one decoder layer, image tokens with
little attention are pruned (fastv.py). Without a reduction, every step is plain LLaVA.

A batch is a list of items. `forward` runs items of any lengths, with or without a cache. `prefill`
and `decode` use it for a single item.

Shapes: B images or items, P patches and U <= P tokens of an image, S pixels of a side, T prompt
ids, R rows of a prompt, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from llava_lite.cache import KVCache
from llava_lite.config import IMAGE_TOKEN_ID, FastViTHDConfig, LlavaConfig
from llava_lite.errors import PromptError
from llava_lite.fastv import Pruning
from llava_lite.fastvithd import FastViTHD
from llava_lite.layout import PLACEMENTS, Layout, join, place_image
from llava_lite.llama import DecoderLayer, LlamaDecoder
from llava_lite.projector import Projector
from llava_lite.reduction import NO_REDUCTION, DToMe, FastV, Reduction
from llava_lite.vision import VisionTower


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image. A model takes it wherever it takes an image, and skips the tower.

    image_embeds (U, C); mapping (P,), the token of each patch (None: nothing merged); the reduction
    that was used; tokens_per_block, the number of tokens after each block or round of merging."""

    image_embeds: Tensor
    mapping: Tensor | None = None
    reduction: Reduction = NO_REDUCTION
    tokens_per_block: tuple[int, ...] = ()

    @property
    def num_patches(self) -> int:
        """P, the number of tokens before merging."""
        return len(self.image_embeds if self.mapping is None else self.mapping)

    def num_positions(self, positions: str) -> int:
        """By how many positions the image moves the text behind it (layout.py)."""
        return PLACEMENTS[positions].num_positions(self.num_patches, len(self.image_embeds))


class Llava(nn.Module):
    """The whole model: `vision`, `projector`, `decoder`. Holds weights, and no state of a call."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.vision = (
            FastViTHD(vision) if isinstance(vision, FastViTHDConfig) else VisionTower(vision)
        )
        self.projector = Projector(config)
        self.decoder = LlamaDecoder(config.text)

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    @property
    def vision_dtype(self) -> torch.dtype:
        """The dtype of the tower, which may be float32 in front of a decoder in 16 bit."""
        return next(self.vision.parameters()).dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values (attention.py)."""
        return cast(DecoderLayer, self.decoder.layers[0]).attn.cache_dtype or self.dtype

    def encode_image(
        self, pixel_values: Tensor, reduction: Reduction = NO_REDUCTION
    ) -> list[EncodedImage]:
        """Encode pixel_values (B, 3, S, S): for each image its embeds (U, C). Raises ValueError
        for a size S that the tower does not take."""
        vision = self.config.vision.at(pixel_values.shape[-1])
        pixel_values = pixel_values.to(self.device, self.vision_dtype)
        merge = reduction.merge
        steps = None if merge is None else merge.steps(vision)
        encoded = []
        # With thresholds each image keeps a different number of tokens: one image at a time.
        for images in pixel_values.split(1) if isinstance(merge, DToMe) else [pixel_values]:
            output = self.vision(images, steps)
            mappings = [None] * len(images) if output.mapping is None else output.mapping
            image_embeds = self.projector(output.image_features.to(self.dtype))
            for embeds, mapping in zip(image_embeds, mappings, strict=True):
                encoded.append(EncodedImage(embeds, mapping, reduction, output.tokens_per_block))
        return encoded

    def splice(
        self,
        input_ids: Sequence[int],
        images: Sequence[EncodedImage],
        position: int = 0,
        positions: str = "vtu",
    ) -> tuple[Tensor, Layout]:
        """Embed T ids and put the images, in order, in their slots (id -200).

        The first row stands at `position`. `positions` is a name of `layout.PLACEMENTS`. Returns
        the rows (R, C) and their layout. Raises PromptError if there are more or fewer slots than
        images."""
        slots = [row for row, token in enumerate(input_ids) if token == IMAGE_TOKEN_ID]
        if len(slots) != len(images):
            raise PromptError.of_counts(len(slots), len(images))
        pieces, layouts, start = [], [], 0
        # The last round has no image: it embeds the text behind the last slot.
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
        """Copy ids to the device, without waiting for the device."""
        # Only a copy from pinned memory is asynchronous.
        ids = torch.tensor(input_ids, pin_memory=self.device.type == "cuda")
        return ids.to(self.device, non_blocking=True)

    def forward(
        self,
        input_embeds: Sequence[Tensor],
        layouts: Sequence[Layout],
        past_key_values: Sequence[KVCache | None],
        fastv: Sequence[FastV | None] | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, list[KVCache], list[tuple[Pruning, ...]]]:
        """Run a batch: per item its rows (R, C), their layout, its cache (None at prefill), and its
        FastV (None: no pruning).

        Returns the logits of each item's last position (B, V), or of all rows that are left,
        packed; the longer caches; and what each stage has pruned."""
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
        """Run a whole prompt: input_ids (1, T) with -200 for each image of pixel_values
        (B, 3, S, S).

        Returns the logits of the last row (1, 1, V), or of all rows (1, R, V) with `all_logits`;
        the cache; and the position of the next token."""
        images = [] if pixel_values is None else self.encode_image(pixel_values, reduction)
        rows, layout = self.splice(
            input_ids.flatten().tolist(), images, positions=reduction.positions
        )
        logits, caches, _ = self([rows], [layout], [None], [reduction.fastv], all_logits)
        return logits[None], caches[0], layout.next_position

    def decode(
        self, token: Tensor, position: int, past_key_values: KVCache
    ) -> tuple[Tensor, KVCache]:
        """Run one token (one element, any shape) at `position`: logits (1, 1, V), longer cache."""
        input_embeds = self.decoder.embed_tokens(token.to(self.device).reshape(1))  # (1, C)
        layout = Layout.text(1, position, self.device)
        logits, caches, _ = self([input_embeds], [layout], [past_key_values])
        return logits[None], caches[0]
