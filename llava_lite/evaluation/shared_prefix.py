"""Prefix caching for several questions about the same images.

The text before the image and the image itself are most of a prompt. They are prefilled once, and
every question runs only its own words on that cache, as in a chat. The answers are the same up to
rounding. Pruning excludes this: FastV scores image tokens by the last token of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch

from llava_lite.config import IMAGE_TOKEN_ID
from llava_lite.generation.model import Model
from llava_lite.generation.state import Request, State


@dataclass(frozen=True)
class Beginning:
    """The shared beginning of one group's requests: `length` ids, of which `num_images` are images.

    `states`: each request's state, started with the cached prefix of its template."""

    requests: Sequence[Request]
    states: Sequence[State]
    length: int
    num_images: int

    @classmethod
    def of(cls, model: Model, requests: Sequence[Request]) -> "Beginning":
        """The longest beginning that leaves every request at least one id. Images are encoded."""
        states = [model.apply_prefix(request) for request in requests]
        shared = commonprefix([state.pending_ids for state in states])  # of any sequences
        shared = shared[: min(len(state.pending_ids) for state in states) - 1]
        return cls(requests, states, len(shared), shared.count(IMAGE_TOKEN_ID))

    @property
    def is_worth_it(self) -> bool:
        """Whether sharing saves at least one image, and the reduction allows sharing."""
        several = len(self.requests) > 1 and self.num_images > 0
        return several and self.requests[0].state.reduction.fastv is None

    @property
    def state(self) -> State:
        """The shared beginning, ready to run."""
        first, images = self.states[0], self.requests[0].images[: self.num_images]
        return replace(first, pending_ids=first.pending_ids[: self.length], images=images)

    def rest(self, after: State) -> list[Request]:
        """The requests without the beginning, continued from the state `after` it."""
        positions = after.reduction.positions
        return [
            replace(
                request,
                state=replace(after, pending_ids=before.pending_ids[self.length :]),
                images=request.images[self.num_images :],
                counts=request.counts.add_images(request.images[: self.num_images], (), positions),
            )
            for request, before in zip(self.requests, self.states, strict=True)
        ]


@torch.inference_mode()
def after_shared_prefixes(model: Model, groups: Sequence[Sequence[Request]]) -> list[list[Request]]:
    """Prefill the beginnings of all groups in one forward pass.

    Returns the requests for the rest of each prompt, or the same requests if nothing is shared.
    The requests of a group have the same encoded images in the same order."""
    beginnings = [Beginning.of(model, group) if group else None for group in groups]
    shared = [one for one in beginnings if one is not None and one.is_worth_it]
    if not shared:
        return [list(group) for group in groups]
    _, advanced = model.advance([one.state for one in shared])
    states = iter(advanced)
    return [
        one.rest(next(states)) if one is not None and one.is_worth_it else list(group)
        for one, group in zip(beginnings, groups, strict=True)
    ]
