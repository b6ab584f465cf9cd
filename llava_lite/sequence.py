"""One item on its way through the loop: the request that was checked, the state between two steps,
and the row that gathers its answer.

Shapes: P image tokens, C decoder width, both in a state's image_embeds (P, C).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_lite.answer import Answer, AnswerText
from llava_lite.attention import KVCache


@dataclass(frozen=True)
class State:
    """One sequence between two steps: the cache of what has run, and the ids that have yet to run.

    Never changed, only replaced as a whole: an interrupt finds the old state or the new one."""

    past_key_values: KVCache | None = None
    next_position: int = 0
    pending_ids: tuple[int, ...] = ()
    image_embeds: tuple[Tensor, ...] = ()  # (P, C) per image slot in pending_ids
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
        elif len(answer_ids) >= self.request.max_new_tokens:
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


def as_list(image: Any) -> list[Any]:
    """None, one image or several -> a list of images."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]
