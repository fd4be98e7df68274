"""Run Snakemake as a user does, in a folder of its own."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
REAL_COCO = Path(os.environ.get("QWT_REAL_COCO", ROOT.parent / "shared" / "coco_real")).resolve()
REAL_DETECTORS = Path(
    os.environ.get("QWT_REAL_DETECTORS", ROOT.parent / "shared" / "real_detectors")
).resolve()


@dataclass(frozen=True)
class Workflow:
    """The workflow of ``root``, run in ``folder``."""

    root: Path
    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake with its own log; its whole output is ``stdout``."""
        return self.run_with_profile("--workflow-profile", "none", *arguments)

    def run_with_profile(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake with the workflow's default profile; its whole output is ``stdout``."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "snakemake", "--snakefile", str(self.root / "Snakefile")),
                *("--directory", str(self.folder), "--nocolor", *arguments),
            ],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def jobs(self, *arguments: str) -> dict[str, int]:
        """Return how many jobs of each rule a dry run would execute."""
        done = self.run("--dry-run", *arguments)
        assert done.returncode == 0, done.stdout
        if "Nothing to be done" in done.stdout:
            return {}
        table = done.stdout.split("Job stats:")[1]
        counts = {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
        total = counts.pop("total")
        assert total == sum(counts.values())
        counts.pop("all", None)
        return counts

    def configure(self, config: dict) -> None:
        """Write the default config file of the folder."""
        path = self.folder / "config" / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
