"""Freed memory stays with the process.

The C library of most Linux systems maps every large block of memory anew, and gives it back when it
is freed. A prefill makes hundreds of such blocks, and each time the system has to find pages for
them and clear them: a tenth of the whole time, much more on some virtual machines. A process that
does little else than run a model, as the command line does, had better keep them."""

import ctypes
import sys

# From malloc.h of glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
NEVER = 2**31 - 1
LARGEST = 2**30  # blocks up to this come from the heap
AT_ONCE = 2**28  # the heap grows by so much


def keep_freed_memory() -> bool:
    """Tell the C library, for the rest of the process; False where it is not glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        wishes = (M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, AT_ONCE)
        return all([mallopt(parameter, value) == 1 for parameter, value in wishes])
    except (OSError, AttributeError):  # musl has no mallopt
        return False
