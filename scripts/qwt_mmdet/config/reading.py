"""Reading of a config file, and checks of all its values."""

import itertools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import QwtError
from .section import dotted, raise_problems, shown

MOST_VALUES = 20_000  # aliases count each time: a few lines of YAML may mean billions of values
DEEPEST_NESTING = 50


class _ConfigLoader(yaml.SafeLoader):
    """YAML loader that raises for a duplicate key, and names the line of an invalid value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first_line: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            key = (key_node.tag, key_node.value)  # merge keys (<<) are still unexpanded here
            if key in first_line:
                raise QwtError(
                    f"{node.start_mark.name}: the name {shown(key_node.value)} appears twice, on "
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
            tag = node.tag.rpartition(":")[2]  # a date with month 13, 0x_, a number of 5000 digits
            raise QwtError(
                f"{node.start_mark.name}: {shown(node.value)} on line {node.start_mark.line + 1} "
                f"looks like YAML's {tag} but is none; correct it, or put text in quotes."
            ) from error


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file as Snakemake does, but raise for a duplicate key.

    YAML parsers silently keep only the last one.

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
        raise QwtError(f"{path} holds {shown(content)}; it must be a mapping (key: value).")
    return content


def _check_value(value: Any) -> str | None:
    """The fault of a value, for any key; None without one."""
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
    """Check all keys and values: names must be text, and JSON must be able to represent values.

    Raises:
        QwtError: one line for each problem; or the config is too deep or too large.
    """
    problems = []
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), config)]
    for count in itertools.count(1):
        if not pending:
            break
        path, value = pending.pop()
        if count > MOST_VALUES or len(path) > DEEPEST_NESTING:
            raise QwtError(
                f"{dotted(path[:3])} is nested more than {DEEPEST_NESTING} levels deep, or has more than "
                f"{MOST_VALUES} values; look for an alias (*name) that repeats or contains itself."
            )
        if problem := _check_value(value):
            problems.append(f"{dotted(path)} is {shown(value)}, which {problem}.")
        if isinstance(value, Mapping):
            for name, item in reversed(list(value.items())):
                if isinstance(name, str):
                    pending.append(((*path, name), item))
                else:
                    problems.append(
                        f"{dotted(path)}: the name {shown(name)} must be text; put it in quotes."
                    )
        elif isinstance(value, list | tuple):
            pending += [((*path, index), item) for index, item in enumerate(value)][::-1]
    raise_problems(problems)
