"""Freed memory stays with the process, within bounds.

The C library of most Linux systems gives memory back soon after it is freed. A prefill frees and
allocates hundreds of blocks of 5 to 30 MB, and each time the system has to find pages for them and
clear them: a tenth of the whole time, much more on some virtual machines. A process that does
little else than run a model, as the command line does, had better keep them.

Larger blocks, of very long prompts, go back to the system as ever: the heap that would hold them
grows by one of them again and again, for an aligned block does not fit into the hole that one of
its size left."""

import ctypes
import sys

# From malloc.h of glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**25  # blocks up to this come from the heap, the most that older glibc takes
KEPT = 2**28  # so much stays at the end of the heap when all is freed
AT_ONCE = 2**26  # the heap grows by so much
PICTURE_BLOCK = 2 * LARGEST


def keep_freed_memory() -> bool:
    """Tell the C library, for the process; False where it is not glibc's, or refuses."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    # The first is what bounds the heap: without it, the others had better stay as they are.
    wishes = (M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, AT_ONCE)
    return all(mallopt(parameter, value) == 1 for parameter, value in wishes)


def return_freed_pictures() -> None:
    """Give the memory of large pictures back as soon as they are closed, for the process.

    Pillow takes it in blocks of 16 MiB, which stay in the heap of the thread that decoded them. A
    server has several such threads, and pictures of many megapixels only now and then."""
    from PIL import Image

    Image.core.set_block_size(PICTURE_BLOCK)
