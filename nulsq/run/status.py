"""How a run ended: RUN/outcome.json, which outlives the exit code (torchrun turns every non-zero code into 1)."""

import enum
import json
import time
from pathlib import Path
from typing import Any

from nulsq.errors import ExitCode
from nulsq.files import write_atomically

FILE = "outcome.json"


class RunStatus(enum.StrEnum):
    """Status of a run; the values stand in outcome.json."""

    RUNNING = "running"
    FINISHED = "finished"
    SAVED = "saved"  # interrupted: the same command continues
    DIVERGED = "diverged"
    FAILED = "failed"

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of `python -m nulsq.train` for a run that ended like this."""
        return {RunStatus.FINISHED: ExitCode.FINISHED, RunStatus.SAVED: ExitCode.SAVED,
                RunStatus.DIVERGED: ExitCode.DIVERGED}.get(self, ExitCode.FAILED)


def write_status(run: Path, status: RunStatus, **details: Any) -> None:
    """Write outcome.json: the status, whether a batch system should start the run again, and details."""
    content = {"outcome": status, "requeue": status is RunStatus.SAVED, "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
               **details}
    write_atomically(run / FILE, json.dumps(content, indent=1) + "\n")


def read_outcome(run: Path) -> dict[str, Any]:
    """The content of outcome.json; {"outcome": "running", ...} where there is none yet."""
    file = run / FILE
    return json.loads(file.read_text()) if file.is_file() else {"outcome": RunStatus.RUNNING.value, "requeue": False}


def read_status(run: Path) -> RunStatus:
    return RunStatus(read_outcome(run)["outcome"])
