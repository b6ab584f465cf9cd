"""A conversation over one KV cache that only grows: each message runs its new tokens only."""

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
    """A conversation that keeps its KV cache.

    The image of `Model.chat` belongs to the first message. `send` and `stream` can add others."""

    def __init__(self, model: "Loop", image: Any, options: GenerationOptions) -> None:
        self.model, self.options = model, options
        self.images = as_list(image)
        model.reduction_for(self.images, options.reduction)  # raises now, not at the first message
        self.log = ChatLog()
        self.open_stream: weakref.ref[Generator[str, None, Answer]] | None = None

    @property
    def history(self) -> list[tuple[str, str]]:
        """The turns so far, as (message, answer)."""
        return list(self.log.turns)

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All ids of the conversation so far, answers included, -200 for each image."""
        return self.log.input_ids

    def clear(self) -> None:
        """Start over with the image of `Model.chat`."""
        self.close_stream()
        self.log = ChatLog()

    def send(self, text: str, image: Any = None) -> Answer:
        """Send a message, with an image or several if given, and return the whole answer.

        Raises as `Model.generate`. An error leaves the chat as it was."""
        pieces = self.stream(text, image)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream(self, text: str, image: Any = None) -> Generator[str, None, Answer]:
        """`send` in pieces. If the stream is closed or interrupted, the text so far stays in the
        history as the answer. A new message closes an open stream."""
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
        """Close a stream that was left open."""
        pieces = self.open_stream() if self.open_stream else None
        if pieces is not None:
            pieces.close()

    def answer(self, text: str, request: Request) -> Generator[str, None, Answer]:
        """Run one turn. Keep its answer, also if the turn is interrupted."""
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
    """A chat between two turns. It is replaced as a whole: no interrupt leaves half a turn."""

    turns: tuple[tuple[str, str], ...] = ()
    state: State = NEW_STATE
    input_ids: tuple[int, ...] = ()
    counts: TokenCounts = NO_TOKENS
