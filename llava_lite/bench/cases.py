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

from llava_lite.bench.machine import Case, Prepared
from llava_lite.cache import KVCache, attend
from llava_lite.config import IMAGE_TOKEN_ID, FastViTHDConfig, LlavaConfig, TextConfig, VisionConfig
from llava_lite.errors import CheckpointError
from llava_lite.generation.model import Model
from llava_lite.generation.sampling import sample
from llava_lite.generation.state import NO_TOKENS, Request, State
from llava_lite.generation.trace import (
    Trace,
    decoder_flops,
    fastvithd_flops,
    kv_bytes,
    tower_flops,
    trace_prompt,
)
from llava_lite.llava import Llava
from llava_lite.reduction import REDUCTIONS, Reduction

OURS, TRANSFORMERS = "llava_lite", "transformers"
LLAMACPP = "llama.cpp"  # a contender is named with its format: "llama.cpp q4_k"
WORDS_BEFORE, WORDS_AFTER = 35, 29
SHARED_WORDS = WORDS_BEFORE - 1  # the last word may merge with what follows it
DECODED = 8  # tokens per timing
ATTENTION_CALLS = 4  # per timing
BATCHED = COLD = ("none", "hybrid-72-36")  # reductions
Costs = dict[str, Any]

PARTS = (
    *("tower", "prefill", "first token", "first token, cold", "decode", "batch"),
    *("growing prefill", "growing decode", "growing attention"),
)


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
    """The costs of each part of a model, as fields of a `Case`: bytes of weights and caches, and
    operations, two per multiply-add (trace.py counts them)."""

    config: LlavaConfig
    dtype: torch.dtype
    cache_dtype: torch.dtype
    decoder_bytes: int
    tower_bytes: int

    @staticmethod
    def of(llava: Llava) -> "Work":
        """The work of a model, plain or quantized."""
        embeddings = llava.decoder.embed_tokens.weight.nbytes  # only one or two rows are read
        if getattr(llava.decoder.lm_head, "weight", None) is llava.decoder.embed_tokens.weight:
            embeddings = 0  # the tied head reads all rows
        read = stored_bytes(llava.decoder) - embeddings
        tower = stored_bytes(llava.vision)
        return Work(llava.config, llava.dtype, llava.cache_dtype, read, tower)

    def tower(self, tokens_per_block: Sequence[int]) -> Costs:
        """The tower, with so many tokens after each of its blocks."""
        vision = self.config.vision
        if isinstance(vision, FastViTHDConfig):  # tokens merge after this tower
            return {"flops": 2 * fastvithd_flops(vision, vision.grid), "bytes": self.tower_bytes}
        patches = vision.num_patches * 3 * vision.patch_size**2 * vision.hidden_size
        share = len(tokens_per_block) / vision.num_blocks  # transformers runs one more
        flops = 2 * (patches + tower_flops(vision, tokens_per_block))
        return {"flops": flops, "bytes": int(share * self.tower_bytes)}

    def prefill(self, tokens: int, layer_flops: int) -> Costs:
        """A prompt: `layer_flops` multiply-adds, and one row of logits."""
        logits = self.config.text.hidden_size * self.config.text.vocab_size
        flops = 2 * (layer_flops + logits)
        return {"tokens": tokens, "flops": flops, "bytes": self.decoder_bytes}

    def decode(self, lengths: Sequence[int], size: int = 1) -> Costs:
        """One token after each of `size` caches of these lengths, one per layer."""
        text, one = self.config.text, [1] * len(lengths)
        flops = self.prefill(1, decoder_flops(text, one, one, lengths))["flops"]
        halfway = [length + 1 + DECODED // 2 for length in lengths]
        read = self.decoder_bytes + size * kv_bytes(text, halfway, self.cache_dtype.itemsize)
        return {"steps": DECODED, "tokens": size, "flops": size * flops, "bytes": read}


@dataclass(frozen=True)
class Contender:
    """One of our models (`Model`), transformers (`Peer`), or llama.cpp (`LlamaCpp`)."""

    name: str
    model: Any
    work: Work


def prompt_ids(config: LlavaConfig) -> tuple[int, ...]:
    """Some words, with the image between them."""
    words = word_ids(config.text, WORDS_BEFORE + WORDS_AFTER)
    return (*words[:WORDS_BEFORE], IMAGE_TOKEN_ID, *words[WORDS_BEFORE:])


def count_positions(config: LlavaConfig) -> int:
    """Positions of that prompt, with one token for every patch."""
    return WORDS_BEFORE + config.vision.num_patches + WORDS_AFTER


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
    trace = trace_prompt(config, [image], reduction, words, 0, None, cache, after.prunings)
    lengths = tuple(k.shape[2] for k, _ in cache)
    return Walk(state, trace, lengths, after.next_position, logits)


def our_cases(
    one: Contender, walks: Mapping[str, Walk], batch_sizes: Sequence[int], lengths: Sequence[int]
) -> list[Case]:
    """All cases of one of our models: one prompt with every reduction, batches, and prompts without
    an image of all `lengths` that the model's context allows."""
    cases = []
    for setting, walked in walks.items():
        cases += prompt_cases(one, setting, walked)
        if setting in BATCHED:
            cases += [batch_case(one, setting, walked, size) for size in batch_sizes]
    for length in lengths:
        if length <= one.work.config.text.max_positions:
            cases += growing_cases(one, length)
    return cases


def prompt_cases(one: Contender, setting: str, walked: Walk) -> list[Case]:
    """One prompt with one reduction: prefill, first token, decode, and the tower."""
    model, work, trace, reduction = one.model, one.work, walked.trace, walked.state.reduction
    [image] = walked.state.images
    pixels = random_pixels(work, model.llava.device)
    case = partial(Case, one.name, setting=setting, image_tokens=len(image.image_embeds))
    kept = partial(case, kv_bytes=trace.kv_bytes)
    prefill = work.prefill(walked.lengths[0], trace.decoder_flops["gated"].total)
    first = partial(first_token, model, pixels, reduction)

    def first_call() -> Callable[[], Any]:
        model.prefix.clear()
        return first

    cases = [
        kept("prefill", run=partial(model.advance, [walked.state]), **prefill),
        case("first token", run=first),
        kept("decode", run=decode_prompt(model, walked, 1), **work.decode(walked.lengths)),
    ]
    if setting in COLD:
        cases.append(case("first token, cold", run=Prepared(first_call)))
    if one.name == OURS and reduction.fastv is None and reduction.positions == "vtu":
        steps = reduction.merge.steps(work.config.vision) if reduction.merge else None
        run = partial(model.llava.vision, pixels.to(model.llava.vision_dtype), steps)
        cases.append(case("tower", run=run, **work.tower(image.tokens_per_block)))
    return cases


def batch_case(one: Contender, setting: str, walked: Walk, size: int) -> Case:
    """One token after each of `size` prompts."""
    run, kept = decode_prompt(one.model, walked, size), size * walked.trace.kv_bytes
    costs = one.work.decode(walked.lengths, size)
    return Case(one.name, "batch", f"{setting} x {size}", run, kv_bytes=kept, **costs)


def growing_cases(one: Contender, length: int) -> list[Case]:
    """A prompt of `length` words, a token after it, and the attention in one layer."""
    model, work, text = one.model, one.work, one.work.config.text
    lengths = (length,) * text.num_layers
    state = State(pending_ids=word_ids(text, length))
    heads = text.num_heads, text.kv_heads, text.kv_heads
    shapes = [(1, length, count, text.head_dim) for count in heads]  # as the projections leave them
    noise = partial(torch.randn, device=model.llava.device, dtype=work.cache_dtype)
    q, k, v = (noise(shape).transpose(1, 2) for shape in shapes)
    attention = partial(attend, q, k, v, None)
    prefill = work.prefill(length, decoder_flops(text, lengths, lengths))
    decode = Prepared(partial(begin_decoding, model, state, lengths, length, 1))
    repeated, calls = partial(call_repeatedly, attention), ATTENTION_CALLS
    case = partial(Case, one.name, setting=str(length))
    return [
        case("growing prefill", run=partial(model.advance, [state]), **prefill),
        case("growing decode", run=decode, **work.decode(lengths)),
        case("growing attention", run=repeated, steps=calls, tokens=length),
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


def decode_prompt(model: Model, walked: Walk, size: int) -> Prepared:
    """A run that decodes after `size` copies of the prompt."""
    state, lengths, position = walked.state, walked.lengths, walked.position
    return Prepared(partial(begin_decoding, model, state, lengths, position, size))


def begin_decoding(
    model: Model, before: State, lengths: Sequence[int], position: int, size: int
) -> Callable[[], Any]:
    """Decode one token, which gives every cache room to grow, and return the call to time. The
    cache holds zeros: its values do not matter for speed."""
    text = model.config.text
    zeros = partial(torch.zeros, device=model.llava.device, dtype=model.llava.cache_dtype)
    shapes = [(1, text.kv_heads, length, text.head_dim) for length in lengths]
    cache: KVCache = tuple((zeros(shape), zeros(shape)) for shape in shapes)
    state = replace(
        before, past_key_values=cache, next_position=position, pending_ids=(5,), images=()
    )
    return partial(decode, model, decode(model, [state] * size, 1), DECODED)


# ---- transformers ------------------------------------------------------------------------------


def peer_cases(one: Contender) -> tuple[list[Case], Tensor]:
    """The cases of transformers, without a reduction, and its logits (1, V)."""
    peer, work, text, vision = one.model, one.work, one.work.config.text, one.work.config.vision
    assert isinstance(vision, VisionConfig)  # the only tower of transformers' LLaVA
    ids = peer.expand(prompt_ids(work.config))
    pixels = random_pixels(work, peer.device)
    logits, cache = peer.first_token(ids, pixels)
    length = ids.shape[1]
    lengths = (length,) * text.num_layers
    embeds = torch.randn(1, length, text.hidden_size, device=peer.device, dtype=work.dtype)
    tower = work.tower([vision.num_patches] * vision.num_layers)
    prefill = work.prefill(length, decoder_flops(text, lengths, lengths))
    decode = Prepared(partial(peer.begin_decoding, cache, length, DECODED))
    case = partial(Case, one.name, setting="none", image_tokens=vision.num_patches)
    return [
        case("tower", run=partial(peer.tower, pixels), **tower),
        case("prefill", run=partial(peer.prefill, embeds), **prefill),
        case("first token", run=partial(peer.first_token, ids, pixels)),
        case("decode", run=decode, **work.decode(lengths)),
    ], logits
