"""One item in the loop: its checked request, its state between two steps, its growing answer."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llava_lite.cache import KVCache
from llava_lite.fastv import Pruning
from llava_lite.generation.answer import Answer, AnswerText
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.trace import Trace
from llava_lite.llava import EncodedImage
from llava_lite.reduction import NO_REDUCTION, Reduction


@dataclass(frozen=True)
class State:
    """One sequence between two steps: its cache and the ids that still have to run.

    A state is never changed, only replaced: an interrupt leaves the old state or the new one."""

    past_key_values: KVCache | None = None
    next_position: int = 0
    pending_ids: tuple[int, ...] = ()
    images: tuple[EncodedImage, ...] = ()  # one per image slot in pending_ids
    reduction: Reduction = NO_REDUCTION
    answer_ids: tuple[int, ...] = ()
    prunings: tuple[Pruning, ...] = ()  # the stages of the last forward

    @property
    def num_pending_rows(self) -> int:
        """Decoder rows that still have to run."""
        image_rows = sum(len(image.image_embeds) for image in self.images)
        return len(self.pending_ids) - len(self.images) + image_rows


NEW_STATE = State()


@dataclass(frozen=True)
class TokenCounts:
    """Tokens before an answer.

    prompt: text tokens. patches: of all images. image: image tokens in the decoder. kept: image
    tokens after pruning. positions: decoder positions of the images."""

    prompt: int = 0
    patches: int = 0
    image: int = 0
    kept: int = 0
    positions: int = 0

    def add_images(
        self, images: tuple[EncodedImage, ...], prunings: tuple[Pruning, ...], positions: str
    ) -> "TokenCounts":
        """Add the images of one forward."""
        tokens = sum(len(image.image_embeds) for image in images)
        return replace(
            self,
            patches=self.patches + sum(image.num_patches for image in images),
            image=self.image + tokens,
            kept=self.kept + (len(prunings[-1].kept) if prunings else tokens),
            positions=self.positions + sum(image.num_positions(positions) for image in images),
        )


NO_TOKENS = TokenCounts()


@dataclass(frozen=True)
class Request:
    """One checked item, before any computation.

    counts: tokens before the answer, without this request's images (they are not encoded yet).
    prefix: first ids of the prompt whose cache can be shared (prefix.py)."""

    state: State
    images: tuple[Any, ...]
    counts: TokenCounts
    max_new_tokens: int
    prefix: tuple[int, ...] = ()


@dataclass
class Row:
    """One item while it is answered.

    piece: text that became certain with the last token. counts, trace: set by the first step.
    seconds: time per phase. shares: this item's part of the time, by decoder rows; the shares of a
    batch add up to its time."""

    request: Request
    state: State
    options: GenerationOptions
    text: AnswerText
    generator: torch.Generator | None
    seconds: dict[str, float]
    counts: TokenCounts = NO_TOKENS
    trace: Trace | None = None
    finish_reason: str | None = None
    steps: int = 0
    piece: str = ""
    shares: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})

    def accept(self, token: int, state: State, end_ids: Collection[int]) -> None:
        """Take the sampled token and the state after the step. `end_ids` end the answer."""
        if self.steps == 0:
            positions = state.reduction.positions
            self.counts = self.request.counts.add_images(
                self.state.images, state.prunings, positions
            )
        is_eos = token in end_ids
        new_ids = () if is_eos else (token,)
        answer_ids = self.state.answer_ids + new_ids
        self.state = replace(state, pending_ids=new_ids, answer_ids=answer_ids)
        self.steps += 1
        self.piece = "" if is_eos else self.text.push(token)
        if is_eos or self.text.stopped:
            self.finish_reason = "stop"
        elif len(answer_ids) >= self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.piece += self.text.finish()

    def answer(self) -> Answer:
        """The finished answer."""
        decode = self.seconds["decode"]
        usage = {
            "prompt_tokens": self.counts.prompt,
            "image_patches": self.counts.patches,
            "image_tokens": self.counts.image,
            "kept_image_tokens": self.counts.kept,
            "completion_tokens": len(self.state.answer_ids),
        }
        speed = (self.steps - 1) / decode if decode else 0.0
        timings = {**self.seconds, "tokens_per_second": speed}
        reason = self.finish_reason or "length"
        token_ids = self.state.answer_ids
        return Answer(self.text.text, reason, usage, timings, token_ids, self.trace)


def as_list(image: Any) -> list[Any]:
    """None, one image or several -> a list of images."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]
