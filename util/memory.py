"""The memory of this process: how much is free, and when the C library gives it back."""
import contextlib
import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # of malloc.h


def keep_freed_memory():
    """Let this process keep the memory that it frees, for its next allocations.

    The GNU C library gives large blocks back at once, and the kernel clears every page of the next one: a third of the
    time of a training step on a CPU, and most of that of views (benchmarks/README.md). With another C library nothing
    happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory():
    """Give back what `keep_freed_memory` kept, where much was freed that is not needed again."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory():
    """Bytes that this process may still take: what the machine has free, within the limit of a container."""
    def read(file):
        try:
            return Path(file).read_text().split()
        except OSError:
            return []

    free, meminfo = [], read('/proc/meminfo')
    if 'MemAvailable:' in meminfo:
        free.append(1024 * int(meminfo[meminfo.index('MemAvailable:') + 1]))
    limit, used = read('/sys/fs/cgroup/memory.max'), read('/sys/fs/cgroup/memory.current')
    if limit and used and limit[0] != 'max':
        free.append(int(limit[0]) - int(used[0]))
    return min(free, default=4 * 2**30)                                 # where it is unknown: 4 GB
