"""The cases that `llava-lite bench` times: every part of a model, with its operations and bytes.

Parts, in the order of a round:

    tower               pixels to image features
    prefill             all rows of the prompt, image encoded before, to the first logits
    first token         pixels to the first token, as `generate` does from its second call on, with
                        the words before the image cached (prefix.py); "cold": as in its first call
    decode              one token after the prompt
    batch               one token after each of several prompts
    growing prefill, growing decode, growing attention
                        by length, without an image: a prompt, a token after it, and the attention
                        in one of its layers

Our cache grows in steps (cache.py). The first token is not timed and makes room for at least 64
more, so no timed token copies the cache. transformers copies its cache for every token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_lite.bench.machine import Prepared, Run
from llava_lite.bench.transformers_peer import Peer
from llava_lite.cache import KVCache, attend
from llava_lite.config import IMAGE_TOKEN_ID, LlavaConfig, TextConfig
from llava_lite.errors import CheckpointError
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import sample
from llava_lite.generation.state import NO_TOKENS, Request, State
from llava_lite.generation.trace import Trace, decoder_flops, kv_bytes, tower_flops, trace_prompt
from llava_lite.llava import Llava
from llava_lite.reduction import REDUCTIONS, Reduction

OURS, TRANSFORMERS = "llava_lite", "transformers"
WORDS_BEFORE, WORDS_AFTER = 35, 29
SHARED_WORDS = WORDS_BEFORE - 1  # the last word may merge with what follows it
DECODED = 8  # tokens per timing
ATTENTION_CALLS = 4  # per timing
BATCHED = COLD = ("none", "hybrid-72-36")  # reductions

PARTS = (
    *("tower", "prefill", "first token", "first token, cold", "decode", "batch"),
    *("growing prefill", "growing decode", "growing attention"),
)


@dataclass(frozen=True)
class Case:
    """A run to time. `run` makes `steps` steps; tokens, operations and bytes read are per step
    (0: not counted)."""

    contender: str
    part: str
    setting: str
    run: Run
    steps: int = 1
    tokens: int = 0
    flops: int = 0
    bytes: int = 0
    image_tokens: int | None = None
    kv_bytes: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.contender, self.part, self.setting


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all weights, plain or quantized."""
    tensors: dict[int, Tensor] = {}
    for part in module.modules():
        found = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        found += [value for value in vars(part).values() if isinstance(value, Tensor)]
        tensors |= {id(tensor): tensor for tensor in found}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(frozen=True)
class Work:
    """The cost of a pass through a model: bytes of the decoder's and the tower's weights, and
    operations, two per multiply-add (trace.py counts them)."""

    config: LlavaConfig
    dtype: torch.dtype
    decoder_bytes: int
    tower_bytes: int

    @staticmethod
    def of(llava: Llava) -> "Work":
        """The work of a model, plain or quantized."""
        embeddings = llava.decoder.embed_tokens.weight.nbytes  # only one or two rows are read
        read = stored_bytes(llava.decoder) - embeddings
        return Work(llava.config, llava.dtype, read, stored_bytes(llava.vision))

    def tower(self, block_flops: int) -> int:
        """Operations of the tower: the patch embedding and `block_flops` multiply-adds."""
        vision = self.config.vision
        patches = vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
        return 2 * (patches + block_flops)

    def prefill(self, layer_flops: int) -> int:
        """Operations of a prompt: `layer_flops` multiply-adds and one row of logits."""
        return 2 * (layer_flops + self.config.text.hidden_size * self.config.text.vocab_size)

    def decode(self, lengths: Sequence[int]) -> int:
        """Operations of one token after caches of these lengths, one per layer."""
        one = [1] * len(lengths)
        return self.prefill(decoder_flops(self.config.text, one, one, lengths))

    def cache(self, lengths: Sequence[int]) -> int:
        """Bytes of caches of these lengths, halfway through the timed tokens."""
        halfway = [length + 1 + DECODED // 2 for length in lengths]
        return kv_bytes(self.config.text, halfway, self.dtype.itemsize)


@dataclass(frozen=True)
class Contender:
    """One of our models, or transformers."""

    name: str
    model: Model | Peer
    work: Work


def prompt_ids(config: LlavaConfig) -> tuple[int, ...]:
    """Some words, with the image between them."""
    words = word_ids(config.text, WORDS_BEFORE + WORDS_AFTER)
    return (*words[:WORDS_BEFORE], IMAGE_TOKEN_ID, *words[WORDS_BEFORE:])


def word_ids(text: TextConfig, count: int) -> tuple[int, ...]:
    """Some words. The last id is left out: it marks images in transformers."""
    return tuple(3 + n % (text.vocab_size - 4) for n in range(count))


def random_pixels(work: Work, device: torch.device) -> Tensor:
    """The same image for every contender, (1, 3, S, S)."""
    size = work.config.vision.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return pixels.to(device, work.dtype)


# ---- this package ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """A prompt that was run once: the state before the decoder, its trace, the cache's length per
    layer, the next position, and the logits (1, V)."""

    state: State
    trace: Trace
    lengths: tuple[int, ...]
    position: int
    logits: Tensor


def walk_all(model: Model, names: Sequence[str]) -> tuple[dict[str, Walk], dict[str, str]]:
    """A walk without reduction and one for each named reduction; the reasons for missing ones."""
    walks, skipped = {}, {}
    for name in dict.fromkeys(("none", *names)):
        try:
            reduction = model.check_reduction(REDUCTIONS[name])
        except (CheckpointError, ValueError) as error:
            skipped[name] = str(error)
        else:
            walks[name] = walk(model, reduction)
    return walks, skipped


def walk(model: Model, reduction: Reduction) -> Walk:
    """Run one prompt."""
    config = model.llava.config
    pixels = random_pixels(Work.of(model.llava), model.llava.device)
    [image] = model.llava.encode_image(pixels, reduction)
    state = State(pending_ids=prompt_ids(config), images=(image,), reduction=reduction)
    logits, [after] = model.advance([state])
    cache = after.past_key_values
    assert cache is not None
    words = WORDS_BEFORE + WORDS_AFTER
    trace = trace_prompt(config, [image], reduction, words, 0, None, cache, after.pruning)
    lengths = tuple(k.shape[2] for k, _ in cache)
    return Walk(state, trace, lengths, after.next_position, logits)


def our_cases(
    one: Contender,
    model: Model,
    walks: Mapping[str, Walk],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
) -> list[Case]:
    """All cases of one of our models: one prompt with every reduction, batches, and prompts without
    an image of all `lengths` that the model's context allows."""
    cases = []
    for setting, walked in walks.items():
        cases += prompt_cases(one, model, setting, walked)
        if setting in BATCHED:
            cases += batch_cases(one, model, setting, walked, batch_sizes)
    for length in lengths:
        if length <= model.config.text.max_positions:
            cases += growing_cases(one, model, length)
    return cases


def prompt_cases(one: Contender, model: Model, setting: str, walked: Walk) -> list[Case]:
    """One prompt with one reduction: prefill, first token, decode, and the tower."""
    work, trace, reduction = one.work, walked.trace, walked.state.reduction
    merge = reduction.merge
    steps = merge.steps(model.config.vision) if merge else None
    pixels = random_pixels(work, model.llava.device)
    tokens = len(walked.state.images[0].image_embeds)
    case = partial(Case, one.name, setting=setting, image_tokens=tokens)
    flops = work.prefill(trace.decoder_flops["gated"].total)
    first = partial(first_token, model, pixels, reduction)

    def first_call() -> Callable[[], Any]:
        model.prefix.clear()
        return first

    cases = [
        case(
            "prefill",
            run=partial(model.advance, [walked.state]),
            tokens=walked.lengths[0],
            flops=flops,
            bytes=work.decoder_bytes,
            kv_bytes=trace.kv_bytes,
        ),
        case("first token", run=first),
        case(
            "decode",
            run=decoding(model, walked, 1),
            steps=DECODED,
            tokens=1,
            flops=work.decode(walked.lengths),
            bytes=work.decoder_bytes + work.cache(walked.lengths),
            kv_bytes=trace.kv_bytes,
        ),
    ]
    if setting in COLD:
        cases.append(case("first token, cold", run=Prepared(first_call)))
    if one.name == OURS and reduction.fastv is None and reduction.positions == "vtu":
        run = partial(model.llava.vision, pixels, steps)
        flops = work.tower(trace.tower_flops.total)
        cases.append(case("tower", run=run, flops=flops, bytes=work.tower_bytes))
    return cases


def batch_cases(
    one: Contender, model: Model, setting: str, walked: Walk, sizes: Sequence[int]
) -> list[Case]:
    """One token after each of several prompts, by number of prompts."""
    cache = one.work.cache(walked.lengths)
    return [
        Case(
            one.name,
            "batch",
            f"{setting} x {size}",
            decoding(model, walked, size),
            steps=DECODED,
            tokens=size,
            flops=size * one.work.decode(walked.lengths),
            bytes=one.work.decoder_bytes + size * cache,
            kv_bytes=size * walked.trace.kv_bytes,
        )
        for size in sizes
    ]


def growing_cases(one: Contender, model: Model, length: int) -> list[Case]:
    """A prompt of `length` words, a token after it, and the attention in one layer."""
    work, text = one.work, model.config.text
    lengths = (length,) * text.num_layers
    state = State(pending_ids=word_ids(text, length))
    shape = 1, length, text.num_heads, text.head_dim
    rows = torch.randn(3, *shape, device=model.llava.device, dtype=work.dtype).transpose(2, 3)
    attention = partial(attend, rows[0], rows[1], rows[2], None)
    case = partial(Case, one.name, setting=str(length))
    layer_flops = decoder_flops(text, lengths, lengths)
    return [
        case(
            "growing prefill",
            run=partial(model.advance, [state]),
            tokens=length,
            flops=work.prefill(layer_flops),
            bytes=work.decoder_bytes,
        ),
        case(
            "growing decode",
            run=Prepared(partial(begin_decoding, model, state, lengths, length, 1)),
            steps=DECODED,
            tokens=1,
            flops=work.decode(lengths),
            bytes=work.decoder_bytes + work.cache(lengths),
        ),
        case(
            "growing attention",
            run=partial(call_repeatedly, attention),
            steps=ATTENTION_CALLS,
            tokens=length,
        ),
    ]


def call_repeatedly(call: Callable[[], Any]) -> None:
    for _ in range(ATTENTION_CALLS):
        call()


def first_token(model: Model, pixels: Tensor, reduction: Reduction) -> list[State]:
    """From pixels to the first token, as in `generate`. The first call computes the cache of the
    words before the image in a separate pass; later calls reuse it."""
    ids = prompt_ids(model.llava.config)
    images = tuple(model.llava.encode_image(pixels, reduction))
    asked = State(pending_ids=ids, reduction=reduction)
    state = model.apply_prefix(Request(asked, (), NO_TOKENS, 1, ids[:SHARED_WORDS]))
    logits, states = model.advance([replace(state, images=images)])
    return take_tokens(model, logits, states)


def take_tokens(model: Model, logits: Tensor, states: Sequence[State]) -> list[State]:
    """The states with each item's most likely token pending."""
    tokens = sample(logits, num_text_ids=model.config.text.sampled_vocab_size).tolist()
    return [
        replace(state, pending_ids=(token,)) for state, token in zip(states, tokens, strict=True)
    ]


def decode(model: Model, states: Sequence[State], steps: int) -> list[State]:
    """Decode `steps` tokens of every item."""
    states = list(states)
    for _ in range(steps):
        states = take_tokens(model, *model.advance(states))
    return states


def decoding(model: Model, walked: Walk, size: int) -> Prepared:
    """A run that decodes after `size` copies of the prompt."""
    state, lengths, position = walked.state, walked.lengths, walked.position
    return Prepared(partial(begin_decoding, model, state, lengths, position, size))


def begin_decoding(
    model: Model, before: State, lengths: Sequence[int], position: int, size: int
) -> Callable[[], Any]:
    """Decode one token, which gives every cache room to grow, and return the call to time. The
    cache holds zeros: its values do not matter for speed."""
    text = model.config.text
    zeros = partial(torch.zeros, device=model.llava.device, dtype=model.llava.dtype)
    shapes = [(1, text.num_heads, length, text.head_dim) for length in lengths]
    cache: KVCache = tuple((zeros(shape), zeros(shape)) for shape in shapes)
    state = replace(
        before, past_key_values=cache, next_position=position, pending_ids=(5,), images=()
    )
    return partial(decode, model, decode(model, [state] * size, 1), DECODED)


# ---- transformers ------------------------------------------------------------------------------


def peer_cases(peer: Peer, work: Work) -> tuple[list[Case], Tensor]:
    """The cases of transformers, without a reduction, and its logits (1, V)."""
    text, vision = work.config.text, work.config.vision
    ids = peer.expand(prompt_ids(work.config))
    pixels = random_pixels(work, peer.device)
    logits, cache = peer.first_token(ids, pixels)
    length = ids.shape[1]
    lengths = (length,) * text.num_layers
    blocks = vision.num_layers / vision.num_blocks  # transformers runs all layers
    embeds = torch.randn(1, length, text.hidden_size, device=peer.device, dtype=work.dtype)
    case = partial(Case, TRANSFORMERS, setting="none", image_tokens=vision.num_patches)
    cases = [
        case(
            "tower",
            run=partial(peer.tower, pixels),
            flops=work.tower(tower_flops(vision, [vision.num_patches] * vision.num_layers)),
            bytes=int(blocks * work.tower_bytes),
        ),
        case(
            "prefill",
            run=partial(peer.prefill, embeds),
            tokens=length,
            flops=work.prefill(decoder_flops(text, lengths, lengths)),
            bytes=work.decoder_bytes,
        ),
        case("first token", run=partial(peer.first_token, ids, pixels)),
        case(
            "decode",
            run=Prepared(partial(peer.begin_decoding, cache, length, DECODED)),
            steps=DECODED,
            tokens=1,
            flops=work.decode(lengths),
            bytes=work.decoder_bytes + work.cache(lengths),
        ),
    ]
    return cases, logits
