"""Several questions about the same images: what their prompts begin with runs once for all of them.

Most of a prompt are the words in front of the image, and the image. With the cache of these behind
it every question only runs its own words, as in a chat: the answers are the same up to rounding,
several times sooner. What prunes cannot do that, since FastV chooses by the end of the prompt.
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
    """What the requests of one group share: `state` with all of it pending, `length` ids of which
    `num_images` are images. `states`: each request's own, begun with the cache of its template."""

    requests: Sequence[Request]
    states: Sequence[State]
    length: int
    num_images: int

    @classmethod
    def of(cls, model: Model, requests: Sequence[Request]) -> "Beginning":
        """The longest one that leaves every request something to run. Their images are encoded."""
        states = [model.apply_prefix(request) for request in requests]
        shared = commonprefix([state.pending_ids for state in states])  # of any sequences
        shared = shared[: min(len(state.pending_ids) for state in states) - 1]
        return cls(requests, states, len(shared), shared.count(IMAGE_TOKEN_ID))

    @property
    def is_worth_it(self) -> bool:
        """Whether running it once saves an image, in a reduction that allows it."""
        several = len(self.requests) > 1 and self.num_images > 0
        return several and self.requests[0].state.reduction.fastv is None

    @property
    def state(self) -> State:
        """The shared beginning, ready to run."""
        first, images = self.states[0], self.requests[0].images[: self.num_images]
        return replace(first, pending_ids=first.pending_ids[: self.length], images=images)

    def rest(self, after: State) -> list[Request]:
        """The requests, to go on `after` the beginning."""
        return [
            continued(request, before, after, self.length, self.num_images)
            for request, before in zip(self.requests, self.states, strict=True)
        ]


def continued(
    request: Request, before: State, after: State, length: int, num_images: int
) -> Request:
    """What is left of a request when `length` ids and `num_images` of its images have run."""
    seen, left = request.images[:num_images], request.images[num_images:]
    return replace(
        request,
        state=replace(after, pending_ids=before.pending_ids[length:]),
        images=left,
        counts=request.counts.add_images(seen, None, after.reduction.positions),
    )


@torch.inference_mode()
def after_shared_prefixes(model: Model, groups: Sequence[Sequence[Request]]) -> list[list[Request]]:
    """Run the beginnings of all groups in one forward. Returns for each group requests for the rest
    of each of its prompts, or the same requests where there is nothing to share.

    The requests of a group show the same images, encoded, in the same order."""
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
