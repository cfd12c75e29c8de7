"""A real Slurm of two nodes on this machine, on loopback: munged, slurmctld, two slurmd.

    with cluster() as slurm:                  # skips the test, with the reason, where Slurm is not installed
        slurm.run("sbatch", ...)              # any Slurm command, on this cluster
        slurm.wait(lambda: ..., "what")       # until it holds
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

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
    """The cluster, as long as it is up."""

    def __init__(self, root: Path):
        self.root = root

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, holds, what: str, seconds: float = 240.0):
        """What `holds()` returns, as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s\n{self.told()}"
            time.sleep(0.25)
        return found

    def ended(self, job: str, seconds: float = 300.0) -> dict[str, str]:
        """The job, once it is neither waiting nor running."""
        def look():
            found = self.job(job)
            return found if found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None
        return self.wait(look, f"the end of job {job}", seconds)

    def left(self, job: str) -> list[str]:
        """Processes of a job that are there, whoever their parents are by now: their commands."""
        found = []
        for process in self.processes(f"SLURM_JOB_ID={job}"):
            with contextlib.suppress(OSError):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        return found

    def processes(self, variable: str) -> list[Path]:
        """Folders in /proc of this cluster's processes that inherited a variable, "NAME=VALUE"."""
        found, wanted = [], {variable.encode(), f"SLURM_CONF={self.root}/slurm.conf".encode()}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(process)
        return found

    def crash(self, node: str) -> None:
        """The node's daemons and all that runs there are gone at once; Slurm does not know yet. `run("slurmd", "-N",
        node)` brings it back."""
        there = [int((self.root / f"slurmd-{node}.pid").read_text())]
        for process in self.processes(f"SLURMD_NODENAME={node}"):
            there.append(int(process.name))
            with contextlib.suppress(OSError):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if Path("/proc", parent, "comm").read_text().startswith("slurmstepd"):
                    there.append(int(parent))
        for each in dict.fromkeys(there):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def told(self) -> str:
        """What somebody wants to read who was not there: the queue, the nodes, the ends of the daemons' logs."""
        logs = [f"==> {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.root / "log").glob("*.log"))]
        return "\n".join([self.run("squeue", "--all", check=False), self.run("sinfo", check=False), *logs])

    def empty(self) -> None:
        """End whatever is left in the queue, and have both nodes in use again."""
        self.run("scancel", "--user=root", check=False)
        for node in ("n1", "n2"):
            if "DOWN" in self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").upper():
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait(lambda: not self.run("squeue", "--noheader").strip(), "an empty queue", 60)
        self.wait(lambda: set(self.run("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, "idle nodes", 60)


def text_of(job) -> str:
    """All that a job of `launch` has printed."""
    return "".join(f"==> {path.name}\n{path.read_text()}" for path in sorted(job.path.glob("*.log")))


@contextlib.contextmanager
def cluster():
    """Start it and stop it. Skips where it cannot be had."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: apt-get install munge slurmctld slurmd slurm-client")
    if os.geteuid():
        pytest.skip("a Slurm of its own needs root")
    # Every folder above munge's socket has to let it pass, which pytest's own do not.
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
        made = Slurm(root)
        try:
            made.run("runuser", "-u", "munge", "--", "munged", "--force", "--key-file=/etc/munge/munge.key",
                     f"--socket={root}/m/munge.sock", f"--pid-file={root}/m/munged.pid",
                     f"--log-file={root}/m/munged.log", f"--seed-file={root}/m/seed")
            made.run("slurmctld", "-c")
            made.run("slurmd", "-N", "n1")
            made.run("slurmd", "-N", "n2")
            made.wait(lambda: made.run("sinfo", "--noheader", "--format=%T", check=False).split()[:1] == ["idle"],
                      "idle nodes", 60)
            yield made
        finally:
            if (root / "slurmctld.pid").is_file():
                made.run("scancel", "--user=root", check=False)
                time.sleep(1)
            for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "m/munged"):
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int((root / f"{name}.pid").read_text()), signal.SIGTERM)
            time.sleep(1)
            shutil.rmtree(root, ignore_errors=True)


def _free_ports(count):
    """So many in a row: slurm.conf wants the nodes' as a range. Workers of pytest look in places of their own."""
    first = 26817 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for start in range(first, first + 500, count):
        tried = []
        try:
            for number in range(start, start + count):
                tried.append(socket.create_server(("127.0.0.1", number)))
            return list(range(start, start + count))
        except OSError:
            continue
        finally:
            for each in tried:
                each.close()
    raise OSError("no free ports for Slurm")
