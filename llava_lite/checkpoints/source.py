"""What a checkpoint holds: its layout, its config, and where each of our tensors is stored.

`opening.open_source` makes a `Source` from the headers of the files, and finds every missing,
unexpected or misshapen tensor. A tensor's values are read only when the tensor is asked for.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_lite.checkpoints.names import is_unused, lora_target, our_names
from llava_lite.checkpoints.skeleton import EMBEDDING, HEAD, STATISTICS, expected_shapes
from llava_lite.checkpoints.tensors import (
    DTYPE_CODES,
    DTYPES,
    Files,
    read_tensors,
)
from llava_lite.config import LlavaConfig
from llava_lite.errors import CheckpointError, one_line

# ---- what a source holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Where one of our tensors is stored. `block`: the third of a packed q, k, v (None: all)."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int | None = None


@dataclass
class Inventory:
    """Tensors by our name. Files added later win: the base first, then the trained parts."""

    entries: dict[str, Entry] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    lora: dict[str, dict[str, Entry]] = field(
        default_factory=dict
    )  # our name -> {"A": .., "B": ..}
    in_memory: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict)
    vision_tower: str | None = None  # where a tower from elsewhere came from
    stored_head: Entry | None = None  # left out, see `Source`
    qwen2: bool = False  # whether the decoder is a Qwen2

    def add_files(self, files: Files, only: str = "", own_names: bool = False) -> None:
        """Add the tensors of the files; with `only`, those whose name of ours starts with it."""
        added: dict[str, Entry] = {}
        for file, promised in files.items():
            tensors = read_tensors(file)
            lost = next((name for name in promised if name not in tensors), None)
            if lost is not None:
                raise CheckpointError(f"{file}: tensor {lost!r}, listed in the index, is missing")
            for name, entry in self.locate(file, tensors, own_names).items():
                if name in added:
                    raise CheckpointError(
                        f"{file}: tensor {entry.stored!r} is also in {added[name].file}"
                    )
                if name.startswith(only):
                    added[name] = entry
                else:
                    self.ignored.append(entry.stored)
        self.entries |= added

    def locate(
        self, file: Path, tensors: Mapping[str, Tensor], own_names: bool = False
    ) -> dict[str, Entry]:
        """The entries of one file by our name. Raises CheckpointError for an unknown tensor."""
        # The state dict of open_clip's `model.visual` alone lacks the family's prefix.
        family = "visual." if "conv1.weight" in tensors else ""
        found: dict[str, Entry] = {}
        for stored, tensor in tensors.items():
            self.stored.append(stored)
            try:
                names = (stored,) if own_names else our_names(family + stored, self.qwen2)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from None
            if not names:
                self.ignored.append(stored)
            shape = tuple(tensor.shape)
            if len(names) == 3:
                if not shape or shape[0] % 3:
                    raise CheckpointError(
                        f"{file}: tensor {stored!r} of {shape} is no packed q, k, v"
                    )
                shape = (shape[0] // 3, *shape[1:])
            for block, name in enumerate(names):
                if name in found:
                    raise CheckpointError(
                        f"{file}: {stored!r} and {found[name].stored!r} are one tensor"
                    )
                packed = block if len(names) == 3 else None
                found[name] = Entry(file, stored, shape, tensor.dtype, packed)
        return found

    def add_module(self, visual: nn.Module) -> None:
        """Add the tower of an open_clip model in memory."""
        visual, file = open_clip_visual(visual), Path("open_clip model")
        self.in_memory[file] = visual.state_dict()
        self.vision_tower = str(file)
        self.entries |= self.locate(file, self.in_memory[file])

    def add_lora(self, file: Path) -> None:
        """Add the A and B matrices of an adapter. LoRA on the tower is ignored, with a warning."""
        tensors = read_tensors(file)
        skipped = 0
        for stored, tensor in tensors.items():
            try:
                target = lora_target(stored)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from None
            if target is None:
                skipped += 1
                self.ignored.append(stored)
                continue
            half, name = target
            entry = Entry(file, stored, tuple(tensor.shape), tensor.dtype)
            self.lora.setdefault(name, {})[half] = entry
        if skipped:
            warnings.warn(
                f"{file}: ignored {skipped} LoRA tensors of the vision tower", stacklevel=2
            )
        self.in_memory[file] = tensors  # small, and needed with every shard of the base


@dataclass
class Source:
    """An opened checkpoint: its config, and its tensors by our name, read one at a time.

    unused: tower parts that LLaVA never runs. ignored: stored names of other skipped tensors.
    stored_head: the head of a file whose config ties the head to the embedding, which wins.
    family: of the config.json, "llava_lite", "llava-hf" or "official" (also adapters and
    projectors). base, vision_tower: the names of the model and tower that were added.

    trusted: the folder is in our format, with a manifest. A conversion checks all values before it
    writes the manifest, so they are not checked for NaN and infinity again. `llava-lite info
    --checksums` compares them with the manifest."""

    path: Path
    layout: str
    config: LlavaConfig
    entries: dict[str, Entry]
    unused: dict[str, Entry] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    lora: dict[str, dict[str, Entry]] = field(default_factory=dict)
    lora_scale: float = 1.0
    tokenizer_file: Path | None = None
    family: str = "official"
    trusted: bool = False
    base: str | None = None
    vision_tower: str | None = None
    stored_head: Entry | None = None
    in_memory: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    _last: tuple[Path, Mapping[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights, in which the tower runs too."""
        return self.entries["decoder.embed_tokens.weight"].dtype

    @property
    def revision(self) -> str | None:
        """Commit of a folder inside the huggingface_hub cache."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @property
    def num_parameters(self) -> int:
        """The number of weights. A tied head counts once, statistics of a tower do not count."""
        left_out = (*STATISTICS, HEAD) if self.config.text.tie_embeddings else STATISTICS
        counted = (name for name in self.entries if not name.endswith(left_out))
        return sum(math.prod(self.entries[name].shape) for name in counted)

    def is_tied(self, name: str) -> bool:
        """Whether a tensor is a tied head, which is read from the embedding."""
        return name == HEAD and self.entries[HEAD] is self.entries[EMBEDDING]

    def check_head(self) -> None:
        """Warn if the head that the config leaves out differs from the embedding."""
        head, embedding = self.stored_head, self.entries[EMBEDDING]
        if head is not None and not torch.equal(self._stored(embedding), self._stored(head)):
            warnings.warn(
                f"{head.file}: {head.stored!r} differs from {embedding.stored!r}, but the config "
                f"says tie_word_embeddings: {embedding.stored!r} is used as the head",
                stacklevel=2,
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by our name."""
        return (self.entries.get(name) or self.unused[name]).shape

    def names(self) -> list[str]:
        """Our names, file by file: reading in this order opens each file once."""
        order = {entry.file: None for entry in self.entries.values()}
        rank = {file: number for number, file in enumerate(order)}
        return sorted(self.entries, key=lambda name: rank[self.entries[name].file])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor by our name, with LoRA merged, in `dtype` (default: the decoder's).

        Without a cast, the tensor is a view of the mapped file. Raises CheckpointError for NaN and
        infinity."""
        return self.read_part(name, (), dtype)

    def read_part(
        self, name: str, part: tuple[slice, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        """As `read`, for one part of a tensor: nothing else is cast or copied."""
        entry = self.entries.get(name) or self.unused[name]
        dtype = dtype or self.dtype
        tensor = self._stored(entry)
        if name in self.lora:
            # W + (alpha / r) B A, in float32 and cast once at the end.
            pair = self.lora[name]
            change = self._stored(pair["B"]).float() @ self._stored(pair["A"]).float()
            tensor = torch.add(tensor.float(), change, alpha=self.lora_scale)
        result = tensor[part].to(dtype).contiguous()
        if not self.trusted:
            check_finite(result, f"{entry.file}: tensor {entry.stored!r}")
        return result

    def unmap(self) -> None:
        """Unmap the last file. The next tensor maps its file again."""
        self._last = None

    def _stored(self, entry: Entry) -> Tensor:
        tensors = self.in_memory.get(entry.file)
        if tensors is None:
            if self._last is None or self._last[0] != entry.file:
                self._last = None  # unmap the last file before mapping the next
                self._last = (entry.file, read_tensors(entry.file))
            tensors = self._last[1]
        tensor = tensors[entry.stored]
        return tensor if entry.block is None else tensor.chunk(3)[entry.block]


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise CheckpointError for NaN or infinity. `where` names file and tensor."""
    for part in tensor.flatten().split(1 << 24):  # bounds the memory of isfinite
        if not torch.isfinite(part).all():
            raise CheckpointError(f"{where} has NaN or infinite values (as {tensor.dtype})")


def check_entries(
    entries: Mapping[str, Entry], config: LlavaConfig, where: Path
) -> dict[str, Entry]:
    """Compare names, shapes and dtypes with the model. Returns the unused tower parts.

    Raises CheckpointError that names the first problem and the number of such problems."""
    try:
        expected = expected_shapes(config)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{where}: no model has the config's sizes: {reason}") from error
    unused = {name: e for name, e in entries.items() if is_unused(name, config.vision)}
    check_names(entries, expected, unused, where)
    wrong = [name for name in expected if entries[name].shape != expected[name]]
    if wrong:
        first, shape = entries[wrong[0]], expected[wrong[0]]
        raise CheckpointError(
            f"{first.file}: tensor {first.stored!r} has shape {first.shape}, but the config says "
            f"{shape} ({len(wrong)} such tensors)"
        )
    for entry in entries.values():
        if entry.dtype not in DTYPE_CODES:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.stored!r} is {entry.dtype}; "
                f"supported are {', '.join(DTYPES)}"
            )
    return unused


def check_names(
    entries: Mapping[str, Entry],
    expected: Mapping[str, tuple[int, ...]],
    unused: Mapping[str, Entry],
    where: Path,
) -> None:
    """Raise CheckpointError for a tensor that the model does not have, and for a missing one."""
    unexpected = [name for name in entries if name not in expected and name not in unused]
    if unexpected:
        first = entries[unexpected[0]]
        raise CheckpointError(
            f"{first.file}: unexpected tensor {first.stored!r} ({len(unexpected)} in total)"
        )
    missing = [name for name in expected if name not in entries]
    if missing:
        hint = ""
        if all(name.startswith("projector.") for name in missing):
            hint = "; is it a plain Llama? give the projector as the model and this folder as base"
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}{hint}"
        )


def check_lora(inventory: Inventory, where: Path) -> None:
    """Raise CheckpointError unless each A (r, in) and B (out, r) pair fits the weight (out, in)."""
    for name, pair in inventory.lora.items():
        base = inventory.entries.get(name)
        if base is None or len(pair) != 2:
            present = next(iter(pair.values())).stored
            raise CheckpointError(f"{where}: {present!r} lacks its other half or its base weight")
        a, b = pair["A"], pair["B"]
        if (
            len(a.shape) != 2
            or len(b.shape) != 2
            or ((b.shape[0], a.shape[1]) != base.shape or a.shape[0] != b.shape[1])
        ):
            raise CheckpointError(
                f"{a.file}: {a.stored!r} {a.shape} with B {b.shape} does not fit {base.shape}"
            )


def open_clip_visual(model: nn.Module) -> nn.Module:
    """The visual tower of an open_clip model. Raises CheckpointError unless it uses QuickGELU."""
    visual = getattr(model, "visual", model)
    if not any(type(module).__name__ == "QuickGELU" for module in visual.modules()):
        # Exact GELU with these weights gives plausible, quietly worse answers.
        raise CheckpointError(
            "the open_clip model does not use QuickGELU: build its -quickgelu variant"
        )
    return visual
