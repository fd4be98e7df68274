"""Every configuration that the repository ships can be planned, and asks for what it should."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from qwt_mmdet.config import resolve
from qwt_mmdet.plan import Plan
from running import REAL_COCO, REAL_DETECTORS, ROOT, Workflow

# {name of the configuration: (models, quantized, compensated, exported, datasets, repeats)}
RESULTS = {
    "coco_download": (2, 3, 5, 0),
    "demo_tiny": (1, 1, 1, 0),
    "real_detectors": (5, 120, 0, 0, 2, 3),
    "yolox_coco_real": (1, 7, 12, 0),
    "yolox_coco_real_tiny": (1, 1, 1, 1),
}
CONFIGS = ROOT / "tests" / "configs"
TABLES = ("summarize_results", "render_report")
real = pytest.mark.skipif(
    not (REAL_COCO.is_dir() and REAL_DETECTORS.is_dir()),
    reason=f"no real COCO sample in {REAL_COCO}, or no real detectors in {REAL_DETECTORS}",
)


def expected(
    models: int,
    quantized: int,
    compensated: int,
    exported: int = 0,
    datasets: int = 1,
    repeats: int = 1,
) -> dict[str, int]:
    """Jobs by rule. Exported detectors of one model have one runtime each."""
    exports = {
        "export_model": exported + 1,  # in full precision, too
        "evaluate_exported": exported,
        "benchmark_exported": exported,
    }
    fits = {"fit_compensation": compensated, "evaluate_compensated": compensated}
    return {
        "fetch_checkpoint": models,
        "prepare_dataset": 2 * datasets,
        "select_images": (1 + repeats) * datasets,
        "evaluate_baseline": models,
        "quantize_model": quantized,
        "evaluate_quantized": quantized,
        "summarize_results": 1,
        "render_report": 1,
        **(fits if compensated else {}),
        **(exports if exported else {}),
    }


def test_each_configuration_has_its_expectation():
    assert {path.stem for path in (ROOT / "tests" / "configs").glob("*.yaml")} == set(RESULTS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.real, real] if "real" in name else [])
        for name in RESULTS
    ],
)
def test_a_configuration_asks_for_its_targets(workflow: Workflow, name: str):
    path = ROOT / "tests" / "configs" / f"{name}.yaml"
    assert workflow.jobs("--configfile", str(path)) == expected(*RESULTS[name])


def test_the_default_configuration_asks_for_the_demo(workflow: Workflow):
    (workflow.folder / "config").symlink_to(ROOT / "config")
    assert workflow.jobs() == expected(1, 3, 1, 2)


def test_the_demo_has_a_configuration_with_more_rows(workflow: Workflow):
    config = str(ROOT / "config" / "demo_all.yaml")
    assert workflow.jobs("--configfile", config) == expected(1, 3, 5, 2)


def test_the_headline_configuration_asks_for_five_detectors(workflow: Workflow):
    config = str(ROOT / "config" / "coco.yaml")
    assert workflow.jobs("--configfile", config) == expected(5, 15, 30)


@pytest.mark.real
@real
def test_the_gallery_asks_for_five_detectors_in_its_own_folder(workflow: Workflow):
    folder = workflow.folder / "docs" / "gallery"
    folder.mkdir(parents=True)
    config = str(ROOT / "config" / "gallery.yaml")
    jobs = Workflow(ROOT, folder).jobs("--configfile", config)
    searches = {"measure_candidates": 3, "choose_recipe": 3}
    full = {"export_model": 5 + 13}  # in full precision, too
    assert jobs == expected(5, 14, 1, 13, 2) | searches | full


def test_a_config_file_on_the_command_line_replaces_the_default_one(workflow: Workflow):
    (workflow.folder / "config").symlink_to(ROOT / "config")
    path = ROOT / "tests" / "configs" / "coco_download.yaml"
    jobs = workflow.jobs("--configfile", str(path))
    assert jobs["evaluate_baseline"] == 2


def test_steps_can_be_left_out(workflow: Workflow):
    config = yaml.safe_load((ROOT / "tests" / "configs" / "demo_tiny.yaml").read_text())
    workflow.configure({**config, "skip": ["evaluate_baseline", "evaluate_quantized"]})
    steps = expected(1, 1, 1)
    del steps["evaluate_baseline"], steps["evaluate_quantized"]
    assert workflow.jobs() == steps
    workflow.configure({**config, "compensation": {}})
    steps = expected(1, 1, 0)
    assert workflow.jobs() == {name: jobs for name, jobs in steps.items() if jobs}


def test_repeats_calibrate_and_compensate_anew_on_images_of_their_own(workflow: Workflow):
    config = yaml.safe_load((ROOT / "tests" / "configs" / "demo_tiny.yaml").read_text())
    workflow.configure({**config, "repeats": 3})
    assert workflow.jobs() == expected(1, 3, 3) | {"prepare_dataset": 4, "select_images": 4}


def test_the_plan_has_the_jobs_that_snakemake_runs(workflow: Workflow, monkeypatch, tmp_path):
    config = yaml.safe_load((CONFIGS / "demo_tiny.yaml").read_text())
    config["quantization"]["small"] = {"smallest": {"max_drop": 0.1}, "like": "w4a4"}
    (tmp_path / "mylab.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config["export"] = [{"runtime": ["onnxruntime", "mylab.own"]}, {"compensation": ["qwt"]}]
    config["models"]["second"] = config["models"]["demo"]
    config |= {"repeats": 2, "skip": ["evaluate_quantized"], "evaluation": {"shards": 1}}
    workflow.configure(config)
    others = {"fetch_checkpoint", "prepare_dataset", "select_images", *TABLES}
    planned = Counter(job.step for job in Plan(resolve(config)).jobs)
    assert planned == {s: jobs for s, jobs in workflow.jobs().items() if s not in others}


def test_runtimes_on_a_gpu_take_a_gpu(workflow: Workflow):
    config = yaml.safe_load((CONFIGS / "demo_tiny.yaml").read_text())
    config["export"] = [{"runtime": ["onnxruntime", "onnxruntime-cuda"]}]
    workflow.configure(config)
    done = workflow.run("-n", "--cores", "2")
    for rule in ("evaluate_exported", "benchmark_exported"):
        found = re.findall(
            rf"rule {rule}:.*?runtime=([\w-]+).*?resources: (.*?)\n", done.stdout, re.DOTALL
        )
        taken = {runtime: "gpu=1" in resources for runtime, resources in found}
        assert taken == {"onnxruntime": False, "onnxruntime-cuda": True}


def test_a_run_that_would_evaluate_nothing_is_refused(workflow: Workflow):
    config = yaml.safe_load((ROOT / "tests" / "configs" / "demo_tiny.yaml").read_text())
    workflow.configure({**config, "compensation": {}, "skip": ["evaluate_quantized"]})
    done = workflow.run("--dry-run")
    assert done.returncode != 0
    assert "no quantized detector would be evaluated" in done.stdout


def test_jobs_ask_for_what_the_estimate_measured(workflow: Workflow):
    """Twice the time and 1.25 times the memory; a fit and a refit have room for their cache, too."""
    cost = {"seconds": 60, "seconds_per_image": 30, "gigabytes": 2, "images": 100}
    steps = [{"model": "demo", "step": s, **cost} for s in ("quantize_model", "fit_compensation")]
    (workflow.folder / "results").mkdir()
    (workflow.folder / "results" / "estimate.json").write_text(json.dumps({"steps": steps}))
    config = yaml.safe_load((CONFIGS / "demo_tiny.yaml").read_text())
    del config["activation_cache"]
    config["quantization"]["w4a4"]["refit"] = "none"
    refit = {"weight_bits": 4, "activation_bits": 4}
    question = {"smallest": {"max_drop": 0.1}, "like": "refit"}
    config["quantization"] |= {"refit": refit, "question": question}
    workflow.configure(config)
    done = workflow.run("-n", "--cores", "2")
    quantized = re.findall(
        r"rule (quantize_model|measure_candidates|choose_recipe):.*?(?:quantization|measurement)=(\w+).*?mem_mb=(\d+)",
        done.stdout,
        re.DOTALL,
    )
    cached = {(rule, name): int(megabytes) for rule, name, megabytes in quantized}
    assert cached == {
        ("quantize_model", "w4a4"): 2500,
        ("quantize_model", "refit"): 6500,
        ("quantize_model", "question"): 6500,
        ("measure_candidates", "refit"): 7000,  # not measured
        ("choose_recipe", "question"): 7000,
    }
    asked = dict(re.findall(r"rule (\w+):.*?resources: (.*?)\n", done.stdout, re.DOTALL))
    assert "runtime=6" in asked["quantize_model"]  # of 4 images: 2 x (1 + 2) minutes
    assert "mem_mb=6500" in asked["fit_compensation"]
    assert "mem_mb=3000" in asked["evaluate_baseline"]
    assert "runtime" not in asked["evaluate_baseline"]


def test_steps_wait_for_a_gpu_only_where_there_is_one(workflow: Workflow, monkeypatch, tmp_path):
    def wanted() -> set[str]:
        done = workflow.run(
            *("--dry-run", "--cores", "4", "--resources", "gpu=1"),
            *("--configfile", str(ROOT / "tests" / "configs" / "demo_tiny.yaml")),
        )
        assert done.returncode == 0, done.stdout
        return set(re.findall(r"resources: .*gpu=(\d)", done.stdout))

    if shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        assert wanted() == {"0"}
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: a card (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert wanted() == {"1"}


def test_evaluations_are_split_where_cores_would_be_idle(workflow: Workflow, monkeypatch):
    """Two evaluations of 600 images on eight cores: two shards each, as none may have fewer than 250 images."""
    monkeypatch.delenv("QWT_MMDET_JOBS", raising=False)
    config = yaml.safe_load((CONFIGS / "demo_tiny.yaml").read_text())
    config["compensation"] = {}
    config["datasets"]["shapes"]["evaluation"]["images"] = 600
    workflow.configure(config)
    assert "evaluate_shard" not in workflow.jobs("--cores", "3")
    assert workflow.jobs("--cores", "8")["evaluate_shard"] == 4
    config["datasets"]["shapes"]["evaluation"]["images"] = 300
    workflow.configure(config)
    assert "evaluate_shard" not in workflow.jobs("--cores", "8")
