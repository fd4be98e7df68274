"""What a run would take: measured costs, multiplied as the plan says."""

import re
from pathlib import Path

import pytest
import yaml
from qwt_mmdet import cli, estimate
from qwt_mmdet.config import Search, Smallest, read_file, resolve
from qwt_mmdet.errors import QwtError
from qwt_mmdet.estimate import (
    Cost,
    Inputs,
    estimate_run,
    image_counts,
    images_of,
    pilot_config,
    search_costs,
    wall_seconds,
)
from qwt_mmdet.plan import Plan
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
COST = Cost(seconds=10.0, seconds_per_image=0.5, gigabytes=2.0, device_gigabytes=None)
MEASURED = ("evaluate_baseline", "quantize_model", "evaluate_quantized")


@pytest.fixture
def measured(monkeypatch) -> None:
    """Every step costs the same."""

    def measure(plan: Plan, **options) -> dict[tuple[str, str], Cost]:
        jobs = Plan(resolve(pilot_config(plan, INPUTS, run=0))).jobs
        assert jobs, "there is something to try"
        return {(job.model, job.step): COST for job in plan.jobs}

    monkeypatch.setattr(estimate, "measure", measure)


COUNTS = {"calibration": (2, 8), "evaluation": (32, 64)}
INPUTS = {name: Inputs(Path("inputs", name), {}, COUNTS) for name in ("yolox", "demo")}


@pytest.fixture
def config(tmp_path) -> Path:
    content = yaml.safe_load((ROOT / "config" / "coco.yaml").read_text())
    content["models"] = {"yolox": content["models"]["yolox-s"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def planned(config: Path, **changes) -> Plan:
    return Plan(resolve({**read_file(config), **changes}))


def demo_plan(**changed) -> Plan:
    content = yaml.safe_load((ROOT / "tests" / "configs" / "demo_tiny.yaml").read_text())
    return Plan(resolve(content | changed))


def test_costs_are_multiplied_by_jobs_and_images(measured, config):
    """What is skipped costs nothing."""
    found = estimate_run(planned(config, skip=["evaluate_quantized"]))
    assert {entry.step: (entry.jobs, entry.images, entry.all_seconds) for entry in found} == {
        "evaluate_baseline": (1, 5000, 10 + 2500),
        "quantize_model": (3, 512, 3 * (10 + 256)),
        "fit_compensation": (6, 512, 6 * (10 + 256)),
        "evaluate_compensated": (6, 5000, 6 * (10 + 2500)),
    }


def test_each_exported_detector_is_evaluated_and_timed_in_each_runtime(measured, config):
    found = estimate_run(planned(config, export=[{"quantization": ["w8a8", "w6a6"]}]))
    assert {one.step: (one.jobs, one.images) for one in found if "export" in one.step} == {
        "export_model": (3, 16), "evaluate_exported": (2, 5000), "benchmark_exported": (2, 0),
    }  # fmt: skip


QUESTIONS = {
    "small": {"smallest": {"max_drop": 0.01}, "candidates": [4, 8], "rounds": 3, "images": 2},
    "best": {"best": {"average_weight_bits": 5}, "like": "w4a4"},
    "w4a4": {"weight_bits": 4, "activation_bits": 4, "scope": "backbone+neck"},
}


def test_a_search_is_two_more_steps_before_its_quantization(measured, config):
    plan = planned(config, quantization=QUESTIONS, evaluation={"shards": 1})
    found = {one.step: one for one in estimate_run(plan)}
    steps = ("measure_candidates", "choose_recipe")
    assert {step: (found[step].jobs, found[step].images) for step in steps} == {
        "measure_candidates": (2, 4),
        "choose_recipe": (2, 512),
    }
    assert plan.costliest_search("yolox").best, "of two the one that takes longer"
    wall, _ = estimate.run_seconds(plan, list(found.values()), 99)
    chain = (*steps, "quantize_model", "fit_compensation", "evaluate_compensated")
    assert wall == pytest.approx(sum(found[step].total(found[step].images) for step in chain))


def test_a_search_costs_what_it_repeats():
    """Two widths and three numbers of activation bits: four times every layer alone, and once more each exact."""
    search = Search(
        smallest=Smallest(0.01), candidates=(6, 8), min_activation_bits=4,
        objective="bit_operations", rounds=2,
    )  # fmt: skip
    found = search_costs(search, "m", 9, {("m", step): COST for step in MEASURED})
    seconds = {step: (cost.seconds, cost.seconds_per_image) for (_, step), cost in found.items()}
    assert seconds == {
        "measure_candidates": (10 + 4 * 10, 4 * 0.5 + 5 * 10 * 0.5),
        "choose_recipe": (10 + 2 * 2 * 20, 0.5 + 2 * 2 * 0.5),
    }


def test_a_pilot_takes_one_of_each_kind_and_needs_few_images(config):
    """Also where the run asks for repeats, skips, shards, held out images, a question and an export."""
    plan = planned(
        config, quantization={**QUESTIONS, "w8a8": {"weight_bits": 8, "activation_bits": 8}},
        compensation={"qwt": {"holdout_fraction": 0.2}, "other": {}}, repeats=3, skip=["evaluate_baseline"],
        export=[{"quantization": ["best"], "compensation": ["qwt"], "runtime": ["onnxruntime", "openvino"]}],
        evaluation={"batch_size": 32, "shards": 4},
    )  # fmt: skip
    pilot = Plan(resolve(pilot_config(plan, INPUTS, run=1)))
    assert [job.step for job in pilot.jobs] == [
        "evaluate_baseline", "quantize_model", "evaluate_quantized", "fit_compensation",
        "evaluate_compensated", "export_model", "export_model", "evaluate_exported",
        "benchmark_exported",
    ]  # fmt: skip
    (row,) = pilot.rows
    assert row.settings["scope"] == "backbone+neck", "of a question, what its answer has"
    assert row.compensation_settings["holdout_fraction"] == 0.5
    assert pilot.config["evaluation"] == {"batch_size": 32, "workers": 2, "shards": 1}
    dataset = pilot.config["datasets"]["yolox"]
    assert dataset["root"] == "inputs/yolox"
    assert dataset["evaluation"]["annotations"] == "evaluation-64.json"


def test_a_pilot_has_whole_batches_in_its_evaluations():
    large = demo_plan(evaluation={"batch_size": 16}, calibration={"batch_size": 16}).config
    assert image_counts(large, "evaluation", 6) == (16, 32)
    assert image_counts(large, "calibration", 6) == (2, 8), "they run one by one"
    assert image_counts(demo_plan().config, "evaluation", 6) == (2, 8)


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
def test_a_pilot_that_fails_says_why(tmp_path):
    overrides = [{"pattern": "no.such.layer", "skip": True}]
    wrong = {"weight_bits": 8, "activation_bits": 8, "overrides": overrides}
    plan = demo_plan(quantization={"w8a8": wrong}, compensation={})
    paths = {
        key: str(ROOT / plan.config["models"]["demo"][key]) for key in ("config", "checkpoint")
    }
    plan.config["models"]["demo"] |= paths
    with pytest.raises(QwtError, match=r"quantize_model demo w8a8: The override pattern"):
        estimate.run_pilot(plan, tmp_path / "run", threads=1, gpu=False)


def test_time_of_a_run_is_that_of_its_longest_chain_or_of_its_sum():
    """Chain: quantize 3, fit 2, evaluate 4; beside it two evaluations of 4."""
    costs = {"quantize_model": 3.0, "fit_compensation": 2.0}
    seconds = {job: [costs.get(job.step, 4.0)] for job in demo_plan().jobs}
    assert wall_seconds(seconds, 1) == 17
    assert wall_seconds(seconds, 2) == 10  # baseline | quantize fit evaluate, then evaluate
    assert wall_seconds(seconds, 9) == 9
    assert wall_seconds(seconds, 9, gpus=1) == 17


def test_shards_shorten_the_last_evaluation(measured):
    plan = demo_plan()
    found = estimate_run(plan)
    whole, busy = estimate.run_seconds(plan, found, 8)
    wall, more = estimate.run_seconds(demo_plan(evaluation={"shards": 3}), found, 8)
    images = plan.config["datasets"]["shapes"]["evaluation"]["images"]
    assert images % 3 == 0
    assert whole - wall == pytest.approx(images * 2 / 3 * COST.seconds_per_image)
    assert more - busy == pytest.approx(3 * 2 * COST.seconds), "three evaluations start twice more"


def test_gpus_are_not_priced_on_a_cpu(measured, config):
    options = ["estimate", str(config), "--device", "cpu", "--gpus", "4"]
    shown = CliRunner().invoke(cli.app, options)
    assert shown.exit_code == 1
    assert "--gpus 4" in shown.output
    assert "machine with such a GPU" in " ".join(shown.output.split())
