"""The workflow's configuration: defaults, checks and what each step depends on.

Light on purpose (no torch, no mmdet): Snakemake reads it whenever it reads the workflow.
"""

import difflib
import importlib.util
import itertools
import math
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError

from .errors import QwtError
from .files import is_url
from .settings import CompensationSettings, QuantizationSettings

PACKAGE = Path(__file__).resolve().parent

# Names that would collide with other files under results/, in small letters.
RESERVED_NAMES = {
    "datasets": (),
    "models": ("datasets", "train_demo", "summary.csv", "summary.json", "report.html"),
    "quantization": ("baseline", "checkpoint.pth", "checkpoint.pth.download"),
    "compensation": (
        "quantized",
        "warmup.pth",
        "warmup.json",
        "sensitivity.csv",
        "sensitivity.yaml",
    ),
}
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)

MOST_VALUES = 20_000  # aliases count each time: a few lines of YAML may mean billions of values
DEEPEST_NESTING = 50
MOST_MESSAGES = 20

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


def suggestion(word: Any, known: Iterable[str]) -> str:
    """Return ``"; did you mean …?"`` for a near miss of a known word, else nothing."""
    near = difflib.get_close_matches(str(word)[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class _ConfigLoader(yaml.SafeLoader):
    """YAML loader that refuses a key that appears twice, and names the line of a broken value."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            key = (key_node.tag, key_node.value)  # merge keys (<<) are still unexpanded here
            if key in first_line:
                raise QwtError(
                    f"{node.start_mark.name}: the name {_shown(key_node.value)} appears twice, on "
                    f"line {first_line[key]} and on line {line}; rename or delete one of them."
                )
            first_line[key] = line
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # merges of merges grow tenfold with each line
            raise QwtError(
                f"{node.start_mark.name}: the merges (<<) on line {node.start_mark.line + 1} bring more "
                f"than {MOST_VALUES} values; write out what is meant."
            )

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rpartition(":")[2]  # a date with month 13, 0x_, a number of 5000 digits
            raise QwtError(
                f"{node.start_mark.name}: {_shown(node.value)} on line {node.start_mark.line + 1} "
                f"looks like YAML's {kind} but is none; correct it, or put text in quotes."
            ) from error


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file as Snakemake does, but refuse a key that appears twice.

    YAML parsers silently keep the last one, and the other would be lost without a word.

    Raises:
        QwtError: the file cannot be read, is not UTF-8, not YAML or no mapping, or a key appears
            twice in one mapping.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_ConfigLoader)
    except FileNotFoundError:
        raise QwtError(f"The config {path} does not exist; check the path.") from None
    except OSError as error:
        raise QwtError(f"The config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise QwtError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} on line {line}; save it "
            "as UTF-8."
        ) from error
    except yaml.YAMLError as error:
        raise QwtError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise QwtError(f"{path} is nested too deeply; a config needs few levels.") from error
    if not isinstance(content, dict):
        raise QwtError(f"{path} holds {_shown(content)}; it must be a mapping (key: value).")
    return content


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
    text = "".join(
        f"[{part}]" if isinstance(part, int) else f".{repr(part)[1:-1]:.100}" for part in path
    )
    return text.removeprefix(".") or "the configuration"


def _shown(value: Any) -> str:
    """A value for a message: in one line, and not all of a long one."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


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
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    shown = int(number) if number.is_integer() else number
    return f" (write {shown}: this was read as text)"


def _describe(error: ValidationError) -> Iterable[str]:
    """Turn an error of the JSON Schema validator into sentences about a key and its value."""
    key, value, schema = _key(error.absolute_path), _shown(error.instance), error.schema
    if "propertyNames" in error.absolute_schema_path:
        yield f"{key} has an entry named {value}; a name must be {_allowed(schema)}."
        return
    match error.validator:
        case "additionalProperties":
            known = list(schema.get("properties", {}))
            for name in error.instance:
                if name not in known:
                    yield (
                        f"{_key([*error.absolute_path, name])} is not a known key"
                        f"{suggestion(name, known) or '.'} Known here: {', '.join(known)}."
                    )
        case "required":
            for name in error.validator_value:
                if name not in error.instance:
                    yield f"{key} lacks the key {name!r}; add it."
        case "minProperties" | "minItems":
            yield f"{key} is empty; it needs at least one entry."
        case "enum":
            options = [str(option) for option in schema["enum"]]
            hint = suggestion(error.instance, options) or "."
            yield f"{key} is {value}; choose {_allowed(schema)}{hint}"
        case _:
            yield f"{key} is {value}; it must be {_allowed(schema)}.{_number_hint(error.instance)}"


def _check_value(value: Any) -> str | None:
    """Say what is wrong with a value whatever its key, if anything."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large a number; put text in quotes"
    if isinstance(value, str) and re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", value
    ):
        return "holds a character that is no text; remove it"
    if value is not None and not isinstance(value, str | int | float | list | tuple | Mapping):
        return f"was read as {type(value).__name__}; put text in quotes"
    return None


def check_values(config: Any) -> None:
    """Check what holds for every key: names are text, and values are what JSON can hold.

    Raises:
        QwtError: one line for each problem; or the config is too deep or too large to look further.
    """
    problems = []
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), config)]
    for count in itertools.count(1):
        if not pending:
            break
        path, value = pending.pop()
        if count > MOST_VALUES or len(path) > DEEPEST_NESTING:
            raise QwtError(
                f"{_key(path[:3])} is nested more than {DEEPEST_NESTING} levels deep, or has more than "
                f"{MOST_VALUES} values; look for an alias (*name) that repeats or contains itself."
            )
        if problem := _check_value(value):
            problems.append(f"{_key(path)} is {_shown(value)}, which {problem}.")
        if isinstance(value, Mapping):
            for name, item in reversed(value.items()):
                if isinstance(name, str):
                    pending.append(((*path, name), item))
                else:
                    problems.append(
                        f"{_key(path)}: the name {_shown(name)} must be text; put it in quotes."
                    )
        elif isinstance(value, list | tuple):
            pending += [((*path, index), item) for index, item in enumerate(value)][::-1]
    _raise_problems(problems)


def _raise_problems(problems: Iterable[str]) -> None:
    shown = list(itertools.islice(dict.fromkeys(problems), MOST_MESSAGES + 1))
    if len(shown) > MOST_MESSAGES:
        shown[-1] = "There are more mistakes; mend these first."
    if shown:
        raise QwtError("\n".join(shown))


# JSON Schema takes 2.0 for a whole number; what reads it, as a seed or a batch size, does not.
_Validator = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda checker, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


def check_schema(config: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Check a config against the schema.

    Raises:
        QwtError: one line for each problem, naming the key, the value and what is allowed.
    """
    errors = sorted(_Validator(schema).iter_errors(config), key=lambda e: list(map(str, e.path)))
    _raise_problems(line for error in errors for line in _describe(error))


def _unknown(key: str, name: str, section: str, known: Iterable[str]) -> str:
    known = list(known)
    hint = suggestion(name, known)
    return (
        f"{key} names {_shown(name)}, which is not an entry of {section}{hint or '.'} "
        f"Known: {', '.join(known)}."
    )


def _check_names(config: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names that cannot be folders beside the others; macOS and Windows ignore case."""
    for section, reserved in RESERVED_NAMES.items():
        seen: dict[str, str] = {}
        for name in config[section]:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                yield (
                    f"{section}: the names {other!r} and {name!r} differ in case alone, so one would "
                    "overwrite the other on macOS and Windows; rename one."
                )
            if name.lower() in reserved:
                yield f"{section}.{name}: the name {name!r} is taken by the workflow; choose another."
            if WINDOWS_DEVICE.fullmatch(name):
                yield f"{section}.{name}: {name!r} is a device on Windows; choose another name."


def _check_address(key: str, address: str) -> Iterable[str]:
    try:
        parts = urlsplit(address)
        sound = bool(parts.hostname) and parts.port != 0  # port raises for one that is no number
    except ValueError:
        sound = False
    if not sound or re.search(r"\s", address):
        yield f"{key} is {_shown(address)}, which is not a valid address; check it."


def _resolve_dataset(name: str, entry: dict[str, Any]) -> Iterable[str]:
    """Fill in what depends on the dataset's type; yield the problems."""
    where = f"datasets.{name}"
    if entry["type"] == "coco":
        given = [key for key in ("root", "url") if key in entry]
        if len(given) != 1:
            has = "has both root and url" if given else "has neither root nor url"
            yield f"{where} {has}; give either root (a local folder) or url (to download from)."
        if "url" in entry:
            yield from _check_address(f"{where}.url", entry["url"])
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
    if os.path.isfile(location) or zoo is None or os.path.isfile(zoo / location):
        return
    known = [str(path.relative_to(zoo)) for path in zoo.glob("*/*.py")]
    hint = suggestion(location, known)
    yield (
        f"{key} is {_shown(location)}, which is neither a file nor a config that MMDetection ships"
        f"{hint or '; check the name, which has the form yolox/yolox_nano_8xb8-300e_coco.py.'}"
    )


def _check_model(name: str, entry: dict[str, Any], config: Mapping[str, Any]) -> Iterable[str]:
    where = f"models.{name}"
    if entry["dataset"] not in config["datasets"]:
        yield _unknown(f"{where}.dataset", entry["dataset"], "datasets", config["datasets"])
    for quantization in entry["warmup"]:
        if quantization not in config["quantization"]:
            yield _unknown(f"{where}.warmup", quantization, "quantization", config["quantization"])
    if is_url(entry["checkpoint"]):
        yield from _check_address(f"{where}.checkpoint", entry["checkpoint"])
    elif "://" in entry["checkpoint"]:
        yield (
            f"{where}.checkpoint is {_shown(entry['checkpoint'])}; give a path or an address that starts "
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
    check_values(config)
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
