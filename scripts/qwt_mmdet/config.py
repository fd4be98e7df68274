"""The workflow's configuration: defaults, checks and what each step depends on.

Light on purpose (no torch, no mmdet): Snakemake reads it whenever it reads the workflow.
"""

import ast
import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from .errors import QwtError
from .settings import CompensationSettings, QuantizationSettings

PACKAGE = Path(__file__).resolve().parent

# Names that would collide with other files under results/.
RESERVED_NAMES = {
    "models": ("datasets", "train_demo", "summary.csv", "summary.json", "report.html"),
    "quantization": ("baseline", "checkpoint.pth"),
    "compensation": ("quantized", "warmup.pth"),
}

# Splits and numbers of images that a dataset uses where its entry does not say otherwise.
DATASET_DEFAULTS = {
    "shapes": {
        "calibration": {"split": "calibration", "images": 128},
        "evaluation": {"split": "val", "images": 300},
    },
    "coco": {
        "calibration": {"split": "train2017", "images": 512},
        "evaluation": {"split": "val2017", "images": "all"},
    },
}

# Parts of the library (modules or packages) whose code decides the result of each step.
_DETECTOR = (
    "checkpoints",
    "compat",
    "detectors",
    "fingerprint",
    "loaders",
    "pipeline",
    "timm_backbone",
)
_EVALUATION = ("annotations", "evaluation.coco", "evaluation.predict")
_REPORT = tuple(
    f"reporting.{part}" for part in ("figures", "html", "pictures", "templates", "text")
)
STEP_PARTS = {
    "fetch_checkpoint": ("checkpoints", "download"),
    "prepare_dataset": ("annotations", "datasets", "download", "shapes"),
    "select_images": ("annotations", "datasets", "download", "images"),
    "evaluate_baseline": (*_DETECTOR, *_EVALUATION),
    "quantize_model": (*_DETECTOR, "quantization"),
    "evaluate_quantized": (*_DETECTOR, *_EVALUATION, "quantization"),
    "rank_layers": (*_DETECTOR, "quantization"),
    "fit_compensation": (*_DETECTOR, "quantization", "compensation"),
    "evaluate_compensated": (*_DETECTOR, *_EVALUATION, "quantization", "compensation"),
    "summarize_results": (
        "annotations",
        "compat",
        "evaluation.bootstrap",
        "evaluation.coco",
        "quantization",
        "reporting.tables",
    ),
    "render_report": ("annotations", "evaluation.coco", "images", *_REPORT),
    "train_demo": ("compat", "shapes"),
}


class Combination(NamedTuple):
    """Names of the three entries that a result belongs to; None for no compensation."""

    model: str
    quantization: str
    compensation: str | None


def share_with_scripts() -> None:
    """Make the processes that this one starts import the same copy of the library."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, found out without torch."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")


def is_url(location: str) -> bool:
    """Whether a checkpoint is an address rather than a path."""
    return location.startswith(("http://", "https://"))


def suggestion(word: Any, known: Iterable[str]) -> str:
    """Return ``"; did you mean …?"`` for a near miss of a known word, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key that appears twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value:  # merge keys (<<) are still unexpanded here
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            key = (key_node.tag, key_node.value)
            if key in first_line:
                raise QwtError(
                    f"{node.start_mark.name}: the name {key_node.value!r} appears twice, on line "
                    f"{first_line[key]} and on line {line}; rename or delete one of them."
                )
            first_line[key] = line
        return super().construct_mapping(node, deep)


def check_duplicates(path: str | os.PathLike[str]) -> None:
    """Refuse a config file in which a key appears twice.

    YAML parsers silently keep the last one, and the other would be lost without a word.

    Raises:
        QwtError: a key appears twice in one mapping, or the file is not YAML.
    """
    with open(path, encoding="utf-8") as stream:
        try:
            yaml.load(stream, Loader=_UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise QwtError(f"{path} is not valid YAML: {error}") from error


def load_schema(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON Schema that is written in YAML."""
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def _expand(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Merge the ``$ref`` of a schema (always to ``#/$defs/…``) into it."""
    reference = schema.get("$ref")
    if reference is None:
        return schema
    name = reference.removeprefix("#/$defs/")
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return {**_expand(root["$defs"][name], root), **rest}


def _copy_sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        # keys of a mapping may be anything here; the checks come later
        return {key: _copy_sorted(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_copy_sorted(item) for item in value]
    return value


def with_defaults(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Return a copy of ``value`` with the schema's defaults, at every depth.

    A key without a value (``evaluation:``) means its default. Known keys come in the schema's
    order, so that reordering the config file changes nothing that Snakemake compares.

    Args:
        value: a part of a config; need not be valid.
        schema: the schema of that part.
        root: the schema that ``$ref`` refers to.
    """
    schema = _expand(schema, root)
    if value is None and schema.get("type") == "object":
        value = {}
    if isinstance(value, Mapping) and ("properties" in schema or "additionalProperties" in schema):
        result = {}
        for key, subschema in schema.get("properties", {}).items():
            expanded = _expand(subschema, root)
            item = value.get(key)
            if item is None and "default" in expanded:
                item = _copy_sorted(expanded["default"])
            if item is not None:
                result[key] = with_defaults(item, expanded, root)
        others = schema.get("additionalProperties")
        for key in value:
            if key not in schema.get("properties", {}):
                known = isinstance(others, Mapping)
                result[key] = with_defaults(value[key], others, root) if known else value[key]
        return result
    if isinstance(value, list | tuple) and "items" in schema:
        return [with_defaults(item, schema["items"], root) for item in value]
    return _copy_sorted(value)


def _key(path: Iterable[str | int]) -> str:
    """Write a path in the config as people do: ``targets[0].model``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the configuration"


def _allowed(schema: Mapping[str, Any]) -> str:
    """Say what a schema allows."""
    if "$comment" in schema:
        return schema["$comment"]
    if "oneOf" in schema:
        return ", or ".join(_allowed(option) for option in schema["oneOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    kind = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "array": "a list",
        "object": "a mapping (key: value)",
    }[schema.get("type", "object")]
    if schema.get("minLength"):
        kind = "text that is not empty"
    if "minimum" in schema:
        kind += f" from {schema['minimum']}"
    if "maximum" in schema:
        kind += f" to {schema['maximum']}"
    if "exclusiveMaximum" in schema:
        kind += f" to below {schema['exclusiveMaximum']}"
    return kind


def _number_hint(value: Any) -> str:
    """YAML 1.1 reads 1e-3 as text; say how to write it."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    return f" (write {number!r}: this was read as text)" if number is not None else ""


def _describe(error: ValidationError) -> list[str]:
    """Turn an error of the JSON Schema validator into sentences about a key and its value."""
    key, value, schema = _key(error.absolute_path), error.instance, error.schema
    match error.validator:
        case "additionalProperties":
            known = list(schema.get("properties", {}))
            return [
                f"{_key([*error.absolute_path, name])} is not a known key"
                f"{suggestion(name, known) or '.'} Known here: {', '.join(known)}."
                for name in value
                if name not in known
            ]
        case "required":
            missing = [name for name in error.validator_value if name not in value]
            return [f"{key} lacks the key {name!r}; add it." for name in missing]
        case "minProperties" | "minItems":
            return [f"{key} is empty; it needs at least one entry."]
        case "enum":
            options = [str(option) for option in schema["enum"]]
            return [
                f"{key} is {value!r}; choose {_allowed(schema)}{suggestion(value, options) or '.'}"
            ]
    if "propertyNames" in error.absolute_schema_path:
        return [f"{key} has an entry named {value!r}; a name must be {_allowed(schema)}."]
    return [f"{key} is {value!r}; it must be {_allowed(schema)}.{_number_hint(value)}"]


def _check_key_types(value: Any, path: tuple[str | int, ...] = ()) -> list[str]:
    problems = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                problems += _check_key_types(item, (*path, key))
            else:
                problems.append(f"{_key(path)}: the name {key!r} must be text; put it in quotes.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            problems += _check_key_types(item, (*path, index))
    return problems


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise QwtError("\n".join(dict.fromkeys(problems)))


def check_schema(config: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Check a config against the schema.

    Raises:
        QwtError: one line for each problem, naming the key, the value and what is allowed.
    """
    _raise_problems(_check_key_types(config))
    errors = sorted(
        Draft202012Validator(schema).iter_errors(config), key=lambda e: list(map(str, e.path))
    )
    _raise_problems([line for error in errors for line in _describe(error)])


def _unknown(key: str, name: str, section: str, known: Iterable[str]) -> str:
    known = list(known)
    hint = suggestion(name, known)
    return (
        f"{key} names {name!r}, which is not an entry of {section}{hint or '.'} "
        f"Known: {', '.join(known)}."
    )


def _check_names(config: Mapping[str, Any]) -> Iterable[str]:
    for section, reserved in RESERVED_NAMES.items():
        for name in config[section]:
            if name in reserved:
                yield f"{section}.{name}: the name {name!r} is taken by the workflow; choose another."


def _resolve_dataset(name: str, entry: dict[str, Any]) -> Iterable[str]:
    """Fill in what depends on the dataset's type; yield the problems."""
    where = f"datasets.{name}"
    if entry["type"] == "coco":
        given = [key for key in ("root", "url") if key in entry]
        if len(given) != 1:
            has = "has both root and url" if given else "has neither root nor url"
            yield f"{where} {has}; give either root (a local folder) or url (to download from)."
    for part in ("calibration", "evaluation"):
        images = {**DATASET_DEFAULTS[entry["type"]][part], **entry[part]}
        if entry["type"] == "shapes":
            if images["images"] == "all":
                yield f"{where}.{part}.images is 'all'; shapes are generated, so give a number."
            for key in ("annotations", "image_folder"):
                if key in images:
                    yield f"{where}.{part}.{key} is given, but shapes are generated; remove it."
        else:
            images.setdefault("annotations", f"annotations/instances_{images['split']}.json")
            images.setdefault("image_folder", images["split"])
        entry[part] = {key: images[key] for key in sorted(images)}
    if entry["type"] == "shapes":
        for key in ("root", "url"):
            if key in entry:
                yield (
                    f"{where}.{key} is given, but shapes are generated; remove it or set type: coco."
                )


def zoo_folder() -> Path | None:
    """Folder of the configs that the installed MMDetection ships, or None without MMDetection."""
    specification = importlib.util.find_spec("mmdet")  # finds the package without importing it
    if specification is None or not specification.submodule_search_locations:
        return None
    folder = Path(specification.submodule_search_locations[0]) / ".mim" / "configs"
    return folder if folder.is_dir() else None


def _check_model_config(key: str, location: str) -> Iterable[str]:
    zoo = zoo_folder()
    if Path(location).is_file() or zoo is None or (zoo / location).is_file():
        return
    known = [str(path.relative_to(zoo)) for path in zoo.glob("*/*.py")]
    hint = suggestion(location, known)
    yield (
        f"{key} is {location!r}, which is neither a file nor a config that MMDetection ships"
        f"{hint or '; check the name, which has the form yolox/yolox_nano_8xb8-300e_coco.py.'}"
    )


def _check_model(name: str, entry: dict[str, Any], config: Mapping[str, Any]) -> Iterable[str]:
    where = f"models.{name}"
    if entry["dataset"] not in config["datasets"]:
        yield _unknown(f"{where}.dataset", entry["dataset"], "datasets", config["datasets"])
    for quantization in entry["warmup"]:
        if quantization not in config["quantization"]:
            yield _unknown(f"{where}.warmup", quantization, "quantization", config["quantization"])
    if "://" in entry["checkpoint"] and not is_url(entry["checkpoint"]):
        yield (
            f"{where}.checkpoint is {entry['checkpoint']!r}; give a path or an address that starts "
            "with http:// or https://."
        )
    yield from _check_model_config(f"{where}.config", entry["config"])


def _check_settings(
    section: str, build: Callable[[Mapping[str, Any]], Any], entries: Mapping[str, Any]
) -> Iterable[str]:
    for name, entry in entries.items():
        try:
            build(entry)
        except QwtError as error:
            yield f"{section}.{name}: {error}"


def _check_targets(config: Mapping[str, Any]) -> Iterable[str]:
    for index, target in enumerate(config.get("targets", ())):
        for key, section in zip(
            Combination._fields, ("models", "quantization", "compensation"), strict=True
        ):
            for name in target.get(key, ()):
                if name not in config[section]:
                    yield _unknown(f"targets[{index}].{key}", name, section, config[section])


def resolve(config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with all defaults filled in, checked beyond what a schema can say.

    Raises:
        QwtError: one line for each problem, naming the key, the value and what is allowed.
    """
    resolved = with_defaults(config, schema, schema)
    check_schema(resolved, schema)
    problems = list(_check_names(resolved))
    for name, entry in resolved["datasets"].items():
        problems += _resolve_dataset(name, entry)
    for name, entry in resolved["models"].items():
        problems += _check_model(name, entry, resolved)
    problems += _check_settings(
        "quantization", QuantizationSettings.from_mapping, resolved["quantization"]
    )
    problems += _check_settings(
        "compensation", CompensationSettings.from_mapping, resolved["compensation"]
    )
    problems += _check_targets(resolved)
    if not resolved["compensation"] and "evaluate_quantized" in resolved["skip"]:
        problems.append(
            "compensation is empty and skip names evaluate_quantized, so no quantized detector would "
            "be evaluated; add a compensation or do not skip."
        )
    _raise_problems(problems)
    return resolved


def combinations(config: Mapping[str, Any]) -> list[Combination]:
    """Return the combinations that a resolved config asks for, each once, in the config's order."""
    sections = ("models", "quantization", "compensation")
    found: dict[Combination, None] = {}
    for target in config.get("targets", [{}]):
        choices = [
            target.get(key, list(config[section]) or [None])
            for key, section in zip(Combination._fields, sections, strict=True)
        ]
        found.update(dict.fromkeys(itertools.starmap(Combination, itertools.product(*choices))))
    return list(found)


def _base_names(path: Path) -> list[str]:
    """Names in the ``_base_`` of an mmengine config, read without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []  # building the detector reports what is wrong with the file
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "_base_" for target in node.targets
        ):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                return []
            return [value] if isinstance(value, str) else list(value)
    return []


def config_files(location: str) -> list[str]:
    """Return the local files that an MMDetection config consists of, following ``_base_``.

    Empty for a config that MMDetection ships.
    """
    files: dict[str, None] = {}
    pending = [Path(location)]
    while pending:
        path = pending.pop()
        if path.is_file() and str(path) not in files:
            files[str(path)] = None
            pending += [Path(os.path.normpath(path.parent / base)) for base in _base_names(path)]
    return list(files)


def part_files(part: str, package: Path = PACKAGE) -> list[Path]:
    """Return the source files of a module (``evaluation.coco``) or package of the library."""
    base = package.joinpath(*part.split("."))
    module = base.with_suffix(".py")
    if module.is_file():
        return [module]
    return sorted(path for path in base.rglob("*") if path.suffix in (".py", ".j2"))


def source_hash(step: str, package: Path = PACKAGE) -> str:
    """Return a hash of the library code that decides the result of a step.

    Snakemake notices that a script was edited, but not a module which that script imports.

    Args:
        step: name of a rule.
    """
    digest = hashlib.sha256()
    for part in STEP_PARTS[step]:
        for path in part_files(part, package):
            digest.update(json.dumps(str(path.relative_to(package).as_posix())).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
