# `make` lists the targets. PYTHON chooses the Python (3.11 or newer) that .venv is made with.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
WITH_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help env test test-all bench demo gallery estimate lint docs config-docs clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(STAMP) ## install everything into .venv (once; again when the pins change)

# The checks come first, so that the first line of output names what the machine lacks.
$(STAMP): envs/requirements.txt envs/install.py envs/check_env.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Please install python3 (3.11 or newer), python3-venv and python3-dev, or name another Python:" \
	    "make PYTHON=python3.12 env; $(PYTHON) is missing or too old." >&2; exit 1; }
	@$(PYTHON) envs/check_system.py
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python envs/install.py
	@$(VENV)/bin/python -m pip --quiet --disable-pip-version-check install \
	  --no-deps --no-build-isolation --editable .
	@touch $@

# OpenVINO, ncnn and Snakemake's plugin for Slurm, which nothing but their tests needs.
$(EXTRAS): $(STAMP)
	@$(VENV)/bin/python -m pip --quiet --disable-pip-version-check install \
	  --no-build-isolation --editable '.[openvino,ncnn,slurm]'
	@touch $@

PYTEST := $(WITH_VENV) OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist worksteal

test: env ## run the tests but for the slow ones, in under 10 minutes (ARGS="-k word" chooses some)
	@$(PYTEST) -m "not slow and not zoo and not slurm" $(ARGS)

test-all: $(EXTRAS) ## run the slow tests too: whole runs, ten architectures, OpenVINO, a Slurm of its own
	@$(PYTEST) -m "not zoo" $(ARGS)

bench: env ## measure time and memory on a Swin-T backbone, and exported files (over an hour on two cores)
	@$(WITH_VENV) python tests/benchmarks/bench_quantization.py
	@$(WITH_VENV) python tests/benchmarks/bench_compensation.py --images 32 --check
	@$(WITH_VENV) python tests/benchmarks/bench_exports.py backbones demo
	@$(WITH_VENV) python tests/benchmarks/bench_exports.py detector --bits w8a8 w4a8 w4a4 --others

demo: env ## run the default configuration from checkpoint to report
	@$(WITH_VENV) snakemake --cores all --resources gpu=$$($(VENV)/bin/python -c \
	  'from qwt_mmdet.devices import count_gpus; print(count_gpus())') $(ARGS)

# The report of real detectors, whose files lie beside the repository; GALLERY names a config of your own.
gallery: env ## compute and report five detectors on real images, as docs/gallery/results/report.html (hours)
	@mkdir -p docs/gallery
	@PYTHONPATH="$(CURDIR)/../shared/real_detectors" $(WITH_VENV) snakemake --cores all --directory docs/gallery \
	  --configfile $(or $(GALLERY),config/gallery.yaml) $(ARGS)

estimate: env ## tell what a run would take (CONFIG=config/coco.yaml names another config)
	@$(VENV)/bin/qwt-mmdet estimate $(or $(CONFIG),config/config.yaml)

lint: env ## check code and workflow: ruff, mypy, import-linter, snakefmt, snakemake --lint
	@$(WITH_VENV) ruff check .
	@$(WITH_VENV) ruff format --check .
	@$(WITH_VENV) mypy
	@$(WITH_VENV) lint-imports --no-cache --no-logo
	@$(WITH_VENV) snakefmt --check Snakefile workflow
	@$(WITH_VENV) snakemake --lint

docs: env ## write the API reference to docs/api/
	@$(VENV)/bin/python docs/reference.py

config-docs: env ## write the schema and the tables of config/README.md from the sections
	@$(VENV)/bin/python -m qwt_mmdet.config.documentation

clean: ## remove .venv and the tools' caches; results stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache scripts/*.egg-info
	find scripts tests envs -name __pycache__ -type d -prune -exec rm -rf {} +
