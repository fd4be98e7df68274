"""Command-line options that are generated from keys of the configuration.

Help, default, choices and limits of such an option are those of the key, in a section of ``config/``.
"""

import contextlib
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from types import GenericAlias
from typing import Annotated, Any, Literal, NamedTuple

import typer
from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined

from ..config.documentation import limits
from ..config.section import alternatives, default_of
from ..errors import QwtError


class Key(NamedTuple):
    """A key of a section that an option sets."""

    name: str
    default: Any = None
    """Default of the option, if not the key's: ``...`` for a required option, a list for a repeatable one."""


Table = Mapping[type, Mapping[str, Key]]
"""Keys by section and option (as a parameter, ``eval_samples``)."""
Values = dict[type, dict[str, Any]]
"""Values by section and key."""


def _option_type(types: list[Any]) -> tuple[Any, str | None]:
    """For typer: the type of an option whose key accepts ``types``, and its metavar if the type is text."""
    types = [one for one in types if one is not type(None)]
    if len(types) == 1 and (types[0] is bool or typing.get_origin(types[0]) is Literal):
        return types[0], None
    if types[0] in (int, float) and all(_are_numbers(one) for one in types):
        return types[0], None
    if typing.get_origin(types[0]) is dict:
        return list[str], "KEY=VALUE"
    return str, "TEXT" if types == [str] else choices(*types)


def _are_numbers(type_: Any) -> bool:
    return type_ in (int, float) or any(isinstance(v, int | float) for v in typing.get_args(type_))


def choices(*types: Any) -> str:
    """The metavar of an option with one of ``types``: ``mse|NAME``."""
    names = {int: ["NUMBER"], str: ["NAME"]}
    return "|".join(word for one in types for word in names.get(one) or typing.get_args(one))


@functools.cache
def _schema(section: type) -> Mapping[str, Any]:
    """The JSON Schemas of a section's keys: their meanings and limits."""
    return TypeAdapter(section).json_schema()["properties"]


def _parameter(option: str, keys: list[tuple[type, Key]]) -> inspect.Parameter:
    """The parameter that typer makes an option from: it sets all keys; type and default are the first one's."""
    section, key = keys[0]
    annotation = typing.get_type_hints(section, include_extras=True)[key.name]
    option_type, metavar = _option_type(alternatives(annotation))
    default = key.default if key.default is not None else default_of(section, key.name)
    if option_type == list[str]:
        default = []
    elif isinstance(default, list):
        option_type = GenericAlias(list, (option_type,))
    meanings = [" ".join(_schema(s)[k.name]["description"].split()) for s, k in keys]
    repeatable = " Repeatable." if isinstance(default, list) else ""
    info = typer.Option(
        help=" ".join(meanings) + limits(_schema(section)[key.name]) + repeatable,
        metavar=metavar,
        rich_help_panel=(section.__doc__ or "").partition("\n")[0].rstrip("."),
    )
    return inspect.Parameter(
        option,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default in (..., PydanticUndefined) else default,
        annotation=Annotated[option_type, info],
    )


def with_options(table: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: adds the options of a table to a command, which gets their values as its first argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in list(signature.parameters.values())[1:]
        ]
        options: dict[str, list[tuple[type, Key]]] = {}
        for section, keys in table.items():
            for option, key in keys.items():
                options.setdefault(option, []).append((section, key))
        made = [_parameter(option, keys) for option, keys in options.items()]

        def call(**given: Any) -> None:
            values: Values = {
                section: {key.name: given[option] for option, key in keys.items()}
                for section, keys in table.items()
            }
            command(values, **{name: given[name] for name in given if name not in options})

        wrapper: Any = functools.wraps(command)(call)
        wrapper.__signature__ = signature.replace(parameters=[*made, *own])  # which typer reads
        return wrapper

    return decorate


@contextlib.contextmanager
def options_named(table: Table, **further: str) -> Iterator[None]:
    """Inside: error messages name the options (of a table, and ``further`` ones by key) instead of the key."""
    options: dict[str, list[str]] = {}
    for keys in table.values():
        for option, key in keys.items():
            options.setdefault(key.name, []).append(f"--{option.replace('_', '-')}")
    try:
        yield
    except QwtError as error:
        names = {k: " or ".join(dict.fromkeys(theirs)) for k, theirs in options.items()} | further

        def named(found: re.Match[str]) -> str:
            """The option of the innermost key of a path: ``models.yolox.checkpoint``, ``runtime[0]``."""
            keys = re.sub(r"\[\d+\]", "", found[0]).split(".")
            return next((names[key] for key in reversed(keys) if key in names), found[0])

        lines = [
            re.sub(r"^[\w.@\[\]-]+(?=: | (is|has|names|lacks|supplies) )", named, line)
            for line in str(error).splitlines()
        ]
        raise QwtError("\n".join(lines)) from error
