"""LSQ that sleeps in each training step while the file $NULSQ_TEST_SLOW exists, so that a test can interrupt its run.

The file may contain the number of seconds to sleep in each call; the default is 0.02.
"""

import os
import time
from pathlib import Path

from nulsq.quantizers.lsq import LSQ


class Slowed(LSQ):
    """LSQ with a delay in training; its output equals that of LSQ."""

    def forward(self, x):
        slow = os.environ.get("NULSQ_TEST_SLOW")
        if self.training and slow and Path(slow).is_file():
            time.sleep(float(Path(slow).read_text() or 0.02))
        return super().forward(x)
