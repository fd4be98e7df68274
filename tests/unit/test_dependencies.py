"""What a step depends on: the code that decides its result, configs and images."""

import ast
import json
import shutil
from pathlib import Path

import pytest
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


def test_config_files_follow_base_files_but_not_mmdets_own(write):
    write(
        **{
            "base.py": "_base_ = ['mmdet::_base_/default_runtime.py']\n",
            "models/mine.py": "_base_ = '../base.py'\nmodel = dict()\n",
            "models/here.py": "_base_ = ['{{ fileDirname }}/mine.py', '../other.yaml']\n",
            "other.yaml": "_base_: base.py\n",
        }
    )
    assert staleness.config_files("models/mine.py") == ["models/mine.py", "base.py"]
    assert set(staleness.config_files("models/here.py")) == {
        "models/here.py", "models/mine.py", "other.yaml", "base.py",
    }  # fmt: skip
    assert staleness.config_files("yolox/yolox_nano_8xb8-300e_coco.py") == []


def test_config_files_follow_read_base_without_running_anything(write):
    stop = "raise SystemExit\n"
    write(
        **{
            "configs/mine.py": "from mmengine.config import read_base\n"
            "with read_base():\n"
            "    from .base import *\n"
            "    from .._base_.models.net import *\n"
            "    from mmdet.configs._base_.default_runtime import *\n",
            "configs/base.py": stop + "with read_base():\n    from .deeper import *\n",
            "configs/deeper.py": stop,
            "_base_/models/net.py": stop,
        }
    )
    assert set(staleness.config_files("configs/mine.py")) == {
        "configs/mine.py", "configs/base.py", "configs/deeper.py", "_base_/models/net.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "custom_imports = dict(imports=['ownnets.wide'], allow_failed_imports=False)",
        "custom_imports = {'imports': 'ownnets.wide'}",
        "from ownnets.wide import Wide",
        "from ownnets import wide",
    ],
)
def test_config_files_follow_modules_of_ones_own(write, tmp_path, monkeypatch, line):
    stop = "raise SystemExit\n"
    write(
        **{
            "own.py": f"import os\n{line}\n",
            "code/ownnets/__init__.py": "",
            "code/ownnets/wide.py": stop + "import torch\nfrom .parts import x\n",
            "code/ownnets/parts.py": stop,
        }
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    assert set(staleness.config_files("own.py")) == {
        "own.py", "code/ownnets/__init__.py", "code/ownnets/wide.py", "code/ownnets/parts.py",
    }  # fmt: skip


def test_source_files_are_those_of_the_module_that_registers_a_type(write, tmp_path, monkeypatch):
    stop = "raise SystemExit\n"
    write(
        **{
            "code/mylab/__init__.py": stop,
            "code/mylab/voc.py": stop + "from .boxes import x\n",
            "code/mylab/boxes.py": stop,
        }
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    assert set(staleness.source_files("mylab.voc.drawn")) == {
        "code/mylab/__init__.py", "code/mylab/voc.py", "code/mylab/boxes.py",
    }  # fmt: skip
    assert staleness.source_files("coco") == []


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
    note.write_text(json.dumps(staleness.image_files(str(tmp_path), ["a.jpg", "b.jpg"])))
    return tmp_path, note


def test_images_that_stay_as_they_were_chosen_say_nothing(chosen):
    folder, note = chosen
    (folder / "c.jpg").write_text("another image")
    assert staleness.changed_images(note) == ""
    assert staleness.changed_images(folder / "not_chosen_yet.json") == ""


@pytest.mark.parametrize("change", [Path.unlink, Path.touch, lambda path: path.write_text("x")])
def test_a_change_of_a_chosen_image_says_the_same_until_and_after_it_was_dealt_with(chosen, change):
    folder, note = chosen
    change(folder / "a.jpg")
    said = staleness.changed_images(note)
    assert said
    assert staleness.changed_images(note) == said
    (folder / "a.jpg").write_text("again")
    note.write_text(json.dumps(staleness.image_files(str(folder), ["a.jpg", "b.jpg"], said)))
    assert staleness.changed_images(note) == said
    change(folder / "a.jpg")
    assert staleness.changed_images(note) not in ("", said)


def test_a_note_that_is_cut_off_asks_for_another_choice(chosen):
    _, note = chosen
    note.write_text(note.read_text()[:20])
    assert staleness.changed_images(note)
