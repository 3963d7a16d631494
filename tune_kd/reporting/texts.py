"""Tables as Markdown, LaTeX (with booktabs) and CSV.

Text from records is escaped in each: it is never markup, a command, or a formula.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tune_kd.analysis import summary
from tune_kd.records.reader import Records

IN_POINTS = (
    "estimate", "sd", "low", "high", "mean", "control", "gap", "gain", "teacher_accuracy", "val_accuracy_best",
    "test_accuracy", "test_accuracy_best", "agreement", "ece", "target", "sd_teacher", "sd_seed", "sd_rest",
)  # fmt: skip
"""Columns of fractions, shown in points (hundredths)."""
NOT_FOR_PAPERS = ("provenance", "differences")
LEFT_OUT = ["words", "note", "kind", "planned", "smallest_exact_p", "pairs_needed"]  # of a table in a paper
VERDICTS = "run family contrast verdict estimate low high n p_holm rules_out note"
ROWS = 200  # shown of a table; CSV files have all
FORMULA = re.compile(r"(?:^|(?<=[;\t\r\n]))(?=[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")
"""Where a spreadsheet may see a formula: at the start of a cell, or after a character that may end one."""
MARKUP = re.compile(
    r"[\\`*\[\]|~$]"  # of Markdown, and of GitHub's tables and formulas
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # inside a word it is not emphasis
    r"|:(?=//)|(?<=[wW]{3})\."  # GitHub turns addresses into links
)
BLOCK = re.compile(r"^(?:([#+=-])|(\d+)([.)]))")  # starts a heading, a rule, or a list item

Titled = Mapping[str, tuple[str, pd.DataFrame]]


def cell(name: str, value: Any) -> str:
    """A value as text: fractions in points, p values to three digits, empty for None and NaN."""
    if value is None or value is pd.NA or value != value:
        return ""
    if isinstance(value, float):
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
    unit = " (points)" if name.removesuffix("_sd") in IN_POINTS else ""
    return name.replace("_", " ") + unit


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table without empty columns, and without the column `run` if there is only one."""
    kept = [name for name in table.columns if table[name].notna().any() and (table[name].astype("string") != "").any()]
    return table[[name for name in kept if name != "run" or table["run"].nunique() > 1]]


def questions(records: Records) -> list[str]:
    """The questions of the studies, each once."""
    return list(dict.fromkeys(study["study"]["question"] for study in records.studies.values()))


def verdicts(contrasts: pd.DataFrame) -> pd.DataFrame:
    """The columns of the contrasts that people read first."""
    return contrasts[VERDICTS.split()]


def markdown(records: Records, tables: Titled, limits: Sequence[str]) -> str:
    """The whole report as Markdown."""
    lines = [f"# {_inline(', '.join(records.runs))}", ""]
    for question in questions(records):
        lines += [_line(question), ""]
    if "contrasts" in tables:
        lines += ["## Summary", "", *(f"- {_line(sentence)}" for sentence in summary.summary(records)), ""]
        lines += ["## Verdicts", "", *_rows(shown(verdicts(tables["contrasts"][1]))), ""]
        lines += [f"{_line(sentence)}\n" for sentence in (*summary.method(records), *summary.holds_for(records))]
    lines += ["## Limits of the evidence", "", *(f"- {_line(sentence)}" for sentence in limits), ""]
    for title, table in tables.values():
        lines += [f"## {title}", "", *_rows(shown(table)), ""]
    return "\n".join(lines)


def _rows(table: pd.DataFrame) -> list[str]:
    names = [str(name) for name in table.columns]
    lines = ["| " + " | ".join(_inline(heading(name)) for name in names) + " |", "|" + " --- |" * len(names)]
    for row in table.head(ROWS).itertuples(index=False):
        cells = (_inline(cell(name, value)) for name, value in zip(names, row, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    if len(table) > ROWS:
        lines += ["", f"The first {ROWS} of {len(table):,} rows; the others are in tables/."]
    return lines


def _inline(text: str) -> str:
    """Text on one line of Markdown, escaped: no markup, HTML, link, or end of a table cell."""
    entities = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\g<0>", entities)


def _line(text: str) -> str:
    """Text as a line that starts a paragraph, and no other block."""
    return BLOCK.sub(lambda found: f"\\{found[1]}" if found[1] else f"{found[2]}\\{found[3]}", _inline(text))


def csv(table: pd.DataFrame) -> str:
    """A table as CSV. Text that a spreadsheet would compute gets an apostrophe; numbers stay numbers."""
    safe = table.rename(columns=_no_formula)
    for name in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[name]):
            safe[name] = safe[name].map(_no_formula, na_action="ignore")
    return safe.to_csv(index=False)


def _no_formula(text: str) -> str:
    return FORMULA.sub("'", text)


def latex(tables: Titled) -> dict[str, str]:
    """Each table as a `tabular` with booktabs rules, for `\\input` in a paper; `all` is a complete document with all of
    them."""
    tables = {name: each for name, each in tables.items() if name not in NOT_FOR_PAPERS}
    files = {
        name: _tabular(shown(table).drop(columns=LEFT_OUT, errors="ignore")) for name, (_, table) in tables.items()
    }
    body = "\n".join(
        f"\\section*{{{_escaped(title)}}}\n\\resizebox{{\\textwidth}}{{!}}{{\\input{{{name}.tex}}}}"
        for name, (title, _) in tables.items()
    )
    files["all"] = (
        "% Where names are not ASCII: lualatex instead of pdflatex.\n"
        "\\documentclass{article}\n\\usepackage[margin=2cm]{geometry}\n\\usepackage{booktabs}\n"
        f"\\usepackage{{graphicx}}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    return files


def _tabular(table: pd.DataFrame) -> str:
    names = [str(name) for name in table.columns]
    numbers = ["r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in names]
    lines = [f"% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{''.join(numbers)}}}", "\\toprule"]
    lines += [" & ".join(_escaped(heading(name)) for name in names) + " \\\\", "\\midrule"]
    for row in table.head(ROWS).itertuples(index=False):
        lines.append(" & ".join(_escaped(cell(name, value)) for name, value in zip(names, row, strict=True)) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _escaped(text: str) -> str:
    """Text escaped for LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "$<$",
               ">": "$>$", "|": "$|$"}  # fmt: skip
    special |= {"[": "{[}", "*": "{*}", "\n": " ", "\t": " "}  # after `\\`, the first two would be its arguments
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
