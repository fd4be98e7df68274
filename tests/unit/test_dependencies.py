"""What a step depends on: the code that decides its result, configs and images."""

import ast
import json
import re
import shutil
import sys
import time
import tomllib
from pathlib import Path

import pytest
from mmengine.config import Config
from qwt_mmdet import staleness

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
EVALUATIONS = {"evaluate_baseline", "evaluate_quantized", "evaluate_compensated"}
STEPS = EVALUATIONS | {path.stem for path in SCRIPTS.glob("*.py")}
STEPS -= {"evaluate_detector", "run_calibration"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files, by name, in a folder of their own, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(**texts: str) -> None:
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


MODULES = {
    "code/ownnets/__init__.py": "",
    "code/ownnets/wide.py": "from .parts import x\ndef later():\n    import ownnets.late\n",
    "code/ownnets/parts.py": "from pathlib import Path\nx = Path('anchors.csv').read_text()\n",
    "code/ownnets/late.py": "",
    "anchors.csv": "1,2",
}


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("_base_ = ['a.py'] + ['b.py']", {"a.py", "b.py"}),
        ("_base_ = '{{ fileDirname }}/deep.json'", {"deep.json", "a.py"}),
        ("_base_ = 'mmdet::_base_/default_runtime.py'", set()),
        ("x = open('deep.json').read()", {"deep.json"}),
        ("from mmengine.config import read_base\nwith read_base():\n    from .a import *\n", {"a.py"}),
        ("custom_imports = dict(imports=['ownnets' + '.wide'])", MODULES.keys() - {"code/ownnets/late.py"}),
    ],
)  # fmt: skip
def test_what_a_config_reads_is_recorded_however_it_names_it(
    write, tmp_path, monkeypatch, text, files
):
    write(
        **MODULES,
        **{"own.py": text, "a.py": "a = 1", "b.py": "b = 1", "deep.json": '{"_base_": "a.py"}'},
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    found = {"a.py": "its state before"}
    with staleness.recorded_files(found, without=["none.pth"]):
        Config.fromfile("own.py")
    assert found["a.py"] == "its state before"
    assert found.keys() - {"a.py"} == {"own.py", *files} - {"a.py"}
    known = set(sys.modules)
    if module := sys.modules.pop("ownnets.wide", None):
        module.later()
        assert set(staleness.imported_files(known)) == {"code/ownnets/late.py"}
    for name in [name for name in sys.modules if name.startswith("ownnets")]:
        del sys.modules[name]


def test_what_is_written_or_said_to_be_without_is_not_recorded(write):
    write(**{"read.txt": "", "cache.txt": "", "result.pth": ""})
    found = {}
    with staleness.recorded_files(found, without=[Path("result.pth")]):
        for name in ("read.txt", "cache.txt", "result.pth", "/proc/cpuinfo"):
            open(name).close()
        open("cache.txt", "w").close()
        Path("gone.txt").write_text("")
        Path("gone.txt").read_text()
        Path("gone.txt").unlink()
    assert set(found) == {"read.txt"}


def test_jobs_share_a_note_until_what_they_read_changes(write, monkeypatch):
    write(**{"a.py": "1", "b.txt": "1"})

    def states(*names):
        return staleness.file_note(names, how="content")["files"]

    staleness.add_to_note("note.json", "", states("a.py", "$QWT_TEST"))
    write(**{"a.py": "2"})
    staleness.add_to_note("note.json", "", states("a.py", "b.txt"))  # of a job that began later
    said = staleness.changed_files("note.json")
    assert said, "the first job has read another file"
    staleness.add_to_note("note.json", said, states("a.py", "$QWT_TEST"))
    assert staleness.changed_files("note.json") == said
    write(**{"b.txt": "2"})
    assert staleness.changed_files("note.json") == said, "nobody reads it any more"
    monkeypatch.setenv("QWT_TEST", "x")
    assert staleness.changed_files("note.json") not in ("", said)


FIT = {"fit_compensation", "evaluate_compensated", "evaluate_shard", "export_model"}
SEARCH = {"measure_candidates", "choose_recipe"}
QUANTIZED = {"quantize_model", "rank_layers", "evaluate_quantized", *SEARCH, *FIT}
COCO = {"evaluate_baseline", "evaluate_quantized", "evaluate_compensated", "evaluate_shard"}
COCO |= {"evaluate_exported"}
EVERY_DETECTOR = QUANTIZED | COCO


@pytest.mark.parametrize(
    ("edited", "stale"),
    [
        ("compensation/solve.py", {"fit_compensation"}),  # the others read its file
        ("compensation/kinds.py", FIT),
        ("quantization/calibrate.py", {"quantize_model", "rank_layers", *SEARCH}),
        ("quantization/rounding.py", QUANTIZED - {"evaluate_quantized"}),
        ("quantization/scheme.py", QUANTIZED),
        ("search/sensitivity.py", {"rank_layers", *SEARCH}),
        ("steps/rank.py", {"rank_layers"}),
        ("steps/quantize.py", {"quantize_model"}),
        ("steps/compensate.py", {"fit_compensation"}),
        ("export/nodes.py", {"export_model"}),
        ("export/loading.py", {"evaluate_exported"}),
        ("export/runtimes.py", {"export_model", "evaluate_exported", "benchmark_exported"}),
        ("export/benchmark.py", {"benchmark_exported"}),
        ("steps/search.py", SEARCH),
        ("steps/evaluate.py", COCO | SEARCH),
        ("evaluation/predict.py", COCO | SEARCH),
        ("steps/inputs.py", EVERY_DETECTOR),
        ("evaluation/bootstrap.py", {"summarize_results", *SEARCH}),
        ("evaluation/estimates.py", {"summarize_results", "render_report", *SEARCH}),
        ("devices.py", EVERY_DETECTOR),
        ("data/loaders.py", EVERY_DETECTOR),
        ("reporting/templates/report.html.j2", {"render_report"}),
        ("demo/shapes.py", {"prepare_dataset", "select_images", "train_demo"}),
        ("runtime.py", set()),  # logs and messages
        ("cli/run.py", set()),
        ("config/quantization.py", set()),  # its values are in params
    ],
)
def test_an_edit_makes_those_steps_stale_whose_result_it_decides(tmp_path, edited, stale):
    package = tmp_path / "scripts" / "qwt_mmdet"
    shutil.copytree(SCRIPTS, package.parent, ignore=shutil.ignore_patterns("__pycache__"))
    with open(package / edited, "a") as stream:
        stream.write("# another way\n")
    found = {s for s in STEPS if staleness.source_hash(s, package) != staleness.source_hash(s)}
    assert found == stale


def is_module(name: str) -> bool:
    place = staleness.PACKAGE / name.replace(".", "/")
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_every_import_of_the_library_is_found():
    for path in SCRIPTS.rglob("*.py"):
        inside = path.is_relative_to(staleness.PACKAGE)
        package = path.relative_to(staleness.PACKAGE).parent.parts if inside else ()
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("qwt_mmdet") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").split(".")
                if node.level == 0 and module[0] != "qwt_mmdet":
                    continue
                base = list(package[: len(package) - (node.level - 1)]) if node.level else []
                base += [part for part in module[node.level == 0 :] if part]
                names |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
        modules = {name for name in names if name and is_module(name)}
        found = staleness._imported(path, staleness.PACKAGE)
        assert modules <= found, path
        assert all(any(m.startswith(f"{name}.") for m in modules) for name in found - modules)


def test_a_start_of_snakemake_waits_little_for_the_hashes():
    for cached in (
        staleness._modules,
        staleness._imported,
        staleness._digest,
        staleness.source_hash,
    ):
        cached.cache_clear()
    start = time.process_time()
    for step in STEPS:
        staleness.source_hash(step)
    assert time.process_time() - start < 0.5  # it takes about 0.05


@pytest.fixture
def chosen(tmp_path):
    """Two images and the note that was taken when they were chosen: folder, path of the note."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text(name)
    note = tmp_path / "files.json"
    note.write_text(
        json.dumps(staleness.file_note(["a.jpg", "b.jpg"], root=str(tmp_path), how="time"))
    )
    return tmp_path, note


def test_images_that_stay_as_they_were_chosen_say_nothing(chosen):
    folder, note = chosen
    (folder / "c.jpg").write_text("another image")
    assert staleness.changed_files(note) == ""
    assert staleness.changed_files(folder / "not_chosen_yet.json") == ""
    note.write_text(note.read_text()[:20])
    assert staleness.changed_files(note), "a note that is cut off asks for another choice"


@pytest.mark.parametrize("change", [Path.unlink, Path.touch, lambda path: path.write_text("x")])
def test_a_change_of_a_chosen_image_says_the_same_until_and_after_it_was_dealt_with(chosen, change):
    folder, note = chosen
    change(folder / "a.jpg")
    said = staleness.changed_files(note)
    assert said
    assert staleness.changed_files(note) == said
    (folder / "a.jpg").write_text("again")
    note.write_text(
        json.dumps(staleness.file_note(["a.jpg", "b.jpg"], root=str(folder), seen=said, how="time"))
    )
    assert staleness.changed_files(note) == said
    change(folder / "a.jpg")
    assert staleness.changed_files(note) not in ("", said)


def test_the_map_of_the_documentation_is_what_lint_checks():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \|", page, re.MULTILINE)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    checked = [
        (str(level), room)
        for level, rooms in enumerate(layers, start=1)
        for room in rooms.split(" | ")
    ]
    assert sorted(rows) == sorted(checked)
