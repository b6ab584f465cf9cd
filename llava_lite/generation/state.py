"""One item on its way through the loop: the request that was checked, the state between two steps,
and the row that gathers its answer.
"""

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
    """One sequence between two steps: the cache of what has run, and the ids that have yet to run.

    Never changed, only replaced as a whole: an interrupt finds the old state or the new one."""

    past_key_values: KVCache | None = None
    next_position: int = 0
    pending_ids: tuple[int, ...] = ()
    images: tuple[EncodedImage, ...] = ()  # one per image slot in pending_ids
    reduction: Reduction = NO_REDUCTION
    answer_ids: tuple[int, ...] = ()
    pruning: Pruning | None = None  # what the last forward dropped

    @property
    def num_pending_rows(self) -> int:
        """Decoder rows that have yet to run."""
        image_rows = sum(len(image.image_embeds) for image in self.images)
        return len(self.pending_ids) - len(self.images) + image_rows


NEW_STATE = State()


@dataclass(frozen=True)
class TokenCounts:
    """Tokens in front of an answer: of text, patches of images, image tokens that these became for
    the decoder, those of them that all its layers see, and the positions that images take."""

    prompt: int = 0
    patches: int = 0
    image: int = 0
    kept: int = 0
    positions: int = 0

    def add_images(
        self, images: tuple[EncodedImage, ...], pruning: Pruning | None, positions: str
    ) -> "TokenCounts":
        """And those of the images of one forward."""
        tokens = sum(len(image.image_embeds) for image in images)
        return replace(
            self,
            patches=self.patches + sum(image.num_patches for image in images),
            image=self.image + tokens,
            kept=self.kept + (tokens if pruning is None else len(pruning.kept)),
            positions=self.positions + sum(image.num_positions(positions) for image in images),
        )


NO_TOKENS = TokenCounts()


@dataclass(frozen=True)
class Request:
    """One item, checked against the context, nothing computed yet. `counts` cover the whole
    sequence in front of the answer, but for the images of this request. `prefix` are those of its
    first ids whose cache can be shared (prefix.py)."""

    state: State
    images: tuple[Any, ...]
    counts: TokenCounts
    max_new_tokens: int
    prefix: tuple[int, ...] = ()


@dataclass
class Row:
    """One item while it is being answered. `piece` is the text its last token made certain;
    `counts` and `trace` come with the first. `seconds` are what passed while it was there, `shares`
    its own part of them by decoder rows: these add up to the whole over the items of a batch."""

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

    def accept(self, token: int, state: State, eos_id: int) -> None:
        """Take the sampled token and the state it leads to."""
        if self.steps == 0:
            positions = state.reduction.positions
            self.counts = self.request.counts.add_images(
                self.state.images, state.pruning, positions
            )
        is_eos = token == eos_id
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
