"""The tiny demo on a real Slurm, which runs in a private namespace: `pytest -m slurm` as root, some minutes."""

import csv
import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "configs" / "demo_tiny.yaml"
NO_PACKAGES = 77
RESULTS = [
    "summary.csv",
    "demo/baseline/predictions.json",
    "demo/w4a4/warmup.pth",
    "demo/w4a4/quantized/predictions.json",
    "demo/w4a4/qwt/blocks.csv",
    "demo/w4a4/qwt/compensation.pth",
    "demo/w4a4/qwt/predictions.json",
]
KILL_ONE = """
while sleep 0.5; do
    job=$(squeue --noheader --states RUNNING --format '%i %k' | awk '/quantize_model/ {print $1; exit}')
    if [ -n "$job" ]; then sleep 4; scancel --full --signal KILL "$job"; break; fi
done &
exec "$@"
"""


def snakemake(folder: Path, *arguments: str, config: Path = CONFIG) -> list[str]:
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--nocolor"),
        *("--directory", str(folder), "--configfile", str(config), *arguments),
    ]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )


@pytest.fixture
def with_slurm(tmp_path) -> list[str]:
    """A command that runs another one beside a Slurm; it skips where that cannot be."""
    plugin = importlib.util.find_spec("snakemake_executor_plugin_slurm")
    if plugin is None:
        pytest.skip("the package snakemake-executor-plugin-slurm is not installed")
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or run([*namespace, "true"]).returncode:
        pytest.skip("unshare cannot make a mount and process namespace here (root can)")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("there is neither a Slurm nor Debian's apt-get here")
    folders = {tmp_path, ROOT, Path(sys.prefix), Path(plugin.origin).parents[1]}
    return [
        *namespace,
        str(ROOT / "tests" / "slurm" / "with_slurm.sh"),
        " ".join(map(str, sorted(folders))),
    ]


@pytest.mark.slurm
def test_a_run_on_slurm_with_a_killed_job_gives_the_bytes_of_a_local_run(tmp_path, with_slurm):
    folders = {name: tmp_path / name for name in ("local", "slurm")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "workflow").symlink_to(ROOT / "workflow")
    on_slurm = (
        *("--workflow-profile", str(ROOT / "workflow" / "profiles" / "slurm")),
        *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5"),
        *("--latency-wait", "10", "--slurm-keep-successful-logs"),
    )
    broken = yaml.safe_load(CONFIG.read_text())
    (tmp_path / "no_warmup.pth").write_text("no warmup file")
    broken["models"]["demo"]["warmup"] = {"w4a4": str(tmp_path / "no_warmup.pth")}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    whole = snakemake(folders["slurm"], *on_slurm)
    failing = snakemake(
        folders["slurm"], *on_slurm, "--retries", "0", config=tmp_path / "broken.yaml"
    )
    both = 'sh -c "$1" && cp -r "$3/results" "$3/of_slurm" && sh -c "$2"'
    kill_one = ["sh", "-c", KILL_ONE, "sh", *whole]
    commands = [shlex.join(kill_one), shlex.join(failing), str(folders["slurm"])]
    done = run([*with_slurm, "sh", "-c", both, "sh", *commands], timeout=1200)
    if done.returncode == NO_PACKAGES:
        pytest.skip(f"Debian's packages of Slurm cannot be had: {done.stdout[-300:]}")
    assert done.stdout.count("Trying to restart job") == 1, done.stdout
    assert done.stdout.count("has been submitted with SLURM jobid") == 8 + 1, done.stdout

    local = run(snakemake(folders["local"], "--cores", "1"))
    assert local.returncode == 0, local.stdout
    for name in RESULTS:
        one, other = folders["local"] / "results" / name, folders["slurm"] / "of_slurm" / name
        assert one.read_bytes() == other.read_bytes(), name

    # the second run failed, said why, and made a table of what it had
    assert done.returncode == 1, done.stdout
    *_, said = done.stdout.partition("has been submitted with SLURM jobid 9")
    assert "no_warmup.pth" in said, said
    assert "Traceback" not in said, said
    rows = list(csv.DictReader((folders["slurm"] / "results/summary.csv").open()))
    assert rows, said
    assert all(row["failed"].startswith("quantize_model demo w4a4") for row in rows), rows
