"""A decoder that does not fit one GPU, spread over several (Megatron-LM, arXiv 1909.08053).

Every rank (ranks.py) runs the whole program on its share of the decoder's weights:

    q, k, v, gate, up     rows of the weight: whole heads, and channels of the MLP
    o, down               the columns that take these in; the ranks' results are added up, which
                          are the only two sums in a layer
    lm_head               rows, the logits are gathered: a decoded token reads all of this weight
    embed_tokens, norms   whole, on every rank: a token reads one row, which would not be worth
                          a sum of its own
    tower, projector      whole, on every rank, 0.6 GB of the 7B model's 14 in 16 bit: nothing in
                          them has to wait for others then, and each rank looks at its share of the
                          images of a batch
    KV cache              the heads of the rank

The plan is torch's own, `parallelize_module` over DTensors: it says where each weight is cut. That
is all it does here. To find out how to multiply, a DTensor takes longer than a GPU does for the
product, 225 times for every token, so layers run on plain tensors and do the one exchange that
their place in the plan needs (`SharedLinear`). `tests/test_tensor_parallel.py` compares the two.

Above these layers nothing is spread: all ranks see the same rows, logits and tokens. FastV ranks
image tokens by the attention of all heads, so the scores are averaged over ranks before any choice
(`ParallelDecoder.fastv_scores`). What could differ between ranks comes from the first one: pixels,
sampled tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
)
from torch.nn import functional as F

from llava_lite.cache import KVCache
from llava_lite.config import LlavaConfig, TextConfig
from llava_lite.fast.ranks import Ranks
from llava_lite.generation.answer import Score
from llava_lite.generation.chat import Chat
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions, Options
from llava_lite.generation.state import Request, Row
from llava_lite.layout import Layout
from llava_lite.llama import LlamaDecoder
from llava_lite.llava import EncodedImage, Llava
from llava_lite.reduction import NO_REDUCTION, Reduction


def decoder_plan() -> dict[str, ParallelStyle]:
    """How each linear layer of the decoder is spread, by name; `*` stands for every layer."""
    by_rows = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    by_columns = ("attn.o_proj", "mlp.down_proj")
    return {
        **{f"layers.*.{name}": ColwiseParallel() for name in by_rows},
        **{f"layers.*.{name}": RowwiseParallel() for name in by_columns},
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


class SharedLinear(nn.Module):
    """A linear layer without a bias, of whose weight (out, in) this rank has some rows (dim 0) or
    columns (dim 1).

    Rows give some of the outputs, x (R, in) -> (R, out / ranks), which are left so for the next
    layer, or gathered where `gathered` says how many there are. Columns take some of the inputs,
    (R, in / ranks) -> (R, out), summed over ranks."""

    def __init__(self, ranks: Ranks, weight: Tensor, dim: int, gathered: int | None = None) -> None:
        super().__init__()
        self.ranks, self.dim, self.gathered = ranks, dim, gathered
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.dim == 1:
            return self.ranks.sum(y)
        return y if self.gathered is None else self.ranks.concatenated(y, self.gathered)


# ---- the model -----------------------------------------------------------------------------------


class ParallelDecoder(LlamaDecoder):
    """The decoder of one rank, which holds some of the heads."""

    def __init__(self, ranks: Ranks, config: TextConfig) -> None:
        super().__init__(config)
        self.ranks = ranks

    def fastv_scores(self, query: Tensor, keys: Tensor, layout: Layout, score: str) -> Tensor:
        """As `LlamaDecoder.fastv_scores`, over the heads of all ranks."""
        return self.ranks.mean(super().fastv_scores(query, keys, layout, score))


class ParallelLlava(Llava):
    """The same model; each rank looks at its share of the images, and all get what all saw."""

    def __init__(self, ranks: Ranks, config: LlavaConfig) -> None:
        super().__init__(config)
        self.ranks = ranks
        self.decoder = ParallelDecoder(ranks, config.text)

    def encode_image(
        self, pixel_values: Tensor, reduction: Reduction = NO_REDUCTION
    ) -> list[EncodedImage]:
        """As `Llava.encode_image`. Every image is looked at once: where two ranks rounded
        differently, they would merge differently."""
        own = pixel_values.tensor_split(self.ranks.count)[self.ranks.index]

        def look() -> list[EncodedImage]:
            encoded = super(ParallelLlava, self).encode_image(own, reduction) if len(own) else []
            return [moved(image, torch.device("cpu")) for image in encoded]

        shares = self.ranks.gather(look)
        return [moved(image, self.device) for share in shares for image in share]


def moved(image: EncodedImage, device: torch.device) -> EncodedImage:
    """The image on another device."""
    mapping = None if image.mapping is None else image.mapping.to(device)
    return replace(image, image_embeds=image.image_embeds.to(device), mapping=mapping)


class ParallelModel(Model):
    """The same model on several ranks, which all make the same calls and get the same answers.

    Images are read, and tokens sampled, on the first rank; what the others are given as an image
    may be anything but an encoded one. What one rank finds wrong with its call, or with an image,
    raises on all ranks, as does a call whose prompts or options differ from rank to rank
    (RankError); `decode` alone, a single step, compares nothing. A rank that fails alone, in the
    middle of the decoder, has to end: the others then raise RankError."""

    llava: ParallelLlava

    @property
    def ranks(self) -> Ranks:
        return self.llava.ranks

    # Every check of arguments runs on all ranks: an error on one rank raises on all.

    def read_call(
        self,
        image: Any,
        prompt: str | Sequence[str],
        options: Options,
        batch_size: int | None = None,
        single: bool = False,
    ) -> tuple[list[Request], GenerationOptions, int]:
        with self.ranks.together():
            return super().read_call(image, prompt, options, batch_size, single)

    def read_scores(self, *call: Any) -> tuple[list[Request], list[tuple[int, ...]], int]:
        with self.ranks.together():
            return super().read_scores(*call)

    def chat(self, image: Any = None, **options: Any) -> Chat:
        with self.ranks.together():
            return ParallelChat(self, image, GenerationOptions(**options))

    def encode(self, image: Any, reduction: Reduction | str | None = None) -> EncodedImage:
        with self.ranks.together():
            self.reduction_for([image], reduction)
        return super().encode(image, reduction)

    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        reduction: Reduction | str | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, KVCache, int]:
        """As `Model.prefill`, once all ranks agree on what to run."""
        images = None if pixel_values is None else tuple(pixel_values.shape)
        asked = input_ids.tolist(), images, reduction, all_logits
        self.ranks.require_same("the prompts or options", asked)
        return super().prefill(input_ids, pixel_values, reduction, all_logits)

    def run(
        self,
        requests: Iterable[Request],
        options: GenerationOptions,
        batch_size: int | None = None,
    ) -> Iterator[tuple[int, Row]]:
        """As `Model.run`, once all ranks agree on what to run."""
        with self.ranks.together():
            requests = list(requests)
        asked = [described(request) for request in requests]
        self.ranks.require_same("the prompts or options", (asked, options, batch_size))
        yield from super().run(requests, options, batch_size)

    def score_requests(
        self, requests: Sequence[Request], targets: Sequence[tuple[int, ...]], batch_size: int
    ) -> list[Score]:
        """As `Model.score_requests`, once all ranks agree on what to score."""
        asked = [described(request) for request in requests]
        self.ranks.require_same("the prompts or continuations", (asked, targets, batch_size))
        return super().score_requests(requests, targets, batch_size)

    def encode_images(
        self, wanted: Sequence[tuple[Any, Reduction]], batch_size: int
    ) -> tuple[list[EncodedImage], dict[str, float]]:
        """As `Model.encode_images`, once all ranks agree on which of them are encoded already."""
        kinds = [(isinstance(image, EncodedImage), reduction) for image, reduction in wanted]
        self.ranks.require_same("the images or their reductions", (kinds, batch_size))
        return super().encode_images(wanted, batch_size)

    def prepare(self, image: Any) -> Tensor:
        """The pixel values that the first rank reads."""
        return self.ranks.from_first(lambda: super(ParallelModel, self).prepare(image))

    def next_tokens(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """The tokens that the first rank samples."""
        return self.ranks.from_first(lambda: super(ParallelModel, self).next_tokens(logits, rows))


class ParallelChat(Chat):
    """A chat on several ranks."""

    model: ParallelModel

    def request(self, text: str, image: Any) -> Request:
        with self.model.ranks.together():
            return super().request(text, image)


def described(request: Request) -> tuple[Any, ...]:
    """What of a request must be the same on all ranks."""
    state, images = request.state, len(request.images)
    wishes = state.reduction, request.max_new_tokens, request.prefix
    return state.pending_ids, state.next_position, images, wishes
