"""Tensor parallelism: several GPUs share one decoder (Megatron-LM, arXiv 1909.08053).

Every rank (ranks.py) runs the whole program on its share of the decoder's weights:

    q, k, v, gate, up     rows of the weight: whole heads, and channels of the MLP. With fewer heads
                          of keys and values, a rank holds all queries of its key heads
    o, down               the columns for these heads and channels; the results are summed over
                          ranks. A layer has these two sums and no other.
    lm_head               rows; the logits are gathered
    embed_tokens, norms   whole on every rank: a token reads one row, so cutting saves no time
    tower, projector      whole on every rank; each rank encodes its share of the images of a batch
    KV cache              the heads of the rank

torch's `parallelize_module` decides where each weight is cut. The layers then run on plain tensors
and make the exchange of their place in the plan (`SharedLinear`). A DTensor would do the same, but
takes longer to decide how to multiply than a GPU takes for the product. tests/fast/
test_tensor_parallel.py compares the two.

Outside of these layers, all ranks see the same rows, logits and tokens. FastV's scores are averaged
over the heads of all ranks (`ParallelDecoder`). Pixels and sampled tokens come from the first rank.
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

from llava_lite.cache import KVCache, LayerCache
from llava_lite.config import LlavaConfig, TextConfig
from llava_lite.fast.ranks import Ranks
from llava_lite.fastv import Pruning
from llava_lite.generation.answer import Score
from llava_lite.generation.chat import Chat
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import GenerationOptions, Options, with_size
from llava_lite.generation.state import Request, Row
from llava_lite.layout import Layout
from llava_lite.llama import LlamaDecoder, Pruned
from llava_lite.llava import EncodedImage, Llava
from llava_lite.reduction import NO_REDUCTION, FastV, Reduction


def decoder_plan() -> dict[str, ParallelStyle]:
    """How each linear layer of the decoder is cut, by name; `*` stands for every layer."""
    by_rows = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    by_columns = ("attn.o_proj", "mlp.down_proj")
    return {
        **{f"layers.*.{name}": ColwiseParallel() for name in by_rows},
        **{f"layers.*.{name}": RowwiseParallel() for name in by_columns},
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


class SharedLinear(nn.Module):
    """A linear layer. This rank holds rows (dim 0) or columns (dim 1) of the weight (out, in).

    Rows compute a part of the outputs: x (R, in) -> (R, out / ranks), or (R, out) if `gathered`
    names out; they may have a bias (out / ranks,). Columns take a part of the inputs: x
    (R, in / ranks) -> (R, out), a sum over ranks."""

    def __init__(
        self,
        ranks: Ranks,
        weight: Tensor,
        dim: int,
        gathered: int | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ranks, self.dim, self.gathered = ranks, dim, gathered
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.dim == 1:
            return self.ranks.sum(y)
        return y if self.gathered is None else self.ranks.concatenate(y, self.gathered)


# ---- the model -----------------------------------------------------------------------------------


class ParallelDecoder(LlamaDecoder):
    """The decoder of one rank, which holds some of the heads."""

    def __init__(self, ranks: Ranks, config: TextConfig) -> None:
        super().__init__(config)
        self.ranks = ranks

    def fastv_scores(self, query: Tensor, cache: LayerCache, layout: Layout, score: str) -> Tensor:
        """As `LlamaDecoder.fastv_scores`, over the heads of all ranks."""
        return self.ranks.mean(super().fastv_scores(query, cache, layout, score))

    def prune(
        self,
        layer_idx: int,
        x: Tensor,
        layouts: Sequence[Layout],
        prunings: Sequence[tuple[Pruning, ...]],
        queries: Sequence[Tensor],
        caches: Sequence[LayerCache],
        fastv: Sequence[FastV | None],
    ) -> Pruned:
        """As `LlamaDecoder.prune`, with the same hidden states on all ranks."""
        pruned = super().prune(layer_idx, x, layouts, prunings, queries, caches, fastv)
        rows, kept_layouts, stages = pruned
        # Folding sums hidden states, on a GPU in any order. The next stage folds by their last bit.
        if any(wish is not None and wish.rest == "fold" for wish in fastv):
            rows = self.ranks.mean(rows)
        return rows, kept_layouts, stages


class ParallelLlava(Llava):
    """One rank's share of a model. Each rank encodes some images, and all ranks get all of them."""

    def __init__(self, ranks: Ranks, config: LlavaConfig) -> None:
        super().__init__(config)
        self.ranks = ranks
        self.decoder = ParallelDecoder(ranks, config.text)

    def encode_image(
        self, pixel_values: Tensor, reduction: Reduction = NO_REDUCTION
    ) -> list[EncodedImage]:
        """As `Llava.encode_image`."""
        # One rank encodes an image, not all: two ranks could round, and so merge, differently.
        own = pixel_values.tensor_split(self.ranks.count)[self.ranks.index]

        def encode() -> list[EncodedImage]:
            encoded = super(ParallelLlava, self).encode_image(own, reduction) if len(own) else []
            return [move(image, torch.device("cpu")) for image in encoded]

        shares = self.ranks.gather(encode)
        return [move(image, self.device) for share in shares for image in share]


def move(image: EncodedImage, device: torch.device) -> EncodedImage:
    """Copy an encoded image to a device."""
    mapping = None if image.mapping is None else image.mapping.to(device)
    return replace(image, image_embeds=image.image_embeds.to(device), mapping=mapping)


class ParallelModel(Model):
    """A model on several ranks, which all make the same calls and get the same answers.

    The first rank reads images and samples tokens; the other ranks may pass any image, except an
    encoded one. An error in the call of one rank raises on all ranks. Different prompts or options
    raise RankError on all ranks. `decode`, a single step, compares nothing. A rank that fails alone
    inside the decoder must exit: the other ranks then raise RankError."""

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

    def encode(
        self, image: Any, reduction: Reduction | str | None = None, image_size: int | None = None
    ) -> EncodedImage:
        with self.ranks.together():
            self.reduction_for([image], with_size(reduction, image_size))
        return super().encode(image, reduction, image_size)

    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        reduction: Reduction | str | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, KVCache, int]:
        """As `Model.prefill`. Raises RankError if ranks differ in their call."""
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
        """As `Model.run`. Raises RankError if ranks differ in their call."""
        with self.ranks.together():
            requests = list(requests)
        asked = [make_key(request) for request in requests]
        self.ranks.require_same("the prompts or options", (asked, options, batch_size))
        yield from super().run(requests, options, batch_size)

    def score_requests(
        self, requests: Sequence[Request], targets: Sequence[tuple[int, ...]], batch_size: int
    ) -> list[Score]:
        """As `Model.score_requests`. Raises RankError if ranks differ in their call."""
        asked = [make_key(request) for request in requests]
        self.ranks.require_same("the prompts or continuations", (asked, targets, batch_size))
        return super().score_requests(requests, targets, batch_size)

    def encode_images(
        self, wanted: Sequence[tuple[Any, Reduction]], batch_size: int
    ) -> tuple[list[EncodedImage], dict[str, float]]:
        """As `Model.encode_images`. Raises RankError if ranks differ in their call."""
        kinds = [(isinstance(image, EncodedImage), reduction) for image, reduction in wanted]
        self.ranks.require_same("the images or their reductions", (kinds, batch_size))
        return super().encode_images(wanted, batch_size)

    def prepare(self, image: Any, reduction: Reduction = NO_REDUCTION) -> Tensor:
        """Read the image on the first rank."""
        return self.ranks.from_first(lambda: super(ParallelModel, self).prepare(image, reduction))

    def next_tokens(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """Sample the tokens on the first rank."""
        return self.ranks.from_first(lambda: super(ParallelModel, self).next_tokens(logits, rows))


class ParallelChat(Chat):
    """A chat on several ranks."""

    model: ParallelModel

    def request(self, text: str, image: Any) -> Request:
        with self.model.ranks.together():
            return super().request(text, image)


def make_key(request: Request) -> tuple[Any, ...]:
    """The parts of a request that must be the same on all ranks."""
    state, images = request.state, len(request.images)
    wishes = state.reduction, request.max_new_tokens, request.prefix
    return state.pending_ids, state.next_position, images, wishes
