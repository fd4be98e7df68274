"""The plan of a run: what a config asks for, the jobs that make it, and its files under results/.

A rule states the pattern of its own files. Whoever else names a file of a run asks here.

Light on purpose (no torch, no mmdet): Snakemake reads it whenever it reads the workflow.
"""

from .files import Variant
from .rows import ExportRow, Failure, ResultRow, Stopped
from .run import Job, Plan

__all__ = ["ExportRow", "Failure", "Job", "Plan", "ResultRow", "Stopped", "Variant"]
