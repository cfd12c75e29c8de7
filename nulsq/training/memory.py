"""Memory of a run on the CPU: what a step has freed, the next one takes again; and how much there is.

glibc gives large freed blocks back to the system, so every step faults its activations in anew, page by page: a sixth
of a step of a small network. A training process has no use for that: its steps are all alike.
"""

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
MOST, PAD = 2**31 - 1, 2**26


def keep_freed_memory() -> bool:
    """Ask glibc's malloc to keep freed memory, for the life of the process. False where there is another malloc."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: MOST, M_TOP_PAD: PAD}
    return mallopt is not None and all(mallopt(*each) == 1 for each in wanted.items())


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else 0
