"""LLaVA-1.5 (arXiv 2310.03744) in one page: look, project, splice, decode.

    pixel_values   one image, 336 px                                            (1, 3, 336, 336)
    vision         24 x 24 = 576 patches + class token, 23 blocks, token dropped  (1, 576, 1024)
    projector      image features become image embeds                             (1, 576, 4096)
    splice         the image slot (-200) among T prompt ids gives way to 576 rows     (N, 4096)
    decoder        32 layers; the last row's logits choose the first token        (1, 1, 32000)

Then one token at a time over the tuple cache ((k, v), ...), each (1, H, length, D) per layer.

A batch is a list of items. `forward` runs any number of them, of any lengths, with or without a
cache; `prefill` and `decode` are its two uses for a single item.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llava_lite.attention import KVCache
from llava_lite.config import LlavaConfig
from llava_lite.errors import PromptError
from llava_lite.llama import LlamaDecoder
from llava_lite.projector import Projector
from llava_lite.vision import VisionTower

IMAGE_TOKEN_ID = -200


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

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, S, S) -> image_embeds (B, P, C), to stand among words."""
        return self.projector(self.vision(pixel_values.to(self.device, self.dtype)))

    def splice(self, input_ids: Sequence[int], image_embeds: Sequence[Tensor]) -> Tensor:
        """Embed T ids and put the image_embeds (P, C) in their slots (id -200), in order -> (N, C).

        Raises PromptError when slots and images differ in number."""
        slots = [row for row, token in enumerate(input_ids) if token == IMAGE_TOKEN_ID]
        if len(slots) != len(image_embeds):
            raise PromptError.of_counts(len(slots), len(image_embeds))
        pieces, start = [], 0
        for slot, image in zip([*slots, len(input_ids)], [*image_embeds, None], strict=True):
            if start < slot:
                token_ids = torch.tensor(input_ids[start:slot], device=self.device)
                pieces.append(self.decoder.embed_tokens(token_ids))
            if image is not None:
                pieces.append(image.to(self.device, self.dtype))
            start = slot + 1
        return torch.cat(pieces)

    def forward(
        self,
        input_embeds: Sequence[Tensor],
        positions: Sequence[int],
        past_key_values: Sequence[KVCache | None],
        all_logits: bool = False,
    ) -> tuple[Tensor, list[KVCache]]:
        """Run a batch: per item its rows (n, C), the position of its first row, and its cache (None
        at prefill). Returns the logits of each item's last row (B, V), or of all packed rows
        (R, V), and the grown caches."""
        lengths = [len(rows) for rows in input_embeds]
        position_ids = torch.cat(
            [
                torch.arange(p, p + n, device=self.device)
                for p, n in zip(positions, lengths, strict=True)
            ]
        )
        x, caches = self.decoder(
            torch.cat(list(input_embeds)), position_ids, lengths, past_key_values
        )
        if not all_logits:
            x = x[torch.tensor(lengths).cumsum(0) - 1]  # (B, C)
        return self.decoder.lm_head(x), caches

    def prefill(
        self, input_ids: Tensor, pixel_values: Tensor | None, all_logits: bool = False
    ) -> tuple[Tensor, KVCache, int]:
        """The whole prompt at once: input_ids (1, T) with -200 for each image of pixel_values
        (images, 3, S, S). Returns logits (1, 1, V), or (1, N, V) with `all_logits`, the cache, and
        the position of the next token."""
        images = [] if pixel_values is None else list(self.encode_image(pixel_values))
        input_embeds = self.splice(input_ids.flatten().tolist(), images)  # (N, C)
        logits, caches = self([input_embeds], [0], [None], all_logits)
        return logits[None], caches[0], len(input_embeds)

    def decode(
        self, token: Tensor, position: int, past_key_values: KVCache
    ) -> tuple[Tensor, KVCache]:
        """One token (one element, any shape) at `position` -> logits (1, 1, V), the grown cache."""
        input_embeds = self.decoder.embed_tokens(token.to(self.device).reshape(1))  # (1, C)
        logits, caches = self([input_embeds], [position], [past_key_values])
        return logits[None], caches[0]
