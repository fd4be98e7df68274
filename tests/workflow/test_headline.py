"""The headline run against a local server: weights and COCO arrive by download, as they would."""

import functools
import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pandas as pd
import pytest
import torch
import yaml
from mmdet.datasets import CocoDataset
from mmengine.logging import HistoryBuffer
from qwt_mmdet.config.datasets import PARTS
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.steps.prepare import prepare_dataset
from running import ROOT, Workflow

HEADLINE = (ROOT / "config" / "coco.yaml").read_text()
COCO_URL, WEIGHTS_URL = "http://images.cocodataset.org", "https://download.openmmlab.com"


class Quiet(SimpleHTTPRequestHandler):
    """A file server that says nothing."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served under."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def stand_in_coco(folder: Path, temporary: Path) -> None:
    """Generated images in the layout of COCO 2017, with COCO's 80 classes."""
    counts = {"calibration": {"images": 5}, "evaluation": {"images": 3}}
    settings = {"type": "shapes", "seed": 5, **counts}
    for part in PARTS:
        prepare_dataset(settings, part, folder=temporary, output=temporary / f"{part}.json")
    names = CocoDataset.METAINFO["classes"]
    archive = folder / "annotations" / "annotations_trainval2017.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for source, split in (("calibration", "train2017"), ("val", "val2017")):
            content = json.loads((temporary / f"annotations/instances_{source}.json").read_text())
            content["categories"] = [{"id": i, "name": n} for i, n in enumerate(names, start=1)]
            packed.writestr(f"annotations/instances_{split}.json", json.dumps(content))
            (temporary / source).rename(folder / split)


def openmmlab_checkpoint(config: str, path: Path) -> Path:
    """Random weights as OpenMMLab's trainer saves them; the name ends in the file's sha256."""
    torch.manual_seed(0)
    model = random_detector(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    path.parent.mkdir(parents=True)
    torch.save(
        {
            "meta": {"epoch": 12, "dataset_meta": {"CLASSES": CocoDataset.METAINFO["classes"]}},
            "state_dict": model.state_dict(),
            "message_hub": {"log_scalars": {"train/loss": HistoryBuffer([1.0], [1])}},
            "optimizer": optimizer.state_dict(),
        },
        path,
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}-{digest[:8]}.pth"))


@pytest.mark.slow
def test_weights_and_images_arrive_and_every_step_runs(
    workflow: Workflow, served: tuple[Path, str], tmp_path: Path
):
    folder, address = served
    stand_in_coco(folder, tmp_path / "shapes")
    config = yaml.safe_load(HEADLINE.replace(COCO_URL, address))
    name = "rtmdet-tiny"  # the smallest of the five
    model = config["models"][name]
    assert model["checkpoint"].startswith(WEIGHTS_URL)
    remote = PurePosixPath(urlsplit(model["checkpoint"]).path).relative_to("/")
    saved = openmmlab_checkpoint(model["config"], folder / remote)
    config["models"] = {
        name: {**model, "checkpoint": f"{address}/{saved.relative_to(folder).as_posix()}"}
    }
    quick = {"rounding": "nearest", "bias_correction": False}
    config["quantization"] = {"w4a4": {**config["quantization"]["w4a4"], **quick}}
    config["compensation"] = {"qwt": config["compensation"]["qwt"]}
    config["datasets"]["coco"]["calibration"]["images"] = 5
    workflow.configure(config)
    done = workflow.run("--cores", "1", "--quiet", "all")
    assert done.returncode == 0, done.stdout
    results = workflow.folder / "results"
    summary = pd.read_csv(results / "summary.csv")
    assert set(summary["compensation"]) == {"qwt"}
    assert (results / "report.html").is_file()
    assert "Nothing to be done" in workflow.run("--dry-run").stdout
