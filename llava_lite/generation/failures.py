"""Which errors cost a batch one row only, and how a failing batch falls back to single items."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from llava_lite.errors import LlavaLiteError

# A row may fail for these reasons without ending the run. Out of memory is a RuntimeError.
ROW_ERRORS = (LlavaLiteError, OSError, RuntimeError, MemoryError)


Item = TypeVar("Item")


Result = TypeVar("Result")


def is_accelerator_failure(error: BaseException) -> bool:
    """Whether an error leaves the accelerator unusable, so that all that follows would fail, too.
    Out of memory does not. Older versions of torch have no class of its own for it."""
    if not isinstance(error, RuntimeError) or "out of memory" in str(error).lower():
        return False
    named = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
    return named or "CUDA error" in str(error)


def try_together(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], list[Result]],
    failed: Callable[[Item, Exception], Result],
) -> list[Result]:
    """What `work` makes of all items at once or, if that fails, of each alone; what fails even then
    gets `failed(item, error)`. Raises what is no row's error, and an accelerator's failure."""
    if not items:
        return []
    try:
        return work(items)
    except ROW_ERRORS as error:
        if is_accelerator_failure(error):
            raise
        if len(items) == 1:
            return [failed(items[0], error)]
    # Out of the handler, which would keep the tensors of the batch.
    return [result for item in items for result in try_together([item], work, failed)]
