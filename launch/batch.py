"""What a job's script asks Python; needs nothing but Python.

    python -m launch.batch address HOST     the host's address, as text of numbers
    python -m launch.batch port JOB         the first of four free ports in a row, looked for from one of the job's own
    python -m launch.batch outcome RUN      how a run ended: finished, saved, diverged, failed or running
"""

import json
import socket
import sys
from pathlib import Path

LOWEST, RANGE, STEP = 20000, 10000, 4  # below the ports that systems give to outgoing connections
STRIDE = 617  # places further on: two jobs that look at the same time do not look at the same places one after another


def address(host: str) -> str:
    """An IPv4 address where there is one. Raises OSError where nobody knows the host."""
    found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    return min(found, key=lambda each: each[0] != socket.AF_INET)[4][0]


def port(job: int, count: int = STEP) -> int:
    """The first of `count` ports in a row that are free on this machine. Two jobs begin to look at different ones."""
    places = RANGE // STEP
    for attempt in range(places):
        start = LOWEST + (job + attempt * STRIDE) % places * STEP
        if all(map(_free, range(start, start + count))):
            return start
    raise OSError(f"no {count} free ports in a row from {LOWEST} to {LOWEST + RANGE}")


def outcome(run: str) -> str:
    """Raises OSError or ValueError where there is none."""
    return json.loads((Path(run) / "outcome.json").read_text())["outcome"]


def _free(number):
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", number))
        except OSError:
            return False
        return True


def main(argv: list[str]) -> int:
    answer = {"address": address, "port": lambda job: port(int(job)), "outcome": outcome}
    if len(argv) != 2 or argv[0] not in answer:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(answer[argv[0]](argv[1]))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {' '.join(argv)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
