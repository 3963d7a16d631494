"""Write a report of a run's records: an HTML page, Markdown, tables and figures."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from tune_kd.analysis import accuracy, contrasts, early_stopping, fidelity, measures, paper, provenance, tuned
from tune_kd.analysis.statistics import MARGIN
from tune_kd.analysis.summary import summary
from tune_kd.records.reader import Records
from tune_kd.reporting import figures, page, texts
from tune_kd.reporting.paper import grid
from tune_kd.system.errors import UserError
from tune_kd.system.files import obstacle, publish

FORMATS = ("html", "md", "csv", "tex", "png", "svg")
Table = tuple[str, Callable[[Records], pd.DataFrame]]
TABLES: dict[str, Table] = {
    "contrasts": ("Contrasts that the study declared", contrasts.contrasts),
    "paper": ("Test accuracy by method, as a table for a paper", paper.paper),
    "fidelity": (
        "Exploratory: contrasts of fidelity to the teacher and of calibration (a family separate from accuracy)",
        fidelity.fidelity,
    ),
    "arms": ("Test accuracy of each arm, at the epoch with the best validation accuracy", accuracy.arms),
    "teachers": ("Test accuracy of the teachers, and effects of their settings", contrasts.teachers_compared),
    "factors": ("F tests of any effect of a factor, by context (no verdict depends on them)", contrasts.factors),
    "variances": ("Spread between teachers, between seeds, and residual", contrasts.variances),
    "settings": ("Tuned settings and their importance", tuned.settings),
    "budgets": ("Tuning budget of each arm", tuned.budgets),
    "exploratory": ("Exploratory: the screen, draws, and seeds added later", accuracy.exploratory),
    "measures": ("Fidelity to the teacher, and calibration", measures.measures),
    "costs": ("Cost of a trial, without its teacher", measures.costs),
    "temperature": ("Accuracy by temperature", lambda records: measures.response(records, "temperature")),
    "alpha": ("Accuracy by alpha", lambda records: measures.response(records, "alpha")),
    "gaps": ("The teacher's lead and the students' gain", measures.gaps),
    "decisions": ("Decisions of early stopping, by reason", early_stopping.decisions),
    "rungs": ("Rank correlation between accuracy at a rung and final accuracy", early_stopping.rank_correlations),
    "between_runs": ("The same arms in the other runs", provenance.between_runs),
    "differences": ("Differences between the runs", provenance.differences),
    "provenance": ("Provenance: code, machine and data of each run", provenance.provenance),
}
"""The tables of a report: the title, and the function that computes the table."""


def tables(records: Records) -> dict[str, pd.DataFrame]:
    """The tables that are not empty, by name."""
    made = {name: make(records) for name, (_, make) in _tables(records).items()}
    return {name: table for name, table in made.items() if len(table)}


def _tables(records: Records) -> dict[str, Table]:
    """`TABLES`, plus a response for each other numeric setting that factors vary."""
    more = [name for name in measures.responses(records) if name not in TABLES]
    return TABLES | {f"response_{name}": (f"Accuracy by {name}", partial(measures.response, factor=name))
                     for name in more}  # fmt: skip


def report(records: Records, to: Path | str, formats: Sequence[str] = FORMATS) -> Path:
    """Write a report of the records into the folder `to`. Returns the file to read first.

    `formats` are some of html, md, csv, tex, png, svg. Raises `UserError` for any other format, before it writes
    anything.
    """
    folder = Path(to)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        named = ", ".join(map(repr, unknown)) or "empty"
        raise UserError(f"--format is {named}; allowed: {', '.join(FORMATS)}")
    if (there := obstacle(folder)) is not None:
        raise UserError(f"--to is {folder}, and {there} cannot be written to; allowed: a folder that can be created")
    if found := [path for path in (folder / "tables", folder / "figures") if path.is_symlink()]:
        raise UserError(f"--to is {folder}, and a report does not write through links, such as {found[0]}; remove it")
    made = tables(records)
    titled = {name: (_tables(records)[name][0], table) for name, table in made.items()}
    printed = grid(made["paper"], records) if "paper" in made else None
    drawn = figures.draw(records) if {"html", "png", "svg"} & set(formats) else []
    limits, said = provenance.limits(records, MARGIN), summary(records)
    kinds = [kind for kind in ("png", "svg") if kind in formats]
    files = {f"figures/{each.name}.{kind}": figures.rendered(each.figure, kind) for each in drawn for kind in kinds}
    if "csv" in formats:
        files |= {f"tables/{name}.csv": texts.csv(table).encode() for name, table in made.items()}
    if "tex" in formats:
        files |= {f"tables/{name}.tex": text.encode() for name, text in texts.latex(titled, printed).items()}
    if "md" in formats:
        files["report.md"] = texts.markdown(records, titled, limits, printed, said).encode()
    if "html" in formats:
        files["report.html"] = page.html(records, titled, drawn, limits, printed, said).encode()
    _forget(folder, formats)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        publish(folder / name, data)
    first = {"html": "report.html", "md": "report.md", "csv": "tables", "tex": "tables"}
    return folder / next((first[kind] for kind in first if kind in formats), "figures")


def _forget(folder: Path, formats: Sequence[str]) -> None:
    """Remove the files of an earlier report in these formats, since a table that is no longer written looks current."""
    for kind, names in (("tables", [*TABLES, "all"]), ("figures", list(figures.PICTURES))):
        for form in formats:
            for path in (folder / kind).glob(f"*.{form}"):
                name = path.stem.partition("-")[0]
                if path.stem in names or name in names or name.startswith("response_"):
                    path.unlink()
