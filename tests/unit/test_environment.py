"""The environment: the pins, the conda form, and what `make env` says before it installs anything."""

import ast
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENVS = ROOT / "envs"
REQUIREMENTS = ENVS / "requirements.txt"


def load(name: str):
    """A script of envs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ENVS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_env = load("check_env")
check_system = load("check_system")
install = load("install")


def requirements() -> list[Requirement]:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


PINS = {canonicalize_name(requirement.name): requirement for requirement in requirements()}


# --- the list ---


def test_every_requirement_is_an_exact_version():
    for requirement in requirements():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert "*" not in specifier.version, requirement


def test_no_package_stands_twice():
    assert len(PINS) == len(requirements())


def test_the_list_holds_no_address_and_no_pip_option():
    text = REQUIREMENTS.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-", text, flags=re.MULTILINE)
    assert all(requirement.url is None for requirement in requirements())


def test_no_pin_carries_a_local_version():
    """A local part such as +cpu exists in one place only, not in every registry."""
    assert all("+" not in str(requirement.specifier) for requirement in requirements())


def test_whatever_a_pinned_package_needs_is_pinned_too():
    """Only a CUDA build of torch brings packages of its own, at versions that it names."""
    installed = {canonicalize_name(each.name): each for each in metadata.distributions()}
    missing = {}
    for name, requirement in PINS.items():
        extras = ["", *requirement.extras]
        for line in installed[name].requires or []:
            needed = Requirement(line)
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            )
            of_cuda = name == "torch" and re.match(r"nvidia-|cuda-|triton", needed.name)
            if wanted and not of_cuda and canonicalize_name(needed.name) not in PINS:
                missing.setdefault(needed.name, []).append(name)
    assert missing == {}


def of_its_own_environment(path: Path) -> set[str]:
    """Packages that a script names for an environment of its own (PEP 723)."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text("utf-8"), re.MULTILINE)
    if block is None:
        return set()
    pins = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))["dependencies"]
    return {canonicalize_name(Requirement(pin).name) for pin in pins}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def test_every_import_comes_from_a_pin():
    providers = metadata.packages_distributions()
    sources = [
        path for part in ("scripts", "tests", "envs") for path in (ROOT / part).rglob("*.py")
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [pin for pins in project["optional-dependencies"].values() for pin in pins]
    known = {*PINS, *(canonicalize_name(pin.partition("==")[0]) for pin in extras)}
    own = {"qwt_mmdet", *(path.stem for path in sources), *(path.parent.name for path in sources)}
    foreign = {
        f"{name} ({path.relative_to(ROOT)})"
        for path in sources
        for name in imported_packages(path) - own - sys.stdlib_module_names
        if not (known | of_its_own_environment(path))
        & {canonicalize_name(each) for each in providers.get(name, [name])}
    }
    assert sources
    assert foreign == set()


def test_the_project_takes_its_dependencies_from_the_list():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {
        "file": ["envs/requirements.txt"]
    }


# --- the conda form ---


def test_conda_form_repeats_no_pin():
    form = yaml.safe_load((ENVS / "qwt.yaml").read_text(encoding="utf-8"))
    names = {re.split(r"[=<> ]", entry)[0] for entry in form["dependencies"]}  # no `pip:` mapping
    assert names & PINS.keys() == set()


def test_conda_form_is_made_anew_when_the_pins_change():
    """Snakemake hashes the post-deploy script but not the list that it reads."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    assert f"requirements.txt sha256: {digest}\n" in (ENVS / "qwt.post-deploy.sh").read_text(), (
        f"write {digest} into envs/qwt.post-deploy.sh"
    )


def test_post_deploy_script_away_from_the_repository_says_how_to_name_it(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "QWT_ROOT"}
    done = subprocess.run(
        ["bash", ENVS / "qwt.post-deploy.sh"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "QWT_ROOT" in done.stderr


# --- what `make` says ---

FAULTS = {
    "venv": ("sys.modules['ensurepip'] = None", f"python3.{sys.version_info.minor}-venv"),
    "headers": (
        "import sysconfig; sysconfig.get_paths = lambda: {'include': '/nowhere'}",
        f"python3.{sys.version_info.minor}-dev",
    ),
    "libGL": ("lost = 'libGL.so.1'", "libgl1"),
    "glib": ("lost = 'libgthread-2.0.so.0'", "libglib2.0-0"),
}
LOSE_LIBRARY = """
import sys
lost = None
{fault}
if lost:
    import ctypes
    class CDLL(ctypes.CDLL):
        def __init__(self, name, *args, **kwargs):
            if name == lost:
                raise OSError(name)
            super().__init__(name, *args, **kwargs)
    ctypes.CDLL = CDLL
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make env` reads, and a folder `bin` with a make, a shell and a g++ that do nothing else."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ENVS, tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "sed", "expand"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "g++").write_text("#!/bin/sh\n")
    (tools / "g++").chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env={"PATH": str(checkout / "bin"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


def assert_first_line_names(package: str, done: subprocess.CompletedProcess, checkout: Path):
    assert done.returncode != 0
    assert re.search(rf"(^| ){re.escape(package)}[ ,;]", done.stdout.splitlines()[0]), done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("target", ["env", "test", "demo", "lint"])
def test_without_a_compiler_the_first_line_names_its_package(checkout, target):
    (checkout / "bin" / "g++").unlink()
    done = make(checkout, target, f"PYTHON={sys.executable}")
    assert_first_line_names("g++", done, checkout)


@pytest.mark.parametrize("fault", FAULTS)
def test_first_line_names_the_package_of_what_is_missing(checkout, fault):
    code, package = FAULTS[fault]
    (checkout / "sitecustomize.py").write_text(LOSE_LIBRARY.format(fault=code))
    done = make(checkout, "env", f"PYTHON={sys.executable}", PYTHONPATH=str(checkout))
    assert_first_line_names(package, done, checkout)


def test_first_line_names_every_package_that_is_missing(checkout):
    code, package = FAULTS["libGL"]
    (checkout / "bin" / "g++").unlink()
    (checkout / "sitecustomize.py").write_text(LOSE_LIBRARY.format(fault=code))
    done = make(checkout, "env", f"PYTHON={sys.executable}", PYTHONPATH=str(checkout))
    assert_first_line_names("g++", done, checkout)
    assert_first_line_names(package, done, checkout)


def test_without_python_the_first_line_names_its_packages(checkout):
    done = make(checkout, "env")
    assert_first_line_names("python3", done, checkout)
    assert_first_line_names("python3-venv", done, checkout)


def test_an_old_python_is_refused_before_anything_is_made(checkout):
    (checkout / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 10, 14)")
    done = make(checkout, "test", f"PYTHON={sys.executable}", PYTHONPATH=str(checkout))
    assert_first_line_names("python3", done, checkout)
    assert "3.11" in done.stdout.splitlines()[0]


def test_make_without_a_target_lists_the_targets(checkout):
    done = make(checkout)
    assert done.returncode == 0
    for target in ("env", "test", "demo", "lint", "clean"):
        assert f"make {target} " in done.stdout


def test_nothing_is_missing_where_these_tests_run():
    """Otherwise the tests above would find a first line for the wrong reason."""
    missing = [package for _, package, present in check_system.requirements() if not present()]
    assert missing == []


# --- mmcv ---


def test_mmcv_is_installed_after_everything_else():
    others, mmcv = install.split_requirements(REQUIREMENTS.read_text(encoding="utf-8"))
    assert mmcv == "mmcv==2.1.0"
    assert check_env.pinned_versions(others).keys() == check_env.pinned_versions(
        REQUIREMENTS.read_text(encoding="utf-8")
    ).keys() - {"mmcv"}


NVCC = "Cuda compilation tools, release {}, V13.0.88"


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "forced", "gpu_hidden"),
    [
        (None, "", "0", False),
        (None, NVCC.format("13.0"), "0", False),  # nvcc is no use to a CPU build of torch
        ("13.0", NVCC.format("13.0"), "1", False),
        ("12.8", NVCC.format("12.4"), "1", False),  # minor versions may differ
        ("12.8", NVCC.format("13.0"), "0", True),
        ("13.0", "", "0", True),
    ],
)
def test_mmcv_gets_cuda_kernels_only_from_the_nvcc_that_torch_was_built_with(
    torch_cuda, nvcc, forced, gpu_hidden
):
    settings, sentence = install.cuda_settings(torch_cuda, nvcc)
    assert settings["FORCE_CUDA"] == forced
    assert (settings.get("CUDA_VISIBLE_DEVICES") == "") is gpu_hidden
    assert sentence


def test_a_user_can_decline_cuda_kernels():
    settings, sentence = install.cuda_settings("13.0", NVCC.format("13.0"), declined=True)
    assert settings == {"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
    assert "FORCE_CUDA=0" in sentence


def test_build_keeps_the_users_number_of_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    settings, _ = install.build_settings()
    assert settings["MAX_JOBS"] == "7"
    monkeypatch.delenv("MAX_JOBS")
    settings, _ = install.build_settings()
    assert 1 <= int(settings["MAX_JOBS"]) <= (os.cpu_count() or 1)
    assert settings["CFLAGS"].endswith("-g0")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "  error: subprocess-exited-with-error\n  gcc -c x.cpp\n"
            "  x.cpp:1:10: fatal error: Python.h: No such file or directory\n  error: command failed",
            "Python.h: No such file or directory",
        ),
        ("  /bin/sh: 1: c++: not found\n  CalledProcessError: Command '['ninja'", "c++: not found"),
        ("error: command 'g++' failed: No such file or directory\n", "'g++' failed"),
        ("ModuleNotFoundError: No module named 'pkg_resources'\n", "'pkg_resources'"),
        ("Killed\n", "no error line"),
    ],
)
def test_a_failed_build_ends_in_one_line_with_the_first_error(output, reason):
    sentence = install.build_failure(output)
    assert reason in sentence
    assert "\n" not in sentence


def test_a_pin_that_is_not_fulfilled_is_named():
    check_env.check_pins({"torch": metadata.version("torch").partition("+")[0]})
    with pytest.raises(check_env.EnvironmentFault, match=r"mmdet is .* instead of 0\.1"):
        check_env.check_pins({"mmdet": "0.1"})
    with pytest.raises(check_env.EnvironmentFault, match="nonesuch is missing instead of 1"):
        check_env.check_pins({"nonesuch": "1"})


def test_mmcv_operators_run():
    check_env.run_operators("cpu")


def test_operators_that_answer_wrongly_are_noticed(monkeypatch):
    import mmcv.ops
    import torch

    monkeypatch.setattr(mmcv.ops, "nms", lambda *_, **__: (None, torch.tensor([0, 1, 2])))
    with pytest.raises(check_env.EnvironmentFault, match="nms"):
        check_env.run_operators("cpu")


# --- continuous integration ---


@pytest.mark.parametrize("own", ["", "/elsewhere"])
@pytest.mark.parametrize("ready", [True, False])
def test_ci_lints_and_tests_and_offers_the_wheel_where_there_is_one(tmp_path, ready, own):
    script = tmp_path / "repository" / ".ci" / "run"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", script)
    wheels = tmp_path / "shared" / "wheels"
    if ready:
        wheels.mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "make").write_text('#!/bin/sh\necho "$1:${PIP_FIND_LINKS:-}"\n')
    (tools / "make").chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    environment["PIP_FIND_LINKS"] = own
    done = subprocess.run(
        [script], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    links = " ".join([own] * bool(own) + [str(wheels)] * ready)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"lint:{links}", f"test-all:{links}"]
