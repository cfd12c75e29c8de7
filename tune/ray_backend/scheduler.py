"""Stratified ASHA: trials of different studies never eliminate each other.

Ray supports one Tune experiment at a time on a cluster, so all studies share one; behind its one scheduler stands
one of Ray's own ASHA objects per study. Decisions are Ray's code, this file only routes, and keeps what Ray does
not: the rungs are written to disk whenever a result changes them, before the answer is given, and read back when a
search goes on.

Rungs are keyed by study and number: a trial that Tune starts anew after a crash has another id. A trial that was
stopped at an epoch is stopped at that epoch again, not earlier. A NaN score stops the trial and stays out of the
rungs (to Ray's ASHA it compares as neither better nor worse, so such a trial would never be stopped).

Where a study's networks differ in cost (a search with two objectives), a cheap one is not worse for being less
accurate: only trials of about the same cost, a stratum, share rungs.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from nulsq.files import write_atomically
from tune.space import STRATUM

CONTINUE, STOP = FIFOScheduler.CONTINUE, FIFOScheduler.STOP


class StratifiedAsha(FIFOScheduler):
    """One ASHA per study.

    Args:
        epochs: study name -> epochs of its full schedule.
        grace, reduction: as ASHA's grace_period and reduction_factor, in epochs.
        metric, mode: what is ranked; "max" or "min".
        file: where rungs are kept; None: nowhere.
    """

    def __init__(self, epochs: dict[str, int], *, grace: int, reduction: int, metric: str, mode: str,
                 file: Path | None = None):
        super().__init__()
        self.settings = epochs, grace, reduction
        self.metric_name, self.sign = metric, 1.0 if mode == "max" else -1.0
        self.file = file
        self.asha = None

    # ---- the decision, without Tune: a simulator replays this

    def decide(self, study: str, key: str, epoch: int, score: float | None, stratum: str | None = None) -> str:
        """CONTINUE or STOP for a result; the score enters the rung of the study (or of the stratum, STUDY or
        STUDY~ANYTHING) if the epoch is one."""
        self._load()
        if key in self.stopped:
            return STOP if epoch >= self.stopped[key] else CONTINUE
        if epoch >= self.settings[0][study]:
            return CONTINUE  # the trial is at its end and closes its run by itself
        before = after = 0
        if score is None or not math.isfinite(score):
            action = STOP
        else:
            asha = self._asha(stratum or study)
            trial = SimpleNamespace(trial_id=key)
            if key not in asha._trial_info:
                asha.on_trial_add(None, trial)
            before = self._entries(asha)
            action = asha.on_trial_result(None, trial, {"epoch": epoch, "score": score * self.sign})
            after = self._entries(asha)
        if action == STOP:
            self.stopped[key] = epoch
        if action == STOP or after > before:  # most epochs are no rung: nothing to write
            self._save()
        return action

    # ---- what Tune calls

    def on_trial_result(self, tune_controller, trial, result):
        if "epoch" not in result:
            return CONTINUE  # Tune's own result of a trial that ended without a report
        which = trial.config["trial"]
        score = None if result.get("diverged") else result.get(self.metric_name)
        if which["repeat"]:  # of a finalist, with another seed: it is compared with nobody
            return CONTINUE if score is not None and math.isfinite(score) else STOP
        return self.decide(which["study"], which["key"], result["epoch"], score, which["stratum"])

    def debug_string(self):
        return "one ASHA per study"

    # ---- rungs on disk

    def _load(self):
        if self.asha is not None:
            return
        self.asha, self.stopped = {}, {}
        if self.file is not None and self.file.is_file():
            saved = json.loads(self.file.read_text())
            self.stopped = saved["stopped"]
            for stratum, recorded in saved["rungs"].items():
                for rung, (_, values) in zip(self._rungs(self._asha(stratum)), recorded, strict=True):
                    rung[1].update(values)

    def _save(self):
        if self.file is not None:
            rungs = {stratum: self._rungs(asha) for stratum, asha in self.asha.items()}
            write_atomically(self.file, json.dumps({"rungs": rungs, "stopped": self.stopped}))

    def _asha(self, stratum):
        if stratum not in self.asha:
            epochs, grace, reduction = self.settings
            most = epochs[stratum.partition(STRATUM)[0]]
            self.asha[stratum] = AsyncHyperBandScheduler(time_attr="epoch", metric="score", mode="max", max_t=most,
                                                         grace_period=min(grace, most), reduction_factor=reduction)
        return self.asha[stratum]

    def _rungs(self, asha):
        return asha._brackets[0]._rungs

    def _entries(self, asha):
        return sum(len(values) for _, values in self._rungs(asha))

    def __getstate__(self):
        # Tune pickles the scheduler once, at the start: what it learned since then is in the file.
        return self.__dict__ | {"asha": None, "stopped": None}
