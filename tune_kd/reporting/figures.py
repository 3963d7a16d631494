"""Draw the figures of a report, and render them as PNG or SVG.

To add a figure, write a function from records and method styles to `Made`, and add it to `PICTURES`.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib import rc_context
from matplotlib.figure import Figure

from tune_kd.analysis import measures
from tune_kd.records.reader import Records
from tune_kd.reporting import accuracy_figures as accuracy, early_stopping_figures as early_stopping
from tune_kd.reporting.style import STYLE, Made, Styles, method_styles


@dataclass(frozen=True)
class Picture:
    """A figure with its file name, its caption, and its alternative text."""

    name: str
    caption: str
    alternative: str
    figure: Figure


def draw(records: Records) -> list[Picture]:
    """All figures that have data, run by run. A method looks the same in all of them."""
    found = []
    styles = method_styles(records.trials["method"].dropna())
    for run in records.runs:
        one = records.of(run)
        ending, of = (f"-{run}", f" ({run})") if len(records.runs) > 1 else ("", "")
        more = [name for name in measures.responses(one) if name not in PICTURES]
        responses = {f"response_{name}": partial(accuracy.response, factor=name) for name in more}
        for name, make in (PICTURES | responses).items():
            with rc_context(STYLE):
                made = make(one, styles)
            if made is not None:
                caption, alternative, figure = made
                found.append(Picture(f"{name}{ending}", f"{caption}{of}", alternative, figure))
    return found


def rendered(figure: Figure, kind: str) -> bytes:
    """The bytes of a figure as `png` (200 dots per inch) or `svg`."""
    sink = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(sink, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return sink.getvalue()


PICTURES: dict[str, Callable[[Records, Styles], Made]] = {
    "effects": accuracy.effects,
    "curves": accuracy.curves,
    "temperature": partial(accuracy.response, factor="temperature"),
    "alpha": partial(accuracy.response, factor="alpha"),
    "tuning": accuracy.tuning,
    "cost": accuracy.cost,
    "rungs": early_stopping.rungs,
    "rank_correlation": early_stopping.rank_correlation,
    "timeline": early_stopping.timeline,
}
