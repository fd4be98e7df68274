"""mmdet without what it loads and no detector uses; all of it works once it is needed."""

import importlib
import subprocess
import sys

import pytest
from qwt_mmdet import devices
from qwt_mmdet.imports import deferred

LEAN = """
import sys
from qwt_mmdet.imports import import_mmdet
import_mmdet()
from mmdet.utils import register_all_modules
from qwt_mmdet.steps import compensate, evaluate, quantize
register_all_modules(init_default_scope=True)
heavy = {"matplotlib", "scipy.linalg", "scipy.optimize", "scipy.sparse", "sympy"}
heavy |= {"torch.distributed.fsdp", "torch.distributed.optim"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)

from mmdet.models.task_modules.assigners.hungarian_assigner import linear_sum_assignment
assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
import scipy.optimize
assert scipy.optimize.minimize and scipy.optimize.linear_sum_assignment is not linear_sum_assignment

from mmengine.registry import MODEL_WRAPPERS, OPTIMIZERS, STRATEGIES
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
assert issubclass(MODEL_WRAPPERS.get("MMFullyShardedDataParallel"), FullyShardedDataParallel)
assert issubclass(OPTIMIZERS.get("ZeroRedundancyOptimizer"), ZeroRedundancyOptimizer)
assert STRATEGIES.get("FSDPStrategy").__module__ == "mmengine._strategy.fsdp"
assert OPTIMIZERS.get("SGD")
import mmdet.utils.mot_error_visualize
assert mmdet.utils.mot_error_visualize.plt
"""


def test_mmdet_is_imported_lean_and_lacks_nothing():
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("steps.prepare", {"torch", "mmdet", "mmcv", "numpy", "matplotlib", "scipy"}),
        ("steps.select", {"torch", "mmdet", "mmcv", "matplotlib", "scipy"}),
        ("reporting.tables", {"torch", "mmdet", "mmcv", "matplotlib", "scipy.stats"}),
        ("reporting.html", {"torch", "mmdet", "mmcv", "scipy"}),
    ],
)
def test_a_step_without_a_detector_imports_nothing_heavy_that_it_does_not_need(module, heavy):
    program = f"import sys, qwt_mmdet.{module}; print(*set({sorted(heavy)}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``outer.heavy`` with the functions ``half`` and ``double`` and a submodule ``part``."""
    code = "def double(x, times=2):\n    return times * x\ndef half(x):\n    return x / 2\n"
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").touch()
    (tmp_path / "outer" / "heavy").mkdir()
    (tmp_path / "outer" / "heavy" / "__init__.py").write_text(code)
    (tmp_path / "outer" / "heavy" / "part.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "outer"]:
        del sys.modules[name]


def imported(line: str) -> dict:
    """The names that an import statement makes."""
    names: dict = {}
    exec(line, names)
    return names


def test_a_deferred_module_is_imported_when_its_function_is_called(package):
    with deferred({"outer.heavy": ["double"]}):
        double = imported("from outer.heavy import double")["double"]
    assert "outer.heavy" not in sys.modules
    assert double(4, times=3) == 12
    assert sys.modules["outer.heavy"].__file__


def test_what_else_is_asked_of_a_deferred_module_is_the_real_ones(package):
    with deferred({"outer.heavy": ["double"]}):
        imported("import outer.heavy.part")
        assert not hasattr(sys.modules["outer.heavy"], "__file__")
        half = imported("from outer.heavy import half")["half"]
        assert imported("import outer.heavy")["outer"].heavy.part.value == 3
        with pytest.raises(ImportError):
            imported("from outer.heavy import missing")
    assert half(4) == 2
    assert importlib.import_module("outer.heavy").double(4) == 8


def test_a_submodule_that_was_imported_stays(package):
    with deferred({"outer.heavy": ["double"]}):
        importlib.import_module("outer.heavy.part")
    assert importlib.import_module("outer.heavy").part.value == 3


def test_a_module_that_is_there_already_stays(package):
    real = importlib.import_module("outer.heavy")
    with deferred({"outer.heavy": ["double"]}):
        assert importlib.import_module("outer.heavy") is real
    assert sys.modules["outer.heavy"] is real


def test_windows_is_refused_in_a_sentence():
    command = [sys.executable, "-c", "import os; os.name = 'nt'; import qwt_mmdet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "on Windows, install it inside of WSL 2" in done.stderr.splitlines()[-1]


def test_peak_memory_is_counted_in_the_units_of_the_system(monkeypatch):
    linux = devices.peak_gigabytes()
    monkeypatch.setattr("sys.platform", "darwin")
    assert 0.05 < linux < 100
    assert devices.peak_gigabytes() == pytest.approx(linux / 1024, rel=0.1)
