"""What users see of a mistake: one message that names it, a failed exit, no partial result."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from running import REAL_COCO, Workflow

CONFIG = yaml.safe_load(
    """
    datasets:
      shapes: {type: shapes}
    models:
      own: {config: own.py, checkpoint: own.pth, dataset: shapes}
    quantization:
      w8a8: {weight_bits: 8, activation_bits: 8}
    compensation:
      qwt: {}
    """
)


@pytest.fixture
def folder(workflow: Workflow) -> Path:
    (workflow.folder / "own.py").write_text("")
    (workflow.folder / "own.pth").write_text("")
    return workflow.folder


def refusal(workflow: Workflow, *arguments: str) -> str:
    """What Snakemake says when it refuses to plan; never with a traceback."""
    done = workflow.run("--dry-run", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    assert "Exception" not in done.stdout
    assert "Error" not in done.stdout.replace("Error in the configuration", "")
    assert not (workflow.folder / "results").exists()
    return done.stdout


def test_a_mistake_in_the_config_is_told_in_one_line(workflow, folder):
    config = copy.deepcopy(CONFIG)
    config["quantization"]["w8a8"]["weight_bits"] = 9
    workflow.configure(config)
    assert refusal(workflow).splitlines() == [
        "Error in the configuration (config/config.yaml):",
        "quantization.w8a8.weight_bits is 9; it should be from 2 to 8.",
    ]


def test_a_name_given_twice_is_refused_although_yaml_takes_it(workflow, folder):
    text = yaml.safe_dump(CONFIG) + "seed: 1\nseed: 2\n"
    path = folder / "twice.yaml"
    path.write_text(text)
    assert "the name 'seed' appears twice" in refusal(workflow, "--configfile", str(path))


def test_a_config_file_that_snakemake_could_not_read_is_named(workflow, folder):
    workflow.configure(CONFIG)
    path = folder / "config" / "config.yaml"
    path.write_bytes("# caf\u00e9\n".encode("latin-1") + path.read_bytes())
    assert "not UTF-8 text: byte 0xe9 on line 1" in refusal(workflow)


def test_a_checkpoint_that_is_no_file_is_named_with_its_key(workflow, folder):
    (folder / "own.pth").unlink()
    (folder / "own.pth").mkdir()
    workflow.configure(CONFIG)
    assert "models.own.checkpoint is 'own.pth', but there is no such file" in refusal(workflow)


def test_a_missing_warmup_file_is_named_with_its_key(workflow, folder):
    config = copy.deepcopy(CONFIG)
    config["models"]["own"]["warmup"] = {"w8a8": "old.pth"}
    workflow.configure(config)
    assert "models.own.warmup.w8a8 is 'old.pth', but there is no such file" in refusal(workflow)


def test_a_missing_annotation_file_is_named_with_its_key(workflow, folder):
    config = copy.deepcopy(CONFIG)
    config["datasets"]["shapes"] = {"type": "coco", "root": "photos"}
    workflow.configure(config)
    said = refusal(workflow)
    named = (
        r"datasets\.shapes\.(calibration|evaluation) is 'photos/annotations/instances_\w+\.json'"
    )
    assert re.search(named, said)


def test_names_in_snakemakes_own_signs_are_names(workflow, folder):
    odd = folder / "a{b}" / "{model} <c>"
    write_dataset(odd, images=1)
    for name in ("own<b>.py", "{own}.pth", "{}.pth"):
        (odd / name).write_text("")
    config = copy.deepcopy(CONFIG)
    parts = {"calibration": {"split": "train"}, "evaluation": {"split": "val"}}
    config["datasets"]["shapes"] = {"type": "coco", "root": str(odd), **parts}
    model = {"config": str(odd / "own<b>.py"), "checkpoint": str(odd / "{own}.pth")}
    config["models"]["own"] |= {**model, "warmup": {"w8a8": str(odd / "{}.pth")}}
    workflow.configure(config)
    path = odd / "my{x}.yaml"
    (folder / "config" / "config.yaml").rename(path)
    assert workflow.jobs("--configfile", str(path))["fetch_checkpoint"] == 1


def write_dataset(root: Path, images: int = 3) -> None:
    """A COCO-format folder with tiny images, for calibration and evaluation."""
    for split, first in (("train", 1), ("val", 101)):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        numbers = range(first, first + images)
        for number in numbers:
            pixels = np.full((32, 48, 3), number, dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
        content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in numbers
            ],
            "annotations": [
                {
                    "id": n,
                    "image_id": n,
                    "category_id": 1,
                    "bbox": [4, 4, 20, 20],
                    "area": 400,
                    "iscrowd": 0,
                }
                for n in numbers
            ],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def failed_logs(workflow: Workflow, targets: list[str], logs: list[str]) -> dict[str, str]:
    """Run targets that must fail, all of them; return what their logs say."""
    done = workflow.run("--cores", "2", "--keep-going", *targets)
    assert done.returncode != 0
    for target in targets:
        assert not (workflow.folder / target).exists(), f"{target} is there after a failure"
    found = {}
    for log in logs:
        text = (workflow.folder / "logs" / log).read_text()
        message, traceback = text.split("Traceback (most recent call last):", 1)
        found[log] = message.split(" ERROR qwt_mmdet.runtime: ")[1].splitlines()[0]
        assert "qwt_mmdet.errors.QwtError: " + found[log] in traceback
        assert found[log] in done.stdout, "the terminal shows the message"
    return found


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(workflow, folder):
    (folder / "benchmarks").symlink_to("/sys/kernel")
    workflow.configure(CONFIG)
    done = workflow.run("--cores", "1", "results/datasets/shapes/evaluation.json")
    assert done.returncode != 0
    assert f"{folder / 'benchmarks'} cannot be used" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (folder / "results").exists()


def test_broken_files_are_named_in_the_log_and_on_the_terminal(workflow: Workflow):
    folder = workflow.folder
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, folder / "good.pth")
    whole = (folder / "good.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "own.py").write_text("")
    part = {"calibration": {"split": "train", "images": 2}, "evaluation": {"split": "val"}}
    broken = {
        "empty": lambda root: (root / "annotations" / "instances_val.json").write_text(""),
        "malformed": lambda root: (root / "annotations" / "instances_val.json").write_text(
            '{"a": ['
        ),
        "listless": lambda root: (root / "annotations" / "instances_val.json").write_text("{}"),
        "absent": lambda root: (root / "val" / "102.png").unlink(),
        "undecodable": lambda root: (root / "val" / "102.png").write_bytes(b"not a picture"),
        "few": lambda root: None,
    }
    config = copy.deepcopy(CONFIG)
    config["datasets"] = {}
    for name, spoil in broken.items():
        write_dataset(folder / name)
        spoil(folder / name)
        config["datasets"][name] = {"type": "coco", "root": name, **copy.deepcopy(part)}
    config["datasets"]["few"]["calibration"]["images"] = 50
    config["models"] = {
        "wrong-sha256": {"checkpoint": "good.pth", "sha256": "0" * 64},
        "truncated": {"checkpoint": "cut.pth"},
    }
    for entry in config["models"].values():
        entry |= {"config": "own.py", "dataset": "few"}
    workflow.configure(config)
    logs = {
        "fetch_checkpoint/wrong-sha256.log": "good.pth",
        "fetch_checkpoint/truncated.log": "cut.pth",
        "prepare_dataset/empty/evaluation.log": "empty/annotations/instances_val.json",
        "prepare_dataset/malformed/evaluation.log": "malformed/annotations/instances_val.json",
        "prepare_dataset/listless/evaluation.log": "listless/annotations/instances_val.json",
        "select_images/absent/evaluation.log": "102.png",
        "select_images/undecodable/evaluation.log": "102.png",
        "select_images/few/evaluation.log": "datasets.few.calibration.images",
    }
    targets = [f"results/{name}/checkpoint.pth" for name in config["models"]]
    targets += [f"results/datasets/{name}/evaluation.json" for name in broken]
    found = failed_logs(workflow, targets, list(logs))
    for log, named in logs.items():
        assert named in found[log]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL_COCO.is_dir(), reason=f"no real COCO sample in {REAL_COCO}")
def test_what_does_not_fit_the_model_is_refused(workflow: Workflow):
    folder = workflow.folder
    config = yaml.safe_load(
        (Path(__file__).parents[1] / "configs" / "yolox_coco_real_tiny.yaml").read_text()
    )
    del config["export"]  # of a quantization that is not there
    model = config["models"]["yolox_nano"]
    shutil.copy(REAL_COCO / "yolox_nano_coco_mmdet.pth", folder / "other.pth")
    config["quantization"] = {
        "w8a8": {"weight_bits": 8, "activation_bits": 8},
        "nowhere": {
            "weight_bits": 8,
            "activation_bits": 8,
            "overrides": [{"pattern": "no.such.layer*", "skip": True}],
        },
    }
    torch.save({"format": "of another tool"}, folder / "foreign.pth")
    config["models"] = {
        "yolox_nano": {**model, "warmup": {"w8a8": "foreign.pth"}},
        "tiny": {**model, "config": "yolox/yolox_tiny_8xb8-300e_coco.py"},
    }
    workflow.configure(config)
    logs = {
        "quantize_model/yolox_nano/w8a8.log": "foreign.pth",
        "quantize_model/yolox_nano/nowhere.log": "no.such.layer*",
        "quantize_model/tiny/w8a8.log": "yolox/yolox_tiny_8xb8-300e_coco.py",
    }
    targets = [f"results/{log.removeprefix('quantize_model/')[:-4]}/warmup.pth" for log in logs]
    found = failed_logs(workflow, targets, list(logs))
    for log, named in logs.items():
        assert named in found[log]
