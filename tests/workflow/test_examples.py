"""The documentation's examples: each is run as it stands there, and finds what the workflow finds.

They are collected from the pages, so a new one is run, too. A small YOLOX and generated images stand where the
pages name a detector and data (``standin``).
"""

import csv
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import standin
import torch
import typer
import yaml
from mmdet.apis import inference_detector
from mmdet.registry import MODELS
from qwt_mmdet import estimate, evaluate_detector, load_exported
from qwt_mmdet.cli import app
from qwt_mmdet.config import configuration, resolve
from running import ROOT, Workflow
from snakemake.cli import get_argument_parser
from typer.testing import CliRunner

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "config/*.md", "docs/**/*.md", "workflow/**/*.md")
    for path in ROOT.glob(pattern)
)
OPENVINO = "openvino" if find_spec("openvino") else "onnxruntime"
REPLACED = {
    "/data/": "data/",
    "images: 512": "images: 14",
    "--coco-root": "--calibration-samples 14 --device cpu --cores 1 --coco-root",
    "--gpus 4": "--device cpu",
    '"…"': f'"{"0" * 64}"',
    "openvino": OPENVINO,
    "runtime: [onnxruntime, mylab.reference]": "runtime: [onnxruntime]",
}
"""What the stand-in needs to be written otherwise."""
NOT_RUN = {
    "pip install": "it changes the environment",
    "python envs/install.py": "it changes the environment",
    "cp $(.venv/bin/pip cache dir)": "it copies what `make env` has compiled",
    "snakemake --workflow-profile workflow/profiles/slurm": "needs a Slurm (tests/slurm runs it)",
    "executor: cluster-generic": "settings of Snakemake for clusters that are not here",
    "import qwt_mmdet as qwt": "test_python.py runs it, on the demo",
}
"""Beginnings of examples that cannot be run here, with the reason."""
MODEL = "yolox_nano_8xb8-300e_coco"
EVALUATED = ("baseline", "w4a8/quantized", "w4a8/auto", "w8a8/onnxruntime")


class Example(NamedTuple):
    """A block of a page: the number of its first line, its language and its text."""

    line: int
    language: str
    text: str


def replaced(text: str) -> str:
    for theirs, ours in REPLACED.items():
        text = text.replace(theirs, ours)
    return text


def examples(page: str) -> list[Example]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Example(text[: block.start(2)].count("\n") + 1, block[1], block[2])
        for block in re.finditer(r"^ *```(\S*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    ]


def lines(text: str) -> list[list[str]]:
    """The words of each command of a shell's text, without comments."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def not_run(text: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if text.startswith(start)), None)


def mentioned(page: str) -> Iterator[list[str]]:
    """Commands within sentences and in indented lines."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    spoken = re.findall(r"`((?:qwt-mmdet|snakemake|make|python) [^`]+)`", text)
    indented = re.findall(
        r"^    ((?:qwt-mmdet|snakemake|python) (?:.*\\\n)*.*)$", text, re.MULTILINE
    )
    for command in [*spoken, *indented]:
        yield from lines(" ".join(command.split("\n")).replace("\\", ""))


def commands_of(language: str = "sh") -> list[str]:
    return [
        " ".join(words)
        for page in PAGES
        for example in examples(page)
        if example.language == language
        for words in lines(example.text)
    ]


# What can be told without running anything


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_of_a_kind_that_is_run(page):
    for example in examples(page):
        where = f"{page}:{example.line}"
        assert example.language in {"sh", "python", "yaml", "text"}, where
        if example.language == "sh":
            for words in lines(example.text):
                known = words[0] in RUNNERS or not_run(" ".join(words))
                assert known, f"{where}: nothing runs {words[0]}; see RUNNERS and NOT_RUN"


def test_what_is_not_run_stands_on_a_page():
    texts = [*commands_of(), *(example.text for page in PAGES for example in examples(page))]
    for start in NOT_RUN:
        assert any(text.startswith(start) for text in texts), start


def test_every_command_of_the_command_line_is_an_example():
    wanted = set(typer.main.get_command(app).commands)
    assert {
        command.split()[1] for command in commands_of() if command.startswith("qwt-mmdet ")
    } == wanted


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page):
    """As do their options; they are no examples that could be run as they stand."""
    for tool, *words in mentioned(page):
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if tool == "qwt-mmdet":
            command = typer.main.get_command(app).commands[words[0]]
            known = {option for parameter in command.params for option in parameter.opts}
            assert set(options) <= known | {"--help"}, words
        elif tool == "make":
            subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
        elif tool == "snakemake":
            known = set(get_argument_parser()._option_string_actions)
            assert set(options) <= known, words
        elif words[0].endswith(".py"):
            source = (ROOT / words[0]).read_text()
            assert all(f'"{option}"' in source for option in options), words


def sections() -> list[Any]:
    return [
        pytest.param(page, example, id=f"{page}:{example.line}")
        for page in PAGES
        for example in examples(page)
        if example.language == "yaml" and not not_run(example.text)
    ]


@pytest.mark.parametrize(("page", "example"), sections())
def test_a_piece_of_configuration_is_sound(page, example, monkeypatch, tmp_path):
    """With what else a configuration needs: the names that the pages use, and a model's required keys."""
    monkeypatch.chdir(tmp_path)
    (whole,) = (e for e in examples("README.md") if e.language == "yaml")
    content = yaml.safe_load(replaced(whole.text))
    model = content["models"]["yolox_nano"]
    content["models"]["demo"] = model
    content["quantization"]["w4a4"] = {"weight_bits": 4, "activation_bits": 4}
    for section, entries in yaml.safe_load(replaced(example.text)).items():
        if section == "models":
            entries = {name: model | entry for name, entry in entries.items()}
        if isinstance(entries, dict):
            entries = content.get(section, {}) | entries
        content[section] = entries
    resolved = resolve(content)
    assert configuration(resolved).combinations()


# What is run


def run_make(folder: Path, words: list[str]) -> str:
    """Whether there is such a target; it would install things."""
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, text=True, capture_output=True, check=True
    )
    return done.stdout


def run_snakemake(folder: Path, words: list[str]) -> str:
    done = Workflow(ROOT, folder).run("--dry-run", *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_python(folder: Path, words: list[str]) -> str:
    command = [sys.executable, *words]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def run_ours(folder: Path, words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.output


RUNNERS = {
    "make": run_make,
    "snakemake": run_snakemake,
    "python": run_python,
    "qwt-mmdet": run_ours,
}


def make_standin(folder: Path) -> None:
    """The folder that a reader of the pages has: a detector, images, ``my.yaml``, and what it computes."""
    for name in ("yolox", "data", "config"):
        (folder / name).mkdir(parents=True)
    model, weights = folder / "yolox" / f"{MODEL}.py", folder / "yolox_nano.pth"
    standin.write_detector(model, weights)
    shutil.copy(weights, folder / "data")
    standin.write_images(folder / "data" / "coco", model, weights)
    pieces = {page: [e for e in examples(page) if e.language == "yaml"] for page in PAGES}
    text = "".join(replaced(pieces[page][0].text) for page in ("README.md", "docs/export.md"))
    content = {**yaml.safe_load(text), "bootstrap": {"resamples": 100}}
    for entry in content["export"]:
        entry["runtime"] = ["onnxruntime"]
    (folder / "my.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.copytree(folder / "data/coco/val2017", folder / "photos")
    shutil.copy(sorted((folder / "photos").iterdir())[0], folder / "photo.jpg")
    for name in ("docs", "workflow", "scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "config" / "config.yaml", folder / "config")
    done = Workflow(ROOT, folder).run(
        *(f"results/yolox_nano/{place}/metrics.json" for place in EVALUATED),
        *("--cores", "2", "--configfile", str(folder / "my.yaml")),
    )
    assert done.returncode == 0, done.stdout


PILOT: dict[tuple[str, str], Any] = {}
"""Costs by model and step, of the one pilot that all estimates of ``my.yaml`` share; it has the fewest images."""


@pytest.fixture
def folder(shared_folder, tmp_path, monkeypatch) -> Path:
    """A copy of the stand-in's folder to work in."""
    monkeypatch.setattr(estimate, "MOST", estimate.LEAST)
    measure = estimate.measure

    def measure_once(plan: estimate.Plan, **where: Any) -> dict[tuple[str, str], Any]:
        def fill(place: Path) -> None:
            (place / "costs").write_bytes(pickle.dumps(measure(plan, **where)))

        PILOT.update(pickle.loads((shared_folder("pilot", fill) / "costs").read_bytes()))
        return PILOT

    monkeypatch.setattr(estimate, "measure", measure_once)
    copy = tmp_path / "reader"
    shutil.copytree(shared_folder("standin", make_standin), copy, symlinks=True)
    monkeypatch.chdir(copy)
    return copy


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def found(records: list[dict]) -> list[tuple]:
    return sorted((round(r["score"], 4), *(round(v, 2) for v in r["bbox"])) for r in records)


def check_readme(folder: Path, names: dict, said: dict[str, str]) -> None:
    theirs, ours = folder / "results" / "yolox_nano", folder / "yolox" / "results" / MODEL
    for place in ("baseline", "w4a8/quantized", "w4a8/auto"):
        expected = read(theirs / place / "metrics.json")["bbox"]
        own = place.replace("w4a8", "w4a8-detector-integer")
        assert read(ours / own / "metrics.json")["bbox"] == expected
        assert f"{expected['AP']:.3f}" in said["run"]
    for block in csv.DictReader((theirs / "w4a8/auto/blocks.csv").read_text().splitlines()):
        (shown,) = re.findall(rf"^{block['name']} .*", said["show"], re.M)
        assert not block["fit_r2"] or f"{float(block['fit_r2']):.3f}" in shown
    applied = read(folder / "qwt_apply" / "predictions.json")
    assert found(applied) == found(read(theirs / "w4a8/quantized/predictions.json"))
    assert len(list((folder / "qwt_apply" / "pictures").iterdir())) == standin.SPLITS["val"][1]
    assert "my.yaml is valid: 2 combinations" in said["validate"]
    check_estimate(folder, names, said)
    check_second_run(folder)

    small = folder / "small" / "results" / MODEL / "smallest"
    (recipe,) = yaml.safe_load((small / "recipe.yaml").read_text()).values()
    entries = [recipe, *recipe.get("overrides", [])]
    assert {entry["weight_bits"] for entry in entries} <= {4, 8}, "as files store them"
    # Ties of rounding decide what this nearly random detector finds; test_real_detectors.py compares the AP of files.
    (exported,) = csv.DictReader((folder / "small/results/exports.csv").read_text().splitlines())
    assert exported["failed"] == ""
    assert float(exported["file_bytes"]) < 0.4 * float(exported["full_precision_file_bytes"])
    assert str(Path("small/results", MODEL, "smallest/model.onnx")) in said["shrink"]
    assert "So activations have" in said["shrink"], "after files of both forms were timed"
    last = said["shrink"].strip().splitlines()[-1]
    assert re.match(
        r"smallest: \d\.\d\d MB \(\d+ % of full precision\), .* ms for an image in ONNX Runtime",
        last,
    )


def check_second_run(folder: Path) -> None:
    """The script takes the command's options; another bit target uses again what is there."""
    first = next(command for command in commands_of() if command.startswith("qwt-mmdet run"))
    options = shlex.split(replaced(first))[2:]
    planned = run_python(
        folder, ["scripts/run_calibration.py", *options, "--w-bit", "8", "--dry-run"]
    )
    assert "quantize_model" in planned
    assert "evaluate_baseline" not in planned


def check_estimate(folder: Path, names: dict, said: dict[str, str]) -> None:
    """It plans the jobs that the workflow has."""
    planned = dict(re.findall(r"^yolox_nano +(\w+) +(\d+)", said["estimate"], re.MULTILINE))
    jobs = Workflow(ROOT, folder).jobs("--configfile", "my.yaml", "--forceall")
    assert {step: jobs[step] for step in planned} == {s: int(n) for s, n in planned.items()}
    assert planned["quantize_model"] == "2"
    for cost in PILOT.values():
        assert 0 <= cost.seconds_per_image < 60
        assert 0 < cost.seconds < 120
        assert 0.1 < cost.gigabytes < 8


def check_export(folder: Path, names: dict, said: dict[str, str]) -> None:
    """The file has the scores of the simulation; AP of a nearly random detector on a few images would say little."""
    theirs = folder / "results" / "yolox_nano" / "w8a8"
    _, predictions = evaluate_detector(
        names["detector"].model, "results/datasets/coco/evaluation.json"
    )
    ours, simulated = (
        best_scores(records)
        for records in (predictions, read(theirs / "quantized" / "predictions.json"))
    )
    assert ours.keys() == simulated.keys()
    difference = [abs(ours[image] - simulated[image]) for image in ours]
    assert min(difference) < 0.01, "a tie of rounding changes much in the other images"
    photo = inference_detector(load_exported(theirs / "model.onnx").model, "photo.jpg")
    scores = [float(line.split()[0]) for line in said["docs/examples/run_exported.py"].splitlines()]
    np.testing.assert_allclose(scores, photo.pred_instances.scores.numpy(), atol=1e-3)


def best_scores(records: list[dict]) -> dict[int, float]:
    """The best score of each image."""
    return {r["image_id"]: r["score"] for r in sorted(records, key=lambda r: r["score"])}


def check_configuration(folder: Path, names: dict, said: dict[str, str]) -> None:
    """The backbone of timm is one that can be built."""
    import_module("qwt_mmdet.detectors.timm_backbone")  # as the reading of such a config does
    backbone = dict(names["backbone"])
    assert backbone.pop("_delete_")
    assert len(MODELS.build(backbone).eval()(torch.zeros(1, 3, 64, 64))) == 4


CHECKS = {
    "README.md": check_readme,
    "config/README.md": check_configuration,
    "docs/clusters.md": check_estimate,
    "docs/export.md": check_export,
}
RUN_PAGES = [page for page in PAGES if any(e.language in ("sh", "python") for e in examples(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_examples_of_a_page_run_from_top_to_bottom(page, folder):
    names: dict[str, Any] = {}
    said: dict[str, str] = {}
    for example in examples(page):
        if example.language == "python" and not not_run(example.text):
            exec(compile(replaced(example.text), f"{page}:{example.line}", "exec"), names)
        elif example.language == "sh":
            for words in lines(example.text):
                if not_run(" ".join(words)):
                    continue
                tool, *rest = shlex.split(replaced(shlex.join(words)))
                said[rest[0]] = RUNNERS[tool](folder, rest)
    if page in CHECKS:
        CHECKS[page](folder, names, said)
