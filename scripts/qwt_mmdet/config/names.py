"""Names that are folder names under ``results/``."""

import re
from typing import Annotated

from pydantic import AfterValidator, Strict


def check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?", name):
        raise ValueError(
            "a name must be at most 100 letters, digits, dots, hyphens and underscores, starting with a "
            "letter or digit and not ending in a dot"
        )
    return name


Name = Annotated[str, Strict(), AfterValidator(check_name)]
