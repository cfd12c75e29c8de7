"""Measurements. Every figure in the docs comes from one of these commands."""

import os
import shlex


def command(module: str, argv: list[str]) -> str:
    """The command line of a measurement, as a page quotes it. The folder of data sets is written as $NULSQ_DATA."""
    words = shlex.join(argv)
    if data := os.environ.get("NULSQ_DATA"):
        words = words.replace(data, "$NULSQ_DATA")
    return f"python -m {module} {words}"
