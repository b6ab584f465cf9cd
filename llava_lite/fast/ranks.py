"""Processes that run one model together.

    torchrun --nproc-per-node 2 -m llava_lite generate --tensor-parallel ...

`torchrun` starts the same program several times. Each process is a rank, numbered from 0. All ranks
make the same calls. A rank that waits for another waits until it exits, at most 30 days. So no
decision may depend on something only one rank sees: a file, a random number, the order of a sum on
a GPU. Everything that could differ is exchanged here. Objects travel through gloo on the CPU,
tensors through gloo or nccl where they are.
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

# The other ranks wait while the first one waits for its user. torch's timeouts of 10 and 30 minutes
# would end a chat that pauses.
PATIENCE = timedelta(days=30)

HOW_TO_START = (
    "tensor parallel needs the processes that torchrun starts: "
    "torchrun --nproc-per-node 2 -m llava_lite generate --tensor-parallel ..."
)


class RankError(LlavaLiteError):
    """The ranks of a model make different calls, or one of them has ended."""


@contextmanager
def exchange() -> Iterator[None]:
    """Raise RankError if the other ranks cannot be reached."""
    try:
        yield
    except RuntimeError as error:  # gloo and nccl raise it
        message = f"another rank has ended, or cannot be reached: {one_line(error)}"
        raise RankError(message) from error


@cache
def join() -> "Ranks":
    """Join the ranks of this process: the first call waits for all ranks, later calls return the
    same object. An existing process group keeps its timeout.

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
    """Leave the process group."""
    join.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """The exchanges of one rank with the others: this rank is number `index` of `count`."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.objects = dist.new_group(backend="gloo", timeout=PATIENCE)

    def from_first(self, compute: Callable[[], Result]) -> Result:
        """Run `compute` on the first rank only, and return its result on all ranks. An error raises
        on all ranks."""
        outcome = attempt(compute) if self.index == 0 else (None, None)
        sent: list[Any] = [outcome]
        with exchange():
            dist.broadcast_object_list(sent, src=0, group=self.objects)
        result, error = sent[0]
        if error is not None:
            raise error
        return result

    def gather(self, compute: Callable[[], Result]) -> list[Result]:
        """Run `compute` on all ranks, and return all results, in order. If some ranks raise, the
        first of these errors raises on all ranks."""
        outcomes: list[Any] = [None] * self.count
        own = attempt(compute)
        with exchange():
            dist.all_gather_object(outcomes, own, group=self.objects)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over ranks, any shape, the same to the last bit on all ranks."""
        # Choices depend on the last bit: every rank adds the same numbers in the same order.
        shares = [torch.empty_like(x) for _ in range(self.count)]
        with exchange():
            dist.all_gather(shares, x.contiguous())
        return torch.stack(shares).mean(0)

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks, in place."""
        with exchange():
            dist.all_reduce(x)
        return x

    def concatenate(self, x: Tensor, size: int) -> Tensor:
        """Concatenate the columns of all ranks: x (R, `part` of size) -> (R, size)."""
        x = functional.pad(x, (0, self.share(size) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        with exchange():
            dist.all_gather(parts, x)
        return torch.cat(parts, -1)[:, :size]

    def share(self, size: int) -> int:
        """The number of things that a rank holds of `size`; the last rank may hold fewer."""
        return -(-size // self.count)

    def part(self, size: int) -> slice:
        """The things that this rank holds of `size`."""
        share = self.share(size)
        return slice(self.index * share, (self.index + 1) * share)

    def require_same(self, what: str, value: Any) -> None:
        """Raise RankError on all ranks unless `value` is the same on all ranks."""
        check_same(self.gather(lambda: (what, value)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one rank in the block on all ranks. The block itself must not exchange
        anything. Raises RankError if some ranks are not in such a block."""
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
        """Pick this rank's device: the CPU, or the GPU with this rank's number on this machine.

        `pick` returns the device of a name, or raises if it is missing. Raises ValueError on all
        ranks if some rank lacks the device, or if ranks cannot use this kind of device."""
        devices = self.gather(lambda: pick(self.device_name(str(device))))
        if len({found.type for found in devices}) > 1:
            each = ", ".join(f"{found.type} on rank {rank}" for rank, found in enumerate(devices))
            raise ValueError(f"all ranks need the same kind of device, but there is {each}")
        own = devices[self.index]
        if own.type == "cuda":
            torch.cuda.set_device(own)
        return own

    def device_name(self, name: str) -> str:
        """The device of "auto", "cuda" or "cpu" on this rank. Raises ValueError for other names."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            return f"cuda:{os.environ.get('LOCAL_RANK', self.index)}"
        if name != "cpu":
            raise ValueError(f"device {name!r} does not go with tensor parallel: cuda, cpu or auto")
        return name


def check_same(values: list[tuple[str, Any]]) -> None:
    """Raise RankError unless all ranks have the first rank's pair (name of the value, value)."""
    others = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if others:
        names = {name for name, _ in values}
        what = names.pop() if len(names) == 1 else "the calls"
        raise RankError(
            f"all ranks have to make the same calls, but {what} of rank "
            f"{', '.join(others)} differ from those of rank 0"
        )


def attempt(compute: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Run `compute`: (result, None), or (None, error) with an error that can be pickled."""
    try:
        return compute(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RankError(f"{type(error).__name__}: {error}")
        return None, error
