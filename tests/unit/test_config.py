"""The configuration: defaults and messages about mistakes."""

import copy
import datetime
import itertools
import re
import sys
from pathlib import Path

import pytest
import yaml
from qwt_mmdet import config, errors
from qwt_mmdet.config import PRESETS, CompensationSettings, read_file, workflow
from qwt_mmdet.config.section import dotted
from qwt_mmdet.errors import QwtError

ROOT = Path(__file__).parents[2]

MINIMAL = yaml.safe_load(
    """
    datasets:
      shapes: {type: shapes}
    models:
      demo: {config: own.py, checkpoint: demo.pth, dataset: shapes}
    quantization:
      w8a8: {weight_bits: 8, activation_bits: 8}
      w4a8: {weight_bits: 4, activation_bits: 8}
    compensation:
      qwt:
      paper: {ridge: 0, gate: fit}
    """
)


@pytest.fixture(autouse=True)
def own_model_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("")


def changed(path: str, value) -> dict:
    """The minimal config with one value set, added, or (None) removed."""
    result = copy.deepcopy(MINIMAL)
    *parents, key = path.split("/")
    section = result
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[key]
    else:
        section[key] = value
    return result


def message(path: str, value) -> str:
    with pytest.raises(QwtError) as caught:
        config.resolve(changed(path, value))
    return str(caught.value)


def test_defaults_fill_in_at_every_depth():
    resolved = config.resolve(MINIMAL)
    assert resolved["evaluation"] == {"batch_size": 1, "workers": 2, "shards": "auto"}
    assert resolved["bootstrap"] == {"resamples": 1000}
    assert resolved["quantization"]["w4a8"]["activation_range"] == "repq"
    assert resolved["compensation"]["paper"]["holdout_fraction"] == 0.2
    assert resolved["models"]["demo"]["config_options"] == {}


def test_an_entry_without_values_takes_all_defaults():
    resolved = config.resolve(MINIMAL)
    assert CompensationSettings.from_mapping(resolved["compensation"]["qwt"]) == (
        CompensationSettings()
    )


def test_splits_and_file_names_follow_from_the_type_of_dataset():
    given = changed("datasets/coco", {"type": "coco", "root": "data", "evaluation": {"images": 5}})
    coco = config.resolve(given)["datasets"]["coco"]
    assert coco["calibration"] == {
        "split": "train2017",
        "images": 512,
        "annotations": "annotations/instances_train2017.json",
        "image_folder": "train2017",
        "draw": 1,
    }
    assert coco["evaluation"]["images"] == 5
    assert coco["evaluation"]["image_folder"] == "val2017"


def test_resolving_changes_neither_the_config_nor_a_resolved_one():
    before = copy.deepcopy(MINIMAL)
    resolved = config.resolve(MINIMAL)
    assert before == MINIMAL
    assert config.resolve(resolved) == resolved


def test_the_order_of_keys_in_the_file_does_not_matter():
    given = changed("models/demo/config_options", {"b.c": 1, "a": 2})
    turned = copy.deepcopy(given)
    turned["models"]["demo"] = dict(reversed(given["models"]["demo"].items()))
    turned["models"]["demo"]["config_options"] = {"a": 2, "b.c": 1}
    first, second = (config.resolve(c)["models"]["demo"] for c in (given, turned))
    assert repr(first) == repr(second)


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("quantisation", {}, ["quantisation", "did you mean quantization?"]),
        ("models", None, ["lacks the key 'models'"]),
        ("models", {}, ["models is {}", "at least one entry"]),
        ("quantization/w8a8/weight_bits", 1, ["quantization.w8a8.weight_bits is 1", "from 2 to 8"]),
        ("quantization/w8a8/weight_bits", 9, ["quantization.w8a8.weight_bits is 9", "from 2 to 8"]),
        ("quantization/w8a8/activation_bits", 16, ["activation_bits is 16", "from 2 to 8, or be 32"]),
        ("quantization/w8a8/weight_bits", None, ["quantization.w8a8", "'weight_bits'"]),
        ("quantization/w8a8/weigth_bits", 8, ["w8a8.weigth_bits", "did you mean weight_bits?"]),
        ("quantization/w8a8/scope", "neck", ["w8a8.scope is 'neck'", "backbone+neck", "detector"]),
        ("quantization/my bits", MINIMAL["quantization"]["w8a8"], ["'my bits'", "letters, digits"]),
        ("quantization/baseline", MINIMAL["quantization"]["w8a8"], ["quantization.baseline", "taken"]),
        ("compensation/quantized", {}, ["compensation.quantized", "taken"]),
        ("compensation/qwt", {"ridge": "1e-3"}, ["qwt.ridge is '1e-3'", "write 0.001"]),
        ("compensation/qwt", {"ridge": -1}, ["qwt.ridge is -1", "from 0, or be 'auto'"]),
        ("compensation/qwt", {"holdout_fraction": 0}, ["compensation.qwt", "holdout_fraction is 0"]),
        ("datasets/shapes/calibration", {"images": 0}, ["shapes.calibration.images is 0", "from 1"]),
        ("datasets/shapes/calibration", {"images": "all"}, ["calibration.images is 'all'", "a whole number"]),
        ("datasets/shapes/root", "data", ["datasets.shapes.root", "not a known key"]),
        ("datasets/shapes/type", "voc", ["datasets.shapes.type is 'voc'", "'shapes', 'coco'"]),
        ("export", [{"runtime": ["onnxruntim"]}], ["export[0].runtime[0] is 'onnxruntim'", "did you mean onnxruntime?"]),
        ("export", [{"runtime": ["mylab/own.x"]}], ["export[0].runtime[0]: a name must be", "letters, digits"]),
        ("export", [{"opset": 7}], ["export[0].opset is 7", "from 21 to 23"]),
        ("export", [{"input": "static"}], ["export[0].input is 'static'", "'fixed' or 'dynamic'"]),
        ("export", [{"quantization": ["w8"]}], ["export[0].quantization names 'w8'", "did you mean w8a8?"]),
        ("export", [{}, {"opset": 22}], ["export[0] exports nothing", "later entries"]),
        ("datasets/coco", {"type": "coco"}, ["datasets.coco", "neither root nor url"]),
        (
            "datasets/coco",
            {"type": "coco", "root": "x", "url": "http://x.org"},
            ["datasets.coco", "both root and url"],
        ),
        ("datasets/coco", {"type": "coco", "url": "x.org"}, ["coco.url is 'x.org'", "http://"]),
        ("models/demo/dataset", "shape", ["models.demo.dataset names 'shape'", "Known: shapes"]),
        ("models/demo/sha256", "abc", ["models.demo.sha256 is 'abc'", "64 hexadecimal"]),
        ("models/demo/checkpoint", "s3://x/y.pth", ["models.demo.checkpoint", "http://"]),
        ("models/demo/warmup", {"w2": "x.pth"}, ["models.demo.warmup names 'w2'", "w8a8, w4a8"]),
        ("targets", [{"model": ["dem"]}], ["targets[0].model names 'dem'", "Known: demo"]),
        ("targets", [{"quantization": ["w2"]}], ["targets[0].quantization names 'w2'", "w8a8, w4a8"]),
        ("targets", [{"model": "demo"}], ["targets[0].model is 'demo'", "a list"]),
        ("seed", True, ["seed is True", "a whole number"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_key_value_and_remedy(path, value, parts):
    text = message(path, value)
    for part in parts:
        assert part in text
    assert "\n" not in text, "one mistake, one message"


def test_an_unknown_model_config_suggests_one_that_mmdet_ships():
    text = message("models/demo/config", "yolox/yolox_nano_8xb8_coco.py")
    assert "models.demo.config" in text
    assert "did you mean yolox/yolox_" in text


def test_all_mistakes_are_told_at_once():
    given = changed("quantization/w8a8/weight_bits", 1)
    given["quantization"]["w4a8"]["activation_bits"] = 16
    with pytest.raises(QwtError) as caught:
        config.resolve(given)
    assert len(str(caught.value).splitlines()) == 2


def test_names_that_yaml_reads_as_numbers_must_be_quoted():
    given = copy.deepcopy(MINIMAL)
    given["quantization"][8] = given["quantization"]["w8a8"]
    with pytest.raises(QwtError, match="the name 8 must be text"):
        config.resolve(given)


def test_a_name_that_appears_twice_is_an_error(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("quantization:\n  w8a8: {a: 1}\n  w4a4: {a: 1}\n  w8a8: {a: 2}\n")
    with pytest.raises(QwtError, match=r"'w8a8' appears twice, on line 2 and on line 4"):
        config.read_file(path)


def test_the_same_name_in_two_places_and_merge_keys_are_fine(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "quantization:\n  a: &a {bits: 8, scope: x}\n  b: {<<: *a, bits: 4}\ncompensation:\n  a: {}\n"
    )
    config.read_file(path)


GOOD = yaml.safe_dump(MINIMAL, sort_keys=False)
LAUGHTER = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghijkl")
)


@pytest.fixture
def usual_recursion_limit():
    """What Python starts with; libraries that other tests of a process import may have raised it."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("usual_recursion_limit")
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (f"# caf\u00e9\n{GOOD}".encode("latin-1"), ["not UTF-8", "0xe9 on line 1"]),
        (GOOD.encode("utf-16"), ["not UTF-8"]),
        (GOOD.replace("  ", "\t").encode(), ["not valid YAML", "line 2"]),
        (b"", ["mapping (key: value)"]),
        (b"- a\n- b\n", ["mapping (key: value)"]),
        (b"a: 1\n---\nb: 1\n", ["not valid YAML", "single document"]),
        (b"seed: 2024-13-45", ["'2024-13-45' on line 1"]),
        (b"seed: 0x_", ["'0x_' on line 1"]),
        (b"seed: " + b"9" * 5000, ["999' on line 1"]),
        (b"seed: !!bool maybe", ["'maybe' on line 1"]),
        (b"seed: !!map [a]", ["expected a mapping"]),
        (b"? [a]\n: 1\n", ["unhashable key"]),
        (b"seed: !!python/object/apply:os.getcwd []", ["could not determine a constructor"]),
        (b"a: " + b"[" * 500, ["nested too deeply"]),
        (LAUGHTER.encode(), ["alias"]),
        (b"seed: &a {b: *a}", ["alias"]),
        (
            LAUGHTER.replace("x, x, x, x, x, x, x, x, x, x", "{x: 1}").replace("[", "{<<: [")
            .replace("]", "]}").encode(),
            ["merges (<<) on line"],
        ),
        (b"seed: 2020-01-01\n", ["was read as date"]),
        (b"seed: !!binary aGk=\n", ["was read as bytes"]),
        (b"seed: !!set {a}\n", ["was read as set"]),
    ],
)  # fmt: skip
def test_whatever_yaml_can_hold_gets_one_sentence(tmp_path, content, parts):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(QwtError) as caught:
        config.resolve(config.read_file(path))
    text = str(caught.value)
    for part in parts:
        assert part in text
    assert "\n" not in text
    assert len(text) < 500


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    (tmp_path / "config.yaml").write_bytes(GOOD.replace("\n", "\r\n").encode("utf-8-sig"))
    assert config.read_file(tmp_path / "config.yaml") == MINIMAL


def test_the_key_of_the_chooser_that_is_gone_names_the_search():
    given = {**MINIMAL, "sensitivity": {"average_bits": 4}}
    with pytest.raises(QwtError, match=r"sensitivity\.average_bits is gone: .*average_weight_bits"):
        config.resolve(given)


def keys(node, path=()):
    """Every key and index of a config, in full."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from keys(value, (*path, key))


def test_no_key_takes_a_value_that_is_none():
    given = changed("targets", [{"model": ["demo"]}])
    given["models"]["demo"] |= {"config_options": {"a.b": 1}, "warmup": {"w8a8": "x.pth"}}
    given["datasets"]["coco"] = {"type": "coco", "url": "http://x.org"}
    given["quantization"]["w4a8"]["overrides"] = [{"pattern": "x", "weight_bits": 4}]
    given["compensation"]["paper"] |= {"blocks": ["x"], "max_cost": {"bytes": 1}}
    given["sensitivity"] = {"images": 4}
    given = config.resolve(given)
    for path in keys(given):
        *parents, key = path
        for value in (float("nan"), float("inf"), 10**400, datetime.date(2020, 1, 1), b"x", "\0"):
            broken = copy.deepcopy(given)
            section = broken
            for parent in parents:
                section = section[parent]
            section[key] = value
            with pytest.raises(QwtError) as caught:
                config.resolve(broken)
            assert dotted(path) in str(caught.value)


@pytest.mark.parametrize("section", ["datasets", "models", "quantization", "compensation"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("x\n", "a name must be"),
        ("x" * 101, "at most 100"),
        ("a/b", "a name must be"),
        ("..", "a name must be"),
        (".hidden", "a name must be"),
        ("end.", "a name must be"),
        ("end ", "a name must be"),
        ("ä", "a name must be"),
        ("", "a name must be"),
        ("con", "device on Windows"),
        ("NUL.x", "device on Windows"),
    ],
)
def test_a_name_that_cannot_be_a_folder_everywhere_is_refused(section, name, remedy):
    entry = next(iter(MINIMAL[section].values()))
    given = copy.deepcopy(MINIMAL)
    given[section][name] = entry
    with pytest.raises(QwtError, match=remedy) as caught:
        config.resolve(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["datasets", "models", "quantization", "compensation"])
def test_names_that_differ_in_case_alone_are_refused(section):
    name, entry = next(iter(MINIMAL[section].items()))
    assert "differ in case" in message(f"{section}/{name.title()}", entry or {})


def test_no_name_is_that_of_a_file_beside_it():
    """Every path that a rule writes, against the names that its neighbours may have."""
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    levels = {"models": "results/", "quantization": "results/{model}/"}
    levels["compensation"] = "results/{model}/{quantization}/"
    for section, folder in levels.items():
        beside = set(re.findall(rf'"{re.escape(folder)}([^/"{{]+)[/"]', rules))
        assert beside, section
        for name in beside:
            entry = next(iter(MINIMAL[section].values()))
            assert "is taken by the workflow" in message(f"{section}/{name.upper()}", entry or {})


def test_no_compensation_has_the_folder_of_a_runtime(monkeypatch):
    monkeypatch.setattr(workflow, "zoo_folder", lambda: None)
    given = changed("compensation/mylab.own", {})
    assert config.resolve(given)
    given["export"] = [{"runtime": ["mylab.own"]}]
    with pytest.raises(QwtError, match=r"compensation\.mylab\.own: the name .* is taken"):
        config.resolve(given)


@pytest.mark.parametrize(
    "address", ["http://[::bad/x.pth", "http://host:99999999/x", "https://", "http://a b/x"]
)
def test_an_address_that_is_none_is_refused(address):
    assert "be a valid address" in message("models/demo/checkpoint", address)
    entry = {"type": "coco", "url": address}
    assert "be a valid address" in message("datasets/coco", entry)


def test_a_whole_number_is_not_written_with_a_point():
    assert "seed is 1.0" in message("seed", 1.0)
    assert "write 512:" in message("datasets/shapes/calibration", {"images": "512"})


def test_without_targets_all_combinations_are_wanted():
    found = config.configuration(config.resolve(MINIMAL)).combinations()
    assert found == [
        ("demo", "w8a8", "qwt"),
        ("demo", "w8a8", "paper"),
        ("demo", "w4a8", "qwt"),
        ("demo", "w4a8", "paper"),
    ]


def test_exports_are_quantized_detectors_or_those_with_a_compensation_that_is_named():
    entries = [{"quantization": ["w8a8"]}, {"quantization": ["w4a8"], "compensation": ["qwt"]}]
    found = config.configuration(config.resolve(changed("export", entries))).exports()
    assert [row[1:] for row in found] == [("w8a8", None), ("w4a8", "qwt")]
    assert config.configuration(config.resolve(MINIMAL)).exports() == {}
    again = [{}, {"quantization": ["w4a8"], "runtime": ["onnxruntime", "openvino"]}]
    found = config.Configuration(**changed("export", again)).exports()
    assert [about.runtime for about in found.values()] == [
        ("onnxruntime",), ("onnxruntime", "openvino"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("search", "export", "storage"),
    [
        ({}, [{"quantization": ["small"]}], "onnx"),
        ({}, [{}], "onnx"),
        ({}, [{"quantization": ["w8a8"]}], "bits"),
        ({}, [{"weights": "bytes"}], "bits"),
        ({"storage": "bits"}, [{}], "bits"),
        ({"candidates": [5, 6, 8]}, [{}], "bits"),
        ({"objective": "bit_operations"}, [{}], "bits"),
        ({}, [], "bits"),
    ],
)
def test_a_search_counts_the_bytes_of_its_file_where_one_is_exported(search, export, storage):
    entries = changed("quantization/small", {"smallest": {"max_drop": 0.01}, **search})
    assert (
        config.resolve(entries | {"export": export})["quantization"]["small"]["storage"] == storage
    )


def test_mistakes_in_an_exported_search_are_told_as_ever():
    entries = changed("quantization/small", {"smallest": {"max_drop": "much"}}) | {"export": [{}]}
    with pytest.raises(QwtError, match=r"quantization\.small\.smallest\.max_drop is 'much'"):
        config.resolve(entries)


def test_what_cannot_be_repeated_is_refused():
    entries = changed("repeats", 2)
    assert config.resolve(entries)["repeats"] == 2
    entries["models"]["demo"]["warmup"] = {"w8a8": "w.pth"}
    entries["datasets"]["shapes"] = {"type": "coco", "root": ".", "calibration": {"images": "all"}}
    with pytest.raises(QwtError) as caught:
        config.resolve(entries)
    assert "models.demo.warmup.w8a8 supplies a single calibration" in str(caught.value)
    assert "calibration.images is all" in str(caught.value)


def test_exports_of_one_model_have_one_opset():
    entries = [{"quantization": ["w8a8"]}, {"quantization": ["w4a8"], "opset": 22}]
    with pytest.raises(QwtError, match="for the model demo, opset is both 21 and 22"):
        config.resolve(changed("export", entries))


def test_a_runtime_that_is_not_installed_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(workflow, "zoo_folder", lambda: Path("configs"))
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QwtError, match="openvino is not installed; `pip install openvino`"):
        config.resolve(changed("export", [{"runtime": ["openvino"]}]))
    with pytest.raises(QwtError, match="mylab is not installed; put its folder into PYTHONPATH"):
        config.resolve(changed("export", [{"runtime": ["mylab.own"]}]))


def test_targets_choose_combinations_and_each_is_wanted_once():
    given = changed(
        "targets", [{"quantization": ["w4a8"]}, {"model": ["demo"], "compensation": ["qwt"]}]
    )
    found = config.configuration(config.resolve(given)).combinations()
    assert found == [
        ("demo", "w4a8", "qwt"),
        ("demo", "w4a8", "paper"),
        ("demo", "w8a8", "qwt"),
    ]
    given = changed("targets", [{"quantization": ["w4a8"], "compensation": []}])
    found = config.configuration(config.resolve(given)).combinations()
    assert found == [("demo", "w4a8", None)]


@pytest.mark.parametrize("name", ["config/config.yaml", "config/coco.yaml"])
def test_a_recipe_means_the_same_in_a_config_file_and_on_the_command_line(name):
    written = read_file(ROOT / name)["compensation"]
    named = {key: CompensationSettings.from_mapping(entry) for key, entry in written.items()}
    assert named == {key: PRESETS[key] for key in written}
