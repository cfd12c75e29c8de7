"""What a person sees while a search runs: a line for whatever happens, and one table of where it stands.

On a terminal the table stays below the lines; elsewhere it is printed once a minute and at the end.
"""

import sys
import time
from pathlib import Path

from ray.tune import Callback

from nulsq.text import duration
from tune.queue import TrialQueue
from tune.status import elapsed, table
from tune.store import journal
from tune.store.status import TrialStatus

TERMINAL, PLAIN = 5.0, 60.0  # seconds between two tables


class Watch(Callback):
    """Prints results as they come in."""

    def __init__(self, course: TrialQueue, folder: Path):
        self.course, self.folder = course, folder
        self.terminal = sys.stdout.isatty()
        self.before = elapsed(journal.events(folder))  # of earlier sessions
        self.began = self.shown = time.monotonic()
        self.lines = 0  # of the table that stands below

    def on_step_end(self, iteration, trials, **info):
        self._table()

    def on_trial_start(self, iteration, trials, trial, **info):
        self.course.begun.add(trial.config["trial"]["key"])  # Tune tells a searcher only of results and ends
        self._say(trial, "started")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if "epoch" in result:
            metric = self.course.search.metric
            self._say(trial, TrialStatus.DIVERGED if result["diverged"] else
                      f"epoch {result['epoch']}  {metric} {result[metric]:.2f}")

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._say(trial, self.course.status[trial.config["trial"]["key"]])

    def on_trial_recover(self, iteration, trials, trial, **info):
        self._trouble("retry", trial, "crashed and is tried again")

    def on_trial_error(self, iteration, trials, trial, **info):
        self._trouble("error", trial, "failed")

    def on_experiment_end(self, trials, **info):
        self._table(now=True)

    def _trouble(self, what, trial, text):
        file = Path(trial.error_file) if trial.error_file else None
        lines = file.read_text().splitlines() if file is not None and file.is_file() else []
        reason = next((line for line in reversed(lines) if line.strip()), "no reason is known")[:300]
        journal.event(self.folder, what, trial.config["trial"]["key"], reason=reason)
        self._say(trial, f"{text}: {reason}")

    def _say(self, trial, text):
        ended = sum(status.ended for status in self.course.status.values())
        self._print(f"[{duration(time.monotonic() - self.began):>6}, {ended}/{self.course.budget()} trials ended] "
                    f"{trial}  {text}")

    def _table(self, now=False):
        if now or time.monotonic() - self.shown > (TERMINAL if self.terminal else PLAIN):
            rows = [self.course.row(key) for key in self.course.trials]
            text = table(self.course.search, rows, self.before + time.monotonic() - self.began, running=True)
            self._print(text)
            self.lines = text.count("\n") + 1 if self.terminal else 0
            self.shown = time.monotonic()

    def _print(self, text):
        if self.lines:
            sys.stdout.write(f"\x1b[{self.lines}F\x1b[J")
            self.lines = 0
        print(text, flush=True)
