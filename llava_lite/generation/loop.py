"""The loop behind every answer: single calls, streams, batches and chats.

`Loop.request` checks one prompt, `Loop.run` answers requests. A step runs the pending rows of every
active item: a whole prompt (prefill), the next message of a chat, or the last token (decode). The
decoder returns the logits of each item's last row. The loop samples a token per item and drops
finished items.

Shapes: B items, V vocabulary, T prompt ids, S image side.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from llava_lite.config import LlavaConfig
from llava_lite.errors import ContextError, ImageError
from llava_lite.generation.answer import AnswerText
from llava_lite.generation.prefix import Prefix
from llava_lite.generation.sampling import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationOptions,
    check_integer,
    sample,
)
from llava_lite.generation.state import NEW_STATE, NO_TOKENS, Request, Row, State, TokenCounts
from llava_lite.generation.trace import Trace, trace_prompt
from llava_lite.inputs.pixels import load_pixels
from llava_lite.inputs.prompt import (
    Turn,
    build_prompt,
    check_family,
    check_images,
    next_turn_text,
    place_images,
)
from llava_lite.inputs.tokenizer import After, Tokenizer
from llava_lite.llava import EncodedImage, Llava
from llava_lite.reduction import NO_REDUCTION, DToMe, Reduction

DEFAULT_BATCH_SIZE = 8
Thresholds = Sequence[float] | Callable[[], Sequence[float] | None] | None


class Loop:
    """A loaded LLaVA that answers checked requests: weights, tokenizer, config; no state of a call.

    `config` overrides how prompts and images are prepared (`pad`, `template`) for the same
    weights; `exif=False` ignores the rotation that a camera notes in its files, as LLaVA does;
    `thresholds`: the model's own for DToMe, or a function that reads them when they are needed."""

    def __init__(
        self,
        llava: Llava,
        tokenizer: Tokenizer,
        config: LlavaConfig | None = None,
        exif: bool = True,
        thresholds: Thresholds = None,
    ) -> None:
        self.llava, self.tokenizer, self.exif = llava, tokenizer, exif
        self.own_thresholds = thresholds
        self.config = config or llava.config
        self.prefix = Prefix(llava, tokenizer)

    @cached_property
    def thresholds(self) -> Sequence[float] | None:
        """The model's own DToMe thresholds, read at the first use. Raises CheckpointError."""
        return self.own_thresholds() if callable(self.own_thresholds) else self.own_thresholds

    def request(
        self,
        images: Sequence[Any],
        prompt: str | Sequence[Turn],
        options: GenerationOptions,
        *,
        system: str | None = None,
        state: State = NEW_STATE,
        counts: TokenCounts = NO_TOKENS,
    ) -> Request:
        """Write a prompt and check it: its `<image>` markers, its reduction, its length.

        prompt: one question, which gets its images in front unless it has markers, or the turns of
        a conversation with markers. system: replaces `options.system` for this prompt alone; its
        keys and values are not shared with later calls (prefix.py). state, counts: a chat so far
        and its tokens; the question is the chat's next message. Raises PromptError, ContextError,
        and ValueError for a reduction that the model or the images do not allow, and for a template
        of another family of models."""
        template = options.template or self.config.template
        check_family(template, self.tokenizer.family)
        if isinstance(prompt, str):
            prompt = [(place_images(prompt, len(images), template), None)]
        if state.next_position:
            [(question, _)] = prompt
            text = next_turn_text(template, question)
        else:
            text = build_prompt(template, prompt, options.system if system is None else system)
        check_images(text, len(images))
        after: After | None = "text" if state.next_position else None
        new_ids = tuple(self.tokenizer.encode_prompt(text, after=after))
        reduction = self.reduction_for(images, options.reduction, state.reduction)
        state = replace(
            state, pending_ids=state.pending_ids + new_ids, reduction=reduction, answer_ids=()
        )
        image_positions = sum(self.num_positions(image, reduction) for image in images)
        length = state.next_position + len(state.pending_ids) - len(images) + image_positions
        image_positions += counts.positions
        counts = replace(counts, prompt=length - image_positions)
        max_new_tokens = self.fit_answer(options.max_new_tokens, counts.prompt, image_positions)
        prefix = self.find_prefix(state, template, options)
        return Request(state, tuple(images), counts, max_new_tokens, prefix)

    def fit_answer(self, max_new_tokens: int | None, text: int, image_positions: int) -> int:
        """The most tokens of an answer to `text` tokens and `image_positions`. None takes as many
        as there is room for, up to 512. Raises ContextError."""
        limit, length = self.config.text.max_positions, text + image_positions
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_MAX_NEW_TOKENS, limit - length))
        if length + max_new_tokens > limit:
            raise ContextError(
                f"{text} prompt tokens + {image_positions} image positions + {max_new_tokens} "
                f"new tokens exceed the context of {limit}"
            )
        return max_new_tokens

    def find_prefix(
        self, state: State, template: str, options: GenerationOptions
    ) -> tuple[int, ...]:
        """The first ids of a new prompt whose keys and values are shared (prefix.py)."""
        if state.next_position or options.trace:  # a trace shows the whole prompt
            return ()
        shared = self.prefix.ids(template, options.system)
        return shared if state.pending_ids[: len(shared)] == shared else ()

    def reduction_for(
        self, images: Sequence[Any], wish: Reduction | str | None, before: Reduction = NO_REDUCTION
    ) -> Reduction:
        """The reduction of a call, checked against the model.

        None takes the reduction of the encoded images, or else the one from `before` in a chat. A
        reduction without an image size takes the size of the encoded images. Raises ValueError if
        an encoded image was merged in another way, or has another size."""
        encoded = [image.reduction for image in images if isinstance(image, EncodedImage)]
        if wish is None:
            wish = encoded[0] if encoded else before
            if any(reduction != wish for reduction in encoded):
                raise ValueError("the images of one prompt are encoded with different reductions")
        wish, own_size = Reduction.of(wish), self.config.vision.image_size
        sizes = {reduction.image_size for reduction in encoded}
        if wish.image_size is None and len(sizes) == 1:
            wish = replace(wish, image_size=sizes.pop())
        checked = self.check_reduction(wish)
        for reduction in encoded:
            if reduction.merge != checked.merge:
                raise ValueError(
                    f"an image was encoded with merge={reduction.merge}, but the call asks for "
                    f"merge={checked.merge}"
                )
            if checked.image_size not in (None, reduction.image_size or own_size):
                raise ValueError(
                    f"an image was encoded with image_size={reduction.image_size or own_size}, but "
                    f"the call asks for image_size={checked.image_size}"
                )
        return checked

    def check_reduction(self, wish: Reduction) -> Reduction:
        """`Reduction.check` with the model's own thresholds. Raises ValueError, and CheckpointError
        if the thresholds are needed and cannot be read."""
        return wish.check(self.config, self.thresholds if wish.merge == DToMe() else None)

    def num_positions(self, image: Any, reduction: Reduction) -> int:
        """The most decoder positions the image can take, known before it is encoded."""
        if isinstance(image, EncodedImage):
            return image.num_positions(reduction.positions)
        return reduction.most_positions(self.config.vision)

    def run(
        self,
        requests: Iterable[Request],
        options: GenerationOptions,
        batch_size: int | None = None,
    ) -> Iterator[tuple[int, Row]]:
        """The loop: yields (index of the request, its row) for every token of every request.

        At most `batch_size` requests run at once. The next one is taken from `requests` as soon as
        one is finished."""
        size = check_batch_size(batch_size)
        waiting = enumerate(requests)
        active: list[tuple[int, Row]] = []
        while (joining := list(islice(waiting, size - len(active)))) or active:
            fresh = self.start([request for _, request in joining], [options] * len(joining), size)
            active += [(index, row) for (index, _), row in zip(joining, fresh, strict=True)]
            self.step([row for _, row in active])
            yield from active
            active = [(index, row) for index, row in active if row.finish_reason is None]

    def start(
        self, requests: Sequence[Request], options: Sequence[GenerationOptions], batch_size: int
    ) -> list[Row]:
        """Encode the images of some requests and make a row of each, with its options."""
        states, seconds = self.encode_requests(requests, batch_size)
        return [
            Row(
                request,
                state,
                wish,
                AnswerText(self.tokenizer.stream(), wish.stop_strings),
                wish.make_generator(),
                {**seconds, "prefill": 0.0, "decode": 0.0},
            )
            for request, state, wish in zip(requests, states, options, strict=True)
        ]

    @torch.inference_mode()  # here and not around `run`: it would leak out of a suspended generator
    def step(self, rows: Sequence[Row]) -> None:
        """Run one forward and sample one token per row. Rows may join and leave between steps."""
        start = perf_counter()
        pending = [row.state.num_pending_rows for row in rows]
        logits, states = self.advance([row.state for row in rows])
        tokens = self.next_tokens(logits, rows)
        seconds = perf_counter() - start
        for row, token, state, own in zip(rows, tokens, states, pending, strict=True):
            if row.options.trace and row.steps == 0:
                row.trace = self.trace(row.state, state, row.request.counts)
            row.accept(token, state, (self.config.text.eos_id, *self.config.text.stop_ids))
            phase = "decode" if row.steps > 1 else "prefill"
            row.seconds[phase] += seconds
            row.shares[phase] += seconds * own / sum(pending)

    def next_tokens(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        """Sample the next token of every row from its logits (B, V), by the row's options."""
        alike: dict[tuple[float, int, float], list[int]] = {}
        for index, row in enumerate(rows):
            wish = row.options
            alike.setdefault((wish.temperature, wish.top_k, wish.top_p), []).append(index)
        tokens: dict[int, int] = {}
        for (temperature, top_k, top_p), indices in alike.items():
            chosen = sample(
                logits if len(alike) == 1 else logits[indices],
                temperature,
                top_k,
                top_p,
                [rows[index].generator for index in indices],
                self.config.text.sampled_vocab_size,
            )
            # If all rows have the same options, the step waits for the device only here.
            tokens.update(zip(indices, chosen.tolist(), strict=True))
        return [tokens[index] for index in range(len(rows))]

    def trace(self, before: State, after: State, counts: TokenCounts) -> Trace:
        """Trace the image tokens of the forward between two states. `counts`: tokens before it."""
        assert after.past_key_values is not None
        missing = counts.patches - counts.positions  # merged tokens may take fewer positions
        return trace_prompt(
            self.config,
            before.images,
            before.reduction,
            len(before.pending_ids) - len(before.images),
            before.next_position + missing,
            before.past_key_values,
            after.past_key_values,
            after.prunings,
        )

    def advance(
        self, states: Sequence[State], all_logits: bool = False
    ) -> tuple[Tensor, list[State]]:
        """Run the pending rows of every state: logits (B, V) of the last rows, or of all rows,
        packed."""
        spliced = [
            self.llava.splice(s.pending_ids, s.images, s.next_position, s.reduction.positions)
            for s in states
        ]
        logits, caches, prunings = self.llava(
            [rows for rows, _ in spliced],
            [layout for _, layout in spliced],
            [state.past_key_values for state in states],
            [state.reduction.fastv for state in states],
            all_logits,
        )
        advanced = [
            State(cache, layout.next_position, reduction=state.reduction, prunings=stages)
            for state, (_, layout), cache, stages in zip(
                states, spliced, caches, prunings, strict=True
            )
        ]
        return logits, advanced

    def encode_requests(
        self, requests: Sequence[Request], batch_size: int
    ) -> tuple[list[State], dict[str, float]]:
        """The states of the requests with their images encoded, and the seconds per phase."""
        wanted = [(image, r.state.reduction) for r in requests for image in r.images]
        encoded, seconds = self.encode_images(wanted, batch_size)
        rest = iter(encoded)
        states = [
            replace(self.apply_prefix(request), images=tuple(next(rest) for _ in request.images))
            for request in requests
        ]
        return states, seconds

    def apply_prefix(self, request: Request) -> State:
        """The state of the request, after the shared cache of its prefix if it has one."""
        state, prefix = request.state, request.prefix
        if not prefix or state.next_position:
            return state
        return replace(
            state,
            past_key_values=self.prefix.cache(prefix),
            next_position=len(prefix),
            pending_ids=state.pending_ids[len(prefix) :],
        )

    @torch.inference_mode()
    def encode_images(
        self, wanted: Sequence[tuple[Any, Reduction]], batch_size: int
    ) -> tuple[list[EncodedImage], dict[str, float]]:
        """Encode each image with its reduction, `batch_size` images at a time. Also returns the
        seconds of "preprocess" and "vision"."""
        start = perf_counter()
        encoded: dict[int, EncodedImage] = {}
        slots: dict[Reduction, list[int]] = {}
        pixel_values: dict[int, Tensor] = {}
        for slot, (image, reduction) in enumerate(wanted):
            if isinstance(image, EncodedImage):
                encoded[slot] = self.check_image(image)
            else:
                pixel_values[slot] = self.prepare(image, reduction)
                slots.setdefault(reduction, []).append(slot)
        prepared = perf_counter()
        for reduction, alike in slots.items():
            for first in range(0, len(alike), batch_size):
                chunk = alike[first : first + batch_size]
                pixels = torch.cat([pixel_values[slot] for slot in chunk])
                encoded.update(zip(chunk, self.llava.encode_image(pixels, reduction), strict=True))
        seconds = {"preprocess": prepared - start, "vision": perf_counter() - prepared}
        return [encoded[slot] for slot in range(len(wanted))], seconds

    def prepare(self, image: Any, reduction: Reduction = NO_REDUCTION) -> Tensor:
        """The pixel values (1, 3, S, S) of an image. Raises ImageError."""
        return load_pixels(image, self.config.at(reduction.image_size), self.exif)

    def check_image(self, image: EncodedImage) -> EncodedImage:
        """The image, if its width is that of this model. Raises ImageError."""
        width, needed = image.image_embeds.shape[-1], self.config.text.hidden_size
        if width != needed:
            raise ImageError(f"the encoded image is {width} wide, but the model needs {needed}")
        return image


def check_batch_size(batch_size: int | None) -> int:
    """The default for None. Raises ValueError below 1."""
    size = check_integer("batch_size", DEFAULT_BATCH_SIZE if batch_size is None else batch_size)
    if size < 1:
        raise ValueError(f"batch_size {size} must be at least 1")
    return size
