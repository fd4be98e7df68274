#!/usr/bin/env bash
# Installs requirements.txt into the conda environment of qwt.yaml, which is active here.
# Snakemake runs a copy of this file in the working directory, so the repository is looked for there;
# QWT_ROOT names it where the working directory is another one (`snakemake --directory`).
#
# Snakemake makes the environment anew when this file changes, and does not look into requirements.txt.
# Hence the next line, which tests/unit/test_environment.py compares with it.
# requirements.txt sha256: c8b838b943de8dfc24e5ae7c04490178c020fc5a2690e34c2fe96e4e13f6f511
set -euo pipefail

envs="${QWT_ROOT:-$PWD}/envs"
if [ ! -f "$envs/install.py" ]; then
  echo "There is no $envs/install.py: run this in the repository, or set QWT_ROOT to its folder." >&2
  exit 1
fi
python "$envs/check_system.py"
python "$envs/install.py"
