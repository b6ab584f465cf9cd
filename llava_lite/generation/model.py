"""`Model`: the calls of a user. `generate` returns answers, `stream` their pieces as they come,
`chat` keeps a conversation, `score` rates a given answer.

Shapes: V vocabulary, T prompt ids, S image side.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from llava_lite.cache import KVCache
from llava_lite.errors import PromptError
from llava_lite.generation.answer import Answer, Score, score_tokens
from llava_lite.generation.chat import Chat
from llava_lite.generation.loop import DEFAULT_BATCH_SIZE, Loop, check_batch_size
from llava_lite.generation.sampling import (
    GenerationOptions,
    Options,
    PromptOptions,
    check_names,
    with_size,
)
from llava_lite.generation.state import Request, State, as_list
from llava_lite.llava import EncodedImage
from llava_lite.reduction import Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Model(Loop):
    """A loaded LLaVA: weights, tokenizer and config. Holds no state of a call."""

    @overload
    def generate(
        self,
        image: Any,
        prompt: str,
        *,
        batch_size: int | None = ...,
        **options: "Unpack[Options]",
    ) -> Answer: ...

    @overload
    def generate(
        self,
        image: Any,
        prompt: list[str] | tuple[str, ...],
        *,
        batch_size: int | None = ...,
        **options: "Unpack[Options]",
    ) -> list[Answer]: ...

    def generate(
        self,
        image: Any,
        prompt: str | list[str] | tuple[str, ...],
        *,
        batch_size: int | None = None,
        **options: "Unpack[Options]",
    ) -> Answer | list[Answer]:
        """Answer a prompt about an image, or a list of prompts about a list of images.

        image: a path, bytes, PIL image, array, tensor or URL (see `load_image`), an `EncodedImage`,
        or None. A list of images belongs to one prompt. With a list of prompts, `image` is None or
        a list of the same length: per prompt an image, a list of images, or None.

        In float32 a batch gives the answers of the single calls. In 16 bit the rounding depends on
        the size of a batch, so a token may differ where two are almost equally likely.

        Options:
            batch_size: prompts that run at once, 8 by default. The next prompt starts as soon as
                one is done.
            max_new_tokens: None means 512, or as many as the context has room for.
            temperature: 0 (default) always takes the most likely token; above 0 samples.
            top_p: sample from the smallest set of tokens with this probability, 1.0 (default): all.
            top_k: sample from this many best tokens, 0 (default): all.
            seed: makes sampling repeatable; None (default) differs every time.
            stop: a string or several that end the answer; the answer does not contain them.
            system: replaces the system text of the template.
            template: replaces the model's prompt template.
            reduction: how to use fewer image tokens, a `Reduction` or the name of a preset.
            image_size: for FastVLM, the side of the image in pixels, a multiple of 64 in 256..2048.
                None (default) takes the model's size. Smaller images have fewer tokens.
            trace: True adds `Answer.trace`, the path of the image tokens and their cost (trace.py).

        Raises ImageError. Raises before any computation: PromptError, ContextError, ValueError, and
        TypeError for an unknown option."""
        requests, wishes, size = self.read_call(image, prompt, options, batch_size)
        answers = {
            index: row.answer()
            for index, row in self.run(requests, wishes, size)
            if row.finish_reason is not None
        }
        ordered = [answers[index] for index in range(len(requests))]
        return ordered[0] if isinstance(prompt, str) else ordered

    def read_call(
        self,
        image: Any,
        prompt: str | Sequence[str],
        options: Options,
        batch_size: int | None = None,
        single: bool = False,
    ) -> tuple[list[Request], GenerationOptions, int]:
        """Check the arguments of a call, before any computation: requests, options, batch size.

        `single` allows one prompt only. Raises as `generate`."""
        check_names("Model.stream" if single else "Model.generate", options, Options)
        wishes = GenerationOptions(**options)
        if single and not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise PromptError(f"a stream answers one prompt, a str, not a {kind}")
        size = check_batch_size(batch_size)
        items = pair(image, prompt)
        return [self.request(images, text, wishes) for images, text in items], wishes, size

    def stream(
        self, image: Any, prompt: str, **options: "Unpack[Options]"
    ) -> Generator[str, None, Answer]:
        """The text of `generate(image, prompt, **options)` in pieces, as soon as each is certain.

        Bad arguments raise at this call, not at the first piece. The generator returns the
        `Answer`; closing it early ends the computation."""
        [request], wishes, _ = self.read_call(image, prompt, options, single=True)
        return self.pieces(request, wishes)

    def pieces(self, request: Request, options: GenerationOptions) -> Generator[str, None, Answer]:
        """Run one request, yield its text, return its answer."""
        for _, row in self.run([request], options):
            if row.piece:
                yield row.piece
        return row.answer()

    def chat(self, image: Any = None, **options: "Unpack[Options]") -> Chat:
        """Start a conversation, about an image or a list of images if given. Options as in
        `generate`.

        A later image gets the reduction of the one before it. Raises ValueError for options that
        the model does not allow."""
        check_names("Model.chat", options, Options)
        return Chat(self, image, GenerationOptions(**options))

    def encode(
        self, image: Any, reduction: Reduction | str | None = None, image_size: int | None = None
    ) -> EncodedImage:
        """Run the vision tower on one image now, to ask about the image many times later.

        Tokens merge here. Later calls that name no reduction use its positions and its FastV. For
        an image that is encoded already, only these two can change; its size stays. image_size: as
        in `generate`. Raises ImageError and ValueError."""
        checked = self.reduction_for([image], with_size(reduction, image_size))
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
        checked = self.check_reduction(Reduction.of(reduction))
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
        batch_size: int | None = ...,
        **options: "Unpack[PromptOptions]",
    ) -> Score: ...

    @overload
    def score(
        self,
        image: Any,
        prompt: list[str] | tuple[str, ...],
        continuation: list[str] | tuple[str, ...],
        *,
        batch_size: int | None = ...,
        **options: "Unpack[PromptOptions]",
    ) -> list[Score]: ...

    def score(
        self,
        image: Any,
        prompt: str | list[str] | tuple[str, ...],
        continuation: str | list[str] | tuple[str, ...],
        *,
        batch_size: int | None = None,
        **options: "Unpack[PromptOptions]",
    ) -> Score | list[Score]:
        """How likely is `continuation` as the beginning of the answer? Lists are batches, as in
        `generate`.

        Options: system, template, reduction, image_size and batch_size, as in `generate`. A space
        in front of the continuation is implied, the end token is not scored. Raises as `generate`,
        and ValueError for an empty continuation."""
        requests, targets, size = self.read_scores(image, prompt, continuation, options, batch_size)
        scores = self.score_requests(requests, targets, size)
        return scores[0] if isinstance(prompt, str) else scores

    def read_scores(
        self,
        image: Any,
        prompt: str | Sequence[str],
        continuation: str | Sequence[str],
        options: PromptOptions,
        batch_size: int | None,
    ) -> tuple[list[Request], list[tuple[int, ...]], int]:
        """Check the arguments of `score`: requests, ids of the continuations, the batch size."""
        check_names("Model.score", options, PromptOptions)
        items = pair(image, prompt)
        texts = pair_continuations(prompt, continuation, len(items))
        targets = [
            tuple(self.tokenizer.encode(text.removeprefix(" "), bos=False)) for text in texts
        ]
        if not all(targets):
            raise ValueError("a continuation to score must not be empty")
        requests = [
            self.request(images, text, GenerationOptions(len(target), **options))
            for (images, text), target in zip(items, targets, strict=True)
        ]
        return requests, targets, check_batch_size(batch_size)

    def score_requests(
        self, requests: Sequence[Request], targets: Sequence[tuple[int, ...]], batch_size: int
    ) -> list[Score]:
        """Score checked requests, `batch_size` at a time."""
        scores = []
        for start in range(0, len(requests), batch_size):
            chunk = slice(start, start + batch_size)
            scores += self.score_chunk(requests[chunk], targets[chunk], batch_size)
        return scores

    def score_chunk(
        self, requests: Sequence[Request], targets: Sequence[tuple[int, ...]], batch_size: int
    ) -> list[Score]:
        """Score checked requests in one batch."""
        states, _ = self.encode_requests(requests, batch_size)
        logits, _ = self.target_logits(states, targets)
        return [score_tokens(rows, target) for rows, target in zip(logits, targets, strict=True)]

    @torch.inference_mode()
    def target_logits(
        self, states: Sequence[State], targets: Sequence[tuple[int, ...]]
    ) -> tuple[list[Tensor], list[State]]:
        """The logits (T, V) in front of each of T target tokens, for every item, and the states
        behind the prompts. V counts the ids of text only.

        Two passes: the prompts (last rows only), then all but the last token of each target."""
        logits, after = self.advance(states)
        packed = [[row] for row in logits]  # per item, logits (V,) of each target
        longer = [index for index, target in enumerate(targets) if len(target) > 1]
        if longer:
            more = [replace(after[index], pending_ids=targets[index][:-1]) for index in longer]
            logits, _ = self.advance(more, all_logits=True)
            rows = logits.split([len(state.pending_ids) for state in more])
            for index, item in zip(longer, rows, strict=True):
                packed[index].extend(item)
        text_ids = self.config.text.sampled_vocab_size
        return [torch.stack(rows)[:, :text_ids] for rows in packed], after


def pair(image: Any, prompt: str | Sequence[str]) -> list[tuple[list[Any], str]]:
    """The images and the prompt of each item. Raises PromptError."""
    if isinstance(prompt, str):
        return [(as_list(image), prompt)]
    prompts = list(prompt) if isinstance(prompt, Iterable) else [prompt]
    if not all(isinstance(text, str) for text in prompts):
        raise PromptError("a prompt must be a str or a list of str")
    images = [None] * len(prompts) if image is None else image
    if not isinstance(images, list | tuple):
        raise PromptError(f"{len(prompts)} prompts need a list of as many images, not one image")
    if len(images) != len(prompts):
        raise PromptError(f"{len(prompts)} prompts need as many images, not {len(images)}")
    return [(as_list(entry), text) for entry, text in zip(images, prompts, strict=True)]


def pair_continuations(
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
        raise PromptError("a continuation must be a str or a list of str")
    if len(texts) != count:
        raise PromptError(f"{count} prompts need as many continuations, not {len(texts)}")
    return texts
