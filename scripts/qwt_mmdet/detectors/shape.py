"""Check of the types of a model config's values, before a detector is built."""

from typing import Any

from mmengine.config import Config
from pydantic import BaseModel, ValidationError, field_validator

from ..errors import QwtError


class _Transform(BaseModel):
    type: Any


class _DataSet(BaseModel):
    metainfo: dict[str, Any] | None = None
    pipeline: list[_Transform] | None = None
    dataset: "_DataSet | None" = None
    datasets: list["_DataSet"] | None = None


class _Loader(BaseModel):
    dataset: _DataSet | None = None


class _Model(BaseModel):
    backbone: dict[str, Any] | None = None
    data_preprocessor: dict[str, Any] | None = None


class _ModelConfig(BaseModel):
    model: _Model | None = None
    test_dataloader: _Loader | None = None
    test_pipeline: list[_Transform] | None = None
    test_evaluator: Any = None
    metainfo: dict[str, Any] | None = None

    @field_validator("test_evaluator")
    @classmethod
    def _is_dict_or_list(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(isinstance(one, dict) for one in values):
            raise ValueError("dict or list of dicts")
        return value


def check_shape(config: Config, name: str) -> None:
    """Check that data sets, pipelines, evaluators and the model are dicts and lists where MMDetection's are.

    Args:
        name: of the config, for messages.

    Raises:
        QwtError: one is something else.
    """
    try:
        _ModelConfig.model_validate(config._cfg_dict)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise QwtError(f"The model config {name} has no {place}; add it.") from error
        kind = first["ctx"]["error"] if first["type"] == "value_error" else None
        kind = kind or ("list" if first["type"] == "list_type" else "dict")
        raise QwtError(
            f"The model config {name} has a {place} that is {first['input']!r:.100}; it should be a {kind}."
        ) from error
