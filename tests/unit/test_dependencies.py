"""What a step depends on: the code that decides its result, configs and images."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from qwt_mmdet import staleness

ROOT = Path(__file__).parents[2]


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
        ("compensation/solve.py", FIT),
        ("quantization/rounding.py", QUANTIZED),
        ("quantization/recipe.py", QUANTIZED),
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
        ("evaluation/bootstrap.py", {"summarize_results"}),
        ("evaluation/estimates.py", {"summarize_results", "render_report"}),
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
    package = tmp_path / "qwt_mmdet"
    shutil.copytree(staleness.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = {step: staleness.source_hash(step, package) for step in staleness.STEP_MODULES}
    with open(package / edited, "a") as stream:
        stream.write("# another way\n")
    found = {step for step in before if staleness.source_hash(step, package) != before[step]}
    assert found == stale


# Modules that cannot change a result that is already there, or whose effect is in params.
NOT_HASHED = {
    "__init__",
    "config",
    "errors",
    "files",
    "imports",
    "progress",
    "runtime",
    "staleness",
}
# What a module imports to check what a later step will need.
CHECKED_AHEAD = {"inputs.py": {"data.sources"}}
# What a module imports for steps other than the one that is looked at.
OTHER_STEPS = {
    "evaluate_baseline": {"archives", "compensation", "data.download", "quantization"},
    **{step: {"compensation", "data.download", "evaluation"} for step in SEARCH},
    "quantize_model": {"compensation", "data.download", "evaluation"},
    "evaluate_quantized": {"compensation", "data.download"},
    "rank_layers": {"compensation", "data.download", "evaluation"},
    "fit_compensation": {"data.download", "evaluation"},
    "evaluate_compensated": {"data.download"},
    "evaluate_shard": {"data.download"},
    "export_model": {"data.download", "evaluation"},
    "evaluate_exported": {"compensation", "data.download", "quantization"},
    "summarize_results": {"compensation"},
}


def script(step: str) -> Path:
    """Of a step's rule; three evaluations share one."""
    name = "evaluate_detector" if step in COCO - {"evaluate_exported", "evaluate_shard"} else step
    return ROOT / "scripts" / f"{name}.py"


def imported_modules(path: Path) -> set[str]:
    """Dotted names, inside the package, of the modules that a script or a module imports."""
    inside = path.is_relative_to(staleness.PACKAGE)
    package = path.relative_to(staleness.PACKAGE).parent.parts if inside else ()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level > 0:
                base = list(package[: len(package) - (node.level - 1)])
            elif node.module.split(".")[0] == "qwt_mmdet":
                base = node.module.split(".")[1:]
            else:
                continue
            if node.level > 0 and node.module:
                base += node.module.split(".")
            found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
    return {name for name in found - {""} if staleness.module_files(name)}


@pytest.mark.parametrize("step", staleness.STEP_MODULES)
def test_a_hash_covers_all_that_the_step_imports(step):
    modules = staleness.STEP_MODULES[step]
    files = [script(step)]
    for name in modules:
        assert staleness.module_files(name), f"{name} is not in the library"
        files += [path for path in staleness.module_files(name) if path.suffix == ".py"]
    for path in files:
        for module in imported_modules(path):
            top = module.split(".")[0]
            covered = any(
                module == p or module.startswith(f"{p}.") or p.startswith(f"{module}.")
                for p in modules
            )
            others = OTHER_STEPS.get(step, set()) | CHECKED_AHEAD.get(path.name, set())
            ignored = top in NOT_HASHED or {module, top} & others
            assert covered or ignored, f"{path.name} imports {module}"


@pytest.mark.parametrize("step", staleness.STEP_MODULES)
def test_a_hash_covers_nothing_that_the_step_does_not_import(step):
    reached: set[Path] = set()
    pending = [script(step)]
    while pending:
        path = pending.pop()
        if path not in reached and path.suffix == ".py":
            reached.add(path)
            modules = imported_modules(path)
            pending += [file for module in modules for file in staleness.module_files(module)]
    for name in staleness.STEP_MODULES[step]:
        if not name.endswith("templates"):
            assert reached & set(staleness.module_files(name)), f"{step} never imports {name}"


def test_every_rule_has_a_script_and_a_list_of_code():
    scripts = set((ROOT / "scripts").glob("*.py"))
    assert scripts - {ROOT / "scripts" / "run_calibration.py"} == set(
        map(script, staleness.STEP_MODULES)
    )


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


def test_a_note_that_is_cut_off_asks_for_another_choice(chosen):
    _, note = chosen
    note.write_text(note.read_text()[:20])
    assert staleness.changed_files(note)
