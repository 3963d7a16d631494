"""The report as one HTML file. It opens from disk and makes no requests."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined, select_autoescape

from tune_kd.analysis.summary import Summary
from tune_kd.records.reader import Records
from tune_kd.reporting import figures
from tune_kd.reporting.paper import Grid
from tune_kd.reporting.texts import ROWS, Titled, cells, headings, questions, shown, verdicts

TEMPLATE = Path(__file__).with_name("page.html")
VERDICTS = ("better", "worse", "equivalent", "inconclusive", "not judged")
AT_THE_END = ("decisions", "rungs", "provenance")  # of the page


def html(
    records: Records,
    tables: Titled,
    pictures: Sequence[figures.Picture],
    limits: Sequence[str],
    paper: Grid | None,
    summary: Summary,
) -> str:
    """The whole page. It shows the first `ROWS` rows of a long table, with a note. `paper` is the grid of the table
    `paper`."""
    environment = Environment(autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True)
    source = TEMPLATE.read_text(encoding="utf-8")
    found = tables["contrasts"][1]["verdict"].tolist() if "contrasts" in tables else []
    return environment.from_string(source).render(
        policy=_policy(source),
        title=", ".join(records.runs),
        questions=questions(records),
        counts={name: count for name in VERDICTS if (count := found.count(name))},
        verdicts=None if not found else _table("", verdicts(tables["contrasts"][1])),
        summary=summary,
        fixed=all(study.get("contrasts_sha256") for study in records.studies.values()),
        contrasts=None if not found else _table(*tables["contrasts"]),
        paper=paper,
        paper_title="" if paper is None else tables["paper"][0],
        tables={name: _table(*tables[name]) for name in tables if name not in ("contrasts", "paper", *AT_THE_END)},
        checks={name: _table(*tables[name]) for name in AT_THE_END if name in tables},
        pictures=[_picture(each) for each in pictures],
        limits=limits,
        trials=len(records.trials),
        rows=ROWS,
    )


def _policy(source: str) -> str:
    """The page's content security policy (https://www.w3.org/TR/CSP3).

    It allows our style and script, by their hashes, and embedded pictures. It allows no connections and no foreign
    script, even if text from records were parsed as HTML.
    """
    ours = {}
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        ours[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    allowed = "".join(f" {tag}-src 'sha256-{digest}';" for tag, digest in ours.items())
    return f"default-src 'none'; img-src data:;{allowed} base-uri 'none'; form-action 'none'"


def _table(title: str, table: pd.DataFrame) -> dict[str, Any]:
    """A table's cells as text, each with a sort key."""
    table = shown(table).drop(columns=["words"], errors="ignore")
    numeric = [bool(pd.api.types.is_numeric_dtype(table[name])) for name in table.columns]
    rows = [
        [{"text": text, "key": "" if pd.isna(value) else value, "number": number,
          "mark": value.replace(" ", "-") if name == "verdict" and value in VERDICTS else ""}
         for name, text, value, number in zip(table.columns, texts, row, numeric, strict=True)]
         for texts, row in zip(cells(table), table.head(ROWS).itertuples(index=False), strict=True)
    ]  # fmt: skip
    heads = [{"text": text, "number": number} for text, number in zip(headings(table), numeric, strict=True)]
    return {"title": title, "heads": heads, "rows": rows, "total": len(table)}


def _picture(picture: figures.Picture) -> dict[str, str]:
    drawn = base64.b64encode(figures.rendered(picture.figure, "svg")).decode()
    return {"source": f"data:image/svg+xml;base64,{drawn}", "caption": picture.caption, "alt": picture.alternative}
