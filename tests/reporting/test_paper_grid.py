"""A paper's table as it is printed: cell texts, bold cells and notes, in Markdown, LaTeX, CSV and on the page."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, strategies as st
from markdown_it import MarkdownIt

from tune_kd.analysis.accuracy import CONTEXT
from tune_kd.analysis.paper import COLUMNS
from tune_kd.records.reader import Records, load
from tune_kd.records.tables import typed
from tune_kd.reporting import report as reporting, texts
from tune_kd.reporting.paper import BOLD, Cell, Grid, grid


@pytest.fixture(scope="module")
def records(finished: Path) -> Records:
    return load(finished)


def table(*changes: dict[str, Any], **everywhere: Any) -> pd.DataFrame:
    """Cells of a table: by default one row with a control and `logit`, which has the verdict better."""
    whole = {
        "run": "r", "student": "resnet18", "teacher": "resnet50", "stem": "cifar", "weights": "none", "width": 1.0,
        "n": 5, "mean": 0.9486, "sd": 0.0014, "teacher_n": 1, "teacher_accuracy": 0.9536,
    }  # fmt: skip
    default = ({"column": "none"}, {"column": "logit", "mean": 0.9491, "sd": 0.0008, "verdict": "better"})
    rows = [dict.fromkeys(COLUMNS.split()) | whole | everywhere | each for each in changes or default]
    return typed(rows, COLUMNS)


def shown(made: Grid) -> list[list[str]]:
    return [made.heads, *([each.text for each in row] for row in made.rows)]


def test_a_cell_has_the_mean_and_deviation_in_percent_and_n_is_a_column(records: Records) -> None:
    made = grid(table(), records)
    assert shown(made) == [
        ["student", "teacher", "teacher's accuracy", "none", "logit", "n"],
        ["resnet18", "resnet50", "95.36", "94.86 ± 0.14", "94.91 ± 0.08", "5"],
    ]
    assert [each for row in made.rows for each in row if each.bold] == [Cell("94.91 ± 0.08", bold=True)]


@pytest.mark.parametrize("verdict", ["worse", "equivalent", "inconclusive", "not judged", None])
def test_only_a_better_verdict_is_bold(records: Records, verdict: str | None) -> None:
    made = grid(table({"column": "none"}, {"column": "logit", "mean": 0.99, "verdict": verdict}), records)
    assert not any(each.bold for row in made.rows for each in row)


def test_n_is_in_the_cells_if_it_differs_within_a_row(records: Records) -> None:
    made = grid(table({"column": "none"}, {"column": "logit", "n": 4}, {"column": "feature", "n": 0}), records)
    assert shown(made)[1][3:] == ["94.86 ± 0.14 (n = 5)", "94.86 ± 0.14 (n = 4)", ""]
    assert made.heads[-1] == "feature"


def test_one_seed_has_no_deviation_and_several_teachers_have_one(records: Records) -> None:
    made = grid(table({"column": "none", "n": 1, "sd": None}, teacher_n=3, teacher_accuracy_sd=0.0004), records)
    assert shown(made)[1][2:] == ["95.36 ± 0.04 (n = 3)", "94.86", "1"]


def test_rows_are_labelled_by_varying_settings_and_a_note_lists_the_constant_ones(records: Records) -> None:
    made = grid(table({"column": "none", "stem": "imagenet", "width": 0.125}, {"column": "none"}), records)
    assert (made.heads[:2], made.labels) == (["stem", "width"], 2)
    assert [row[:2] for row in shown(made)[1:]] == [["imagenet", "0.125"], ["cifar", "1"]]
    assert "All rows: student resnet18, teacher resnet50, weights none." in made.notes


def test_the_notes_explain_the_numbers(records: Records) -> None:
    first, *_, last = grid(table(), records).notes
    assert "sample standard deviation over n seeds" in first and "best validation accuracy" in first
    assert "on 20 test images" in first
    assert last == BOLD
    whole = replace(records, studies={"r": {"study": {"data": {"name": "cifar10", "test": None}}}})
    assert "on 10,000 test images" in grid(table(), whole).notes[0]


NAMES = st.text(st.sampled_from("<>&[]()!|\\`*_~#-+=1. $:/aw{}^%±")).filter(str.strip) | st.sampled_from(
    ["<script>alert(1)</script>", "\\input{/etc/passwd}", "**a**", "a|b", "www.x.org", "=1+1", "a & b \\\\ c"]
)


@given(stem=NAMES, column=NAMES)
def test_names_are_shown_literally_in_markdown_and_latex(stem: str, column: str) -> None:
    made = Grid(["stem", column], [[Cell(stem), Cell(column, bold=True)]], [column], 1)
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = [each for token in parser.parse("\n".join(texts._grid(made))) for each in (token, *(token.children or ()))]
    kinds = {each.type.removesuffix("_open").removesuffix("_close") for each in tokens}
    assert kinds <= {"table", "thead", "tbody", "tr", "th", "td", "paragraph", "strong", "inline", "text"}
    plain = " ".join(column.split())
    found = "|".join(each.content for each in tokens if each.type == "text" and each.content)
    assert found == "|".join(["stem", plain, " ".join(stem.split()), plain, plain])
    body = texts._tabular_of(made).split("\\midrule\n")[1].splitlines()[0].removesuffix(r" \\")
    left = re.sub(r"\\text(backslash|asciicircum|asciitilde)\{\}|\\[&%$#_{}]|\{[*[]\}|\$(<|>|\||\\pm)\$", "", body)
    assert left.count("&") == 1 and left.count("\\textbf{") == 1 and left.endswith("}")
    assert not set(left.replace("\\textbf{", "").removesuffix("}").replace(" & ", "")) & set("\\{}$&#^_%~[*")


def test_latex_has_rules_bold_and_notes_no_wider_than_the_columns(records: Records) -> None:
    text = texts._tabular_of(grid(table(), records))
    assert "\\begin{tabular}{llrrrr}" in text
    assert "resnet18 & resnet50 & 95.36 & 94.86 $\\pm$ 0.14 & \\textbf{94.91 $\\pm$ 0.08} & 5 \\\\" in text
    assert [text.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 1, 1]
    notes = re.findall(r"\\multicolumn\{6\}\{l\}\{\\footnotesize (.*)\} \\\\", text)
    row = "resnet18  resnet50  teacher's accuracy  94.86 ± 0.14  94.91 ± 0.08  n  "
    assert len(notes) > 3 and max(len(line.replace("$\\pm$", "±")) for line in notes) <= len(row)


def test_the_report_has_the_paper_table_in_markdown_csv_and_latex(finished: Path, tmp_path: Path) -> None:
    reporting.report(load(finished), tmp_path, ["html", "md", "csv", "tex"])
    read = pd.read_csv(tmp_path / "tables" / "paper.csv", keep_default_na=False, na_values=[""])
    assert read["column"].tolist() == ["none", "logit T=2", "logit T=4", "feature"] * 2
    assert read[["mean", "sd", "n"]].notna().all(axis=None) and read["mean"].dtype == "float64"
    assert set(CONTEXT) | {"verdict", "teacher_accuracy"} <= set(read)
    title = reporting.TABLES["paper"][0]
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[lines.index(f"## {title}") + 2].startswith("| stem | teacher's accuracy | none | logit T=2 |")
    assert "\\textbf" not in (tmp_path / "tables" / "arms.tex").read_text()
    assert "multicolumn" in (tmp_path / "tables" / "paper.tex").read_text()
    assert "\\input{paper.tex}" in (tmp_path / "tables" / "all.tex").read_text()


def test_a_report_on_tables_without_a_study_has_no_paper_table(tmp_path: Path) -> None:
    trials = [{"trial_id": f"{arm}{seed}", "arm": arm, "seed": seed, "test_accuracy_best": 0.5}
              for arm in ("a", "b") for seed in (1, 2)]  # fmt: skip
    pd.DataFrame(trials).to_parquet(tmp_path / "trials.parquet")
    reporting.report(load(tmp_path), tmp_path / "report", ["html", "md", "csv", "tex"])
    assert not (tmp_path / "report" / "tables" / "paper.csv").exists()
    assert reporting.TABLES["paper"][0] not in (tmp_path / "report" / "report.html").read_text()


def test_rows_of_several_measures_have_the_unit_beside_the_measure() -> None:
    rows = [
        {"measure": "agreement", "n": 3, "estimate": 0.0123, "low": -0.01, "p": 0.5},
        {"measure": "kl_t4", "n": 3, "estimate": -0.00004, "low": -0.0123, "p": 0.0001},
    ]
    made = pd.DataFrame(rows)
    assert texts.headings(made) == ["measure", "n", "estimate", "low", "p"]
    assert texts.cells(made) == [
        ["agreement (points)", "3", "+1.23", "-1.00", "0.500"],
        ["kl t4 (nats)", "3", "+0.0000", "-0.0123", "< 0.001"],
    ]
    assert texts.headings(made.drop(columns="measure"))[1:3] == ["estimate (points)", "low (points)"]
