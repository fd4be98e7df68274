#!/usr/bin/env bash
# Installs requirements.txt into the conda environment of qwt.yaml, which is active here.
# Snakemake runs a copy of this file in the working directory, so the repository is looked for there;
# QWT_ROOT names it where the working directory is another one (`snakemake --directory`).
#
# Snakemake makes the environment anew when this file changes, and does not look into requirements.txt.
# Hence the next line, which tests/unit/test_environment.py compares with it.
# requirements.txt sha256: df50530095bcb2e0a90ad5f07b4c11ca093ff8b893bb6bf984b709482c474ada
set -euo pipefail

envs="${QWT_ROOT:-$PWD}/envs"
if [ ! -f "$envs/install.py" ]; then
  echo "There is no $envs/install.py: run this in the repository, or set QWT_ROOT to its folder." >&2
  exit 1
fi
python "$envs/check_system.py"
python "$envs/install.py"
