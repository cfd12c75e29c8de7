"""Statuses of trials and of searches. The values appear in events.jsonl, trials.csv and in reports."""

import enum

from nulsq.run.status import RunStatus


class TrialStatus(enum.StrEnum):
    """What became of a trial so far."""

    WAITING = "waiting"  # decided on; no process trains it yet, or not again since an interruption
    RUNNING = "running"
    FINISHED = "finished"  # trained to its last epoch
    STOPPED = "stopped"  # by ASHA, at a rung
    DIVERGED = "diverged"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # in reports: a running trial of a search that does not run

    @classmethod
    def of_run(cls, status: RunStatus) -> "TrialStatus":
        """The status that a run's outcome gives its trial. Only the scheduler knows whether it was stopped early."""
        return {RunStatus.FINISHED: cls.FINISHED, RunStatus.DIVERGED: cls.DIVERGED,
                RunStatus.FAILED: cls.FAILED}.get(status, cls.RUNNING)

    @property
    def ended(self) -> bool:
        """Whether it is not trained any further."""
        return self in (TrialStatus.FINISHED, TrialStatus.STOPPED, TrialStatus.DIVERGED, TrialStatus.FAILED)

    @property
    def ranked(self) -> bool:
        """Whether its score counts in the ranking of its study."""
        return self in (TrialStatus.FINISHED, TrialStatus.STOPPED)

    @property
    def lost(self) -> bool:
        """Whether it ended without a usable score."""
        return self in (TrialStatus.DIVERGED, TrialStatus.FAILED)

    @property
    def discarded(self) -> bool:
        """Whether nothing needs its checkpoints any more. Those of a failed trial are kept: it is tried again."""
        return self in (TrialStatus.STOPPED, TrialStatus.DIVERGED)


class SearchStatus(enum.StrEnum):
    """Where a search is."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
