"""Declaration of the configuration's sections, and messages about wrong values.

A section is a frozen dataclass. A field defines a key: its name, type, limits, default and, in the string
below, its meaning. pydantic checks the values. The JSON schema, the tables of ``config/README.md`` and the
options of the command line are generated from the fields.
"""

import dataclasses
import itertools
import math
import re
import reprlib
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from ..errors import QwtError, suggestion

T = TypeVar("T")

MOST_MESSAGES = 20

# YAML's types are not converted: neither the text "8" nor `true` is a number.
Text = Annotated[str, Strict(), Field(pattern=r"\A[^\x00-\x1f\x7f]{1,4000}\z")]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Gigabytes = Annotated[float, Strict(), Field(ge=0, le=1_000_000)]
Seed = Annotated[int, Strict(), Field(ge=0, le=2**32 - 1)]


def _without_nulls(value: Any) -> Any:
    """A key without a value (``evaluation:``) means its default."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if item is not None}
    return value


Nested = BeforeValidator(_without_nulls)
"""Annotation of a section inside of another one."""


@dataclass_transform(frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Class decorator: a section of the configuration. Its constructor raises QwtError for wrong values."""
    options = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    declared = dataclass(frozen=True, config=options)(cls)
    build = declared.__init__

    def checked(self: Any, *arguments: Any, **values: Any) -> None:
        try:
            build(self, *arguments, **values)
        except ValidationError as error:
            raise_problems(sentences(error, declared))

    declared.__init__ = checked  # type: ignore[method-assign]
    return cast(type[T], declared)


def dotted(path: Iterable[str | int]) -> str:
    """A path in the configuration as text: ``targets[0].model``."""
    text = "".join(
        f"[{key}]" if isinstance(key, int) else f".{repr(key)[1:-1]:.100}" for key in path
    )
    return text.removeprefix(".") or "the configuration"


def shown(value: Any) -> str:
    """A value for a message: in one line, shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def raise_problems(problems: Iterable[str]) -> None:
    first = list(itertools.islice(dict.fromkeys(problems), MOST_MESSAGES + 1))
    if len(first) > MOST_MESSAGES:
        first[-1] = "There are more mistakes; correct these first."
    if first:
        raise QwtError("\n".join(first))


def field_names(cls: Any) -> list[str]:
    """The keys of a section."""
    return [field.name for field in dataclasses.fields(cls)]


def alternatives(annotation: Any) -> list[Any]:
    """The types of an annotation: the members of a union, without metadata."""
    if typing.get_origin(annotation) is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, type(int | str)):
        return [one for member in typing.get_args(annotation) for one in alternatives(member)]
    return [annotation]


def _descend(annotation: Any, key: str | int) -> Any | None:
    """The type of a value's item with this key; None if the type has no keys."""
    for type_ in alternatives(annotation):
        if dataclasses.is_dataclass(type_):
            hints = typing.get_type_hints(type_, include_extras=True)
            name = list(hints)[key] if isinstance(key, int) else key
            if name in hints:
                return hints[name]
        elif typing.get_origin(type_) is dict:
            return typing.get_args(type_)[1]
        elif typing.get_origin(type_) is tuple:
            return typing.get_args(type_)[0]
    return None


def _located(location: tuple[str | int, ...], root: Any) -> tuple[list[str | int], Any]:
    """The key that an error of pydantic is about, and its type.

    pydantic's locations also name the members of unions.
    """
    path: list[str | int] = []
    annotation: Any = root
    for key in location:
        below = _descend(annotation, key)
        if below is None:
            tagged = [
                type_ for type_ in alternatives(annotation) if key in (_tag(type_), _name(type_))
            ]
            annotation = tagged[0] if tagged else annotation
            continue
        if isinstance(key, int) and annotation is root:  # a positional argument
            key = field_names(root)[key]
        path.append(key)
        annotation = below
    return path, annotation


def _name(type_: Any) -> str | None:
    """The name of a section, which identifies it in a union without ``type``."""
    return type_.__name__ if dataclasses.is_dataclass(type_) and isinstance(type_, type) else None


def _tag(type_: Any) -> str | None:
    """The value of ``type`` that identifies a section in a union."""
    if not dataclasses.is_dataclass(type_):
        return None
    hint = typing.get_type_hints(type_).get("type")
    return next(iter(typing.get_args(hint)), OWN if hint is str else None)


REPLACED = {
    "sensitivity.average_bits": "only a search chooses bits. Remove it, and give `quantization` an entry such as "
    "mixed: {best: {average_weight_bits: 5}, like: w4a4}."
}
"""Keys that are gone, and what to do."""


def _unknown_key(key: str, location: tuple[str | int, ...], root: Any) -> str:
    path, annotation = _located(location[:-1], root)
    if (name := dotted([*path, key])) in REPLACED:
        return f"{name} is gone: {REPLACED[name]}"
    known = [
        name
        for one in alternatives(annotation)
        if dataclasses.is_dataclass(one)
        for name in field_names(one)
    ]
    return (
        f"{name} is not a known key{suggestion(key, known) or '.'} Known here: {', '.join(known)}."
    )


_PLAINER = {
    r"^Value error, ": "",
    r"^(Input|String) should": "it should",
    r"a dictionary or an instance of \w+": "a mapping (key: value)",
    r"^Input should be a valid dictionary": "it should be a mapping (key: value)",
    r"valid tuple": "list",
    r"valid integer": "whole number",
    r"valid number": "number",
    r"valid string": "text",
    r"valid boolean": "true or false",
    r"match pattern .*4000.*": "be text that is not empty, in one line of at most 4000 letters",
    r"match pattern .*64.*": "be 64 hexadecimal digits, in quotes",
    r"match pattern .*cuda.*": "be auto, cpu, cuda or a card such as cuda:1",
    r"^(Dictionary|Tuple) should have at least 1 item.*": "it should have at least one entry",
    r"^Tuple should have at least (\d+) items.*": r"it should have at least \1 entries",
}
"""pydantic's phrases (patterns), and their replacements for readers of YAML."""


def _plainer(message: str) -> str:
    for pattern, words in _PLAINER.items():
        message = re.sub(pattern, words, message)
    return message


def _bounds(annotation: Any) -> str:
    """The range of numbers that a type allows: ``from 2 to 8``."""
    if typing.get_origin(annotation) is not Annotated:
        return next(filter(None, map(_bounds, typing.get_args(annotation))), "")
    inner, *metadata = typing.get_args(annotation)
    limits = [limit for entry in metadata for limit in getattr(entry, "metadata", ())]
    found = {key: getattr(e, key) for e in limits for key in ("ge", "le", "lt") if hasattr(e, key)}
    if "ge" not in found:
        return _bounds(inner)
    above = f" to {found['le']}" if "le" in found else ""
    return f"from {found['ge']}" + (f" to below {found['lt']}" if "lt" in found else above)


def _number_hint(value: Any) -> str:
    """How to write a number that YAML 1.1 reads as text, such as 1e-3."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    return f" (write {int(number) if number.is_integer() else number}: this was read as text)"


def sentences(error: ValidationError, root: Any) -> list[str]:
    """Sentences about the faults of a section; each names the key, its value and the remedy."""
    found: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}
    errors = error.errors()
    for entry in errors:
        location, code, value = entry["loc"], entry["type"], entry["input"]
        message = _plainer(entry["msg"])
        path, annotation = _located(location, root)
        if code.startswith(("less_than", "greater_than")):
            message = f"it should be {_bounds(annotation)}"
        inside = (e["loc"] for e in errors if len(e["loc"]) > len(location))
        if code == "too_short" and any(loc[: len(location)] == location for loc in inside):
            continue  # its wrong items have messages of their own
        if code == "union_tag_invalid":
            path, value = [*path, "type"], entry["ctx"]["tag"]
            message = f"it should be one of {entry['ctx']['expected_tags']}"
        key = dotted(path)
        if code == "unexpected_keyword_argument":
            name = str(location[-1])
            found[f"{location}"] = _unknown_key(name, location, root)
        elif code == "missing":
            found[key] = f"{dotted(path[:-1])} lacks the key {path[-1]!r}; add it."
        elif code == "union_tag_not_found":
            found[key] = f"{key} lacks the key 'type'; add it."
        elif location and location[-1] == "[key]":
            rest = "put it in quotes" if code == "string_type" else message
            found[key] = f"{dotted(path[:-1])} has an entry named {shown(value)}; {rest}."
        elif code == "value_error" and not message.startswith("it should"):
            found[key] = "\n".join(
                f"{key}: {line}" if path else line for line in message.splitlines()
            )
        else:  # several where the type is a union
            wanted.setdefault(key, []).append(message.removeprefix("it should "))
            remedy = ", or ".join(dict.fromkeys(wanted[key]))
            choices = re.findall(r"'([^']*)'", remedy)
            found[key] = (
                f"{key} is {shown(value)}; it should {remedy}{suggestion(value, choices) or '.'}"
                f"{_number_hint(value)}"
            )
    return [line for text in found.values() for line in text.splitlines()]


def _has_dot(name: str) -> str:
    if "." not in name.strip("."):
        raise ValueError(
            "it should be the name, with a dot in it, of what a module of yours registers"
        )
    return name


Foreign = Annotated[str, Strict(), AfterValidator(_has_dot)]
"""The name of an algorithm that a user's module registers, such as ``mylab.entropy``."""
OWN = "a name with a dot"
"""Description of such names in messages."""


def as_plain(settings: Any) -> dict[str, Any]:
    """A section as dictionaries and lists, for an archive."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
    }


def default_of(section: Any, name: str) -> Any:
    """The default of a key; ``PydanticUndefined`` without one."""
    return section.__pydantic_fields__[name].get_default(call_default_factory=True)


def as_entry(value: Any) -> Any:
    """A section as a config entry, without values that equal their default."""
    if isinstance(value, Mapping):
        return {key: as_entry(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_entry(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    return {
        name: as_entry(given)
        for name in field_names(type(value))
        if (given := getattr(value, name)) != default_of(type(value), name)
    }
