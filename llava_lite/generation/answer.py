"""The results of a model: an answer, its text while it grows, and the score of a continuation.

Shapes: T tokens of a continuation, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_lite.generation.trace import Trace
from llava_lite.inputs.tokenizer import StreamDecoder


class Answer(str):
    """The text of an answer, with details.

    finish_reason: "stop" (end token or stop string) or "length" (max_new_tokens reached).
    usage: prompt_tokens (text), image_patches, image_tokens (after merging), kept_image_tokens
        (after pruning), completion_tokens (without the end token).
    timings: seconds of preprocess, vision, prefill and decode, and decode tokens_per_second. Items
        of a batch share the clock. Queued GPU work counts in the phase that waits for it.
    token_ids: the ids of the answer, without the end token.
    trace: with trace=True, the path of the image tokens (trace.py).
    """

    finish_reason: str
    usage: dict[str, int]
    timings: dict[str, float]
    token_ids: tuple[int, ...]
    trace: Trace | None

    def __new__(
        cls,
        text: str,
        finish_reason: str = "stop",
        usage: dict[str, int] | None = None,
        timings: dict[str, float] | None = None,
        token_ids: Sequence[int] = (),
        trace: Trace | None = None,
    ) -> "Answer":
        answer = super().__new__(cls, text)
        answer.finish_reason = finish_reason
        answer.usage = usage or {}
        answer.timings = timings or {}
        answer.token_ids = tuple(token_ids)
        answer.trace = trace
        return answer

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for json."""
        return {
            "text": str(self),
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "timings": self.timings,
            "token_ids": list(self.token_ids),
            **({} if self.trace is None else {"trace": self.trace.to_dict()}),
        }


class AnswerText:
    """Turns ids into visible text: stripped at both ends, as in LLaVA, and cut at a stop string.

    Text goes out as soon as it is certain. Three things are held back: an incomplete UTF-8 tail,
    trailing whitespace, and a possible start of a stop string."""

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str] = ()) -> None:
        self.decoder, self.stop_strings = decoder, stop_strings
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """Add one id. Returns the text that became certain."""
        return self.release(self.held + self.decoder.push(token), final=False)

    def finish(self) -> str:
        """The rest of the text; nothing after a stop string."""
        return "" if self.stopped else self.release(self.held + self.decoder.flush(), final=True)

    def release(self, text: str, final: bool) -> str:
        """Split `text` into a part to show now (returned) and a part to hold back."""
        if not self.text:
            text = text.lstrip()
        found = [at for at in (text.find(stop) for stop in self.stop_strings) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) if final else self.start_of_stop(text)
        visible = text[:end].rstrip()
        self.text, self.held = self.text + visible, text[len(visible) :]
        return visible

    def start_of_stop(self, text: str) -> int:
        """Where a stop string may begin at the end of `text`, else the length of `text`."""
        starts = range(max(0, len(text) - max(map(len, self.stop_strings), default=0)), len(text))
        unsure = (at for at in starts if any(s.startswith(text[at:]) for s in self.stop_strings))
        return next(unsure, len(text))


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    log_likelihood: natural logarithm, the sum of token_logprobs. is_greedy: whether greedy decoding
    writes exactly these token_ids."""

    log_likelihood: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool
    token_ids: tuple[int, ...]


def score_tokens(logits: Tensor, token_ids: tuple[int, ...]) -> Score:
    """Score a continuation of T tokens from the logits (T, V) before each token."""
    targets = torch.tensor(token_ids, device=logits.device)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]  # (T,)
    is_greedy = bool((logits.argmax(-1) == targets).all())
    return Score(float(logprobs.double().sum()), tuple(logprobs.tolist()), is_greedy, token_ids)
