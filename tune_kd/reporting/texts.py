"""Tables as Markdown, LaTeX (with booktabs) and CSV.

Text from records is escaped in each format: it is never markup, a command or a formula.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tune_kd.analysis.summary import Summary
from tune_kd.records.reader import Records
from tune_kd.reporting.paper import Grid

IN_POINTS = (
    "estimate", "sd", "error", "low", "high", "low_pairs", "high_pairs", "mean", "control", "gap", "gain",
    "teacher_accuracy", "val_accuracy_best", "test_accuracy", "test_accuracy_best", "agreement", "ece", "target",
    "sd_teacher", "sd_seed", "sd_rest",
)  # fmt: skip
"""Columns of fractions, shown in points (hundredths)."""
IN_NATS = ("kl_t1", "kl_t4")
NOT_FOR_PAPERS = ("provenance", "differences")
LEFT_OUT = ["words", "note", "kind", "planned", "smallest_exact_p", "pairs_needed"]  # not shown in a paper's table
VERDICTS = "run family contrast verdict estimate low high n p_holm note"
HEADINGS = {"test_accuracy": "test_accuracy_at_last_epoch", "test_accuracy_best": "test_accuracy_at_best_epoch"}
ROWS = 200  # rows of a table that are shown; CSV files have all rows
FORMULA = re.compile(r"(?:^|(?<=[;\t\r\n]))(?=[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")
"""Places where a spreadsheet may see a formula: at the start of a cell, or after a character that may end a cell."""
MARKUP = re.compile(
    r"[\\`*\[\]|~$]"  # of Markdown, and of GitHub's tables and formulas
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # an underscore inside a word is not emphasis
    r"|:(?=//)|(?<=[wW]{3})\."  # GitHub turns addresses into links
)
BLOCK = re.compile(r"^(?:([#+=-])|(\d+)([.)]))")  # starts a heading, a rule, or a list item

Titled = Mapping[str, tuple[str, pd.DataFrame]]


def cell(name: str, value: Any, measure: str = "") -> str:
    """A value as text: fractions in points, p values to three digits, empty for None and NaN.

    `measure` is the row's measure in a table whose rows have different measures; a measure may be in nats.
    """
    if value is None or value is pd.NA or value != value:
        return ""
    if name == "measure":
        return heading(str(value))
    if isinstance(value, float):
        if name in IN_POINTS and measure in IN_NATS:
            nats = round(value, 4) + 0.0
            return f"{nats:+.4f}" if name == "estimate" else f"{nats:.4f}"
        if name.removesuffix("_sd") in IN_POINTS:
            signed = name in ("estimate", "gain", "gap")
            points = round(100 * value, 2) + 0.0  # adding 0.0 turns -0.0 into 0.0
            return f"{points:+.2f}" if signed else f"{points:.2f}"
        if name.startswith(("p_", "smallest")) or name == "p":
            return "< 0.001" if value < 0.001 else f"{value:.3f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def heading(name: str) -> str:
    """A column's heading, with its unit."""
    plain = name.removesuffix("_sd")
    unit = " (points)" if plain in IN_POINTS else " (nats)" if plain in IN_NATS else ""
    return name.replace(plain, HEADINGS.get(plain, plain), 1).replace("_", " ") + unit


def headings(table: pd.DataFrame) -> list[str]:
    """The headings of a table. If each row has its own measure, the measure states the unit, not the heading."""
    names = [str(name) for name in table.columns]
    return [name.replace("_", " ") if "measure" in names else heading(name) for name in names]


def cells(table: pd.DataFrame) -> list[list[str]]:
    """The first `ROWS` rows of a table as text."""
    table = table.head(ROWS)
    measures = table["measure"] if "measure" in table else [""] * len(table)
    return [
        [cell(str(name), value, measure) for name, value in zip(table.columns, row, strict=True)]
        for row, measure in zip(table.itertuples(index=False), measures, strict=True)
    ]


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table without empty columns, and without the column `run` if there is only one run."""
    kept = [name for name in table.columns if table[name].notna().any() and (table[name].astype("string") != "").any()]
    return table[[name for name in kept if name != "run" or table["run"].nunique() > 1]]


def questions(records: Records) -> list[str]:
    """The questions of the studies, each once."""
    return list(dict.fromkeys(study["study"]["question"] for study in records.studies.values()))


def verdicts(contrasts: pd.DataFrame) -> pd.DataFrame:
    """The most important columns of the contrasts, by family."""
    return contrasts.sort_values(["run", "family"], kind="stable")[VERDICTS.split()]


def markdown(records: Records, tables: Titled, limits: Sequence[str], paper: Grid | None, summary: Summary) -> str:
    """The whole report as Markdown. `paper` is the grid of the table `paper`."""
    lines = [f"# {_inline(', '.join(records.runs))}", ""]
    for question in questions(records):
        lines += [_line(question), ""]
    if "contrasts" in tables:
        lines += ["## Summary", "", *(f"- {_line(sentence)}" for sentence in summary.sentences), ""]
        lines += ["## Verdicts", "", *_rows(shown(verdicts(tables["contrasts"][1]))), ""]
        lines += [f"{_line(sentence)}\n" for sentence in (*summary.method, *summary.holds_for)]
    lines += ["## Limits of the evidence", "", *(f"- {_line(sentence)}" for sentence in limits), ""]
    for name, (title, table) in tables.items():
        lines += [f"## {title}", "", *(_grid(paper) if paper and name == "paper" else _rows(shown(table))), ""]
    return "\n".join(lines)


def _rows(table: pd.DataFrame) -> list[str]:
    rows = [headings(table), *cells(table)]
    lines = ["| " + " | ".join(map(_inline, row)) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(table.columns))
    if len(table) > ROWS:
        lines += ["", f"The first {ROWS} of {len(table):,} rows; the others are in tables/."]
    return lines


def _grid(grid: Grid) -> list[str]:
    rows = [[f"**{_inline(each.text)}**" if each.bold else _inline(each.text) for each in row] for row in grid.rows]
    aligned = [" --- " if place < grid.labels else " ---: " for place in range(len(grid.heads))]
    lines = ["| " + " | ".join(row) + " |" for row in [[_inline(head) for head in grid.heads], *rows]]
    lines.insert(1, f"|{'|'.join(aligned)}|")
    return [*lines, *(line for note in grid.notes for line in ("", _line(note)))]


def _inline(text: str) -> str:
    """Text on one line of Markdown, escaped: it cannot be markup, HTML, a link, or the end of a table cell."""
    entities = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\g<0>", entities)


def _line(text: str) -> str:
    """Text as a line that starts a paragraph and no other kind of block."""
    return BLOCK.sub(lambda found: f"\\{found[1]}" if found[1] else f"{found[2]}\\{found[3]}", _inline(text))


def csv(table: pd.DataFrame) -> str:
    """A table as CSV. Text that a spreadsheet would evaluate gets an apostrophe; numbers stay numbers."""
    safe = table.rename(columns=_no_formula)
    for name in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[name]):
            safe[name] = safe[name].map(_no_formula, na_action="ignore")
    return safe.to_csv(index=False)


def _no_formula(text: str) -> str:
    return FORMULA.sub("'", text)


def latex(tables: Titled, paper: Grid | None) -> dict[str, str]:
    """Each table as a `tabular` with booktabs rules, for `\\input` in a paper. `all` is a complete document with all
    tables."""
    tables = {name: each for name, each in tables.items() if name not in NOT_FOR_PAPERS}
    files = {
        name: _tabular(shown(table).drop(columns=LEFT_OUT, errors="ignore")) for name, (_, table) in tables.items()
    }
    if paper:
        files["paper"] = _tabular_of(paper)
    body = "\n".join(
        f"\\section*{{{_escaped(title)}}}\n\\resizebox{{\\textwidth}}{{!}}{{\\input{{{name}.tex}}}}"
        for name, (title, _) in tables.items()
    )
    files["all"] = (
        "% If names are not ASCII, use lualatex instead of pdflatex.\n"
        "\\documentclass{article}\n\\usepackage[margin=2cm]{geometry}\n\\usepackage{booktabs}\n"
        f"\\usepackage{{graphicx}}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    return files


def _tabular(table: pd.DataFrame) -> str:
    numbers = "".join("r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in table.columns)
    return _ruled(numbers, [[_escaped(text) for text in row] for row in [headings(table), *cells(table)]])


def _tabular_of(grid: Grid) -> str:
    """The grid, with its notes in separate rows that are wrapped to the width of the columns."""
    texts = [grid.heads, *([each.text for each in row] for row in grid.rows)]
    width = sum(max(map(len, column)) + 2 for column in zip(*texts, strict=True))
    notes = [_escaped(line) for note in grid.notes for line in textwrap.wrap(note, width)]
    below = [f"\\multicolumn{{{len(grid.heads)}}}{{l}}{{\\footnotesize {line}}} \\\\" for line in notes]
    rows = [[f"\\textbf{{{_escaped(each.text)}}}" if each.bold else _escaped(each.text) for each in row]
            for row in grid.rows]  # fmt: skip
    columns = "l" * grid.labels + "r" * (len(grid.heads) - grid.labels)
    return _ruled(columns, [[_escaped(head) for head in grid.heads], *rows], below)


def _ruled(columns: str, rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    head, *body = (" & ".join(row) + " \\\\" for row in rows)
    begin = f"% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{columns}}}"
    return "\n".join([begin, "\\toprule", head, "\\midrule", *body, "\\bottomrule", *below, "\\end{tabular}", ""])


def _escaped(text: str) -> str:
    """Text escaped for LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$",
               ">": "$>$", "|": "$|$"}  # fmt: skip
    special |= {
        "[": "{[}",
        "*": "{*}",
        "\n": " ",
        "\t": " ",
        "±": "$\\pm$",
    }  # after `\\`, plain `[` or `*` would be its arguments
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
