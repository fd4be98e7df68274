"""The plan of a run: what a config asks for, the jobs that make it, and its files under results/.

A rule states the pattern of its own files. All other code takes the paths of a run's files from here.

It imports neither torch nor mmdet, since Snakemake imports it whenever it reads the workflow.
"""

from .files import Variant
from .rows import ExportRow, Failure, ResultRow, Stopped
from .run import Job, Plan

__all__ = ["ExportRow", "Failure", "Job", "Plan", "ResultRow", "Stopped", "Variant"]
