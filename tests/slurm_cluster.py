"""A real Slurm of two nodes on this machine, on loopback: munged, slurmctld, two slurmd.

    with cluster() as slurm:                  # skips the test, with the reason, where Slurm is not installed
        slurm.run("sbatch", ...)              # any Slurm command, on this cluster
        slurm.wait(lambda: ..., "event")      # until the condition is true
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from launch.jobs import Job

T = TypeVar("T")

CONFIG = """
ClusterName=loop{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={root}/m/munge.sock,cred_expire=15
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
MinJobAge=600
MaxArraySize=100
SlurmctldDebug=info
SlurmdDebug=info
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={port2}-{port3} CPUs=2 RealMemory=2000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=600 State=UP
PartitionName=low Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=40 State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP
"""


class Slurm:
    """A running cluster. `run("COMMAND", ...)` runs any Slurm command on it."""

    def __init__(self, root: Path):
        self.root = root

    def run(self, *command: str, check: bool = True) -> str:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not check or completed.returncode == 0, (command, completed.stdout, completed.stderr)
        return completed.stdout + completed.stderr

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], T], event: str, seconds: float = 240.0) -> T:
        """Wait until `condition()` is true, and return its result. `event` names it in the message of a failure."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < deadline, f"{event} did not happen within {seconds:g} s\n{self.describe()}"
            time.sleep(0.25)
        return result

    def ended(self, job: str, seconds: float = 300.0) -> dict[str, str]:
        """Wait until a job has ended, and return its fields."""
        def ended_job() -> dict[str, str]:
            fields = self.job(job)
            return fields if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else {}
        return self.wait(ended_job, f"the end of job {job}", seconds)

    def left(self, job: str) -> list[str]:
        """Command lines of the processes of a job that still run, also of orphaned ones."""
        commands = []
        for process in self.processes(f"SLURM_JOB_ID={job}"):
            with contextlib.suppress(OSError):
                commands.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        return commands

    def processes(self, variable: str) -> list[Path]:
        """Folders in /proc of this cluster's processes that inherited a variable, "NAME=VALUE"."""
        processes, inherited = [], {variable.encode(), f"SLURM_CONF={self.root}/slurm.conf".encode()}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if inherited <= set((process / "environ").read_bytes().split(b"\0")):
                    processes.append(process)
        return processes

    def crash(self, node: str) -> None:
        """Kill the node's daemon and all its processes at once, before Slurm notices. `run("slurmd", "-N", node)`
        restarts the node."""
        process_ids = [int((self.root / f"slurmd-{node}.pid").read_text())]
        for process in self.processes(f"SLURMD_NODENAME={node}"):
            process_ids.append(int(process.name))
            with contextlib.suppress(OSError):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if Path("/proc", parent, "comm").read_text().startswith("slurmstepd"):
                    process_ids.append(int(parent))
        for process_id in dict.fromkeys(process_ids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)

    def describe(self) -> str:
        """The queue, the nodes and the last lines of the daemons' logs, for the message of a failed test."""
        logs = [f"==> {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.root / "log").glob("*.log"))]
        return "\n".join([self.run("squeue", "--all", check=False), self.run("sinfo", check=False), *logs])

    def empty(self) -> None:
        """Cancel all jobs, and bring both nodes back into use."""
        self.run("scancel", "--user=root", check=False)
        for node in ("n1", "n2"):
            if "DOWN" in self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").upper():
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait(lambda: not self.run("squeue", "--noheader").strip(), "an empty queue", 60)
        self.wait(lambda: set(self.run("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, "idle nodes", 60)


def text_of(job: Job) -> str:
    """The logs of a job of `launch`."""
    return "".join(f"==> {path.name}\n{path.read_text()}" for path in sorted(job.path.glob("*.log")))


@contextlib.contextmanager
def cluster() -> Iterator[Slurm]:
    """A cluster, stopped at the end. Skips the test where Slurm is not installed or cannot be started."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: apt-get install munge slurmctld slurmd slurm-client")
    if os.geteuid():
        pytest.skip("starting Slurm needs root")
    # munge must be able to enter every folder above its socket; pytest's own temporary folders are private.
    root = Path(tempfile.mkdtemp(prefix="nulsq-slurm-"))
    root.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(root / "slurm.conf"))
        for folder in ("state", "spool", "log"):
            (root / folder).mkdir()
        ports = dict(zip(("port", "port1", "port2", "port3"), _free_ports(4), strict=True))
        (root / "slurm.conf").write_text(CONFIG.format(root=root, host=socket.gethostname().partition(".")[0], **ports))
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "711", root / "m"], check=True)
        slurm = Slurm(root)
        try:
            slurm.run("runuser", "-u", "munge", "--", "munged", "--force", "--key-file=/etc/munge/munge.key",
                     f"--socket={root}/m/munge.sock", f"--pid-file={root}/m/munged.pid",
                     f"--log-file={root}/m/munged.log", f"--seed-file={root}/m/seed")
            slurm.run("slurmctld", "-c")
            slurm.run("slurmd", "-N", "n1")
            slurm.run("slurmd", "-N", "n2")
            slurm.wait(lambda: slurm.run("sinfo", "--noheader", "--format=%T", check=False).split()[:1] == ["idle"],
                      "idle nodes", 60)
            yield slurm
        finally:
            if (root / "slurmctld.pid").is_file():
                slurm.run("scancel", "--user=root", check=False)
                time.sleep(1)
            for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "m/munged"):
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int((root / f"{name}.pid").read_text()), signal.SIGTERM)
            time.sleep(1)
            shutil.rmtree(root, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Consecutive free ports, because slurm.conf takes those of the nodes as a range. Each worker of pytest
    starts at another port."""
    first = 26817 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for start in range(first, first + 500, count):
        servers = []
        try:
            for number in range(start, start + count):
                servers.append(socket.create_server(("127.0.0.1", number)))
            return list(range(start, start + count))
        except OSError:
            continue
        finally:
            for server in servers:
                server.close()
    raise OSError("no free ports for Slurm")
