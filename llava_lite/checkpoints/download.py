"""Download checkpoints from the Hugging Face hub, only on request.

huggingface_hub does the work (cache, resume, authentication) and is imported at its first use.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_lite.checkpoints.opening import find_local
from llava_lite.checkpoints.tensors import read_json, read_tensors, weight_files
from llava_lite.errors import CheckpointError, one_line

# Files beside the weights: configs, indexes, tokenizer, small LoRA and projector files.
SIDE_FILES = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "mm_projector.*",
    "adapter_model.*",
    "non_lora_trainables.*",
)
# Only the first kind in a repository is downloaded.
WEIGHTS = (
    "open_clip_*.safetensors",
    "open_clip_*.bin",
    "model*.safetensors",
    "pytorch_model*.bin",
)
# A checkpoint, or a part of one, has at least one of these.
CONTENTS = (*WEIGHTS, "mm_projector.*", "adapter_model.*")
REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
ABOUT = "about 14 GB for LLaVA-1.5 7B, 26 GB for 13B"


@dataclass(frozen=True)
class Plan:
    """The files of a download, and their total size in bytes (None: unknown)."""

    repo_id: str
    revision: str | None
    files: tuple[str, ...]
    size: int | None

    def __str__(self) -> str:
        size = f"{self.size / 1e9:.1f} GB" if self.size is not None else ABOUT
        return f"{len(self.files)} files of {self.repo_id} ({size})"


def choose_files(names: Sequence[str]) -> list[str]:
    """Choose the files that a checkpoint needs, without a second copy of the weights."""
    top = [name for name in names if "/" not in name]
    kinds = (fnmatch.filter(top, pattern) for pattern in WEIGHTS)
    weights = next((found for found in kinds if found), [])
    side = {name for pattern in SIDE_FILES for name in fnmatch.filter(top, pattern)}
    return sorted(side.union(weights))


def plan_download(repo_id: str, revision: str | None = None, timeout: float = 10.0) -> Plan:
    """Ask the hub for the files of a repository. Raises CheckpointError if it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    except Exception as error:  # network, authentication and hub errors share no base class
        raise CheckpointError(f"{repo_id}: cannot reach the hub: {one_line(error)}") from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    files = choose_files(list(sizes))
    known = [size for name in files if (size := sizes[name]) is not None]
    return Plan(repo_id, revision, tuple(files), sum(known) if len(known) == len(files) else None)


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    destination: str | Path | None = None,
) -> Path:
    """Download a checkpoint, and the CLIP tower that an official one needs. Returns its folder.

    An interrupted download resumes. destination: a folder instead of the hub's cache; a tower is
    put beside it. offline: only look into the cache, which excludes a destination. Raises
    CheckpointError."""
    if not REPO_ID.fullmatch(repo_id):
        raise CheckpointError(f"{repo_id!r} is no hub id of the form owner/name")
    if offline and destination is not None:
        raise CheckpointError(f"{destination}: nothing can be put there offline")
    if offline:
        folder = cached(repo_id, revision)
        if folder is None:
            raise CheckpointError(f"{repo_id}: not complete in the local cache (offline)")
        return folder
    return fetch_with_tower(repo_id, revision, destination)


def fetch_with_tower(
    repo_id: str,
    revision: str | None,
    destination: str | Path | None,
    vision_tower: object = None,
) -> Path:
    """Download a repository, and its vision tower if that is not on this disk."""
    folder = fetch(plan_download(repo_id, revision), destination)
    tower = missing_tower(folder, vision_tower)
    if tower is not None:
        beside = folder.parent / tower.rsplit("/", 1)[-1] if destination is not None else None
        fetch(plan_download(tower), beside)
    return folder


def fetch(plan: Plan, destination: str | Path | None) -> Path:
    """Download the files of a plan. Raises CheckpointError."""
    if not any(fnmatch.filter(plan.files, pattern) for pattern in CONTENTS):
        raise CheckpointError(
            f"{plan.repo_id}: holds no weights, projector or adapter that can be read "
            f"({', '.join(CONTENTS)})"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            plan.repo_id,
            revision=plan.revision,
            allow_patterns=list(plan.files),
            local_dir=destination,
        )
    except Exception as error:  # network, disk and hub errors share no base class
        raise CheckpointError(f"{plan.repo_id}: download failed: {one_line(error)}") from error
    return Path(folder)


def missing_tower(folder: Path, vision_tower: object = None) -> str | None:
    """The hub id of a folder's vision tower, if the tower is not on this disk.

    None if another `vision_tower` is given, or the weights contain a tower."""
    config = folder / "config.json"
    named = read_json(config).get("mm_vision_tower") if config.is_file() else None
    if vision_tower is not None or not isinstance(named, str) or not REPO_ID.fullmatch(named):
        return None
    place = find_local(named, folder)
    is_here = place is not None and (place.is_file() or weight_files(place))
    return None if is_here or has_tower(folder) else named


def has_tower(folder: Path) -> bool:
    """Whether the weights contain a tower, by the index or the files' headers."""
    names: set[str] = set()
    for file, promised in weight_files(folder).items():
        names.update(promised or read_tensors(file))
    return any("vision_tower." in name for name in names)


def cached(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the cache, if its weights are complete. No network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        small = (*folder.glob("mm_projector.*"), *folder.glob("adapter_model.*"))
        complete = bool(weight_files(folder)) or any(file.is_file() for file in small)
    except (OSError, ValueError, CheckpointError):
        return None
    return folder if complete else None


def resolve(
    source: str | Path,
    *,
    download_missing: bool = False,
    revision: str | None = None,
    offline: bool = False,
    vision_tower: object = None,
) -> Path:
    """Find a checkpoint: a local path, or a hub id in the cache, which is downloaded on request.

    vision_tower: the tower that will be used instead of the one in the config. Without
    `download_missing` nothing is downloaded: CheckpointError says what a download would fetch, its
    size, and how to ask for it."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if not REPO_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such file or folder, and no hub id (owner/name)")
    folder = cached(name, revision)
    if folder is not None and (offline or missing_tower(folder, vision_tower) is None):
        return folder
    if download_missing and not offline:
        return fetch_with_tower(name, revision, None, vision_tower)
    raise CheckpointError(f"{name}: {explain_missing(name, folder, revision, offline)}")


def explain_missing(name: str, folder: Path | None, revision: str | None, offline: bool) -> str:
    """Say what is missing on this disk, its size, and how to get it."""
    wanted = name if folder is None else missing_tower(folder) or name
    what = f"{wanted} ({ABOUT})" if folder is None else f"its vision tower {wanted} (1.7 GB)"
    if not offline:
        try:
            what = str(plan_download(wanted, revision if folder is None else None, timeout=5.0))
        except CheckpointError:
            pass  # the estimate stays
    how = f"`llava-lite download {name}`, or --download"
    if folder is not None:
        how += "; or give a tower's folder as vision_tower (--vision-tower)"
    return f"not on this disk; it would fetch {what}: ask for it with {how}"
