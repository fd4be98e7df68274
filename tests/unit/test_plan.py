"""The plan of a run: its jobs, its files, and what its rows say; without running anything."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from qwt_mmdet.config import resolve
from qwt_mmdet.errors import QwtError
from qwt_mmdet.plan import ExportRow, Failure, Plan, ResultRow, Stopped, Variant
from qwt_mmdet.plan.run import shards_note
from qwt_mmdet.plan.settings import Settings

CONFIG = yaml.safe_load(
    """
    datasets:
      shapes: {type: shapes, evaluation: {images: 600}}
      photos: {type: coco, root: photos}
    models:
      first: {config: own.py, checkpoint: first.pth, dataset: shapes}
      second: {config: own.py, checkpoint: second.pth, dataset: photos}
    quantization:
      w4: {weight_bits: 4, activation_bits: 4}
      w8: {weight_bits: 8, activation_bits: 8, scope: detector}
    compensation:
      qwt: {}
    """
)
QUESTION = {"smallest": {"max_drop": 0.01}, "like": "w8", "candidates": [8, 4, 6]}


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch) -> None:
    """A folder in which the model's config is."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").touch()


def plan(stopped: Stopped | None = None, **changes) -> Plan:
    return Plan(resolve({**CONFIG, **changes}), stopped)


def steps(plan: Plan, model: str = "first") -> dict[str, int]:
    return dict(Counter(job.step for job in plan.jobs if job.model == model))


EVERYTHING = {
    "evaluate_baseline": 1,
    "quantize_model": 2,
    "evaluate_quantized": 2,
    "fit_compensation": 2,
    "evaluate_compensated": 2,
}


W4 = [{"model": ["first"], "quantization": ["w4"]}]
SKIP = ["evaluate_baseline", "evaluate_quantized"]


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({}, EVERYTHING, EVERYTHING),
        ({"targets": W4}, dict.fromkeys(EVERYTHING, 1), {}),
        ({"targets": W4, "repeats": 3}, {**dict.fromkeys(EVERYTHING, 3), "evaluate_baseline": 1}, {}),
        ({"targets": W4, "skip": SKIP}, dict.fromkeys([s for s in EVERYTHING if s not in SKIP], 1), {}),
    ],
)  # fmt: skip
def test_each_model_has_each_wanted_job_once(changes, first, second):
    made = plan(**changes)
    assert (steps(made), steps(made, "second")) == (first, second)


def test_jobs_wait_for_what_they_read():
    found = {job.step: job for job in plan(targets=W4).jobs}
    assert found["evaluate_quantized"].after == (found["quantize_model"],)
    assert found["fit_compensation"].after == (found["quantize_model"],)
    assert found["evaluate_compensated"].after == (found["fit_compensation"],)


def test_a_quantization_waits_for_the_answer_to_its_question():
    quantization = {**CONFIG["quantization"], "small": QUESTION}
    jobs = plan(quantization=quantization).jobs
    (choice,) = {job for job in jobs if job.step == "choose_recipe" and job.model == "first"}
    assert [(job.step, job.name) for job in choice.after] == [
        ("measure_candidates", "first/w8+w468_a8_images4")
    ]
    waiting = {job.name: job.after for job in jobs if job.step == "quantize_model"}
    assert waiting["first/small"] == (choice,)
    assert waiting["first/w8"] == ()


EXPORT = [
    {"quantization": ["w8"], "runtime": ["onnxruntime", "openvino"]},
    {"quantization": ["w8"], "compensation": ["qwt"]},
]


def test_an_exported_detector_is_run_in_each_runtime_beside_full_precision():
    exported = plan(export=EXPORT, targets=[{"model": ["first"]}], repeats=2)
    assert {s: n for s, n in steps(exported).items() if "export" in s} == {
        "export_model": 3, "evaluate_exported": 3, "benchmark_exported": 3,
    }  # fmt: skip
    by_name = {job.name: job for job in exported.jobs if job.step == "benchmark_exported"}
    waits = {job.name for job in by_name["first/w8/qwt/onnxruntime"].after}
    assert waits == {"first/w8/qwt", "first/baseline"}
    assert not any(job.wants_gpu for job in by_name.values())
    results = exported.results()
    assert {path for path in results if path.endswith(".onnx")} == {
        f"results/first/{variant}/model.onnx" for variant in ("baseline", "w8", "w8/qwt")
    }
    assert "results/exports.csv" in results
    assert "results/exports.csv" not in plan().results()


def test_a_row_names_what_was_computed_for_it():
    rows = plan(repeats=2).rows
    assert len(rows) == 4
    row = next(row for row in rows if (row.model, row.quantization) == ("second", "w8"))
    assert row.annotations == "results/datasets/photos/evaluation.json"
    assert row.evaluated() == {
        "baseline": "results/second/baseline",
        "quantized": "results/second/w8/quantized",
        "compensated": "results/second/w8/qwt",
    }
    assert row.repeats == {
        "baseline": ["results/second/baseline"],
        "quantized": ["results/second/w8/quantized", "results/second/w8@2/quantized"],
        "compensated": ["results/second/w8/qwt", "results/second/w8@2/qwt"],
    }
    assert row.warmup == "results/second/w8/warmup.pth"
    assert row.settings["scope"] == "detector"
    assert (row.failed, row.recipe, row.asked) == ([], None, {})


def test_rows_are_the_same_after_they_were_params():
    made = plan(export=EXPORT)
    for cls, rows in ((ResultRow, made.rows), (ExportRow, made.export_rows)):
        assert [cls(**json.loads(json.dumps(asdict(row)))) for row in rows] == rows


def test_a_row_without_compensation_or_with_skipped_evaluations_has_gaps():
    (row, *_) = plan(compensation={}, skip=["evaluate_baseline"]).rows
    assert (row.compensation, row.compensation_settings) == (None, None)
    assert row.evaluated() == {"quantized": "results/first/w4/quantized"}
    assert row.failed == [], "nobody asked for more"


def test_each_file_of_a_model_has_its_own_storage_of_weights():
    entries = [{"quantization": ["w4"], "weights": "bytes"}, {"quantization": ["w8"]}]
    settings = Settings(plan(targets=[{"compensation": []}], export=entries))
    stored = [settings.export("first", variant)["weights"] for variant in ("w4", "w8", "baseline")]
    assert stored == ["bytes", "packed", "bytes"]  # full precision has none


def test_a_question_has_a_recipe_a_limit_and_the_settings_of_what_it_is_like():
    made = plan(quantization={**CONFIG["quantization"], "small": QUESTION})
    row = next(row for row in made.rows if row.quantization == "small")
    assert row.recipe == "results/first/small/recipe.json"
    assert row.asked == {"max_drop": 0.01, "metric": "bbox", "confidence": 0.9}
    assert row.settings["scope"] == "detector"
    settings = Settings(made)
    assert settings.plain("small") is None
    assert settings.plain("w8@2") == settings.searched("small@2")
    assert settings.recipe("first", "small@2") == "results/first/small@2/recipe.yaml"
    assert settings.recipe("first", "w8") == []


SHARING = {
    "size": {"best": {"max_size_mb": 3}, "like": "w8", "candidates": [4, 6, 8]},
    "masks": {**QUESTION, "smallest": {"max_drop": 0.01, "metric": "segm"}},
}


def test_searches_of_equal_settings_bits_and_images_share_a_measurement():
    others = {
        "images": {**QUESTION, "images": 5},
        "bits": {**QUESTION, "candidates": [4, 8]},
        "activations": {**QUESTION, "objective": "bit_operations"},
        "defaults": {"best": {"max_size_mb": 3}, "candidates": [4, 6, 8]},
    }
    made = plan(
        quantization={**CONFIG["quantization"], "small": QUESTION, **SHARING, **others},
        targets=[{"model": ["first"]}], repeats=2,
    )  # fmt: skip
    shared = "w8+w468_a8_images4"
    assert {name: made.measurement(name) for name in others} == {
        "images": "w8+w468_a8_images5",
        "bits": "w8+w48_a8_images4",
        "activations": "w8+w468_a468_images4",
        "defaults": "+w468_a8_images4",
    }
    assert {made.measurement(name) for name in ("small", *SHARING)} == {shared}
    assert steps(made)["measure_candidates"] == 2 * 5
    assert steps(made)["choose_recipe"] == 2 * 7
    settings = Settings(made)
    path = "results/first/candidates/w8+w468_a8_images4@2.json"
    assert settings.measured("first", "size@2") == settings.measured("first", "small@2") == path
    assert settings.measured("first", "w8@2") == []
    found = settings.candidates(f"{shared}@2")
    assert (found["weight_bits"], found["activation_bits"], found["images"]) == ([4, 6, 8], [8], 4)
    assert found["settings"] == settings.plain("w8")
    assert settings.images("calibration", "first", f"{shared}@2") == settings.images(
        "calibration", "first", "small@2"
    )


def test_what_recipes_are_scored_by_is_known_before_they_are_measured():
    quantization = {**CONFIG["quantization"], "small": QUESTION, **SHARING}
    targets = [{"model": ["first"]}, {"model": ["second"], "quantization": ["small", "size"]}]
    made = plan(quantization=quantization, targets=targets)
    measurement = made.measurement("small")
    assert made.scored("first", f"{measurement}@2") == {"bbox", "segm"}
    assert made.scored("second", measurement) == {"bbox"}
    assert made.scored("first", "w8+w48_a8_images4") == set()


def test_a_measurement_that_failed_is_told_where_a_search_needs_it():
    quantization = {**CONFIG["quantization"], "small": QUESTION}
    lost = [f"results/first/{name}/quantized/metrics.json" for name in ("small", "w4")]
    wildcards = {"model": "first", "measurement": "w8+w468_a8_images4"}
    cause = Failure("measure_candidates first", wildcards, "a.log", "No.")
    rows = plan(Stopped([cause], lost), quantization=quantization).rows
    found = {row.quantization: list(row.failed) for row in rows if row.model == "first"}
    assert found == {
        "w4": ["the run stopped before it"], "w8": [], "small": ["measure_candidates first: No."],
    }  # fmt: skip


def test_what_failed_costs_only_what_needs_it_and_is_named_there():
    whole = plan(export=EXPORT)
    lost = [path for path in whole.results() if path.startswith("results/first/w8/")]
    cause = Failure("quantize_model first w8", {"model": "first", "quantization": "w8"}, "a", "No.")
    stopped = plan(Stopped([cause], lost), export=EXPORT)
    for row, before in zip(stopped.rows, whole.rows, strict=True):
        if (row.model, row.quantization) != ("first", "w8"):
            assert row == before
            continue
        assert row.evaluated() == {"baseline": "results/first/baseline"}
        assert row.failed == ["quantize_model first w8: No."]
        assert row.warmup is None
    exported = {(row.model, row.exported is None, *row.failed) for row in stopped.export_rows}
    assert exported == {("first", True, "quantize_model first w8: No."), ("second", False)}
    assert not set(lost) & {*stopped.result_files("metrics.json"), *stopped.exported_files()}
    warmups = whole.row_files("warmup")
    assert stopped.row_files("warmup") == [path for path in warmups if path not in lost]


def test_what_failed_in_a_repeat_is_told_and_the_others_count():
    lost = ["results/first/w4@2/qwt/metrics.json"]
    wildcards = {"model": "first", "quantization": "w4@2", "compensation": "qwt"}
    cause = Failure("fit_compensation first w4@2 qwt", wildcards, "a.log", "No.")
    row, *others = plan(Stopped([cause], lost), repeats=2).rows
    assert row.failed == ["fit_compensation first w4@2 qwt: No."]
    assert row.repeats["compensated"] == ["results/first/w4/qwt"]
    assert not any(other.failed for other in others)


@pytest.mark.parametrize(
    ("name", "parts", "evaluated"),
    [
        ("baseline", {}, "results/m/baseline"),
        ("w4@2/quantized", {"warmup": "results/m/w4@2/warmup.pth"}, "results/m/w4@2/quantized"),
        ("w4/qwt", {"warmup": "results/m/w4/warmup.pth", "compensation": "results/m/w4/qwt/compensation.pth"},
         "results/m/w4/qwt"),
    ],
)  # fmt: skip
def test_a_folder_tells_its_variant(name, parts, evaluated):
    variant = Variant.named("m", name)
    assert variant.parts() == parts
    assert variant.evaluated == evaluated


def test_evaluations_are_split_for_idle_jobs_and_stay_as_they_were_done():
    made = plan(targets=W4, compensation={})
    variant = Variant("first", "w4")
    folder = "results/first/w4/quantized/shards"
    assert made.shards(variant, 3) == []
    assert made.shards(variant, 8) == [f"{folder}/{n}-of-2.json" for n in (1, 2)]
    path, of = shards_note(made.config, variant)
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text(json.dumps({"shards": 1, "of": of}))
    asked = plan(targets=W4, compensation={}, evaluation={"shards": 3})
    assert asked.shards(variant, 3) == [], "it was done by one job"
    assert len(asked.shards(Variant("first"), 3)) == 3


def test_images_of_a_repeat_are_its_own_for_calibration_alone():
    settings = Settings(plan(repeats=2))
    folder = "results/datasets/shapes"
    assert settings.images("calibration", "first", "w4@2") == f"{folder}/calibration@2.json"
    assert settings.images("evaluation", "first", "w4@2") == f"{folder}/evaluation.json"
    assert settings.source_file("shapes", "calibration@2") == f"{folder}/calibration@2_source.json"
    photos = "results/datasets/photos/calibration_source.json"
    assert settings.source_file("photos", "calibration@2") == photos, "drawn from the same file"


def test_a_file_of_the_user_that_is_not_there_is_named_with_its_key():
    with pytest.raises(QwtError, match=r"models\.first\.checkpoint is 'first\.pth', but there is"):
        Settings(plan()).local_checkpoint("first")
    Path("first.pth").write_text("weights")
    assert Settings(plan()).local_checkpoint("first") is not None
