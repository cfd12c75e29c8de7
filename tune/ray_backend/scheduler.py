"""Stratified ASHA: trials of different studies never eliminate each other.

Ray runs one Tune experiment at a time on a cluster, so all studies share one experiment and one scheduler. This
scheduler keeps one of Ray's own ASHA objects per study and passes each result to the object of its study. The decisions
are Ray's code. What Ray lacks is persistence: here the rungs are written to disk whenever a result changes them, before
the decision is returned, and read back when a search is continued.

Rungs are keyed by study and number, because a trial that Tune restarts after a crash has another id. A trial that was
stopped at an epoch is stopped at that epoch again, not earlier. A NaN score stops the trial and stays out of the rungs:
Ray's ASHA finds NaN neither better nor worse than the cutoff, and would never stop such a trial.

Where networks of one study differ in cost (a search with two objectives), a cheap network is not worse for being less
accurate. Only trials of about the same cost, a stratum, share rungs.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from nulsq.files import write_atomically
from tune.ray_backend.trial_protocol import TrialSettings
from tune.space import STRATUM

CONTINUE, STOP = FIFOScheduler.CONTINUE, FIFOScheduler.STOP


class StratifiedAsha(FIFOScheduler):
    """One ASHA per study.

    Args:
        epochs: study name -> epochs of its full schedule.
        grace, reduction: ASHA's grace_period and reduction_factor, in epochs.
        metric, mode: the metric that trials are ranked by; "max" or "min".
        file: where rungs are kept; None keeps them in memory only.
    """

    def __init__(self, epochs: dict[str, int], *, grace: int, reduction: int, metric: str, mode: str,
                 file: Path | None = None) -> None:
        super().__init__()
        self.settings = epochs, grace, reduction
        self.metric_name, self.sign = metric, 1.0 if mode == "max" else -1.0
        self.file = file
        self.asha: dict[str, AsyncHyperBandScheduler] | None = None  # by stratum; None until `_load`
        self.stopped: dict[str, int] = {}  # trial key -> epoch

    # ---- the decision, without Tune: a simulator replays this

    def decide(self, study: str, key: str, epoch: int, score: float | None, stratum: str | None = None) -> str:
        """Return CONTINUE or STOP for a result.

        If the epoch is a rung, the score enters that rung of the study, or of `stratum`: STUDY or STUDY~ANYTHING.
        """
        self._load()
        if key in self.stopped:
            return STOP if epoch >= self.stopped[key] else CONTINUE
        if epoch >= self.settings[0][study]:
            return CONTINUE  # the trial is at its end, and closes its run itself
        before = after = 0
        if score is None or not math.isfinite(score):
            action = STOP
        else:
            asha = self._asha(stratum or study)
            trial: Any = SimpleNamespace(trial_id=key)  # ASHA reads nothing else of a trial, nor its controller
            controller: Any = None
            if key not in asha._trial_info:
                asha.on_trial_add(controller, trial)
            before = self._count(asha)
            action = asha.on_trial_result(controller, trial, {"epoch": epoch, "score": score * self.sign})
            after = self._count(asha)
        if action == STOP:
            self.stopped[key] = epoch
        if action == STOP or after > before:  # most epochs are not rungs and change nothing
            self._save()
        return action

    # ---- called by Tune

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if "epoch" not in result:
            return CONTINUE  # Tune's own result of a trial that ended without a report
        settings = TrialSettings.from_config(trial.config)
        score = None if result.get("diverged") else result.get(self.metric_name)
        if settings.repeat:  # a finalist with another seed is compared with no other trial
            return CONTINUE if score is not None and math.isfinite(score) else STOP
        return self.decide(settings.study, settings.key, result["epoch"], score, settings.stratum)

    def debug_string(self) -> str:
        return "one ASHA per study"

    # ---- rungs on disk
    #
    # Private API of Ray Tune, used in this file only: the rungs of AsyncHyperBandScheduler (`_brackets`, `_rungs`), and
    # whether it knows a trial (`_trial_info`). Its public `save` and `restore` pickle the whole object: a file that
    # another version of Ray may not load, and that `tune.status` and `tune.report` could not read without Ray.

    def _load(self) -> None:
        if self.asha is not None:
            return
        self.asha, self.stopped = {}, {}
        if self.file is not None and self.file.is_file():
            saved = json.loads(self.file.read_text())
            self.stopped = saved["stopped"]
            for stratum, recorded in saved["rungs"].items():
                for rung, (_, scores) in zip(self._rungs(self._asha(stratum)), recorded, strict=True):
                    rung[1].update(scores)

    def _save(self) -> None:
        if self.file is not None and self.asha is not None:
            rungs = {stratum: self._rungs(asha) for stratum, asha in self.asha.items()}
            write_atomically(self.file, json.dumps({"rungs": rungs, "stopped": self.stopped}))

    def _asha(self, stratum: str) -> AsyncHyperBandScheduler:
        assert self.asha is not None
        if stratum not in self.asha:
            epochs, grace, reduction = self.settings
            last = epochs[stratum.partition(STRATUM)[0]]
            self.asha[stratum] = AsyncHyperBandScheduler(time_attr="epoch", metric="score", mode="max", max_t=last,
                                                         grace_period=min(grace, last), reduction_factor=reduction)
        return self.asha[stratum]

    def _rungs(self, asha: AsyncHyperBandScheduler) -> list[tuple[float, dict[str, float]]]:
        """(epoch, trial key -> score) of each rung, the last first."""
        return asha._brackets[0]._rungs

    def _count(self, asha: AsyncHyperBandScheduler) -> int:
        """The number of scores in all rungs."""
        return sum(len(scores) for _, scores in self._rungs(asha))

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles the scheduler once, at the start. The file has what it learned since then.
        return self.__dict__ | {"asha": None, "stopped": {}}
