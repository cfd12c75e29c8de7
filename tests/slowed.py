"""LSQ that takes its time while the file that $NULSQ_TEST_SLOW names is there: a run that a test can interrupt.

The file may hold the seconds of each call.
"""

import os
import time
from pathlib import Path

from nulsq.quantizers.lsq import LSQ


class Slowed(LSQ):
    """Its numbers are LSQ's."""

    def forward(self, x):
        slow = os.environ.get("NULSQ_TEST_SLOW")
        if self.training and slow and Path(slow).is_file():
            time.sleep(float(Path(slow).read_text() or 0.02))
        return super().forward(x)
