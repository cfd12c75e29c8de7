"""What a running search prints: a line for each event, and a table of all studies.

On a terminal the table stays below the lines. Elsewhere it is printed once a minute and at the end.
"""

import sys
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from nulsq.text import duration
from tune.queue import TrialQueue
from tune.ray_backend.trial_protocol import TrialSettings
from tune.status import elapsed, table
from tune.store import journal
from tune.store.status import TrialStatus

TERMINAL, PLAIN = 5.0, 60.0  # seconds between two tables


class SearchProgress(Callback):
    """Prints events of trials as Tune reports them. Signatures are those of Tune's Callback."""

    def __init__(self, queue: TrialQueue, folder: Path) -> None:
        self.queue, self.folder = queue, folder
        self.terminal = sys.stdout.isatty()
        self.earlier = elapsed(journal.events(folder))  # seconds of earlier sessions
        self.began = self.shown = time.monotonic()
        self.lines = 0  # of the table at the bottom of the terminal

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._print_table()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.queue.started.add(_key(trial))  # Tune does not report starts to a searcher
        self._print_event(trial, "started")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any],
                        **info: Any) -> None:
        if "epoch" in result:
            metric = self.queue.search.metric
            self._print_event(trial, TrialStatus.DIVERGED if result["diverged"] else
                              f"epoch {result['epoch']}  {metric} {result[metric]:.2f}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._print_event(trial, self.queue.status[_key(trial)])

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._record_error("retry", trial, "crashed and is tried again")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._record_error("error", trial, "failed")

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self._print_table(now=True)

    def _record_error(self, event: str, trial: Trial, text: str) -> None:
        file = Path(trial.error_file) if trial.error_file else None
        lines = file.read_text().splitlines() if file is not None and file.is_file() else []
        reason = next((line for line in reversed(lines) if line.strip()), "no reason is known")[:300]
        journal.event(self.folder, event, _key(trial), reason=reason)
        self._print_event(trial, f"{text}: {reason}")

    def _print_event(self, trial: Trial, text: str) -> None:
        ended = sum(status.ended for status in self.queue.status.values())
        self._print(f"[{duration(time.monotonic() - self.began):>6}, {ended}/{self.queue.budget()} trials ended] "
                    f"{trial}  {text}")

    def _print_table(self, now: bool = False) -> None:
        if now or time.monotonic() - self.shown > (TERMINAL if self.terminal else PLAIN):
            results = [self.queue.trial_result(key) for key in self.queue.trials]
            text = table(self.queue.search, results, self.earlier + time.monotonic() - self.began, running=True)
            self._print(text)
            self.lines = text.count("\n") + 1 if self.terminal else 0
            self.shown = time.monotonic()

    def _print(self, text: str) -> None:
        if self.lines:
            sys.stdout.write(f"\x1b[{self.lines}F\x1b[J")  # erase the table
            self.lines = 0
        print(text, flush=True)


def _key(trial: Trial) -> str:
    return TrialSettings.from_config(trial.config).key
