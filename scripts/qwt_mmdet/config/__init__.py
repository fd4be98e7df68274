"""The workflow's configuration: the one place for keys, types, limits, defaults and meanings.

Light on purpose (no torch, no mmdet): Snakemake reads it whenever it reads the workflow.
"""

from .compensation import PRESETS, CompensationSettings, MaxCost
from .datasets import of_repeat
from .quantization import Override, QuantizationSettings
from .reading import read_file
from .search import Best, Search, Smallest, searched_settings
from .section import as_entry, as_plain
from .workflow import Combination, Configuration, configuration, resolve

__all__ = [
    "PRESETS",
    "Best",
    "Combination",
    "CompensationSettings",
    "Configuration",
    "MaxCost",
    "Override",
    "QuantizationSettings",
    "Search",
    "Smallest",
    "as_entry",
    "as_plain",
    "configuration",
    "of_repeat",
    "read_file",
    "resolve",
    "searched_settings",
]
