"""Installs envs/requirements.txt into the environment whose Python runs this file.

mmcv is compiled against the torch that is installed, so it comes after all other packages. With a
CUDA build of torch and an nvcc of the same major version its operators get their CUDA kernels too,
with or without a GPU in this machine (FORCE_CUDA=0 declines). Not tested: no machine with a CUDA
build of torch was at hand.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENVS = Path(__file__).resolve().parent
REQUIREMENTS = ENVS / "requirements.txt"
BYTES_PER_JOB = 2 * 1024**3  # a compiler process needs 0.6 to 0.8 GiB, for pybind.cpp 2 GiB
NO_DEBUG = "-g0"


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
        # torch's extension builder looks for ninja on PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **settings,
    }, sentence


def pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def install_all_but_mmcv(requirements: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "requirements.txt")
        path.write_text(requirements, encoding="utf-8")
        subprocess.run(pip("install", "-r", str(path)), check=True)


def run_visibly(command: list[str], settings: dict[str, str]) -> None:
    """Run a command, print its output as it comes, and keep it for the error.

    Raises:
        subprocess.CalledProcessError: with the output.
    """
    output = []
    with subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(output))


def install_mmcv(requirement: str) -> None:
    """Compile mmcv, or take a wheel of it where pip is offered one.

    Raises:
        subprocess.CalledProcessError: with the build's output.
    """
    settings, sentence = build_settings()
    say(
        f"Installing {requirement}, {sentence} (MAX_JOBS={settings['MAX_JOBS']}): compiling it takes "
        "6 to 15 minutes on two cores; seconds where pip is offered a wheel (PIP_FIND_LINKS)"
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Two steps: `pip install` of older versions answers a failed build by building once more.
        # pip's cache may hold a wheel that was compiled against another torch.
        options = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "--wheel-dir", folder)
        run_visibly(pip("wheel", *options, requirement), settings)
        (wheel,) = Path(folder).glob("*.whl")
        run_visibly(pip("install", "--no-deps", "--force-reinstall", str(wheel)), {})
    say(f"mmcv installed after {(time.monotonic() - started) / 60:.1f} minutes")


def build_failure(output: str) -> str:
    """One sentence out of the output of a failed build: the compiler's first error."""
    errors = re.findall(r"^.*(?:\berror:|Error:|: not found$).*$", output, flags=re.MULTILINE)
    own = [line for line in errors if "subprocess-exited" not in line]
    reason = own[0].strip() if own else "its output above has no error line"
    return (
        f"mmcv could not be compiled: {reason} (it needs g++, Python's headers and 2 GiB of memory per "
        "job: MAX_JOBS=1 takes least; FORCE_CUDA=0 leaves its CUDA kernels out)"
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
        say(f"pip could not install {REQUIREMENTS.name}; its message is above")
        return error.returncode
    try:
        install_mmcv(mmcv)
    except subprocess.CalledProcessError as error:
        say(build_failure(error.output))
        return error.returncode
    return subprocess.run(proof, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
