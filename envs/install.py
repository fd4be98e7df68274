"""Installs envs/requirements.txt into the environment whose Python runs this file.

mmcv is compiled against the torch that is installed, so it comes after all other packages. With a
CUDA build of torch and an nvcc of the same major version its operators get their CUDA kernels too,
with or without a GPU in this machine (FORCE_CUDA=0 declines). Not tested: no machine with a CUDA
build of torch was at hand. The wheel is kept in pip's cache folder, by the torch that it is for.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ENVS = Path(__file__).resolve().parent
REQUIREMENTS = ENVS / "requirements.txt"
PIP_LOG = Path(sys.prefix, "pip-install.log")
LOG = Path(sys.prefix, "mmcv-build.log")
BYTES_PER_JOB = 2 * 1024**3  # a compiler process needs 0.6 to 0.8 GiB, for pybind.cpp 2 GiB
NO_DEBUG = "-g0"
HEADER_SPACE = 2 * 1024**3  # parsed headers take 0.4 GiB, the build less
SECONDS_BETWEEN_LINES = 60  # of progress, where the output is no terminal


def split_requirements(text: str) -> tuple[str, str]:
    """Take mmcv's line out of the list.

    Returns:
        The list without mmcv, and mmcv's requirement.
    """
    lines = text.splitlines(keepends=True)
    mmcv = next(line for line in lines if line.startswith("mmcv=="))
    return "".join(line for line in lines if line is not mmcv), mmcv.strip()


def cuda_major(version: str) -> str:
    """The first number of a CUDA version or of `nvcc --version`'s text; empty if there is none."""
    found = re.search(r"release (\d+)\.", version) or re.match(r"(\d+)\.", version)
    return found.group(1) if found else ""


def cuda_settings(
    torch_cuda: str | None, nvcc_version: str, *, declined: bool = False
) -> tuple[dict[str, str], str]:
    """Decide whether mmcv gets its CUDA kernels.

    Args:
        torch_cuda: `torch.version.cuda`, None for a CPU build of torch.
        nvcc_version: what `nvcc --version` prints, empty where there is no nvcc.
        declined: whether the user asks for the CPU (FORCE_CUDA=0).

    Returns:
        Environment variables for mmcv's setup, and a sentence about the choice.
    """
    if torch_cuda is None:
        return {"FORCE_CUDA": "0"}, "for the CPU as torch is"
    if not declined and cuda_major(nvcc_version) == cuda_major(torch_cuda):
        return {"FORCE_CUDA": "1"}, "with CUDA kernels, which takes several times as long"
    why = (
        "FORCE_CUDA=0"
        if declined
        else f"no nvcc here for CUDA {torch_cuda}, which torch is built for"
    )
    # mmcv asks for CUDA as soon as torch sees a GPU, and would then stop for want of nvcc.
    return {"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}, f"for the CPU only ({why})"


def build_settings() -> tuple[dict[str, str], str]:
    """Environment variables for mmcv's setup, and a sentence about them.

    MAX_JOBS is kept where the user has set it; otherwise one job per core as far as memory goes.
    """
    import psutil
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    nvcc_version = (
        subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        if CUDA_HOME and nvcc.is_file()
        else ""
    )
    declined = os.environ.get("FORCE_CUDA") == "0"
    settings, sentence = cuda_settings(torch.version.cuda, nvcc_version, declined=declined)
    cores = len(psutil.Process().cpu_affinity() or [0])
    jobs = max(1, min(cores, psutil.virtual_memory().available // BYTES_PER_JOB))
    return {
        "MMCV_WITH_OPS": "1",
        # No debug symbols, which make the extension forty times as large. CPPFLAGS are added to the
        # flags that Python was compiled with; CFLAGS would take their place, its -O3 included.
        "CPPFLAGS": f"{os.environ.get('CPPFLAGS', '')} {NO_DEBUG}".strip(),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(jobs)),
        "NINJA_STATUS": "[%f/%t] ",  # what files_compiled reads
        # torch's extension builder looks for ninja on PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **settings,
    }, sentence


def pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def install_all_but_mmcv(requirements: str) -> None:
    """Install the packages of a list.

    Raises:
        subprocess.CalledProcessError: with pip's output.
    """
    say(f"Installing the packages of {REQUIREMENTS.name}; pip's output goes to {PIP_LOG}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "requirements.txt")
        path.write_text(requirements, encoding="utf-8")
        run_logged(pip("install", "-r", str(path)), {}, PIP_LOG, PipProgress().sentence)


def kept_wheels(cuda: bool) -> Path | None:
    """The folder of the wheels that were compiled for this torch, and for these GPUs.

    pip's own cache of wheels does not ask which torch a wheel was compiled for.

    Returns:
        A folder that need not exist yet; None where pip is told to keep nothing.
    """
    import torch

    done = subprocess.run(pip("cache", "dir"), capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    name = f"torch-{torch.__version__}"
    if cuda:
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        found = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
        listed = asked or " ".join(f"{major}.{minor}" for major, minor in sorted(found))
        name += "-cuda-" + (re.sub(r"[^\w.+]+", "-", listed) or "all")
    return Path(done.stdout.strip(), "qwt-mmdet", name)


def find_wheel(requirement: str, kept: Path | None, folder: Path) -> bool:
    """Copy a ready wheel into the folder: one that was kept, or one that pip is offered.

    Returns:
        Whether there is one.
    """
    places = ("--find-links", str(kept)) if kept and kept.is_dir() else ()
    options = ("--no-deps", "--only-binary", "mmcv", *places, "--wheel-dir", str(folder))
    done = subprocess.run(pip("wheel", *options, requirement), capture_output=True, check=False)
    return done.returncode == 0


def keep_wheel(wheel: Path, kept: Path | None) -> None:
    if kept is None:
        return
    try:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, kept)
    except OSError as error:
        say(f"mmcv's wheel is not kept for the next time ({error})")


def precompile_headers(folder: Path) -> str:
    """Let GCC parse torch's headers once, in the place of once for each file of mmcv.

    Where version or flags of the compiler differ later, GCC reads the headers as it always does.
    Clang would fail there instead, so it gets none.

    Returns:
        Flags for the compiler; empty where there is another compiler, an error or too little space.
    """
    from setuptools._distutils import ccompiler, sysconfig
    from torch.utils.cpp_extension import get_cxx_compiler, include_paths

    compiler = ccompiler.new_compiler()
    sysconfig.customize_compiler(compiler)
    header = folder / "torch_headers.h"
    header.write_text("#include <torch/types.h>\n", encoding="utf-8")
    cxx = shlex.split(get_cxx_compiler())
    # As in torch's extension builder and in mmcv's setup.
    flags = [*compiler.compiler_so[1:], NO_DEBUG, "-std=c++17", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_python_inc())]
    target = ("-x", "c++-header", str(header), "-o", f"{header}.gch")
    try:
        version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True)
        if "Free Software Foundation" not in version.stdout:
            return ""
        if shutil.disk_usage(folder).free < HEADER_SPACE:
            return ""
        subprocess.run([*cxx, *flags, *includes, *target], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"-include {shlex.quote(str(header))}"


class PipProgress:
    """What pip does, by its lines."""

    def __init__(self) -> None:
        self.collected = 0

    def sentence(self, line: str) -> str | None:
        """What a terminal shows after a line; None for what it showed before."""
        if line.startswith("Installing collected packages: "):
            return f"Installing {line.count(',') + 1} packages"
        if not line.startswith(("Collecting ", "Processing ")):
            return None
        self.collected += 1
        return f"Collecting packages: {self.collected}"


class NinjaProgress:
    """How many files ninja has compiled, by its lines, and how long the rest takes at this rate."""

    def __init__(self) -> None:
        self.started: float | None = None  # before the first one, pip prepares the build

    def sentence(self, line: str) -> str | None:
        """What a terminal shows after a line; None for what it showed before."""
        count = files_compiled(line)
        if count is None:
            return None
        now = time.monotonic()
        self.started = now if self.started is None else self.started
        return progress_sentence(*count, now - self.started)


def files_compiled(line: str) -> tuple[int, int] | None:
    """How many files are compiled, and of how many, if the line is one of ninja's."""
    found = re.match(r"\s*\[(\d+)/(\d+)\] ", line)
    return (int(found.group(1)), int(found.group(2))) if found else None


def progress_sentence(done: int, total: int, seconds: float) -> str:
    """What is compiled, and how long the rest takes at the rate of the seconds since the first file."""
    sentence = f"Compiling mmcv: {done} of {total} files"
    if done == 1:
        return sentence
    left = seconds / (done - 1) * (total - done) / 60
    return f"{sentence}, {math.ceil(left)} min left" if left > 1 else f"{sentence}, almost done"


class ProgressLine:
    """A line that a terminal shows redrawn; elsewhere a new one now and then."""

    def __init__(self) -> None:
        self.redrawn = sys.stdout.isatty()
        self.printed = -math.inf

    def show(self, sentence: str, now: float) -> None:
        if self.redrawn:
            print(f"\r{sentence:<60}", end="", flush=True)
        elif now - self.printed >= SECONDS_BETWEEN_LINES:
            print(sentence, flush=True)
        else:
            return
        self.printed = now

    def close(self) -> None:
        if self.redrawn and self.printed >= 0:
            print(flush=True)


def run_logged(
    command: list[str],
    settings: dict[str, str],
    log: Path,
    sentence: Callable[[str], str | None],
) -> None:
    """Run a command, write its output into a file and show how far it is.

    Args:
        sentence: what to show after a line of the output; None for nothing new.

    Raises:
        subprocess.CalledProcessError: with the output.
    """
    started = time.monotonic()
    progress = ProgressLine()
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,
        subprocess.Popen(
            command,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            if shown := sentence(line):
                progress.show(shown, time.monotonic() - started)
    progress.close()
    if process.returncode:
        output = log.read_text(encoding="utf-8")
        raise subprocess.CalledProcessError(process.returncode, command, output)


def compile_wheel(requirement: str, settings: dict[str, str], folder: Path) -> None:
    """Compile mmcv into a wheel in the folder.

    Raises:
        subprocess.CalledProcessError: with the build's output.
    """
    # pip's cache of wheels would be asked for the next torch as well.
    options = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        include = precompile_headers(Path(scratch))
        flags = {"CPPFLAGS": f"{settings['CPPFLAGS']} {include}".strip()}
        # pip shows the build's output only if it is asked to.
        build = pip("wheel", "--verbose", *options, requirement)
        run_logged(build, settings | flags, LOG, NinjaProgress().sentence)


def install_mmcv(
    requirement: str, settings: dict[str, str], sentence: str, kept: Path | None
) -> bool:
    """Install a ready wheel of mmcv, or compile one and keep it.

    Returns:
        Whether it was compiled.

    Raises:
        subprocess.CalledProcessError: with the build's output.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = find_wheel(requirement, kept, folder)
        if not found:
            say(
                f"Compiling {requirement}, {sentence} (MAX_JOBS={settings['MAX_JOBS']}), which takes "
                f"2 to 8 minutes on two cores and nothing the next time; the compiler's output goes to {LOG}"
            )
            compile_wheel(requirement, settings, folder)
        # Two steps: `pip install` of older versions answers a failed build by building once more.
        (wheel,) = folder.glob("*.whl")
        install = pip("install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
        subprocess.run(install, check=True)
        if not found:
            keep_wheel(wheel, kept)
    minutes = (time.monotonic() - started) / 60
    say(f"mmcv installed {'from a ready wheel' if found else f'after {minutes:.1f} minutes'}")
    return not found


def first_error(output: str) -> str:
    """The first line of an output that tells of an error."""
    errors = re.findall(
        r"^.*(?:\berror:|Error:|ERROR:|: not found$).*$", output, flags=re.MULTILINE
    )
    own = [line for line in errors if "subprocess-exited" not in line]
    return own[0].strip() if own else "its output has no error line"


def build_failure(output: str) -> str:
    """One sentence out of the output of a failed build: the compiler's first error."""
    return (
        f"mmcv could not be compiled: {first_error(output)} (all output is in {LOG}; the build needs g++, Python's "
        "headers and 2 GiB of memory per job: MAX_JOBS=1 takes least; FORCE_CUDA=0 leaves its CUDA "
        "kernels out)"
    )


def say(sentence: str) -> None:
    print(f"Environment: {sentence}.", flush=True)


def main() -> int:
    proof = [sys.executable, str(ENVS / "check_env.py")]
    done = subprocess.run(proof, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout, end="")
        return 0
    others, mmcv = split_requirements(REQUIREMENTS.read_text(encoding="utf-8"))
    try:
        install_all_but_mmcv(others)
    except subprocess.CalledProcessError as error:
        reason = first_error(error.output)
        say(f"pip could not install {REQUIREMENTS.name}: {reason} (all output is in {PIP_LOG})")
        return error.returncode
    settings, sentence = build_settings()
    kept = kept_wheels(cuda=settings["FORCE_CUDA"] == "1")
    try:
        compiled = install_mmcv(mmcv, settings, sentence, kept)
        outcome = subprocess.run(proof, check=False).returncode
        if outcome and not compiled and kept and kept.is_dir():
            say(f"the wheel in {kept} is removed, since it does not run here")
            shutil.rmtree(kept)
            install_mmcv(mmcv, settings, sentence, kept)
            outcome = subprocess.run(proof, check=False).returncode
    except subprocess.CalledProcessError as error:
        say(
            "pip could not install mmcv's wheel; its message is above"
            if error.output is None
            else build_failure(error.output)
        )
        return error.returncode
    return outcome


if __name__ == "__main__":
    sys.exit(main())
