"""From images and words to an answer: sampling, streaming, batches, chat, scoring.

Everything that generates runs through one loop, `Model.run`: a step takes the pending rows of every
active item (a whole prompt, a chat's next turn, or the one token sampled last), asks the decoder
for the last row's logits of each, samples, and decides who is done. `generate` collects what the
loop yields, `stream` passes it on, `Chat` keeps the state it leaves behind.

Shapes: B items, V vocabulary, P image tokens, C decoder width.
"""

import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from llava_lite.attention import KVCache
from llava_lite.config import LlavaConfig
from llava_lite.errors import ContextError, ImageError, PromptError
from llava_lite.image import load_image, preprocess
from llava_lite.llava import IMAGE_TOKEN_ID, Llava
from llava_lite.prompt import build_prompt, next_turn_text, place_images
from llava_lite.tokenizer import StreamDecoder, Tokenizer

DEFAULT_MAX_NEW_TOKENS = 512
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class EncodedImage:
    """An image the model has already looked at, reusable wherever it accepts an image."""

    image_embeds: Tensor  # (P, C)


class Answer(str):
    """The answer's text, and how it came about.

    `finish_reason`: "stop" (end token or stop string) or "length" (max_new_tokens reached).
    `usage`: prompt_tokens (text ids), image_tokens, completion_tokens (`token_ids`, end token not
    counted). `timings`: seconds of preprocess, vision, prefill, decode, and decode
    tokens_per_second; items that ran together share the clock, and work still queued on a GPU
    counts where it is awaited.
    """

    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float]
    token_ids: tuple[int, ...]

    def __new__(
        cls,
        text: str,
        finish_reason: str = "stop",
        usage: dict[str, int] | None = None,
        timings: dict[str, float] | None = None,
        token_ids: Sequence[int] = (),
    ) -> "Answer":
        answer = super().__new__(cls, text)
        answer.finish_reason = finish_reason
        answer.usage = usage or {}
        answer.timings = timings or {}
        answer.token_ids = tuple(token_ids)
        return answer

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        return {
            "text": str(self),
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "timings": self.timings,
            "token_ids": list(self.token_ids),
        }


@dataclass(frozen=True)
class Score:
    """How likely the model finds a continuation: natural log-likelihood, per-token logprobs that
    add up to it, and whether greedy decoding would have written exactly these `token_ids`."""

    log_likelihood: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerationOptions:
    """The wishes of one call, checked when made: ValueError out of range.

    max_new_tokens: None means 512, or as many as the context has room for.
    temperature, top_p, top_k: see `sample`; temperature 0 is greedy.
    seed: None differs every time.
    stop: a string or several to end at; they are not part of the answer.
    system, template: instead of the template's own system text, and of the model's template.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    system: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        # `not a <= x` rather than `x < a`: it refuses NaN too.
        if self.max_new_tokens is not None and not self.max_new_tokens >= 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be in [0, inf)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
        if not self.top_k >= 0:
            raise ValueError(f"top_k {self.top_k} must be at least 0 (0 = off)")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} must be in [0, 2**64)")
        if "" in self.stop_strings:
            raise ValueError("a stop string must not be empty")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def make_generator(self) -> torch.Generator | None:
        """The random numbers of one item (None when greedy). Always on the CPU, so that a seed
        means the same on every device."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()  # a new Generator starts from a fixed seed, not from entropy
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator | None] = (),
    num_text_ids: int | None = None,
) -> Tensor:
    """Choose one token per item: logits (B, V) -> ids (B,) below `num_text_ids` (None = V).

    Temperature 0 is argmax. Otherwise, in this order: temperature, the `top_k` best (0 = all), the
    smallest set of best tokens with probability >= `top_p` (Holtzman et al., arXiv 1904.09751),
    then one draw from each item's own generator."""
    logits = logits[:, :num_text_ids].float()
    if temperature == 0:
        return logits.argmax(-1)
    # Devices differ in the last bit of a softmax; from here on everything runs on the CPU.
    logits = logits.cpu()
    smallest = torch.finfo(torch.float32).tiny
    scores = (logits - logits.amax(-1, keepdim=True)) / max(temperature, smallest)
    ids = None
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[-1]))
    elif top_p < 1:
        scores, ids = scores.sort(descending=True, stable=True)
    probs = scores.softmax(-1)
    if top_p < 1:
        probs = probs.where(probs.cumsum(-1) - probs < top_p, 0)
    choice = torch.stack([draw(*item) for item in zip(probs, generators, strict=True)])  # (B,)
    return choice if ids is None else ids.gather(-1, choice[:, None])[:, 0]


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Index drawn in proportion to `weights` (V,), by inverting their cumulative sum: one random
    number per token, whatever the size of the vocabulary."""
    cumulative = weights.double().cumsum(-1)
    # A float32 uniform is at most 1 - 2^-24, so its product in float64 stays below the total.
    target = torch.rand((), generator=generator).double() * cumulative[-1]
    return torch.searchsorted(cumulative, target, right=True)


class AnswerText:
    """Turns ids into visible text: both ends stripped, as LLaVA does, and cut before a stop string.

    Text goes out as soon as it is certain; held back are only an incomplete UTF-8 tail, whitespace
    that may turn out to be the end, and what may turn out to be the start of a stop string."""

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str] = ()) -> None:
        self.decoder, self.stop_strings = decoder, stop_strings
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """One more id -> the text that became certain."""
        return self.release(self.held + self.decoder.push(token), final=False)

    def finish(self) -> str:
        """The rest of the text. Nothing after a stop string."""
        return "" if self.stopped else self.release(self.held + self.decoder.flush(), final=True)

    def release(self, text: str, final: bool) -> str:
        """Split `text` into what goes out now (returned) and what is held back."""
        if not self.text:
            text = text.lstrip()
        found = [at for at in (text.find(stop) for stop in self.stop_strings) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) if final else self.start_of_stop(text)
        visible = text[:end].rstrip()
        self.text, self.held = self.text + visible, text[len(visible) :]
        return visible

    def start_of_stop(self, text: str) -> int:
        """Where the earliest stop string begins that `text` may end inside of, else its length."""
        starts = range(max(0, len(text) - max(map(len, self.stop_strings), default=0)), len(text))
        unsure = (at for at in starts if any(s.startswith(text[at:]) for s in self.stop_strings))
        return next(unsure, len(text))


@dataclass(frozen=True)
class State:
    """One sequence between two steps: the cache of what has run, and the ids that have yet to run.

    Never changed, only replaced as a whole: an interrupt finds the old state or the new one."""

    past_key_values: KVCache | None = None
    next_position: int = 0
    pending_ids: tuple[int, ...] = ()
    image_embeds: tuple[Tensor, ...] = ()  # one per image slot in pending_ids
    answer_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One item, checked against the context, nothing computed yet. Counts are in tokens and cover
    the whole sequence in front of the answer."""

    state: State
    images: tuple[Any, ...]
    prompt_tokens: int
    image_tokens: int
    max_new_tokens: int


@dataclass
class Row:
    """One item while it is being answered. `piece` is the text its last token made certain."""

    request: Request
    state: State
    text: AnswerText
    generator: torch.Generator | None
    seconds: dict[str, float]
    finish_reason: str | None = None
    steps: int = 0
    piece: str = ""

    def accept(self, token: int, state: State, eos_id: int) -> None:
        """Take the sampled token and the state it leads to."""
        is_eos = token == eos_id
        new_ids = () if is_eos else (token,)
        answer_ids = self.state.answer_ids + new_ids
        self.state = replace(state, pending_ids=new_ids, answer_ids=answer_ids)
        self.steps += 1
        self.piece = "" if is_eos else self.text.push(token)
        if is_eos or self.text.stopped:
            self.finish_reason = "stop"
        elif len(answer_ids) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.piece += self.text.finish()

    def answer(self) -> Answer:
        """The finished answer."""
        decode = self.seconds["decode"]
        usage = {
            "prompt_tokens": self.request.prompt_tokens,
            "image_tokens": self.request.image_tokens,
            "completion_tokens": len(self.state.answer_ids),
        }
        speed = (self.steps - 1) / decode if decode else 0.0
        timings = {**self.seconds, "tokens_per_second": speed}
        reason = self.finish_reason or "length"
        return Answer(self.text.text, reason, usage, timings, self.state.answer_ids)


class Model:
    """A loaded LLaVA: weights, tokenizer and config. Holds no state of a call.

    `config` overrides how prompts and images are prepared (`pad`, `template`) for the same
    weights."""

    def __init__(
        self, llava: Llava, tokenizer: Tokenizer, config: LlavaConfig | None = None
    ) -> None:
        self.llava, self.tokenizer = llava, tokenizer
        self.config = config or llava.config

    def generate(
        self,
        image: Any,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        system: str | None = None,
        template: str | None = None,
        batch_size: int | None = None,
    ) -> Answer | list[Answer]:
        """Answer a prompt about an image, or a list of prompts about a list of images.

        An image is whatever `load_image` takes (path, bytes, PIL image, array, tensor, URL), an
        `EncodedImage`, or None for text only. With one prompt a list of images are the images of
        that prompt. With a list of prompts `image` is None or a list of the same length, each entry
        an image, a list of images, or None: a batch, whose answers are those of the single calls.

        Options: see `GenerationOptions`; `batch_size` items run at once (8), and a new one starts
        as soon as one is done. Raises ImageError, and before any computation PromptError,
        ContextError and ValueError."""
        options = GenerationOptions(
            max_new_tokens, temperature, top_p, top_k, seed, stop, system, template
        )
        items = pair(image, prompt)
        requests = [self.request(images, text, options) for images, text in items]
        answers = {
            index: row.answer()
            for index, row in self.run(requests, options, batch_size)
            if row.finish_reason is not None
        }
        ordered = [answers[index] for index in range(len(items))]
        return ordered[0] if isinstance(prompt, str) else ordered

    def stream(self, image: Any, prompt: str, **options: Any) -> Generator[str, None, Answer]:
        """The text of `generate(image, prompt, **options)` piece by piece, each as soon as it is
        certain.

        Bad arguments raise here, not at the first piece. The generator's return value is the
        `Answer`; closing it early ends the computation."""
        wishes = GenerationOptions(**options)
        [(images, text)] = pair(image, prompt)
        return self.pieces(self.request(images, text, wishes), wishes)

    def pieces(self, request: Request, options: GenerationOptions) -> Generator[str, None, Answer]:
        """Run one request, yield its text, return its answer."""
        for _, row in self.run([request], options):
            if row.piece:
                yield row.piece
        return row.answer()

    def chat(self, image: Any = None, **options: Any) -> "Chat":
        """Start a conversation, about an image (or a list of them) if given; options as of
        `generate`."""
        return Chat(self, image, GenerationOptions(**options))

    def encode(self, image: Any) -> EncodedImage:
        """Look at one image now, to ask about it many times later."""
        embeds, _ = self.embed_images([image], DEFAULT_BATCH_SIZE)
        return EncodedImage(embeds[0])

    @torch.inference_mode()
    def prefill(
        self, input_ids: Tensor, pixel_values: Tensor | None, all_logits: bool = False
    ) -> tuple[Tensor, KVCache, int]:
        """`Llava.prefill`: input_ids (1, T) with -200 per image, pixel_values (images, 3, S, S)."""
        return self.llava.prefill(input_ids, pixel_values, all_logits)

    @torch.inference_mode()
    def decode(
        self, token: Tensor, position: int, past_key_values: KVCache
    ) -> tuple[Tensor, KVCache]:
        """`Llava.decode`: one token -> logits (1, 1, V) and the grown cache."""
        return self.llava.decode(token, position, past_key_values)

    def score(
        self,
        image: Any,
        prompt: str | Sequence[str],
        continuation: str | Sequence[str],
        *,
        system: str | None = None,
        template: str | None = None,
        batch_size: int | None = None,
    ) -> Score | list[Score]:
        """How likely is `continuation` as the answer's beginning? Lists are batches, as in
        `generate`.

        The space in front of an answer is implied, the end token is not scored. Raises as
        `generate`, and ValueError for an empty continuation."""
        items = pair(image, prompt)
        texts = [continuation] if isinstance(continuation, str) else list(continuation)
        if len(texts) != len(items) or isinstance(prompt, str) != isinstance(continuation, str):
            raise PromptError(f"{len(items)} prompts need as many continuations, not {len(texts)}")
        targets = [
            tuple(self.tokenizer.encode(text.removeprefix(" "), bos=False)) for text in texts
        ]
        if not all(targets):
            raise ValueError("a continuation to score must not be empty")
        requests = []
        for (images, text), target in zip(items, targets, strict=True):
            options = GenerationOptions(len(target), system=system, template=template)
            requests.append(self.request(images, text, options))
        size, scores = checked_batch_size(batch_size), []
        for start in range(0, len(requests), size):
            chunk = slice(start, start + size)
            scores += self.score_chunk(requests[chunk], targets[chunk], size)
        return scores[0] if isinstance(prompt, str) else scores

    @torch.inference_mode()
    def score_chunk(
        self, requests: Sequence[Request], targets: Sequence[tuple[int, ...]], batch_size: int
    ) -> list[Score]:
        """Two passes: the prompts (last rows only), then all but the last token of each
        continuation."""
        states, _ = self.with_images(requests, batch_size)
        logits, states = self.advance(states)
        packed = [[row] for row in logits]  # per item, logits (V,) of each target
        longer = [index for index, target in enumerate(targets) if len(target) > 1]
        if longer:
            more = [replace(states[index], pending_ids=targets[index][:-1]) for index in longer]
            logits, _ = self.advance(more, all_logits=True)
            rows = logits.split([len(state.pending_ids) for state in more])
            for index, item in zip(longer, rows, strict=True):
                packed[index].extend(item)
        text_ids = self.config.text.sampled_vocab_size
        return [
            score_tokens(torch.stack(rows)[:, :text_ids], target)
            for rows, target in zip(packed, targets, strict=True)
        ]

    def request(self, images: Sequence[Any], prompt: str, options: GenerationOptions) -> Request:
        """Build the prompt's ids and check them against the context."""
        template = options.template or self.config.template
        turns = [(place_images(prompt, len(images), template), None)]
        text = build_prompt(template, turns, options.system)
        return self.continuation(
            State(), tuple(self.tokenizer.encode_prompt(text)), images, options
        )

    def continuation(
        self,
        state: State,
        input_ids: tuple[int, ...],
        images: Sequence[Any],
        options: GenerationOptions,
        past_image_tokens: int = 0,
    ) -> Request:
        """`input_ids` after what `state` holds (nothing, or a chat so far). Raises ContextError."""
        slots = input_ids.count(IMAGE_TOKEN_ID)
        if slots != len(images):
            raise PromptError(
                f"the prompt has {slots} <image> markers, but {len(images)} images were given"
            )
        pending_ids = state.pending_ids + input_ids
        new_image_tokens = sum(map(self.num_image_tokens, images))
        length = state.next_position + len(pending_ids) - slots + new_image_tokens
        image_tokens = past_image_tokens + new_image_tokens
        limit = self.config.text.max_positions
        wanted = options.max_new_tokens
        if wanted is None:
            wanted = max(1, min(DEFAULT_MAX_NEW_TOKENS, limit - length))
        if length + wanted > limit:
            raise ContextError(
                f"{length - image_tokens} prompt tokens + {image_tokens} image tokens + {wanted} "
                f"new tokens exceed the context of {limit}"
            )
        state = replace(state, pending_ids=pending_ids, answer_ids=())
        return Request(state, tuple(images), length - image_tokens, image_tokens, wanted)

    def num_image_tokens(self, image: Any) -> int:
        """Decoder positions the image will take, known before looking at it."""
        if isinstance(image, EncodedImage):
            return len(image.image_embeds)
        return self.config.vision.num_patches

    def run(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        batch_size: int | None = None,
    ) -> Iterator[tuple[int, Row]]:
        """The loop: yields (index of the request, its row) for every token of every request.

        At most `batch_size` run at once; each that finishes makes room for the next."""
        size = checked_batch_size(batch_size)
        waiting = deque(enumerate(requests))
        active: list[tuple[int, Row]] = []
        while waiting or active:
            joining = [waiting.popleft() for _ in range(min(size - len(active), len(waiting)))]
            fresh = self.start([request for _, request in joining], options, size)
            active += [(index, row) for (index, _), row in zip(joining, fresh, strict=True)]
            self.step([row for _, row in active], options)
            yield from active
            active = [(index, row) for index, row in active if row.finish_reason is None]

    def start(
        self, requests: Sequence[Request], options: GenerationOptions, batch_size: int
    ) -> list[Row]:
        """Look at the images of some requests, and make rows of them."""
        states, seconds = self.with_images(requests, batch_size)
        return [
            Row(
                request,
                state,
                AnswerText(StreamDecoder(self.tokenizer), options.stop_strings),
                options.make_generator(),
                {**seconds, "prefill": 0.0, "decode": 0.0},
            )
            for request, state in zip(requests, states, strict=True)
        ]

    @torch.inference_mode()  # here and not around `run`: it would leak out of a suspended generator
    def step(self, rows: Sequence[Row], options: GenerationOptions) -> None:
        """One forward and one sampled token for every row."""
        start = perf_counter()
        logits, states = self.advance([row.state for row in rows])
        tokens = sample(
            logits,
            options.temperature,
            options.top_k,
            options.top_p,
            [row.generator for row in rows],
            self.config.text.sampled_vocab_size,
        ).tolist()  # the step's only wait for the device
        seconds = perf_counter() - start
        for row, token, state in zip(rows, tokens, states, strict=True):
            row.accept(token, state, self.config.text.eos_id)
            row.seconds["decode" if row.steps > 1 else "prefill"] += seconds

    def advance(
        self, states: Sequence[State], all_logits: bool = False
    ) -> tuple[Tensor, list[State]]:
        """Run what is pending in every state: logits (B, V) of the last rows, or of all, packed."""
        input_embeds = [self.llava.splice(s.pending_ids, s.image_embeds) for s in states]
        logits, caches = self.llava(
            input_embeds,
            [state.next_position for state in states],
            [state.past_key_values for state in states],
            all_logits,
        )
        advanced = [
            State(cache, state.next_position + len(rows))
            for state, rows, cache in zip(states, input_embeds, caches, strict=True)
        ]
        return logits, advanced

    def with_images(
        self, requests: Sequence[Request], batch_size: int
    ) -> tuple[list[State], dict[str, float]]:
        """The requests' states with their images encoded, and the seconds that took."""
        images = [image for request in requests for image in request.images]
        embeds, seconds = self.embed_images(images, batch_size)
        rest = iter(embeds)
        states = [
            replace(request.state, image_embeds=tuple(next(rest) for _ in request.images))
            for request in requests
        ]
        return states, seconds

    @torch.inference_mode()
    def embed_images(
        self, images: Sequence[Any], batch_size: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        """image_embeds (P, C) of each image, `batch_size` at a time through the tower, and the
        seconds of "preprocess" and "vision"."""
        start, size = perf_counter(), self.config.vision.image_size
        embeds = {
            slot: self.checked_embeds(image)
            for slot, image in enumerate(images)
            if isinstance(image, EncodedImage)
        }
        raw = [slot for slot in range(len(images)) if slot not in embeds]
        pixel_values = [preprocess(load_image(images[slot]), size, self.config.pad) for slot in raw]
        loaded = perf_counter()
        for first in range(0, len(raw), batch_size):
            chunk = slice(first, first + batch_size)
            encoded = self.llava.encode_image(torch.cat(pixel_values[chunk]))  # (B, P, C)
            embeds.update(zip(raw[chunk], encoded, strict=True))
        seconds = {"preprocess": loaded - start, "vision": perf_counter() - loaded}
        return [embeds[slot] for slot in range(len(images))], seconds

    def checked_embeds(self, image: EncodedImage) -> Tensor:
        """Its image_embeds, if they are of this model's width."""
        width, needed = image.image_embeds.shape[-1], self.config.text.hidden_size
        if width != needed:
            raise ImageError(f"the encoded image is {width} wide, but the model needs {needed}")
        return image.image_embeds


class Chat:
    """A conversation that keeps its KV cache: a turn runs only what is new since the last one.

    The image it was opened with belongs to the first message; `send` and `stream` may bring
    others."""

    def __init__(self, model: Model, image: Any, options: GenerationOptions) -> None:
        self.model, self.options = model, options
        self.images = as_list(image)
        self.log = ChatLog()
        self.open_stream: weakref.ref[Generator[str, None, Answer]] | None = None

    @property
    def history(self) -> list[tuple[str, str]]:
        """The turns so far: (what the user wrote, the answer)."""
        return list(self.log.turns)

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All ids of the conversation so far, the answers' own included, -200 for each image."""
        return self.log.input_ids

    def clear(self) -> None:
        """Start over, with the image the chat was opened with."""
        self.close_stream()
        self.log = ChatLog()

    def send(self, text: str, image: Any = None) -> Answer:
        """Say `text`, with an image or several if given; returns the whole answer.

        Raises as `Model.generate`; the chat then stands where it stood before."""
        pieces = self.stream(text, image)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream(self, text: str, image: Any = None) -> Generator[str, None, Answer]:
        """`send`, piece by piece. What was written until the stream is closed or interrupted stays
        in the history as the answer. A new message closes a stream that is still open."""
        self.close_stream()
        images = as_list(image) if self.log.turns else self.images + as_list(image)
        template = self.options.template or self.model.config.template
        message = place_images(text, len(images), template)
        if self.log.turns:
            turn = next_turn_text(template, message)
            input_ids = self.model.tokenizer.encode_prompt(turn, after="text")
        else:
            prompt = build_prompt(template, [(message, None)], self.options.system)
            input_ids = self.model.tokenizer.encode_prompt(prompt)
        request = self.model.continuation(
            self.log.state, tuple(input_ids), images, self.options, self.log.image_tokens
        )
        pieces = self.answer(text, tuple(input_ids), request)
        self.open_stream = weakref.ref(pieces)
        return pieces

    def close_stream(self) -> None:
        """Close a stream that somebody left open."""
        pieces = self.open_stream() if self.open_stream else None
        if pieces is not None:
            pieces.close()

    def answer(
        self, text: str, input_ids: tuple[int, ...], request: Request
    ) -> Generator[str, None, Answer]:
        """Run one turn and, however it ends, keep what was answered."""
        row = None
        try:
            for _, row in self.model.run([request], self.options):
                if row.piece:
                    yield row.piece
            assert row is not None  # a run of one request yields at least once
            return row.answer()
        finally:
            if row is not None:
                row.text.finish()
                self.log = ChatLog(
                    self.log.turns + ((text, row.text.text),),
                    row.state,
                    self.log.input_ids + input_ids + row.state.answer_ids,
                    request.image_tokens,
                )


@dataclass(frozen=True)
class ChatLog:
    """A chat between two turns. Replaced as a whole, so that no interrupt leaves half a turn."""

    turns: tuple[tuple[str, str], ...] = ()
    state: State = field(default_factory=State)
    input_ids: tuple[int, ...] = ()
    image_tokens: int = 0


def as_list(image: Any) -> list[Any]:
    """None, one image or several -> a list of images."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def pair(image: Any, prompt: str | Sequence[str]) -> list[tuple[list[Any], str]]:
    """Sort out the arguments of a call: the images and the prompt of each item."""
    if isinstance(prompt, str):
        return [(as_list(image), prompt)]
    prompts = list(prompt)
    if not all(isinstance(text, str) for text in prompts):
        raise PromptError("a prompt must be a str, or a list of them")
    images = [None] * len(prompts) if image is None else image
    if not isinstance(images, list | tuple):
        raise PromptError(f"{len(prompts)} prompts need a list of as many images, not one image")
    if len(images) != len(prompts):
        raise PromptError(f"{len(prompts)} prompts need as many images, not {len(images)}")
    return [(as_list(entry), text) for entry, text in zip(images, prompts, strict=True)]


def checked_batch_size(batch_size: int | None) -> int:
    """The default for None. Raises ValueError below 1."""
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size {size} must be at least 1")
    return size


def score_tokens(logits: Tensor, token_ids: tuple[int, ...]) -> Score:
    """Score one continuation of T tokens from the logits (T, V) in front of each."""
    targets = torch.tensor(token_ids, device=logits.device)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]  # (T,)
    is_greedy = bool((logits.argmax(-1) == targets).all())
    return Score(float(logprobs.double().sum()), tuple(logprobs.tolist()), is_greedy, token_ids)
