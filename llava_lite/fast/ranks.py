"""Processes that run one model together: what one of them knows, the others hear.

    torchrun --nproc-per-node 2 -m llava_lite generate --tensor-parallel ...

`torchrun` starts the same program several times; each such process is a rank, numbered from 0. All
ranks make the same calls, and a rank that waits for another waits until that one has ended, or for
30 days (`PATIENCE`), so nothing may depend on what only one of them sees: a file that one cannot
read, a random number, a sum that a GPU adds up in another order. Whatever could differ goes through
here.

    from_first(compute)     the first rank computes; all get the result, or the error
    gather(compute)         all compute; all get all results, or the first rank's error
    sum(x), mean(x)         over ranks; the mean is the same on each, to the last bit
    concatenated(x, ...)    what each rank has some columns of
    require_same(...)       an error on all ranks where they do not agree
    together()              an error on all ranks where one fails in a block

Objects travel through gloo, on the CPU; tensors, and the decoder's own sums, through gloo or nccl,
where they are.
"""

import atexit
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from llava_lite.errors import LlavaLiteError, one_line

Result = TypeVar("Result")

# While the first rank waits for its user's next message, the others wait for it: torch's own 10 and
# 30 minutes would end a conversation that pauses.
PATIENCE = timedelta(days=30)

HOW_TO_START = (
    "tensor parallel needs the processes that torchrun starts: "
    "torchrun --nproc-per-node 2 -m llava_lite generate --tensor-parallel ..."
)


class RankError(LlavaLiteError):
    """The ranks of a model do not go together, or one of them has ended."""


@contextmanager
def exchange() -> Iterator[None]:
    """Raise RankError where the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:  # gloo's and nccl's own
        message = f"another rank has ended, or cannot be reached: {one_line(error)}"
        raise RankError(message) from error


@cache
def join() -> "Ranks":
    """The ranks that this process belongs to, always the same object; the first call waits for all
    of them. A process group that was there before keeps its own timeout.

    Raises RankError in a process that torchrun did not start."""
    if not dist.is_available():
        raise RankError("this torch was built without torch.distributed")
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RankError(HOW_TO_START)
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=PATIENCE)
        atexit.register(leave)
    return Ranks()


def leave() -> None:
    """Let go of the others."""
    join.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """All ranks, as one of them sees them: `index` is its number, of `count`."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.objects = dist.new_group(backend="gloo", timeout=PATIENCE)

    def from_first(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns on the first rank, the only one that runs it. Where that raises,
        all do."""
        outcome = attempt(compute) if self.index == 0 else (None, None)
        sent: list[Any] = [outcome]
        with exchange():
            dist.broadcast_object_list(sent, src=0, group=self.objects)
        result, error = sent[0]
        if error is not None:
            raise error
        return result

    def gather(self, compute: Callable[[], Result]) -> list[Result]:
        """What `compute` returns on each rank, in their order. Where it raises on some, all raise
        what the first of these raised."""
        outcomes: list[Any] = [None] * self.count
        own = attempt(compute)
        with exchange():
            dist.all_gather_object(outcomes, own, group=self.objects)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over ranks, any shape. Every rank adds up the same numbers in the same
        order: what is chosen by the result is the same on all."""
        shares = [torch.empty_like(x) for _ in range(self.count)]
        with exchange():
            dist.all_gather(shares, x.contiguous())
        return torch.stack(shares).mean(0)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over ranks; x becomes it."""
        with exchange():
            dist.all_reduce(x)
        return x

    def concatenated(self, x: Tensor, size: int) -> Tensor:
        """All ranks' x (R, their `part` of size), side by side: (R, size)."""
        x = functional.pad(x, (0, self.share(size) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        with exchange():
            dist.all_gather(parts, x)
        return torch.cat(parts, -1)[:, :size]

    def share(self, size: int) -> int:
        """How many of `size` things a rank has; the last may have fewer."""
        return -(-size // self.count)

    def part(self, size: int) -> slice:
        """Which of `size` things this rank has."""
        share = self.share(size)
        return slice(self.index * share, (self.index + 1) * share)

    def require_same(self, what: str, value: Any) -> None:
        """Raise RankError on all ranks unless `value` equals the first rank's on each."""
        check_same(self.gather(lambda: (what, value)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on all ranks what the first of those raised that failed in the block, which makes
        no exchange of its own; and RankError where they are not all in such a block."""
        raised: list[Exception] = []
        try:
            yield
        except Exception as error:
            raised.append(error)

        def outcome() -> tuple[str, None]:
            if raised:
                raise raised[0]
            return "the calls", None

        check_same(self.gather(outcome))

    def pick_device(
        self, device: str | torch.device, pick: Callable[[str], torch.device]
    ) -> torch.device:
        """This rank's device: the CPU, or of several GPUs the one with its number on this machine.

        `pick` turns a name into a device that is there, or raises. Raises ValueError on all ranks
        for a device that not every rank has, or that only one can have."""
        devices = self.gather(lambda: pick(self.device_name(str(device))))
        if len({found.type for found in devices}) > 1:
            each = ", ".join(f"{found.type} on rank {rank}" for rank, found in enumerate(devices))
            raise ValueError(f"all ranks need the same kind of device, but there is {each}")
        own = devices[self.index]
        if own.type == "cuda":
            torch.cuda.set_device(own)
        return own

    def device_name(self, name: str) -> str:
        """Which device "auto" and "cuda" are here. Raises ValueError for others than the CPU."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            return f"cuda:{os.environ.get('LOCAL_RANK', self.index)}"
        if name != "cpu":
            raise ValueError(f"device {name!r} does not go with tensor parallel: cuda, cpu or auto")
        return name


def check_same(values: list[tuple[str, Any]]) -> None:
    """Raise RankError unless all ranks' (what it is, its value) are those of the first."""
    others = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if others:
        names = {name for name, _ in values}
        what = names.pop() if len(names) == 1 else "the calls"
        raise RankError(
            f"all ranks have to make the same calls, but {what} of rank "
            f"{', '.join(others)} differ from those of rank 0"
        )


def attempt(compute: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result and no error, or no result and an error that other processes can raise, too."""
    try:
        return compute(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RankError(f"{type(error).__name__}: {error}")
        return None, error
