"""What a job's script asks Python; needs nothing but Python.

    python -m launch.batch address HOST     the host's address, as text of numbers
    python -m launch.batch port JOB         the first of four free ports in a row, looked for from a place of the job's
    python -m launch.batch outcome RUN      how a run ended: finished, saved, diverged, failed or running
"""

import contextlib
import json
import socket
import sys
import zlib
from pathlib import Path

LOWEST, RANGE, STEP = 20000, 10000, 4  # below the ports that systems give to outgoing connections
STRIDE = 617  # places further on: two jobs that look at the same time do not look at the same places one after another


def address(host: str) -> str:
    """An IPv4 address where there is one. Raises OSError where nobody knows the host.

    Asked for on the host itself: some systems know their own name as their loopback, which others cannot reach. Then it
    is the address that packets to others leave from.
    """
    found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    known = min(found, key=lambda each: each[0] != socket.AF_INET)[4][0]
    if known.startswith("127.") and not host.startswith("127."):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tried:
            tried.connect(("192.0.2.1", 9))  # sends nothing
            return tried.getsockname()[0]
    return known


def port(job: str, count: int = STEP) -> int:
    """The first of `count` ports in a row that are free on this machine. Jobs begin to look at places of their own."""
    places, first = RANGE // STEP, zlib.crc32(job.encode())
    for attempt in range(places):
        start = LOWEST + (first + attempt * STRIDE) % places * STEP
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
    answer = {"address": address, "port": port, "outcome": outcome}
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
