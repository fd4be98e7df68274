"""The report of a run: a single HTML file without external resources."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..evaluation.coco import AP_METRICS
from ..files import write_atomically
from ..plan.rows import ResultRow
from ..plan.run import unique
from ..runtime import explain
from . import text
from .pictures import RULES, SCORE
from .summary import read_summary
from .view import Model

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
MOST_IMAGES = sum(RULES.values())
WORST_LAYERS = 10
PICTURED_IMAGES = 24  # in the whole report, so that it stays below 5 MB


def guarded(what: str, caller: Callable[[], Markup]) -> Markup:
    """Return a piece of the report, or a sentence in its place if it raises.

    In the templates, every piece that can fail is inside of ``{% call guarded("what it is") %}``. So a failing
    picture, figure or table does not affect the rest. Guarded pieces may be nested.
    """
    try:
        return caller()
    except Exception as error:
        sentence = f"The report cannot show {what}. {explain(error)}"
        logger.warning("%s", sentence)
        logging.getLogger("traceback").info("", exc_info=error)
        return Markup('<p class="missing">{}</p>').format(sentence)


def render(
    rows: Sequence[ResultRow],
    document: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Write the report of the rows of a plan and the JSON file of ``tables.summarize``.

    Raises:
        QwtError: the summary is missing or unreadable. Other failures are shown as sentences in the report.
    """
    summary = read_summary(document)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = (
        text.number, text.signed, text.percent, text.megabytes, text.multiply_adds,
        text.duration, text.significant_digits,
    )  # fmt: skip
    environment.filters |= {form.__name__: form for form in forms}
    functions = (*forms, text.interval, text.plus_minus, text.equality, text.slow_files, guarded)
    environment.globals |= {function.__name__: function for function in functions}
    models = unique(row.model for row in rows)
    most_images = max(min(MOST_IMAGES, PICTURED_IMAGES // len(models)), 1)
    page = environment.get_template("report.html.j2").render(
        models=[
            Model(index, [row for row in rows if row.model == model], summary, most_images)
            for index, model in enumerate(models)
        ],
        metrics=AP_METRICS,
        images=unique(row.images for row in summary.rows if row.images),
        resamples=max(row.resamples or 0 for row in summary.rows),
        repeats=max(row.repeats for row in summary.rows),
        failed=summary.failed,
        seed=summary.seed,
        score=SCORE,
        worst_layers=WORST_LAYERS,
        metric_names=text.AP_TYPES,
    )
    with write_atomically(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
