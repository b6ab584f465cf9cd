"""What became of a prompt's image tokens, and what that cost: for pictures and for teaching."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_lite.attention import KVCache
from llava_lite.config import LlavaConfig
from llava_lite.fastv import Pruning
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction


@dataclass(frozen=True)
class Trace:
    """What became of a prompt's image tokens."""

    tokens_per_block: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        return {"tokens_per_block": [list(counts) for counts in self.tokens_per_block]}


def trace_prompt(
    config: LlavaConfig,
    images: Sequence[EncodedImage],
    reduction: Reduction,
    num_text: int,
    before: KVCache | None,
    after: KVCache,
    pruning: Pruning | None,
) -> Trace:
    """From one prompt's forward: its `images` and `num_text` words, the caches before and after."""
    return Trace(tuple(image.tokens_per_block for image in images))
