"""Compiles cpu.cpp on the machine where it runs, once for each machine, compiler and version of the source.

That takes seconds to a minute. The library is kept in a folder of the user's cache: `$NULSQ_CACHE`, else
`$XDG_CACHE_HOME/nulsq`, else `~/.cache/nulsq`. The compiler is `$CXX`, else `c++`, `g++` or `clang++`.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cpp", "quantizers.h", "traversal.h", "rules.h", "vector.h")]
# No -ffast-math: NaN must stay NaN, and sums must keep their order. -falign-loops: the position of a loop in memory is
# worth a tenth of a pass, and would otherwise change with every line of the source. -fno-trapping-math and
# -fno-math-errno let comparisons become masks.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno",
         "-falign-loops=64", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi", "-Wno-ignored-attributes",
         "-Wno-unknown-pragmas")
COMPILERS = ("c++", "g++", "clang++")


def compiled_library() -> Path:
    """The compiled library, from the cache if it is there.

    Raises OSError without a compiler, subprocess.SubprocessError if it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key_parts = [*(source.read_text() for source in SOURCES), *FLAGS, compiler, version, _processor()]
    key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()
    path = cache_folder() / f"quantizers-{key[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed at the end: other processes compile too
            output = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, str(SOURCES[0]), "-o", str(output)], capture_output=True, text=True,
                           check=True, timeout=300)
            output.replace(path)
    return path


def cache_folder() -> Path:
    """Where compiled code is kept between processes. Raises OSError if the user has no home directory."""
    if folder := os.environ.get("NULSQ_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nulsq"
    except RuntimeError:  # HOME is not set and the user is not in the password database
        raise OSError("there is no home directory for the compiled kernel; set NULSQ_CACHE to a folder") from None


def _processor() -> str:
    """What -march=native depends on: machines that differ may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()
