"""Pack many blocks of questions and answers after one image. A block sees the image and itself, but
no other block, and has the positions that it would have alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llava_lite.config import IMAGE_TOKEN_ID, TINY
from llava_lite.evaluation.scenes.questions import Question
from llava_lite.inputs.prompt import build_prompt
from llava_lite.inputs.tokenizer import Tokenizer
from llava_lite.layout import Layout
from llava_lite.llama import LlamaDecoder
from training.labels import IGNORE
from training.scenes import GRID

# How often each family is asked: with new weights, and with weights that know the easy families.
FAMILY_WEIGHTS = {
    "count": (1.5, 2.0),
    "count_color": (1.0, 1.5),
    "count_shape": (1.0, 1.5),
    "color": (2.0, 1.0),
    "shape": (2.0, 1.0),
    "exists": (5.0, 1.0),  # two properties must be found on the same object
    "where": (1.0, 3.0),
    "relation": (0.7, 1.5),
    "digit": (0.7, 2.5),
}


def conversation(turns: tuple[tuple[str, str | None], ...]) -> str:
    """The prompt text of question-answer turns about one image."""
    first = (f"<image>\n{turns[0][0]}", turns[0][1])
    return build_prompt(TINY.template, [first, *turns[1:]])


class Writer:
    """Encodes conversations: the part before the image (always the same), and the block after it
    with its answer tokens marked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.encode_prompt(conversation((("?", None),)))
        self.head = ids[: ids.index(IMAGE_TOKEN_ID)]
        self.block = lru_cache(maxsize=200_000)(self._block)

    def _block(self, turns: tuple[tuple[str, str], ...]) -> tuple[list[int], list[int]]:
        """Ids after the image, and their targets: the next id if it belongs to an answer or ends
        one, else IGNORE."""
        skip = len(self.head) + 1
        ids = self.tokenizer.encode_prompt(conversation(turns))[skip:]
        targets = [IGNORE] * len(ids)
        for done in range(len(turns)):
            question = (*turns[:done], (turns[done][0], None))
            start = len(self.tokenizer.encode_prompt(conversation(question))) - skip
            stop = len(self.tokenizer.encode_prompt(conversation(turns[: done + 1]))) - skip
            targets[start - 1 : stop - 1] = ids[start:stop]
        return ids, targets


def pick_turns(
    asked: Sequence[Question], rng: np.random.Generator, count: int, late: bool = False
) -> list[tuple[tuple[str, str], ...]]:
    """`count` blocks of one to three questions, with families by FAMILY_WEIGHTS. The first block is
    the description of the image, which names every object."""
    by_family: dict[str, list[Question]] = {}
    for one in asked:
        by_family.setdefault(one.family, []).append(one)
    describe = by_family.pop("describe")[0]
    families = list(by_family)
    weights = np.array([FAMILY_WEIGHTS[family][late] for family in families])
    blocks: list[tuple[tuple[str, str], ...]] = [((describe.text, describe.answer),)]
    while len(blocks) <= count:
        turns = []
        for family in rng.choice(
            families, rng.choice([1, 1, 1, 1, 2, 3]), p=weights / weights.sum()
        ):
            one = by_family[family][rng.integers(len(by_family[family]))]
            turns.append((one.text, one.answer))
        blocks.append(tuple(turns))
    return blocks


@dataclass
class Packed:
    """A training batch: every image with its question blocks is one item of packed rows."""

    token_ids: list[int]  # (R,), IMAGE_TOKEN_ID at image rows
    position_ids: list[int]  # (R,)
    targets: list[int]  # (R,)
    lengths: list[int]
    masks: list[Tensor]
    patches: list[np.ndarray]  # per item: which patches stand in the image slot, ascending


def pack(
    writer: Writer,
    blocks_per_image: Sequence[Sequence[tuple[tuple[str, str], ...]]],
    patches: list[np.ndarray],
    device: str,
) -> Packed:
    """Lay out head, image rows and blocks of each image. A block sees head, image and itself. Its
    positions start after all 576 patches, even if some are left out."""
    packed = Packed([], [], [], [], [], patches)
    head = len(writer.head)
    for blocks, kept in zip(blocks_per_image, patches, strict=True):
        token_ids = writer.head + [IMAGE_TOKEN_ID] * len(kept)
        position_ids = [*range(head), *(head + kept)]
        targets = [IGNORE] * len(token_ids)
        owner = [0] * len(token_ids)
        for index, turns in enumerate(blocks, start=1):
            ids, wanted = writer.block(turns)
            start = head + GRID * GRID
            token_ids, targets = token_ids + ids, targets + wanted
            position_ids += range(start, start + len(ids))
            owner += [index] * len(ids)
        owners = torch.tensor(owner, device=device)
        seen = ((owners == 0)[None, :] | (owners[:, None] == owners[None, :])).tril()
        # Additive and in bfloat16: a bool mask would be converted again in every layer.
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=device)
        packed.masks.append(mask.masked_fill_(~seen, -1e4))
        packed.lengths.append(len(token_ids))
        packed.token_ids += token_ids
        packed.position_ids += [int(position) for position in position_ids]
        packed.targets += targets
    return packed


def answer_loss(
    decoder: LlamaDecoder, packed: Packed, image_embeds: Tensor, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answer tokens. image_embeds (image rows of all items, C). Returns loss,
    and for every answer token whether it is right and its row."""
    token_ids = torch.tensor(packed.token_ids, device=device)
    targets = torch.tensor(packed.targets, device=device)
    is_image = token_ids == IMAGE_TOKEN_ID
    words = decoder.embed_tokens(token_ids.clamp(min=0))
    input_embeds = words.index_put((is_image.nonzero()[:, 0],), image_embeds.to(words.dtype))
    places = torch.tensor(packed.position_ids, device=device).split(packed.lengths)
    past = [None] * len(packed.lengths)
    # Nothing follows these rows, so their next position does not matter.
    layouts = [Layout(len(item), item, next_position=0) for item in places]
    x = decoder(input_embeds, layouts, past, masks=packed.masks).hidden_states
    rows = (targets != IGNORE).nonzero()[:, 0]
    logits = decoder.lm_head(x[rows]).float()
    # A description is long: its tokens must not drown the short answers.
    run_length = torch.tensor(answer_lengths(packed.targets), device=device)[rows]
    weights = run_length.clamp(min=3).float().rsqrt()
    losses = F.cross_entropy(logits, targets[rows], reduction="none")
    return (losses * weights).sum() / weights.sum(), logits.argmax(-1) == targets[rows], rows


def answer_lengths(targets: Sequence[int]) -> list[int]:
    """For every row with a target, how many tokens its answer has; 0 elsewhere."""
    lengths = [0] * len(targets)
    for is_answer, run in groupby(range(len(targets)), key=lambda row: targets[row] != IGNORE):
        rows = list(run)
        if is_answer:
            for row in rows:
                lengths[row] = len(rows)
    return lengths
