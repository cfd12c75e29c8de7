"""Measurements by command: every number in the docs comes from one of these."""

import os
import shlex


def command(module: str, argv: list[str]) -> str:
    """The command of a measurement as its page quotes it: $NULSQ_DATA by name, wherever that folder is here."""
    words = shlex.join(argv)
    if data := os.environ.get("NULSQ_DATA"):
        words = words.replace(data, "$NULSQ_DATA")
    return f"python -m {module} {words}"
