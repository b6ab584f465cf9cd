"""Keep freed memory in the process, within bounds.

The C library of most Linux systems soon returns freed memory to the system. A prefill frees and
allocates hundreds of blocks of 5 to 30 MB, and each time the system has to find and clear pages. A
process that mostly runs a model, such as the command line, is faster if it keeps them.

Blocks above 32 MB are still returned to the system: aligned blocks do not fit into the holes they
leave, so the heap would keep growing.
"""

import ctypes
import sys

# The parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**25  # bytes; blocks up to this come from the heap; older glibc takes no more
KEPT = 2**28  # bytes that stay at the end of the heap
AT_ONCE = 2**26  # bytes by which the heap grows
PICTURE_BLOCK = 2 * LARGEST


def keep_freed_memory() -> bool:
    """Set the C library's bounds for this process. Returns False if it is not glibc, or refuses."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    # The first setting bounds the heap. all() stops there if it fails, and leaves the others.
    wishes = (M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, AT_ONCE)
    return all(mallopt(parameter, value) == 1 for parameter, value in wishes)


def return_freed_pictures() -> None:
    """Return the memory of large pictures to the system when they are closed, in this process.

    Pillow's blocks of 16 MiB would stay in the heap of the thread that decoded the picture. A
    server has several such threads, and rarely a large picture."""
    from PIL import Image

    Image.core.set_block_size(PICTURE_BLOCK)
