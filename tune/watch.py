"""What a person sees while a search runs: a line per result, and where the search stands."""

import time
from pathlib import Path

from ray.tune import Callback

from nulsq.progress import duration


class Watch(Callback):
    """Prints results as they come in."""

    def __init__(self, metric: str, total: int):
        self.metric, self.total = metric, total

    def setup(self, stop=None, num_samples=None, total_num_samples=None, **info):
        self.began = time.monotonic()  # here, not in the constructor: a restored search unpickles an old one

    def on_trial_start(self, iteration, trials, trial, **info):
        self._say(trials, trial, "started")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if "epoch" in result:
            self._say(trials, trial, f"epoch {result['epoch']}  {self.metric} {result[self.metric]:.2f}")

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._say(trials, trial, "done")

    def on_trial_recover(self, iteration, trials, trial, **info):
        self._say(trials, trial, f"crashed and is tried again: {self._reason(trial)}")

    def on_trial_error(self, iteration, trials, trial, **info):
        self._say(trials, trial, f"failed: {self._reason(trial)}")

    def _reason(self, trial):
        file = Path(trial.error_file) if trial.error_file else None
        lines = file.read_text().splitlines() if file is not None and file.is_file() else []
        return next((line for line in reversed(lines) if line.strip()), "no reason is known")[:300]

    def _say(self, trials, trial, text):
        ended = sum(each.status in ("TERMINATED", "ERROR") for each in trials)
        print(f"[{duration(time.monotonic() - self.began):>6}, {ended}/{self.total} trials ended] {trial}  {text}",
              flush=True)
