"""What is computed again after a change, and above all what is not (dry runs)."""

import copy
import json
import os
import time

import pytest
import yaml
from qwt_mmdet.config import resolve
from qwt_mmdet.plan import Plan
from qwt_mmdet.plan.run import shards_note
from qwt_mmdet.staleness import file_note
from running import Workflow

CONFIG = yaml.safe_load(
    """
    datasets:
      shapes: {type: shapes}
      own: {type: coco, root: own}
    models:
      first: {config: own.py, checkpoint: first.pth, dataset: shapes}
      second: {config: own.py, checkpoint: second.pth, dataset: own}
    quantization:
      w8a8: {weight_bits: 8, activation_bits: 8}
      w4a8: {weight_bits: 4, activation_bits: 8}
    compensation:
      qwt: {}
      paper: {ridge: 0, gate: fit}
    """
)
TABLES = {"summarize_results": 1, "render_report": 1}


@pytest.fixture(scope="module")
def finished(copied_tree, tmp_path_factory) -> Workflow:
    """A folder in which everything was computed: all outputs are there and recorded as done."""
    workflow = Workflow(copied_tree(), tmp_path_factory.mktemp("run"))
    for name in ("own.py", "first.pth", "second.pth"):
        (workflow.folder / name).write_text("")
    notes = workflow.folder / "results" / "datasets" / "own"
    for part, split in (("calibration", "train2017"), ("evaluation", "val2017")):
        annotations = workflow.folder / "own" / "annotations" / f"instances_{split}.json"
        for path in (annotations, workflow.folder / split / "1.jpg", notes / f"{part}_files.json"):
            path.parent.mkdir(parents=True, exist_ok=True)
        annotations.write_text(split)
        (workflow.folder / split / "1.jpg").write_text("an image")
        note = file_note(["1.jpg"], root=str(workflow.folder / split), how="time")
        (notes / f"{part}_files.json").write_text(json.dumps(note))
    # as jobs leave them: a file that the config of the first model reads, and a graph that no rule names
    base = workflow.folder / "base.py"
    head = workflow.folder / "results" / "first" / "w4a8" / "qwt" / "model.roi_head.bbox_head.onnx"
    head.parent.mkdir(parents=True)
    notes = {workflow.folder / "results" / "first" / "config_files.json": base}
    for note, path in {**notes, head.with_name("graphs.json"): head}.items():
        path.write_text("")
        names = [str(path.relative_to(workflow.folder))]
        content = file_note(names, root=str(workflow.folder), how="content")
        note.write_text(json.dumps(content))
    workflow.configure(CONFIG)
    compute(workflow)
    return workflow


def compute(workflow: Workflow) -> None:
    """Let all outputs be there, and be recorded as done."""
    listed = workflow.run("--summary")
    assert listed.returncode == 0, listed.stdout
    rows = [line.split("\t") for line in listed.stdout.splitlines() if "\t" in line]
    for path, *_ in rows[1:]:
        output = workflow.folder / path
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(path)
    touched = workflow.run("--touch", "--forceall", "--cores", "1")
    assert touched.returncode == 0, touched.stdout


@pytest.fixture
def config(finished):
    """The config to change; the old one is there again afterwards."""
    yield copy.deepcopy(CONFIG)
    finished.configure(CONFIG)


def test_nothing_is_done_again_when_nothing_changed(finished):
    assert finished.jobs() == {}


def test_a_new_bit_target_runs_only_its_combinations(finished, config):
    config["quantization"]["w6a6"] = {"weight_bits": 6, "activation_bits": 6}
    finished.configure(config)
    assert finished.jobs() == {
        "quantize_model": 2,
        "evaluate_quantized": 2,
        "fit_compensation": 4,
        "evaluate_compensated": 4,
        **TABLES,
    }


def test_a_new_compensation_quantizes_nothing_again(finished, config):
    config["compensation"]["strong"] = {"ridge": 1}
    finished.configure(config)
    assert finished.jobs() == {"fit_compensation": 4, "evaluate_compensated": 4, **TABLES}


def test_a_changed_quantization_runs_again_with_all_that_follows(finished, config):
    config["quantization"]["w4a8"]["activation_range"] = "minmax"
    finished.configure(config)
    assert finished.jobs() == {
        "quantize_model": 2,
        "evaluate_quantized": 2,
        "fit_compensation": 4,
        "evaluate_compensated": 4,
        **TABLES,
    }


def test_searches_share_a_measurement_that_their_own_limits_do_not_decide(workflow: Workflow):
    for name in ("own.py", "first.pth", "second.pth"):
        (workflow.folder / name).write_text("")
    like = {"like": "w8a8"}
    searches = {
        "small": {"smallest": {"max_drop": 0.01}, **like},
        "five": {"best": {"average_weight_bits": 5}, **like},
        "sized": {"best": {"max_size_mb": 3}, **like},
    }
    config = copy.deepcopy(CONFIG) | {"targets": [{"model": ["first"]}], "compensation": {}}
    config["quantization"] = {"w8a8": config["quantization"]["w8a8"], **searches}

    def jobs() -> dict[str, int]:
        workflow.configure(config)
        return workflow.jobs()

    first = jobs()
    assert (first["measure_candidates"], first["choose_recipe"]) == (1, 3)
    compute(workflow)
    assert jobs() == {}
    searches = config["quantization"]
    again = {"choose_recipe": 1, "quantize_model": 1, "evaluate_quantized": 1, **TABLES}
    searches["small"]["smallest"] = {"max_drop": 0.02, "metric": "segm"}
    assert jobs() == again
    searches["small"]["smallest"] = {"max_drop": 0.01}
    for changed in ({"candidates": [4, 8]}, {"images": 5}):
        searches["five"] |= changed
        assert jobs() == {"measure_candidates": 1, **again}
        for key in changed:
            del searches["five"][key]
    assert jobs() == {}
    searches["w8a8"]["scope"] = "detector"
    assert jobs() == {
        "measure_candidates": 1, "choose_recipe": 3, "quantize_model": 4, "evaluate_quantized": 4, **TABLES,
    }  # fmt: skip


@pytest.fixture
def exported(finished, config):
    """The config with an export; whatever a test makes of it is gone afterwards."""
    config["export"] = [{"model": ["first"], "quantization": ["w4a8"], "compensation": ["qwt"]}]
    finished.configure(config)
    folders = [finished.folder / "results" / "first" / name for name in ("baseline", "w4a8/qwt")]
    runtime = ("metrics.json", "predictions.json", "benchmark.json")
    names = ["model.onnx", "model.json", *(f"onnxruntime/{name}" for name in runtime)]
    files = [folder / name for folder in folders for name in names]
    files.append(finished.folder / "results" / "exports.csv")
    yield files
    finished.configure(CONFIG)
    for path in files:
        path.unlink(missing_ok=True)
    assert finished.run("--touch", "--forceall", "--cores", "1").returncode == 0


def test_an_export_runs_only_what_is_new_and_a_graph_that_is_gone(finished, exported, without):
    new = {"evaluate_exported": 1, "benchmark_exported": 1, **TABLES}
    assert finished.jobs() == {"export_model": 2, **new}
    for path in exported:
        path.parent.mkdir(exist_ok=True)
        path.write_text("made")
    assert finished.run("--touch", "--forceall", "--cores", "1").returncode == 0
    without("first/w4a8/qwt/model.roi_head.bbox_head.onnx")
    assert finished.jobs() == {"export_model": 1, **new}


def test_an_edited_runtime_runs_its_evaluation_and_its_latency_again(finished, exported):
    for path in exported:
        path.parent.mkdir(exist_ok=True)
        path.write_text("made")
    module = finished.folder / "mylab.py"
    module.write_text("1")
    note = exported[-2].with_name("files.json")
    content = file_note([module.name], root=str(finished.folder), how="content")
    note.write_text(json.dumps(content))
    assert finished.run("--touch", "--forceall", "--cores", "1").returncode == 0
    assert finished.jobs() == {}
    module.write_text("2")
    assert finished.jobs() == {"evaluate_exported": 1, "benchmark_exported": 1, **TABLES}
    note.unlink()


def test_a_changed_compensation_runs_again_alone(finished, config):
    config["compensation"]["paper"]["ridge"] = 0.5
    finished.configure(config)
    assert finished.jobs() == {"fit_compensation": 4, "evaluate_compensated": 4, **TABLES}


def test_fewer_targets_only_make_new_tables(finished, config):
    config["targets"] = [{"model": ["first"], "compensation": ["qwt"]}]
    finished.configure(config)
    assert finished.jobs() == TABLES


def test_what_cannot_change_a_result_runs_nothing(finished, config):
    config["evaluation"] = {"workers": 0}
    config["calibration"] = {"batch_size": 4}
    config["quantization"]["w4a8"]["input_bits"] = 8  # the default, written out
    config["models"] = dict(reversed(config["models"].items()))
    config["models"]["first"] = dict(reversed(config["models"]["first"].items()))
    config["targets"] = [{"model": ["first"]}, {"model": ["second"]}]
    finished.configure(config)
    assert finished.jobs("--resources", "gpu=0", "--cores", "7") == {}


def test_another_batch_size_evaluates_again_and_fits_nothing(finished, config):
    config["evaluation"] = {"batch_size": 8}
    finished.configure(config)
    assert finished.jobs() == {
        "evaluate_baseline": 2, "evaluate_quantized": 4, "evaluate_compensated": 8, **TABLES,
    }  # fmt: skip


def test_shards_are_for_what_is_still_to_be_evaluated(finished, config, monkeypatch):
    monkeypatch.chdir(finished.folder)
    for variant in Plan(resolve(CONFIG)).evaluations:
        path, key = shards_note(resolve(CONFIG), variant)
        (finished.folder / path).write_text(json.dumps({"shards": 1, "of": key}))
    config["evaluation"] = {"shards": 3}
    finished.configure(config)
    assert finished.jobs() == {}
    config["compensation"]["qwt"] = {"ridge": 1.0}
    finished.configure(config)
    assert finished.jobs() == {
        "fit_compensation": 4, "evaluate_shard": 12, "evaluate_compensated": 4, **TABLES,
    }  # fmt: skip


def test_other_images_of_a_dataset_run_all_that_uses_them(finished, config):
    config["datasets"]["shapes"]["seed"] = 1
    finished.configure(config)
    jobs = finished.jobs()
    assert "fetch_checkpoint" not in jobs
    assert jobs["select_images"] == 2
    assert jobs["quantize_model"] == 2


def test_other_evaluation_images_calibrate_and_fit_nothing_again(finished, config):
    for dataset in config["datasets"].values():
        dataset["evaluation"] = {"images": 5}
    finished.configure(config)
    assert finished.jobs() == {
        "prepare_dataset": 1,  # draws other shapes
        "select_images": 2,
        "evaluate_baseline": 2,
        "evaluate_quantized": 4,
        "evaluate_compensated": 8,
        **TABLES,
    }


def test_an_image_that_is_gone_runs_all_that_used_it(finished):
    image = finished.folder / "val2017" / "1.jpg"
    image.rename(image.with_suffix(".away"))
    jobs = finished.jobs()
    image.with_suffix(".away").rename(image)
    assert jobs == {
        "select_images": 1,
        "evaluate_baseline": 1,
        "evaluate_quantized": 2,
        "evaluate_compensated": 4,
        **TABLES,
    }
    assert finished.jobs() == {}


@pytest.fixture
def without(finished):
    """Move results away; they are there again afterwards."""
    moved = []

    def move(*names: str) -> None:
        for name in names:
            path = finished.folder / "results" / name
            moved.append((path, path.rename(path.with_name(f"{path.name}.moved"))))

    yield move
    for path, away in moved:
        away.rename(path)


def test_every_result_that_is_gone_is_made_again(finished, without):
    without("first/baseline/metrics.json", "second/w8a8/quantized/predictions.json")
    without("summary.json", "second/w4a8/paper/metrics.json", "first/w8a8/qwt/blocks.csv")
    assert finished.jobs() == {
        "evaluate_baseline": 1,
        "evaluate_quantized": 1,
        "fit_compensation": 1,
        "evaluate_compensated": 2,
        **TABLES,
    }


def test_chosen_images_that_are_gone_are_chosen_again(finished, without):
    """As the message about a truncated list advises, after which Snakemake removed the other ones."""
    without("datasets/shapes/calibration_source.json", "datasets/shapes/calibration.json")
    jobs = finished.jobs()
    assert (jobs["prepare_dataset"], jobs["select_images"]) == (1, 1)


def test_a_warmup_that_is_gone_is_made_again_with_all_that_follows(finished, without):
    """As the message about a truncated one advises, after which Snakemake removed an evaluation."""
    without(
        "first/w8a8/warmup.pth", "first/w8a8/quantized/metrics.json", "first/w8a8/qwt/blocks.csv"
    )
    assert finished.jobs() == {
        "quantize_model": 1,
        "evaluate_quantized": 1,
        "fit_compensation": 2,
        "evaluate_compensated": 2,
        **TABLES,
    }


def edited(path, text: str):
    """Append text to a file for the duration of a test, with a new time stamp."""
    before, times = path.read_bytes(), path.stat()
    time.sleep(0.01)
    with open(path, "a") as stream:
        stream.write(text)
    yield
    path.write_bytes(before)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def edited_compensation_code(finished):
    yield from edited(
        finished.root / "scripts" / "qwt_mmdet" / "compensation" / "__init__.py", "# edited\n"
    )


@pytest.fixture
def edited_checkpoint(finished):
    yield from edited(finished.folder / "second.pth", "other weights")


def test_edited_compensation_code_fits_again_but_quantizes_nothing(
    finished, edited_compensation_code
):
    assert finished.jobs() == {"fit_compensation": 8, "evaluate_compensated": 8, **TABLES}


def test_a_changed_checkpoint_runs_its_own_model_again(finished, edited_checkpoint):
    assert finished.jobs() == {
        "fetch_checkpoint": 1,
        "evaluate_baseline": 1,
        "quantize_model": 2,
        "evaluate_quantized": 2,
        "fit_compensation": 4,
        "evaluate_compensated": 4,
        **TABLES,
    }


@pytest.mark.parametrize(("name", "models"), [("own.py", 2), ("base.py", 1)])
def test_an_edited_file_of_a_model_config_runs_its_models_again(finished, name, models):
    for _ in edited(finished.folder / name, "# edited\n"):
        jobs = finished.jobs()
    assert "fetch_checkpoint" not in jobs
    assert jobs["evaluate_baseline"] == models
