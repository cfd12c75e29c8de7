"""Stratified ASHA: trials of different studies never eliminate each other.

Ray supports one Tune experiment at a time on a cluster, so all studies share one; behind its one scheduler stands
one of Ray's own ASHA objects per study. Decisions are Ray's code, this file only routes, and keeps what Ray does
not: the rungs are written to disk with every result and read back when a search is restored.

Rungs are keyed by study and number: a trial that Tune starts anew after a crash has another id. A trial that was
stopped at an epoch is stopped at that epoch again, not earlier. A NaN score stops the trial and stays out of the
rungs (to Ray's ASHA it compares as neither better nor worse, so such a trial would never be stopped).
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from tune.space import trial_key

CONTINUE, STOP = FIFOScheduler.CONTINUE, FIFOScheduler.STOP


class StratifiedAsha(FIFOScheduler):
    """One ASHA per study.

    Args:
        epochs: study name -> epochs of its full schedule.
        grace, reduction: as ASHA's grace_period and reduction_factor, in epochs.
        metric, mode: what is ranked; "max" or "min".
        file: where rungs are kept. Not *.json or *.pkl in Tune's own folder: Tune overwrites those on restore.
    """

    def __init__(self, epochs: dict[str, int], *, grace: int, reduction: int, metric: str, mode: str, file: Path):
        super().__init__()
        self.settings = epochs, grace, reduction
        self.metric_name, self.sign = metric, 1.0 if mode == "max" else -1.0
        self.file = Path(file)
        self.asha = None

    # ---- the decision, without Tune: a simulator replays this

    def decide(self, study: str, number: int, epoch: int, score: float | None) -> str:
        """CONTINUE or STOP for a result; the score enters the study's rung if the epoch is one."""
        self._load()
        key = trial_key(study, number)
        if key in self.stopped:
            return STOP if epoch >= self.stopped[key] else CONTINUE
        if epoch >= self.settings[0][study]:
            return CONTINUE  # the trial is at its end and closes its run by itself
        if score is None or not math.isfinite(score):
            action = STOP
        else:
            asha = self.asha[study]
            trial = SimpleNamespace(trial_id=key)
            if key not in asha._trial_info:
                asha.on_trial_add(None, trial)
            action = asha.on_trial_result(None, trial, {"epoch": epoch, "score": score * self.sign})
        if action == STOP:
            self.stopped[key] = epoch
        self._save()
        return action

    # ---- what Tune calls

    def on_trial_result(self, tune_controller, trial, result):
        if "epoch" not in result:
            return CONTINUE  # Tune's own result of a trial that ended without a report
        which = trial.config["trial"]
        score = None if result.get("diverged") else result.get(self.metric_name)
        return self.decide(which["study"], which["number"], result["epoch"], score)

    def debug_string(self):
        return "one ASHA per study"

    # ---- rungs on disk

    def _load(self):
        if self.asha is not None:
            return
        epochs, grace, reduction = self.settings
        self.asha = {study: AsyncHyperBandScheduler(time_attr="epoch", metric="score", mode="max", max_t=most,
                                                    grace_period=min(grace, most), reduction_factor=reduction)
                     for study, most in epochs.items()}
        self.stopped = {}
        if self.file.is_file():
            saved = json.loads(self.file.read_text())
            self.stopped = saved["stopped"]
            for study, recorded in saved["rungs"].items():
                for rung, (_, values) in zip(self._rungs(study), recorded, strict=True):
                    rung[1].update(values)

    def _save(self):
        content = {"rungs": {study: self._rungs(study) for study in self.asha}, "stopped": self.stopped}
        aside = self.file.with_name(f".{self.file.name}.unfinished")
        aside.write_text(json.dumps(content))
        aside.replace(self.file)

    def _rungs(self, study):
        return self.asha[study]._brackets[0]._rungs

    def __getstate__(self):
        # Tune pickles the scheduler once, at the start: what it learned since then is in the file.
        return self.__dict__ | {"asha": None, "stopped": None}
