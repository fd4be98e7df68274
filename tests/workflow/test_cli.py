"""The command line: a whole run, what its files tell, and plain words where something is wrong."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import TypeAdapter
from qwt_mmdet.cli import app
from qwt_mmdet.cli.export import choose_images
from qwt_mmdet.cli.run import OPTIONS, quantization_name, run
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.config.datasets import PARTS, Coco, CocoCalibration, CocoEvaluation
from qwt_mmdet.config.section import default_of
from qwt_mmdet.files import write_json
from qwt_mmdet.steps.prepare import prepare_dataset
from qwt_mmdet.steps.select import select_images
from running import ROOT
from typer.testing import CliRunner, Result

DEMO = ROOT / "workflow" / "demo" / "mask-rcnn_swin-xxs-p4-w8_fpn_shapes"
MODEL = ("--config", f"{DEMO}.py", "--checkpoint", f"{DEMO}.pth")
SPLITS = ("--calibration-split", "calibration", "--eval-split", "val")
RESULTS = Path("results", DEMO.name)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A few generated images in COCO's layout."""
    root = tmp_path / "coco"
    settings = {
        "type": "shapes",
        "seed": 3,
        "calibration": {"images": 5},
        "evaluation": {"images": 4},
    }
    for part in PARTS:
        prepare_dataset(settings, part, folder=root, output=tmp_path / f"{part}.json")
    return root


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_failed_step_ends_with_its_cause(coco, tmp_path):
    for image in (coco / "val").glob("*.png"):
        image.write_bytes(b"no image")
    options = ["--coco-root", coco, "--output-dir", tmp_path / "output"]
    options += ["--calibration-samples", "all", "--eval-samples", "all"]
    failed = command("run", *MODEL, *SPLITS, *options)
    assert failed.exit_code == 1
    assert "are not usable" in failed.output
    assert "Failed steps: 1\nselect_images coco evaluation: " in failed.output
    assert "Traceback" not in failed.output


def test_a_workflow_that_cannot_run_ends_with_what_snakemake_says(coco, tmp_path):
    locks = tmp_path / "output" / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text("results/report.html\n")
    options = ["--coco-root", coco, "--output-dir", tmp_path / "output"]
    failed = command("run", *MODEL, *SPLITS, *options)
    assert failed.exit_code == 1
    assert "Directory cannot be locked" in failed.output
    assert "see Snakemake's message above" in failed.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "missing.pth"], "Error: --checkpoint is 'missing.pth'"),
        (
            ["--config", "yolox/yolox_nan_8xb8-300e_coco.py"],
            "Error: --config is 'yolox/yolox_nan_8x",
        ),
        (["--coco-root", "nowhere"], "Error: --coco-root is "),
        (["--w-bit", "9"], "--w-bit is 9; it should be from 2 to 8"),
        (["--w-bit", "4", "--a-bit", "8", "--a-bit", "6"], "--a-bit once"),
        (
            ["--eval-samples", "many"],
            "--eval-samples is 'many'; it should be a whole number, or be 'all'",
        ),
        (["--rounding", "up"], "'gptq'"),
        (["--compensation", "papr"], "did you mean"),
        (["--export", "onnxruntim"], "Error: --export is 'onnxruntim'; it should"),
        (["--cfg-options", "a.b"], "key=value"),
        (["--cfg-options", "a=["], "--cfg-options has 'a=['"),
        (["--warmup-checkpoint", "missing.pth"], "Error: --warmup-checkpoint is "),
        (["--output-dir", "/sys/results"], "/sys/results cannot be used"),
        (["--output-dir", __file__], "which is no folder"),
        (["--compensation", "none", "--skip-quantized-eval"], "would be evaluated"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    arguments = [*MODEL, "--coco-root", "coco", *options]
    failed = command("run", *arguments)
    assert failed.exit_code == 1
    assert message in failed.output
    assert not (tmp_path / "qwt_output").exists()


def test_a_full_disk_of_the_output_folder_is_named(coco, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    failed = command("run", *MODEL, "--coco-root", coco, "--output-dir", tmp_path / "output")
    assert failed.exit_code == 1
    assert f"quota of {tmp_path / 'output'} is full" in failed.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give one limit of --max-drop, --max-size-mb, --average-bits"),
        (["--max-drop", "0.01", "--max-size-mb", "3"], "Give one limit"),
        (["--max-drop", "2"], "Error: --max-drop is 2"),
        (["--average-bits", "9"], "Error: --average-bits is 9"),
        (["--max-size-mb", "-1"], "Error: --max-size-mb is -1"),
        (["--max-drop", "0.01", "--export", "x"], "Error: --export is 'x'"),
        (["--max-drop", "0.01", "--rounds", "0"], "--rounds is 0"),
        (
            ["--max-drop", "0.01", "--a-bit", "0"],
            "--a-bit is 0; it should be from 2 to 8, or be 32",
        ),
    ],
)
def test_a_limit_that_is_none_is_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    failed = command("shrink", *MODEL, "--coco-root", "coco", *options)
    assert failed.exit_code == 1
    assert message in failed.output
    assert not (tmp_path / "qwt_output").exists()


def test_shrink_searches_quantizes_and_exports(coco, tmp_path):
    arguments = [*MODEL, *SPLITS, "--coco-root", coco, "--output-dir", tmp_path / "output"]
    arguments += ["--eval-samples", "all", "--max-drop", "0.01", "--device", "cpu"]
    planned = subprocess.run(
        [sys.executable, "-c", "from qwt_mmdet.cli import app; app()", "shrink", *arguments, "--dry-run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    for rule in ("choose_recipe", "quantize_model", "evaluate_exported"):
        assert rule in planned.stdout
    written = yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())
    assert written["quantization"]["smallest"]["smallest"]["max_drop"] == 0.01
    assert written["quantization"]["smallest"]["storage"] == "onnx"
    assert written["quantization"]["w8a8"]["scope"] == "detector"
    assert written["quantization"]["w8a8"]["activation_bits"] == 8
    assert written["quantization"]["w8a8"]["grids"] == "integer", "a file that is fast, too"
    assert written["targets"] == [{"quantization": ["smallest"]}], "w8a8 itself is not evaluated"


@pytest.mark.parametrize(("integers", "chosen"), [(0.7, 8), (1.5, 32)])
def test_shrink_takes_the_activations_whose_files_are_faster(
    coco, tmp_path, monkeypatch, integers, chosen
):
    """Of files that are made from few images and without a refit."""
    asked = []

    def run(configuration, folder, *, files=(), **_):
        asked.append(configuration)
        for path in files:
            ratio = integers if "w8a8" in path else 1.01
            write_json(folder / path, {"processor_ratio": ratio, "title": "OpenVINO"})
        if not files:
            raise InterruptedError

    monkeypatch.setattr("qwt_mmdet.cli.shrink.run_workflow", run)
    arguments = [
        *MODEL,
        *SPLITS,
        "--coco-root",
        coco,
        "--average-bits",
        "5",
        "--output-dir",
        tmp_path,
    ]
    done = command("shrink", *arguments, "--export", "openvino", "--repeats", "3")
    assert isinstance(done.exception, InterruptedError)
    trial, search = asked
    assert trial.datasets["coco"].calibration.images == 4
    assert trial.repeats == 1
    assert trial.datasets["coco"].evaluation.images == 1
    assert {entry.refit for entry in trial.quantization.values()} == {"none"}
    assert {entry.grids for entry in trial.quantization.values()} == {"integer"}
    assert search.repeats == 3
    assert search.quantization["best"].max_activation_bits == chosen
    assert search.quantization[f"w8a{chosen}"].activation_bits == chosen
    assert done.output.startswith("First, files with activations of 8 and of 32 bits are made")
    assert f"files take with activations of 8 bits {100 * integers:.0f} %" in done.output


def test_shrink_and_run_leave_activations_in_floating_point(coco, tmp_path):
    arguments = [*MODEL, *SPLITS, "--coco-root", coco, "--dry-run", "--a-bit", "32"]
    command("shrink", *arguments, "--average-bits", "4", "--output-dir", tmp_path / "shrink")
    written = yaml.safe_load((tmp_path / "shrink/config.yaml").read_text())
    assert written["quantization"]["w8a32"]["activation_bits"] == 32
    assert written["quantization"]["best"]["max_activation_bits"] == 32
    assert written["quantization"]["best"]["like"] == "w8a32"
    command("run", *arguments, "--w-bit", "8", "--output-dir", tmp_path / "run")
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["quantization"]["w8a32"]["activation_bits"] == 32


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        ([], None),
        (["--export", "onnxruntime"], "integer"),
        (["--export", "ncnn"], "symmetric"),
        (["--export", "onnxruntime", "--grids", "any"], None),
    ],
)
def test_what_is_exported_gets_the_grids_of_its_runtime(coco, tmp_path, options, grids):
    pytest.importorskip("ncnn")
    bits = ["--w-bit", "8", "--a-bit", "8", "--compensation", "none"]
    arguments = [*MODEL, *SPLITS, *bits, "--coco-root", coco, "--output-dir", tmp_path, *options]
    command("run", *arguments, "--dry-run")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (settings,) = written["quantization"].values()
    assert settings.get("grids") == grids


def test_settings_that_are_not_the_default_make_another_name():
    assert quantization_name(QuantizationSettings(4, 8)) == "w4a8"
    settings = QuantizationSettings(4, 8, scope="backbone+neck", bias_correction=False)
    assert quantization_name(settings) == "w4a8-backbone-neck-no-bias-correction"
    settings = QuantizationSettings(4, 8, refit="none", refit_weighting=0.8)
    assert quantization_name(settings) == "w4a8-no-refit-refit-weighting-0.8"


@pytest.mark.parametrize(
    ("section", "option", "key"),
    [(section, option, key) for section, keys in OPTIONS.items() for option, key in keys.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_says_what_the_key_of_the_configuration_says(section, option, key):
    parameter = inspect.signature(run).parameters[option]
    kind, info = get_args(parameter.annotation)
    described = TypeAdapter(section).json_schema()["properties"][key.name]
    assert " ".join(described["description"].split()) in info.help
    if key.default is None:
        default = default_of(section, key.name)
        assert parameter.default == {"{}": [], "PydanticUndefined": parameter.empty}.get(
            repr(default), default
        )
    for allowed in [described, *described.get("anyOf", [])]:
        assert all(
            repr(choice)[1:-1] in f"{kind} {info.metavar}" for choice in allowed.get("enum", [])
        )
        if "maximum" in allowed:
            assert f"From {allowed['minimum']} to {allowed['maximum']}." in info.help


def test_an_export_chooses_the_images_that_a_run_chooses(coco, tmp_path):
    split = {"split": "calibration"}
    files = [tmp_path / f"{name}.json" for name in ("source", "images", "files")]
    for seed in (0, 1):
        parts = {"calibration": {**split, "images": 2}, "evaluation": {"split": "val"}}
        settings = {"type": "coco", "seed": seed, "root": str(coco), **parts}
        prepare_dataset(settings, "calibration", folder=tmp_path, output=files[0])
        select_images(
            settings, "calibration", name="coco", source=files[0], folder=tmp_path,
            annotations=files[1], files=files[2],
        )  # fmt: skip
        given = {
            Coco: {"root": str(coco), "seed": seed, "exif": "apply", "allow_outside_root": False},
            CocoCalibration: {**split, "images": "2"},
            CocoEvaluation: {"split": "val"},
        }
        (tmp_path / str(seed)).mkdir()
        chosen = choose_images(given, tmp_path / str(seed))
        assert chosen.read_bytes() == files[1].read_bytes()


def test_other_files_are_not_shown(tmp_path):
    (tmp_path / "some.pth").write_bytes(b"nothing")
    failed = command("show", tmp_path / "some.pth")
    assert failed.exit_code == 1
    assert "cannot be read" in failed.output
    failed = command("show", f"{DEMO}.pth")  # somebody's weights are not to be deleted
    assert (
        failed.output
        == f"Error: {DEMO}.pth is not a warmup or compensation file; name one that qwt-mmdet wrote.\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "not a known key"),
        (
            {"models": {"m": {"config": f"{DEMO}.py", "checkpoint": "no.pth", "dataset": "d"}}},
            "no such",
        ),
    ],
)
def test_a_wrong_config_is_not_sound(tmp_path, change, message):
    content = yaml.safe_load((ROOT / "tests" / "configs" / "demo_tiny.yaml").read_text())
    content["datasets"]["d"] = content["datasets"]["shapes"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**content, **change}))
    failed = command("validate", path)
    assert failed.exit_code == 1
    assert message in failed.output
