"""Names the system packages that the environment needs and this machine lacks.

Run by the Python that the environment is to be made with, before anything is installed, so it uses
the standard library alone. Prints nothing when all is there; otherwise one line, and exits with 1.
"""

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path


def can_make_venv() -> bool:
    """Debian and Ubuntu ship the venv module without the ensurepip that it needs."""
    return importlib.util.find_spec("ensurepip") is not None


def has_compiler() -> bool:
    """The compiler that torch's extension builder will call."""
    return shutil.which(os.environ.get("CXX", "g++").split()[0]) is not None


def has_python_headers() -> bool:
    return Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def requirements() -> list[tuple[str, str, Callable[[], bool]]]:
    """What is needed, the Debian/Ubuntu package that has it, and the test for it."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [
        ("ensurepip (for venv)", f"{python}-venv", can_make_venv),
        ("a C++ compiler (for mmcv)", "g++", has_compiler),
        ("Python.h (for mmcv)", f"{python}-dev", has_python_headers),
        ("libGL.so.1 (for OpenCV)", "libgl1", lambda: has_library("libGL.so.1")),
        (
            "libgthread-2.0.so.0 (for OpenCV)",
            "libglib2.0-0",
            lambda: has_library("libgthread-2.0.so.0"),
        ),
    ]


def main() -> int:
    missing = [(what, package) for what, package, present in requirements() if not present()]
    if not missing:
        return 0
    packages = " ".join(package for _, package in missing)
    print(
        f"Please install {packages} (Debian, Ubuntu: apt-get install {packages}); "
        f"missing on this machine: {', '.join(what for what, _ in missing)}.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
