"""Memory of a run on the CPU: the next step reuses what a step has freed.

glibc returns large freed blocks to the system, so every step faults its activations in again, page by page: a sixth of
a step of a small network. The steps of a training process are all alike, so keeping the memory costs nothing.
"""

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
TRIM_NEVER, PAD = 2**31 - 1, 2**26


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for the life of the process. Returns False for another malloc."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: TRIM_NEVER, M_TOP_PAD: PAD}
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in wanted.items())


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else 0
