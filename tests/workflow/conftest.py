"""Folders for the tests that run Snakemake."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from running import REAL_COCO, REAL_DETECTORS, ROOT, Workflow


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    """The workflow in an empty folder, which sees the demo and the real data at their usual places."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "workflow").symlink_to(ROOT / "workflow")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "coco_real").symlink_to(REAL_COCO)
    (tmp_path / "shared" / "real_detectors").symlink_to(REAL_DETECTORS)
    return Workflow(ROOT, folder)


@pytest.fixture(scope="session")
def copied_tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of everything that the workflow consists of, for tests that edit it."""

    def copy() -> Path:
        root = tmp_path_factory.mktemp("tree")
        for name in ("workflow", "scripts", "envs"):
            shutil.copytree(
                ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        shutil.copy(ROOT / "Snakefile", root)
        return root

    return copy


@pytest.fixture(scope="session")
def shared_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], None]], Path]:
    """Folders that are made once for all workers of a session: a name, and what fills the folder."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return made
