"""The style of figures: sizes, a style for each method, stacked panels, legends and names.

Methods differ in colour (Okabe and Ito 2008), marker, line and hatch, so a figure can be read without colour.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

from matplotlib.axes import Axes
from matplotlib.figure import Figure

T = TypeVar("T")

COLUMN_INCHES = 3.4  # width of a paper's column
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names may contain `$`
    "svg.fonttype": "path",
    "svg.hashsalt": "tune_kd",  # the same figure gives the same bytes
}
PANELS = 24  # in one figure
NAME_LETTERS = 24  # characters per line of a contrast's name
LONGEST_NAME = 4 * NAME_LETTERS  # characters of any name; longer names are cut in the middle


@dataclass(frozen=True)
class MethodStyle:
    """The colour, marker, line and hatch of a method."""

    colour: str
    marker: str
    line: Any  # a `linestyle` of Matplotlib
    hatch: str = ""


METHOD_STYLES = {
    "none": MethodStyle("#000000", "s", "-"),
    "logit": MethodStyle("#0072B2", "o", "--"),
    "feature": MethodStyle("#D55E00", "^", "-.", "...."),
    "teacher": MethodStyle("#999999", "D", ":", "////"),
}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
OTHER_MARKERS = ("v", "P", "X", "*", "<", ">", "p")
OTHER_DASHES = ((8, 2), (3, 1, 1, 1, 1, 1), (1, 2), (6, 1, 2, 1), (2, 2), (10, 2, 2, 2), (1, 3))
OTHER_HATCHES = ("xxxx", "||||", "\\\\\\\\", "----", "++++", "oooo", "****")
"""For methods that are not in `METHOD_STYLES`. Five colours and seven shapes make 35 styles."""
UNKNOWN = MethodStyle(OTHER_COLOURS[0], "o", ":")  # of trials whose method is not recorded

Styles = defaultdict[str, MethodStyle]
Made = tuple[str, str, Figure] | None  # caption, alternative text, figure


def method_styles(methods: Iterable[str]) -> Styles:
    """The style of each method.

    A method that is not in `METHOD_STYLES` gets a colour by the hash of its name, or the next free colour if that one
    is taken. So its style rarely depends on the other methods.
    """
    styles, free, colours = Styles(lambda: UNKNOWN, METHOD_STYLES), list[int](), len(OTHER_COLOURS)
    for count, method in enumerate(sorted({*methods} - {*METHOD_STYLES})):
        free = free or list(range(colours))
        places = ((crc32(method.encode()) + step) % colours for step in range(colours))
        place = next(place for place in places if place in free)
        free.remove(place)
        shape = (place + count // colours * colours) % len(OTHER_MARKERS)
        line = (0, OTHER_DASHES[shape])
        styles[method] = MethodStyle(OTHER_COLOURS[place], OTHER_MARKERS[shape], line, OTHER_HATCHES[shape])
    return styles


def readable(name: object) -> str:
    """A name for a figure: wrapped, and with at most `LONGEST_NAME` characters."""
    text = str(name)
    text = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME // 2]}...{text[3 - LONGEST_NAME // 2 :]}"
    text = "\n".join(textwrap.wrap(text, 2 * NAME_LETTERS))
    return f" {text}" if text.startswith("_") else text  # Matplotlib omits labels with a leading `_` from legends


def left_out(count: int, what: str) -> str:
    """A sentence for a caption about the items that a figure omits; empty if it omits none."""
    return f" {count} more {what} are left out." if count > 0 else ""


def first_panels(items: list[T], what: str) -> tuple[list[T], str]:
    """The items that get a panel, and a sentence for the caption about the omitted ones."""
    return items[:PANELS], left_out(len(items) - PANELS, what)


def stacked(count: int, height: float, rest: float = 0.0, layout: Any = None, **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, one below the other. `height` of a panel and `rest` are in inches."""
    figure = Figure(figsize=(COLUMN_INCHES, height * count + rest), layout=layout)
    return figure, list(figure.subplots(count, 1, squeeze=False, **how)[:, 0])


def band(axes: Axes, x: Any, middle: Any, low: Any, high: Any, colour: str, **line: Any) -> None:
    """Draw a line with a band around it."""
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot(x, middle, color=colour, **line)


def stem_title(axes: Axes, stem: str) -> None:
    """Set the stem as the panel's title, if there is one."""
    axes.set_title(f"{readable(stem)} stem" if stem else "", loc="left")


def legend_above(figure: Figure, ncols: int) -> None:
    """One legend for all panels, with each label once."""
    both = (axes.get_legend_handles_labels() for axes in figure.axes)
    marks = {label: mark for pair in both for mark, label in zip(*pair, strict=True)}
    figure.legend(list(marks.values()), list(marks), loc="outside upper center", ncols=ncols)
