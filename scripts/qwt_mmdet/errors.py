"""Exceptions that are meant for the user."""

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


MAX_QUOTED = 160


def printable(text: str) -> str:
    """Text with escapes in place of characters that control a terminal, except line breaks and tabs."""
    return "".join(
        c if c.isprintable() or c in "\n\t\u00a0" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def quoted(text: Any) -> str:
    """Text from a file or a server for a message: one line of at most ``MAX_QUOTED`` characters."""
    text = str(text) if not isinstance(text, str) else text
    safe = printable(text[:MAX_QUOTED]).replace("\n", "\\n").replace("\t", "\\t")
    return safe if len(text) <= MAX_QUOTED else f"{safe}… ({len(text)} characters)"


class QwtError(Exception):
    """An error that the user can fix: the message names the cause and the remedy.

    Any other exception of this package is a bug of ours. Control characters in messages are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return ``"; did you mean …?"`` if a known word is similar, else an empty text."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class Registry(dict[str, T]):
    """Algorithms by their names in the settings.

    Args:
        key: what messages call such a name.
        imports: first import the module ``mylab`` that registers an unknown name ``mylab.voc``.
    """

    def __init__(self, key: str, *, imports: bool = False) -> None:
        super().__init__()
        self._key, self._imports = key, imports

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: the function or class has this name."""

        def decorate(entry: T) -> T:
            self[name] = entry
            return entry

        return decorate

    def find(self, name: str) -> T:
        """Return the algorithm with a name.

        Raises:
            QwtError: it is not registered, or its module cannot be imported.
        """
        module = name.rpartition(".")[0]
        if self._imports and module and name not in self:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise QwtError(
                    f"{self._key} is {name!r}, but the module {module} cannot be imported ({error}); put its folder "
                    "into PYTHONPATH."
                ) from error
        if name not in self:
            raise QwtError(
                f"{self._key} is {name!r}, which is not registered{suggestion(name, self) or '.'} Known: "
                f"{', '.join(sorted(self))}."
            )
        return self[name]


def check_installed(name: str) -> None:
    """Check that a package is installed, or the module that registers a name with a dot.

    Raises:
        QwtError: it is not.
    """
    package, dot, _ = name.partition(".")
    if importlib.util.find_spec(package) is None:
        remedy = "put its folder into PYTHONPATH" if dot else f"`pip install {package}` installs it"
        raise QwtError(f"The package {package} is not installed; {remedy}.")


LONGEST_REASON = 300


def reason(error: BaseException) -> str:
    """Type and first line of another library's error, shortened to be part of a sentence."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {' '.join(lines[0].split())}".rstrip(".: ")
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"
