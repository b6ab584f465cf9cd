"""`Model`: what a user calls. `generate` collects what the loop yields, `stream` passes pieces on,
`Chat` keeps the state between turns, `score` reads the logits of a given continuation.

Shapes: V vocabulary, T prompt ids, S image side.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from llava_lite.cache import KVCache
from llava_lite.errors import PromptError
from llava_lite.generation.answer import Answer, Score, score_tokens
from llava_lite.generation.chat import Chat
from llava_lite.generation.loop import DEFAULT_BATCH_SIZE, Loop, checked_batch_size
from llava_lite.generation.sampling import (
    GenerationOptions,
)
from llava_lite.generation.state import Request, as_list
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction


class Model(Loop):
    """A loaded LLaVA: weights, tokenizer and config. Holds no state of a call."""

    @overload
    def generate(
        self,
        image: Any,
        prompt: str,
        *,
        max_new_tokens: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        system: str | None = ...,
        template: str | None = ...,
        reduction: Reduction | str | None = ...,
        trace: bool = ...,
        batch_size: int | None = ...,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        image: Any,
        prompt: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int | None = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        system: str | None = ...,
        template: str | None = ...,
        reduction: Reduction | str | None = ...,
        trace: bool = ...,
        batch_size: int | None = ...,
    ) -> list[Answer]: ...

    def generate(
        self,
        image: Any,
        prompt: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        system: str | None = None,
        template: str | None = None,
        reduction: Reduction | str | None = None,
        trace: bool = False,
        batch_size: int | None = None,
    ) -> Answer | list[Answer]:
        """Answer a prompt about an image, or a list of prompts about a list of images.

        An image is whatever `load_image` takes (path, bytes, PIL image, array, tensor, URL), an
        `EncodedImage`, or None for text only. With one prompt a list of images are the images of
        that prompt. With a list of prompts `image` is None or a list of the same length, each entry
        an image, a list of images, or None: a batch. In float32 its answers are those of the single
        calls; in a 16-bit dtype they are up to rounding, which depends on how many rows a product
        of matrices has, so that a token may change where two are almost equally likely.

        Options: see `GenerationOptions`; `batch_size` items run at once (8), and a new one starts
        as soon as one is done. Raises ImageError, and before any computation PromptError,
        ContextError and ValueError."""
        with self.checking():
            options = GenerationOptions(
                max_new_tokens,
                temperature,
                top_p,
                top_k,
                seed,
                stop,
                system,
                template,
                reduction,
                trace,
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
        with self.checking():
            wishes = GenerationOptions(**options)
            if not isinstance(prompt, str):
                kind = type(prompt).__name__
                raise PromptError(f"a stream answers one prompt, a str, not a {kind}")
            [(images, text)] = pair(image, prompt)
            request = self.request(images, text, wishes)
        return self.pieces(request, wishes)

    def pieces(self, request: Request, options: GenerationOptions) -> Generator[str, None, Answer]:
        """Run one request, yield its text, return its answer."""
        for _, row in self.run([request], options):
            if row.piece:
                yield row.piece
        return row.answer()

    def chat(self, image: Any = None, **options: Any) -> Chat:
        """Start a conversation, about an image (or a list of them) if given; options as of
        `generate`. A later image is reduced as the one before it. Raises ValueError for options
        that the model does not allow."""
        with self.checking():
            return Chat(self, image, GenerationOptions(**options))

    def encode(self, image: Any, reduction: Reduction | str | None = None) -> EncodedImage:
        """Look at one image now, to ask about it many times later.

        Merging happens here. The rest of the reduction holds for calls that name none; of an image
        that is encoded already only this rest can still change. Raises ImageError and ValueError.
        """
        with self.checking():
            checked = self.reduction_for([image], reduction)
        [encoded], _ = self.encode_images([(image, checked)], DEFAULT_BATCH_SIZE)
        return replace(encoded, reduction=checked)

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        reduction: Reduction | str | None = None,
        all_logits: bool = False,
    ) -> tuple[Tensor, KVCache, int]:
        """`Llava.prefill`: input_ids (1, T) with -200 per image, pixel_values (images, 3, S, S),
        and a reduction or its name. Raises PromptError, ValueError."""
        checked = self.checked_reduction(Reduction.of(reduction))
        return self.llava.prefill(input_ids, pixel_values, checked, all_logits)

    @torch.inference_mode()
    def decode(
        self, token: Tensor, position: int, past_key_values: KVCache
    ) -> tuple[Tensor, KVCache]:
        """`Llava.decode`: one token -> logits (1, 1, V) and the grown cache."""
        return self.llava.decode(token, position, past_key_values)

    @overload
    def score(
        self,
        image: Any,
        prompt: str,
        continuation: str,
        *,
        system: str | None = ...,
        template: str | None = ...,
        reduction: Reduction | str | None = ...,
        batch_size: int | None = ...,
    ) -> Score: ...

    @overload
    def score(
        self,
        image: Any,
        prompt: list[str] | tuple[str, ...],
        continuation: list[str] | tuple[str, ...],
        *,
        system: str | None = ...,
        template: str | None = ...,
        reduction: Reduction | str | None = ...,
        batch_size: int | None = ...,
    ) -> list[Score]: ...

    def score(
        self,
        image: Any,
        prompt: str | list[str] | tuple[str, ...],
        continuation: str | list[str] | tuple[str, ...],
        *,
        system: str | None = None,
        template: str | None = None,
        reduction: Reduction | str | None = None,
        batch_size: int | None = None,
    ) -> Score | list[Score]:
        """How likely is `continuation` as the answer's beginning? Lists are batches, as in
        `generate`.

        The space in front of an answer is implied, the end token is not scored. Raises as
        `generate`, and ValueError for an empty continuation."""
        with self.checking():
            items = pair(image, prompt)
            texts = paired_continuations(prompt, continuation, len(items))
            targets = [
                tuple(self.tokenizer.encode(text.removeprefix(" "), bos=False)) for text in texts
            ]
            if not all(targets):
                raise ValueError("a continuation to score must not be empty")
            requests = []
            for (images, text), target in zip(items, targets, strict=True):
                options = GenerationOptions(
                    len(target), system=system, template=template, reduction=reduction
                )
                requests.append(self.request(images, text, options))
            size = checked_batch_size(batch_size)
        scores = self.score_requests(requests, targets, size)
        return scores[0] if isinstance(prompt, str) else scores

    def score_requests(
        self, requests: Sequence[Request], targets: Sequence[tuple[int, ...]], batch_size: int
    ) -> list[Score]:
        """The scores of checked requests, `batch_size` at a time."""
        scores = []
        for start in range(0, len(requests), batch_size):
            chunk = slice(start, start + batch_size)
            scores += self.score_chunk(requests[chunk], targets[chunk], batch_size)
        return scores

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


def pair(image: Any, prompt: str | Sequence[str]) -> list[tuple[list[Any], str]]:
    """Sort out the arguments of a call: the images and the prompt of each item."""
    if isinstance(prompt, str):
        return [(as_list(image), prompt)]
    prompts = list(prompt) if isinstance(prompt, Iterable) else [prompt]
    if not all(isinstance(text, str) for text in prompts):
        raise PromptError("a prompt must be a str, or a list of them")
    images = [None] * len(prompts) if image is None else image
    if not isinstance(images, list | tuple):
        raise PromptError(f"{len(prompts)} prompts need a list of as many images, not one image")
    if len(images) != len(prompts):
        raise PromptError(f"{len(prompts)} prompts need as many images, not {len(images)}")
    return [(as_list(entry), text) for entry, text in zip(images, prompts, strict=True)]


def paired_continuations(
    prompt: str | Sequence[str], continuation: str | Sequence[str], count: int
) -> list[str]:
    """The continuations of `count` items: a str for one prompt, a list for a list of them."""
    if isinstance(prompt, str) and not isinstance(continuation, str):
        kind = type(continuation).__name__
        raise PromptError(f"one prompt needs one continuation, a str, not a {kind}")
    if not isinstance(prompt, str) and not isinstance(continuation, list | tuple):
        kind = type(continuation).__name__
        raise PromptError(f"a list of prompts needs a list of continuations, not a {kind}")
    texts = [continuation] if isinstance(continuation, str) else list(continuation)
    if not all(isinstance(text, str) for text in texts):
        raise PromptError("a continuation must be a str, or a list of them")
    if len(texts) != count:
        raise PromptError(f"{count} prompts need as many continuations, not {len(texts)}")
    return texts
