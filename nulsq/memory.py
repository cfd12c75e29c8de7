"""Memory between the steps of a run on the CPU: what a step has freed, the next one takes again.

glibc gives large freed blocks back to the system, so every step faults its activations in anew, page by page: a sixth
of a step of a small network. A training process has no use for that: its steps are all alike.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
MOST, PAD = 2**31 - 1, 2**26


def keep_freed_memory() -> bool:
    """Ask glibc's malloc to keep freed memory, for the life of the process. False where there is another malloc."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: MOST, M_TOP_PAD: PAD}
    return mallopt is not None and all(mallopt(*each) == 1 for each in wanted.items())
