"""The table of a paper as a grid of texts. Markdown, LaTeX and the HTML page are rendered from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tune_kd.analysis.accuracy import CONTEXT
from tune_kd.records.reader import Records
from tune_kd.study.cost import IMAGES

BOLD = (
    "Bold: better than the control of its row, by a contrast of the study's primary family, at a level of 0.05 over "
    "that family. A number that is higher but not bold is not found to be better than the control."
)


@dataclass(frozen=True)
class Cell:
    """A text of the grid."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """Headings, rows of cells, and the notes below. The first `labels` columns name a row; the others are numbers."""

    heads: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    labels: int


def grid(table: pd.DataFrame, records: Records) -> Grid:
    """The grid of a table from `analysis.paper.paper`.

    Rows are labelled with the settings in which they differ, or with teacher and student if they differ in none. A note
    lists the other settings. The number of seeds is a column if it is equal in all arms of each row, else it is part of
    each cell.
    """
    table = table.astype(object).where(table.notna(), None)
    rows = [of_row.to_dict("records") for _, of_row in table.groupby(list(CONTEXT), sort=False, dropna=False)]
    differing = [name for name in CONTEXT if len({row[0][name] for row in rows}) > 1]
    labels = differing or ["student", "teacher"]
    columns = list(dict.fromkeys(table["column"]))
    counts = [{cell["n"] for cell in row if cell["n"]} for row in rows]
    in_cells = any(len(each) > 1 for each in counts)
    return Grid(
        heads=[*labels, "teacher's accuracy", *columns, *([] if in_cells else ["n"])],
        rows=[
            [
                *(_level(row[0][name]) for name in labels),
                _teacher(row[0]),
                *_cells(row, columns, in_cells),
                *([] if in_cells else [Cell(str(max(count, default=0)))]),
            ]
            for row, count in zip(rows, counts, strict=True)
        ],
        notes=_notes(records, {name: rows[0][0][name] for name in CONTEXT[1:] if name not in labels}),
        labels=len(labels),
    )


def _level(value: Any) -> Cell:
    return Cell("" if value is None else f"{value:g}" if isinstance(value, float) else str(value))


def _teacher(cell: Mapping[Any, Any]) -> Cell:
    n = cell["teacher_n"] or 0
    return Cell(_accuracy(cell["teacher_accuracy"], cell["teacher_accuracy_sd"]) + (f" (n = {n})" if n > 1 else ""))


def _cells(row: Sequence[Mapping[Any, Any]], columns: Sequence[str], with_n: bool) -> list[Cell]:
    of_column = {cell["column"]: cell for cell in row}
    found = []
    for column in columns:
        cell = of_column.get(column)
        if cell is None or not cell["n"]:
            found.append(Cell(""))
            continue
        n = f" (n = {cell['n']})" if with_n else ""
        found.append(Cell(_accuracy(cell["mean"], cell["sd"]) + n, bold=cell["verdict"] == "better"))
    return found


def _accuracy(mean: float | None, sd: float | None) -> str:
    """In percent: `94.91 ± 0.08`, without a deviation for a single seed."""
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" if sd is None else f"{100 * mean:.2f} ± {100 * sd:.2f}"


def _notes(records: Records, shared: Mapping[Any, Any]) -> list[str]:
    images = sorted({_test_images(study) for study in records.studies.values()})
    rows = ", ".join(f"{name} {_level(value).text}" for name, value in shared.items() if value is not None)
    return [
        "Test accuracy in %, mean ± sample standard deviation over n seeds, of the weights with the best validation "
        f"accuracy, on {' or '.join(f'{each:,}' for each in images)} test images that all arms share.",
        *([f"All rows: {rows}."] if rows else []),
        BOLD,
    ]


def _test_images(study: Mapping[Any, Any]) -> int:
    data = study["study"]["data"]
    return IMAGES[data["name"]].test if data["test"] is None else int(data["test"])
