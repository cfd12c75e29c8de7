"""Answers questions of a job's script with Python's standard library alone.

    python -m launch.batch address HOST     the host's address in numbers
    python -m launch.batch port JOB         the first of four consecutive free ports; the job decides where to start
    python -m launch.batch outcome RUN      how a run ended: finished, saved, diverged, failed or running
"""

import contextlib
import json
import socket
import sys
import zlib
from pathlib import Path

LOWEST, RANGE, STEP = 20000, 10000, 4  # below the ports that systems use for outgoing connections
STRIDE = 617  # groups of ports between attempts: two jobs that search at once do not try the same groups in turn


def address(host: str) -> str:
    """The host's IPv4 address, or another one if it has none. Raises OSError for an unknown host.

    Called on the host itself. Some systems resolve their own name to loopback, which other hosts cannot reach; the
    answer is then the address that packets to other hosts leave from.
    """
    candidates = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    resolved = str(min(candidates, key=lambda candidate: candidate[0] != socket.AF_INET)[4][0])
    if resolved.startswith("127.") and not host.startswith("127."):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # chooses a route, sends nothing
            return probe.getsockname()[0]
    return resolved


def port(job: str, count: int = STEP) -> int:
    """The first of `count` consecutive ports that are free on this machine. Each job starts at a group of its own."""
    groups, first = RANGE // STEP, zlib.crc32(job.encode())
    for attempt in range(groups):
        start = LOWEST + (first + attempt * STRIDE) % groups * STEP
        if all(map(_is_free, range(start, start + count))):
            return start
    raise OSError(f"no {count} consecutive free ports from {LOWEST} to {LOWEST + RANGE}")


def outcome(run: str) -> str:
    """Raises OSError or ValueError where there is none."""
    return json.loads((Path(run) / "outcome.json").read_text())["outcome"]


def _is_free(number: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError:
            return False
        return True


def main(argv: list[str]) -> int:
    answers = {"address": address, "port": port, "outcome": outcome}
    if len(argv) != 2 or argv[0] not in answers:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(answers[argv[0]](argv[1]))  # type: ignore[operator]
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {' '.join(argv)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
