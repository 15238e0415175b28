"""Memory that the C library would give back after each use."""
import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # of malloc.h


def keep_freed_memory():
    """Let this process keep the memory that it frees, for its next allocations.

    The GNU C library gives large blocks back at once, and the kernel clears every page of the next one: a third of the
    time of a training step on a CPU, and most of that of drawing views (benchmarks/README.md). Where there is another C
    library nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory():
    """Give back what `keep_freed_memory` kept, where much was freed that is not needed again."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
