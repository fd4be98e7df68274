"""The trained detectors."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict

from .datasets import check_address
from .names import Name
from .section import Text, section

Sha256 = Annotated[str, Strict(), Field(pattern=r"\A[0-9a-fA-F]{64}\z")]


def _check_location(text: str) -> str:
    return check_address(text) if "://" in text else text


def _in_order(value: Any) -> Any:
    """The same with sorted keys, so that their order in the file does not matter."""
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value, key=str)}
    return [_in_order(item) for item in value] if isinstance(value, list | tuple) else value


@section
class Model:
    """A trained MMDetection detector."""

    config: Text
    """Name of a config in MMDetection, or path of your own."""
    checkpoint: Annotated[Text, AfterValidator(_check_location)]
    """Path or http(s) address of the trained weights (torch.save or .safetensors)."""
    dataset: Text
    """Name of the data set that calibrates and evaluates this model."""
    sha256: Sha256 | None = None
    """The checkpoint's sha256 (64 hexadecimal digits, in quotes), verified if given."""
    config_options: Annotated[dict[str, Any], AfterValidator(_in_order)] = Field(
        default_factory=dict
    )
    """Values that replace values of the MMDetection config, by dotted key."""
    warmup: dict[Name, Text] = Field(default_factory=dict)
    """Existing warmup files to use instead of computing one: quantization name to path."""
