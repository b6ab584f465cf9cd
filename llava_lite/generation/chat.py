"""A conversation, turn by turn, over one KV cache that only grows.

A chat asks its model to run what is new (`Model.continuation`, `Model.run`) and keeps the state
that is left behind.
"""

import weakref
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_lite.generation.answer import Answer
from llava_lite.generation.sampling import GenerationOptions
from llava_lite.generation.state import (
    NEW_STATE,
    NO_TOKENS,
    Request,
    State,
    TokenCounts,
    as_list,
)

if TYPE_CHECKING:
    from llava_lite.generation.loop import Loop


class Chat:
    """A conversation that keeps its KV cache: a turn runs only what is new since the last one.

    The image it was opened with belongs to the first message; `send` and `stream` may bring
    others."""

    def __init__(self, model: "Loop", image: Any, options: GenerationOptions) -> None:
        self.model, self.options = model, options
        self.images = as_list(image)
        model.reduction_for(self.images, options.reduction)  # raises now, not at the first message
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
        pieces = self.answer(text, self.request(text, image))
        self.open_stream = weakref.ref(pieces)
        return pieces

    def request(self, text: str, image: Any) -> Request:
        """Check the next message, before any computation."""
        images = as_list(image) if self.log.turns else self.images + as_list(image)
        return self.model.request(
            images, text, self.options, state=self.log.state, counts=self.log.counts
        )

    def close_stream(self) -> None:
        """Close a stream that somebody left open."""
        pieces = self.open_stream() if self.open_stream else None
        if pieces is not None:
            pieces.close()

    def answer(self, text: str, request: Request) -> Generator[str, None, Answer]:
        """Run one turn and, however it ends, keep what was answered."""
        new_ids = request.state.pending_ids[len(self.log.state.pending_ids) :]
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
                    self.log.input_ids + new_ids + row.state.answer_ids,
                    row.counts,
                )


@dataclass(frozen=True)
class ChatLog:
    """A chat between two turns. Replaced as a whole, so that no interrupt leaves half a turn."""

    turns: tuple[tuple[str, str], ...] = ()
    state: State = NEW_STATE
    input_ids: tuple[int, ...] = ()
    counts: TokenCounts = NO_TOKENS
