"""What a run would take: measured costs, multiplied as the config says."""

from pathlib import Path

import pytest
import yaml
from qwt_mmdet import cli, estimate
from qwt_mmdet.config import QuantizationSettings, read_file, resolve
from qwt_mmdet.errors import QwtError
from qwt_mmdet.estimate import Cost, Trial, estimate_run, images_of, measure_model
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "workflow" / "demo" / "mask-rcnn_swin-xxs-p4-w8_fpn_shapes.py"
COST = Cost(seconds=10.0, seconds_per_image=0.5, gigabytes=2.0, device_gigabytes=None)


@pytest.fixture
def measured(monkeypatch) -> list[Trial]:
    """Every step costs the same; the trials that were asked for."""
    trials = []

    def measure(trial: Trial, steps) -> dict[str, Cost]:
        trials.append(trial)
        return dict.fromkeys(steps, COST)

    monkeypatch.setattr(estimate, "measure_model", measure)
    return trials


@pytest.fixture
def config(tmp_path) -> Path:
    content = yaml.safe_load((ROOT / "config" / "coco.yaml").read_text())
    content["models"] = {"yolox": content["models"]["yolox-s"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_costs_are_multiplied_by_jobs_and_images(measured, config):
    found = estimate_run(resolve(read_file(config)), device="cpu")
    assert {entry.step: (entry.jobs, entry.images, entry.seconds) for entry in found} == {
        "evaluate_baseline": (1, 5000, 10 + 2500),
        "quantize_model": (3, 512, 3 * (10 + 256)),
        "evaluate_quantized": (3, 5000, 3 * (10 + 2500)),
        "fit_compensation": (6, 512, 6 * (10 + 256)),
        "evaluate_compensated": (6, 5000, 6 * (10 + 2500)),
    }
    assert [trial.config for trial in measured] == ["yolox/yolox_s_8xb8-300e_coco.py"]


def test_each_exported_detector_is_evaluated_and_timed_in_each_runtime(measured, config):
    content = yaml.safe_load(config.read_text())
    content["export"] = [{"quantization": ["w8a8", "w6a6"]}]
    config.write_text(yaml.safe_dump(content))
    found = {entry.step: entry for entry in estimate_run(resolve(read_file(config)), device="cpu")}
    jobs = {step: found[step].jobs for step in estimate.EXPORT_STEPS}
    assert jobs == {"export_model": 3, "evaluate_exported": 2, "benchmark_exported": 2}
    assert found["evaluate_exported"].images == 5000
    (trial,) = measured
    assert trial.quantization.weight_bits == 6, "what is exported is tried, and can be"


def test_the_command_prints_a_table_and_the_sum(measured, config):
    shown = CliRunner().invoke(
        cli.app, ["estimate", str(config), "--device", "cpu", "--cores", "2"]
    )
    assert shown.exit_code == 0, shown.output
    hours = (10 * (10 + 2500) + 9 * (10 + 256)) / 3600
    assert f"One after the other: {hours:.1f} h" in shown.output
    assert f"2 at a time (--cores 2): about {hours / 2:.1f} h" in shown.output


def test_a_split_of_unknown_size_is_named():
    dataset = {"type": "coco", "url": "http://localhost"}
    part = {"images": "all", "split": "test-dev2017", "annotations": "a.json"}
    with pytest.raises(QwtError, match=r"test-dev2017.*give a number"):
        images_of({**dataset, "evaluation": part}, "evaluation")
    assert images_of({**dataset, "evaluation": {**part, "images": 7}}, "evaluation") == 7


@pytest.mark.slow
def test_steps_run_with_random_weights_and_cost_something(tmp_path):
    settings = QuantizationSettings(
        8, 8, weight_range="minmax", activation_range="minmax", rounding="nearest",
        migrate_scales=False, bias_correction=False,
    )  # fmt: skip
    sizes = dict.fromkeys(estimate.PARTS, 1)
    trial = Trial(tmp_path, str(DEMO), {}, settings, None, "cpu", sizes, 1)
    costs = measure_model(trial, ("quantize_model", "evaluate_quantized"))
    for cost in costs.values():
        assert 0.001 < cost.seconds_per_image < 60
        assert 1 < cost.seconds < 120
        assert 0.2 < cost.gigabytes < 8
    assert (tmp_path / "warmup.pth").is_file()
