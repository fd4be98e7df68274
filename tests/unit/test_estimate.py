"""What a run would take: measured costs, multiplied as the config says."""

import re
from pathlib import Path

import pytest
import yaml
from qwt_mmdet import cli, estimate
from qwt_mmdet.config import QuantizationSettings, Search, Smallest, read_file, resolve
from qwt_mmdet.errors import QwtError
from qwt_mmdet.estimate import (
    Cost,
    Trial,
    estimate_run,
    images_of,
    measure_model,
    search_costs,
    wall_seconds,
)
from qwt_mmdet.plan import Plan
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


QUESTIONS = {
    "small": {"smallest": {"max_drop": 0.01}, "candidates": [4, 8], "rounds": 3, "images": 2},
    "best": {"best": {"average_weight_bits": 5}, "like": "w4a4"},
    "w4a4": {"weight_bits": 4, "activation_bits": 4, "scope": "backbone+neck"},
}


def test_a_search_is_two_more_steps_before_its_quantization(measured, config):
    content = yaml.safe_load(config.read_text())
    content |= {"quantization": QUESTIONS, "evaluation": {"shards": 1}}
    resolved = resolve(content)
    found = {one.step: one for one in estimate_run(resolved, device="cpu")}
    assert {step: (found[step].jobs, found[step].images) for step in estimate.SEARCH_STEPS} == {
        "measure_candidates": (2, 4),
        "choose_recipe": (2, 512),
    }
    wall, _ = estimate.run_seconds(resolved, list(found.values()), 99)
    chain = ("measure_candidates", "choose_recipe", *estimate.STEPS[1:2], *estimate.STEPS[3:])
    assert wall == pytest.approx(sum(found[step].cost.total(found[step].images) for step in chain))
    (trial,) = measured
    assert trial.search.candidates == (3, 4, 5, 6, 8), "of two searches the one that takes longer"
    jobs = Plan(resolved).jobs
    (choice,) = {job for job in jobs if job.step == "choose_recipe" and "best" in job.variant.name}
    assert all(
        (choice in job.after) == ("best" in job.variant.name)
        for job in jobs
        if job.step == "quantize_model"
    )


def test_a_search_costs_what_it_repeats():
    """Two widths and three numbers of activation bits: four times every layer alone, and once more each exact."""
    search = Search(
        smallest=Smallest(0.01), candidates=(6, 8), min_activation_bits=4,
        objective="bit_operations", rounds=2,
    )  # fmt: skip
    found = search_costs(search, 9, dict.fromkeys(estimate.STEPS[:3], COST))
    seconds = {step: (cost.seconds, cost.seconds_per_image) for step, cost in found.items()}
    assert seconds == {
        "measure_candidates": (10 + 4 * 10, 4 * 0.5 + 5 * 10 * 0.5),
        "choose_recipe": (10 + 2 * 20, 0.25 + 2 * 0.5),
    }


def test_the_command_prints_a_table_and_the_sum(measured, config):
    shown = CliRunner().invoke(
        cli.app, ["estimate", str(config), "--device", "cpu", "--cores", "2"]
    )
    assert shown.exit_code == 0, shown.output
    hours = (10 * (10 + 2500) + 9 * (10 + 256)) / 3600
    assert f"One after the other: {hours:.1f} h" in shown.output
    said = re.search(r"2 at a time: about ([\d.]+) h, ([\d.]+) core hours", shown.output)
    assert float(said[1]) == pytest.approx(hours / 2, rel=0.05), "the last job runs alone"
    assert float(said[2]) == pytest.approx(hours, abs=0.05)


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


# --- jobs side by side ---


def demo_config(**changed) -> dict:
    content = yaml.safe_load((ROOT / "tests" / "configs" / "demo_tiny.yaml").read_text())
    return resolve(content | changed)


def test_jobs_of_a_run_wait_for_what_they_read():
    found = {job.step: job for job in Plan(demo_config()).jobs}
    assert set(found) == set(estimate.STEPS)
    assert found["evaluate_quantized"].after == (found["quantize_model"],)
    assert found["fit_compensation"].after == (found["quantize_model"],)
    assert found["evaluate_compensated"].after == (found["fit_compensation"],)


def test_time_of_a_run_is_that_of_its_longest_chain_or_of_its_sum():
    """Chain: quantize 3, fit 2, evaluate 4; beside it two evaluations of 4."""
    costs = {"quantize_model": 3.0, "fit_compensation": 2.0}
    seconds = {job: [costs.get(job.step, 4.0)] for job in Plan(demo_config()).jobs}
    assert wall_seconds(seconds, 1) == 17
    assert wall_seconds(seconds, 2) == 10  # baseline | quantize fit evaluate, then evaluate
    assert wall_seconds(seconds, 9) == 9
    assert wall_seconds(seconds, 9, gpus=1) == 17


def test_shards_shorten_the_last_evaluation(measured):
    config = demo_config()
    found = estimate_run(config, device="cpu")
    whole, busy = estimate.run_seconds(config, found, 8)
    split = demo_config(evaluation={"shards": 3})
    wall, more = estimate.run_seconds(split, found, 8)
    images = config["datasets"]["shapes"]["evaluation"]["images"]
    assert images % 3 == 0
    assert whole - wall == pytest.approx(images * 2 / 3 * COST.seconds_per_image)
    assert more - busy == pytest.approx(3 * 2 * COST.seconds), "three evaluations start twice more"


def test_gpus_are_not_priced_on_a_cpu(measured, config):
    options = ["estimate", str(config), "--device", "cpu", "--gpus", "4"]
    shown = CliRunner().invoke(cli.app, options)
    assert shown.exit_code == 1
    assert "--gpus 4" in shown.output
    assert "machine with such a GPU" in " ".join(shown.output.split())
