"""Errors that fail a single row of a batch, and the fallback from a batch to single items."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from llava_lite.errors import LlavaLiteError

# Errors that fail one row without ending the run. Out of memory is a RuntimeError.
ROW_ERRORS = (LlavaLiteError, OSError, RuntimeError, MemoryError)


Item = TypeVar("Item")
Result = TypeVar("Result")


def is_accelerator_failure(error: BaseException) -> bool:
    """Whether an error leaves the accelerator unusable: all later calls fail too.

    Out of memory does not. Older versions of torch raise a plain RuntimeError."""
    if not isinstance(error, RuntimeError) or "out of memory" in str(error).lower():
        return False
    named = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
    return named or "CUDA error" in str(error)


def try_together(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], list[Result]],
    failed: Callable[[Item, Exception], Result],
) -> list[Result]:
    """Run `work` on all items at once or, if that fails, on each alone. An item that fails alone
    gets `failed(item, error)`.

    Raises errors that are not in `ROW_ERRORS`, and failures of an accelerator."""
    if not items:
        return []
    try:
        return work(items)
    except ROW_ERRORS as error:
        if is_accelerator_failure(error):
            raise
        if len(items) == 1:
            return [failed(items[0], error)]
    # Outside of the handler: the error keeps the tensors of the batch.
    return [result for item in items for result in try_together([item], work, failed)]
