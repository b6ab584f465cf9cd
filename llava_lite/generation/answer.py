"""What a model gives back: the answer with how it came about, its text as soon as that is certain,
and the score of a continuation.

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
    """The answer's text, and how it came about.

    `finish_reason`: "stop" (end token or stop string) or "length" (max_new_tokens reached).
    `usage`: prompt_tokens (text ids), image_patches, image_tokens (what these became for the
    decoder), kept_image_tokens (those that were not pruned), completion_tokens (`token_ids`, end
    token not counted). `timings`: seconds of preprocess, vision, prefill, decode, and decode
    tokens_per_second; items that ran together share the clock, and work still queued on a GPU
    counts where it is awaited. `trace`: with trace=True, what became of the image
    tokens (trace.py).
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
class Score:
    """How likely the model finds a continuation: natural log-likelihood, per-token logprobs that
    add up to it, and whether greedy decoding would have written exactly these `token_ids`."""

    log_likelihood: float
    token_logprobs: tuple[float, ...]
    is_greedy: bool
    token_ids: tuple[int, ...]


def score_tokens(logits: Tensor, token_ids: tuple[int, ...]) -> Score:
    """Score one continuation of T tokens from the logits (T, V) in front of each."""
    targets = torch.tensor(token_ids, device=logits.device)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]  # (T,)
    is_greedy = bool((logits.argmax(-1) == targets).all())
    return Score(float(logprobs.double().sum()), tuple(logprobs.tolist()), is_greedy, token_ids)
