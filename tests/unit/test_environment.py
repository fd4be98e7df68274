"""The environment: the pins, the conda form, and what `make env` says before it installs anything."""

import ast
import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools._distutils import ccompiler, sysconfig

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


def test_the_list_is_of_exact_versions_each_once_and_of_nothing_else():
    """A local part such as +cpu exists in one place only, not in every registry."""
    text = REQUIREMENTS.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-", text, flags=re.MULTILINE)  # no option of pip
    assert len(PINS) == len(requirements())
    for requirement in requirements():
        assert re.fullmatch(r"==[^*+,]+", str(requirement.specifier)), requirement
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["dependencies"]
    dynamic = project["tool"]["setuptools"]["dynamic"]["dependencies"]
    assert dynamic == {"file": ["envs/requirements.txt"]}


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
    command = ["bash", ENVS / "qwt.post-deploy.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "QWT_ROOT" in done.stderr


PYTHON = f"python3.{sys.version_info.minor}"
LOSE = """
import ctypes, sys, sysconfig
lost = None
{fault}
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
    for tool in ("make", "sh"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "g++").write_text("#!/bin/sh\n")
    (tools / "g++").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "fault", "packages"),
    [
        *((target, "", ["g++"]) for target in ("env", "test", "demo", "lint")),
        ("env", "sys.modules['ensurepip'] = None", [f"{PYTHON}-venv"]),
        ("env", "sysconfig.get_paths = lambda: {'include': '/nowhere'}", [f"{PYTHON}-dev"]),
        ("env", "lost = 'libGL.so.1'", ["libgl1"]),
        ("env", "lost = 'libgthread-2.0.so.0'", ["libglib2.0-0"]),
        ("env", "lost = 'libGL.so.1'", ["g++", "libgl1"]),
        ("test", "sys.version_info = (3, 10, 14)", ["python3", "(3.11"]),
        ("env", None, ["python3", "python3-venv"]),  # there is no Python
    ],
)
def test_the_first_line_names_every_package_that_is_missing(checkout, target, fault, packages):
    (checkout / "sitecustomize.py").write_text(LOSE.format(fault=fault))
    if "g++" in packages:
        (checkout / "bin" / "g++").unlink()
    done = subprocess.run(
        ["make", target, *([] if fault is None else [f"PYTHON={sys.executable}"])],
        env={"PATH": str(checkout / "bin"), "PYTHONPATH": str(checkout)},
        cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    for package in packages:
        named = rf"(^| ){re.escape(package)}[ ,;]"
        assert re.search(named, done.stdout.splitlines()[0]), done.stdout
    assert not (checkout / ".venv").exists()


def test_nothing_is_missing_where_these_tests_run():
    """Otherwise the tests above would find a first line for the wrong reason."""
    missing = [package for _, package, present in check_system.requirements() if not present()]
    assert missing == []


def test_mmcv_is_installed_after_everything_else():
    text = REQUIREMENTS.read_text(encoding="utf-8")
    others, mmcv = install.split_requirements(text)
    assert mmcv == str(PINS["mmcv"])
    pinned = check_env.pinned_versions
    assert pinned(others).keys() == pinned(text).keys() - {"mmcv"}


NVCC = "Cuda compilation tools, release {}, V13.0.88"


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "declined", "forced", "said"),
    [
        (None, "", False, "0", "as torch is"),
        (None, NVCC.format("13.0"), False, "0", "as torch is"),  # of no use to a CPU build of torch
        ("13.0", NVCC.format("13.0"), False, "1", "with CUDA kernels"),
        ("12.8", NVCC.format("12.4"), False, "1", "with CUDA kernels"),  # minor versions may differ
        ("12.8", NVCC.format("13.0"), False, "0", "no nvcc here for CUDA 12.8"),
        ("13.0", "", False, "0", "no nvcc here for CUDA 13.0"),
        ("13.0", NVCC.format("13.0"), True, "0", "FORCE_CUDA=0"),
    ],
)
def test_mmcv_gets_cuda_kernels_only_from_the_nvcc_that_torch_was_built_with(
    torch_cuda, nvcc, declined, forced, said
):
    settings, sentence = install.cuda_settings(torch_cuda, nvcc, declined=declined)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch_cuda and forced == "0" else {}
    assert settings == {"FORCE_CUDA": forced} | hidden
    assert said in sentence


def compiler_flags() -> list[str]:
    """What setup.py of any package passes to the compiler in this process' environment."""
    compiler = ccompiler.new_compiler()
    sysconfig.customize_compiler(compiler)
    return compiler.compiler_so[1:]


def test_build_keeps_the_users_number_of_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    settings, _ = install.build_settings()
    assert settings["MAX_JOBS"] == "7"
    monkeypatch.delenv("MAX_JOBS")
    settings, _ = install.build_settings()
    assert 1 <= int(settings["MAX_JOBS"]) <= (os.cpu_count() or 1)


def test_mmcv_is_compiled_with_the_optimization_that_python_was_compiled_with(monkeypatch):
    monkeypatch.delenv("CFLAGS", raising=False)
    monkeypatch.setenv("CPPFLAGS", "-DOF_THE_USER")
    theirs = compiler_flags()
    settings, _ = install.build_settings()
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert "-DOF_THE_USER" in theirs
    assert [flag for flag in compiler_flags() if flag != "-g0"] == theirs
    assert "-g0" in compiler_flags()


COMPILER = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$1" in --version) echo "{version}";; *) exit {code};; esac
"""
GCC = "g++ 12.2.0, Copyright (C) 2022 Free Software Foundation, Inc."


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a script the compiler, and hands over its folder, where `calls` lists its arguments."""

    def make(version: str, code: int = 0) -> Path:
        script = tmp_path / "c++"
        script.write_text(COMPILER.format(folder=tmp_path, version=version, code=code))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return tmp_path

    return make


def test_headers_are_parsed_with_the_flags_that_files_are_compiled_with(compiler, monkeypatch):
    """GCC would refuse them otherwise, and parse the headers for each file again."""
    folder = compiler(GCC)
    include = install.precompile_headers(folder)
    monkeypatch.setenv("CPPFLAGS", f"{install.build_settings()[0]['CPPFLAGS']} {include}")
    option, header = include.split()
    call = (folder / "calls").read_text().splitlines()[-1].split()
    assert option == "-include"
    assert Path(header).is_file()
    assert call[call.index("-o") + 1] == f"{header}.gch"
    files = set(compiler_flags()) | {"-std=c++17", "-DTORCH_API_INCLUDE_EXTENSION_H"}
    headers = call[: call.index("-x")]
    assert files - {option, header} == {flag for flag in headers if not flag.startswith("-I")}


def test_without_parsed_headers_files_are_compiled_all_the_same(compiler, monkeypatch):
    folder = compiler("clang version 19.1.0")
    assert install.precompile_headers(folder) == ""
    assert install.precompile_headers(compiler(GCC, code=1)) == ""
    compiler(GCC)
    assert install.precompile_headers(folder) != ""
    monkeypatch.setattr(install, "HEADER_SPACE", math.inf)
    assert install.precompile_headers(folder) == ""
    monkeypatch.setattr(install, "HEADER_SPACE", 0)
    monkeypatch.setenv("CXX", str(folder / "nonesuch"))
    assert install.precompile_headers(folder) == ""


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("  [3/77] c++ -MMD -MF nms.o.d -c nms.cpp -o nms.o\n", (3, 77)),
        ("[77/77] c++ x.cpp\n", (77, 77)),
        ("  copying mmcv/ops/nms.py -> build/lib\n", None),
        ("    int sizes[3/77];\n", None),
    ],
)
def test_progress_is_read_from_the_lines_of_ninja(line, count):
    assert install.files_compiled(line) == count


def test_progress_tells_how_long_the_rest_takes():
    assert install.progress_sentence(1, 81, 0.0) == "Compiling mmcv: 1 of 81 files"
    assert install.progress_sentence(21, 81, 60.0) == "Compiling mmcv: 21 of 81 files, 3 min left"
    assert install.progress_sentence(80, 81, 60.0) == "Compiling mmcv: 80 of 81 files, almost done"
    assert install.progress_sentence(81, 81, 60.0) == "Compiling mmcv: 81 of 81 files, almost done"


@pytest.mark.parametrize(("terminal", "shown"), [(False, "0\n60\n"), (True, "\r0\r1\r60\r61\n")])
def test_progress_is_one_line_on_a_terminal_and_a_line_a_minute_in_a_file(
    terminal, shown, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    progress = install.ProgressLine()
    for second in (0, 1, 60, 61):
        progress.show(str(second), second)
    progress.close()
    assert capsys.readouterr().out.replace(" ", "") == shown


def test_output_of_a_build_goes_to_a_file_and_into_its_error(tmp_path, capsys):
    log = tmp_path / "build.log"
    script = "import os; print('  [1/2] c++ x.cpp'); print(os.environ['FLAG']); raise SystemExit(3)"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        install.run_logged(
            [sys.executable, "-c", script],
            {"FLAG": "x.cpp: error: wrong"},
            log,
            install.NinjaProgress().sentence,
        )
    assert log.read_text() == failed.value.output == "  [1/2] c++ x.cpp\nx.cpp: error: wrong\n"
    assert capsys.readouterr().out == "Compiling mmcv: 1 of 2 files\n"
    assert "x.cpp: error: wrong" in install.build_failure(failed.value.output)


def test_progress_of_pip_is_the_number_of_packages():
    lines = ["Collecting mmdet==3.3.0\n", "  Downloading mmdet.whl\n", "Processing /a/torch.whl\n",
             "Installing collected packages: torch, mmdet\n"]  # fmt: skip
    progress = install.PipProgress()
    assert [progress.sentence(line) for line in lines] == [
        "Collecting packages: 1",
        None,
        "Collecting packages: 2",
        "Installing 2 packages",
    ]


def test_a_package_that_pip_does_not_find_is_named_in_one_line(monkeypatch, capsys):
    output = "Collecting a\nERROR: No matching distribution found for a==9\n"

    def fail(command: list[str], *_: object) -> None:
        raise subprocess.CalledProcessError(1, command, output)

    def unproven(*_: object, **__: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, stdout="", stderr="")

    monkeypatch.setattr(install, "run_logged", fail)
    monkeypatch.setattr(install.subprocess, "run", unproven)
    assert install.main() == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert "ERROR: No matching distribution found for a==9 (all output is in" in last


def write_wheel(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "mmcv-2.1.0-py3-none-any.whl", "w") as wheel:
        info = "mmcv-2.1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_a_wheel_is_found_where_it_was_kept_and_where_pip_is_told_to_look(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    kept, shared, target = tmp_path / "kept", tmp_path / "shared", tmp_path / "target"
    write_wheel(shared)
    (wheel,) = shared.iterdir()
    assert not install.find_wheel("mmcv==2.1.0", kept, target)
    install.keep_wheel(wheel, kept)
    assert install.find_wheel("mmcv==2.1.0", kept, target)
    assert (target / wheel.name).read_bytes() == wheel.read_bytes()
    monkeypatch.setenv("PIP_FIND_LINKS", str(shared))
    assert install.find_wheel("mmcv==2.1.0", None, tmp_path / "other")


def test_wheels_are_kept_for_the_torch_and_the_gpus_that_they_were_compiled_for(monkeypatch):
    import torch

    monkeypatch.delenv("PIP_NO_CACHE_DIR", raising=False)
    monkeypatch.setenv("PIP_CACHE_DIR", "/cache")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    folders = [install.kept_wheels(cuda=False), install.kept_wheels(cuda=True)]
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    folders.append(install.kept_wheels(cuda=False))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    folders.append(install.kept_wheels(cuda=True))
    assert len(set(folders)) == 4
    assert {folder.parent for folder in folders} == {Path("/cache/qwt-mmdet")}
    assert folders[1].name.endswith("-cuda-8.0-9.0+PTX")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    assert install.kept_wheels(cuda=False) is None


@pytest.mark.parametrize(("found", "installations"), [(True, 2), (False, 1)])
def test_a_kept_wheel_that_does_not_run_is_compiled_anew_once(
    found, installations, tmp_path, monkeypatch
):
    kept = tmp_path / "kept"
    write_wheel(kept)
    done = []

    def install_mmcv(*_: object) -> bool:
        done.append(kept.is_dir())
        return not found

    def fail(*_: object, **__: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, stdout="", stderr="")

    monkeypatch.setattr(install, "install_all_but_mmcv", lambda _: None)
    monkeypatch.setattr(install, "kept_wheels", lambda cuda: kept)
    monkeypatch.setattr(install, "install_mmcv", install_mmcv)
    monkeypatch.setattr(install, "build_settings", lambda: ({"FORCE_CUDA": "0"}, ""))
    monkeypatch.setattr(install.subprocess, "run", fail)
    assert install.main() == 1
    assert done == [True, False][:installations]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("  error: subprocess-exited-with-error\n  x.cpp:1:10: fatal error: Python.h: No such file or "
         "directory\n  error: command failed", "Python.h: No such file or directory"),
        ("  /bin/sh: 1: c++: not found\n  CalledProcessError: Command '['ninja'", "c++: not found"),
        ("error: command 'g++' failed: No such file or directory\n", "'g++' failed"),
        ("ModuleNotFoundError: No module named 'pkg_resources'\n", "'pkg_resources'"),
        ("ERROR: No matching distribution found for mmcv==2.1.0\n", "No matching distribution"),
        ("Killed\n", "no error line"),
    ],
)  # fmt: skip
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


def test_operators_that_answer_wrongly_are_noticed(monkeypatch):
    import mmcv.ops
    import torch

    check_env.run_operators("cpu")
    monkeypatch.setattr(mmcv.ops, "nms", lambda *_, **__: (None, torch.tensor([0, 1, 2])))
    with pytest.raises(check_env.EnvironmentFault, match="nms"):
        check_env.run_operators("cpu")
