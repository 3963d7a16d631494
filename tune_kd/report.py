"""From a run's tables to results: arms, contrasts, and the files in `report/`."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_kd import stats
from tune_kd.records import Records
from tune_kd.storage import publish

if TYPE_CHECKING:
    import pandas as pd

HEADLINE = "test_accuracy_best"


def confirmed(records: Records) -> "pd.DataFrame":
    """Test accuracy by arm (columns) and seed (rows), of confirmed trials that ran to their end."""
    trials = records.trials
    ended = trials[(trials["phase"] == "confirm") & (trials["status"] == "completed")]
    return ended.pivot(index="seed", columns="arm", values=HEADLINE)


def arms(records: Records) -> "pd.DataFrame":
    """A row an arm: n, mean, sd, low, high of its confirmed test accuracy, and a note where seeds are missing."""
    import pandas as pd

    values = confirmed(records)
    rows: list[dict[str, Any]] = []
    for arm in records.study["arms"]:
        name = arm["name"]
        planned = records.trials[(records.trials["phase"] == "confirm") & (records.trials["arm"] == name)]
        described = stats.summary(values[name].dropna().tolist() if name in values else [])
        statuses = set(planned["status"]) - {"completed"}
        note = "" if not statuses else "stopped in the screen" if statuses == {"stopped"} else "incomplete"
        rows.append(
            {
                "arm": name,
                "role": arm["role"],
                "n": described.n,
                "planned": len(planned),
                "mean": described.mean,
                "sd": described.sd,
                "low": described.low,
                "high": described.high,
                "note": note,
            }
        )
    return pd.DataFrame(rows).astype(dict.fromkeys(("mean", "sd", "low", "high"), "float64"))


def contrasts(records: Records) -> "pd.DataFrame":
    """A row for each contrast that the study fixed: its estimate over the seeds that have all of its arms.

    Differences are accuracies (0.001 is 0.1 points). A contrast with an arm that the screen stopped has no estimate.
    Holm is over all contrasts that were fixed, those without a p value among them: a family that shrinks with what
    the data did would make its p values too small.
    """
    import pandas as pd

    values = confirmed(records)
    rows: list[dict[str, Any]] = []
    for contrast in records.study["contrasts"]:
        weights = dict(contrast["weights"])
        missing = [arm for arm in weights if arm not in values]
        paired: list[float] = []
        if not missing:
            paired = sum(weight * values[arm] for arm, weight in weights.items()).dropna().tolist()
        rows.append({"contrast": contrast["name"], "kind": contrast["kind"]} | vars(stats.differences(paired)))
    columns = ["contrast", "kind", *(field.name for field in fields(stats.Paired))]
    table = pd.DataFrame(rows, columns=columns)
    numbers = ["estimate", "sd", "low", "high", "p", "p_exact"]
    table[numbers] = table[numbers].astype("float64")
    adjusted = pd.Series(stats.holm(table["p"].fillna(1.0).tolist()), index=table.index, dtype="float64")
    table["p_holm"] = adjusted.where(table["p"].notna())
    table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    return table


def _verdict(row: Mapping[Any, Any]) -> str:
    if row["n"] == 0:
        return "not judged"
    if not row["p_holm"] < 0.05:
        return "inconclusive"
    return "better" if row["estimate"] > 0 else "worse"


def write(run: Path, records: Records) -> Path:
    """Write `report/report.md` and `report/tables/*.csv`; returns the folder."""
    folder = run / "report"
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    tables = {"arms": arms(records), "contrasts": contrasts(records)}
    for name, table in tables.items():
        publish(folder / "tables" / f"{name}.csv", table.to_csv(index=False).encode())
    study = records.study["study"]
    teachers = len(study["teacher_seeds"])
    text = [
        f"# {records.study['run']}",
        "",
        study["question"],
        "",
        f"Data {records.study['data']['name']}, scale {study['scale']}, {len(records.trials)} trials. "
        f"Claims rest on the confirmed seeds alone{', given one teacher' if teachers == 1 else ''}; "
        "p values are of paired t tests, adjusted by Holm over all contrasts. Accuracies are fractions.",
        "",
        "## Contrasts",
        "",
        *_markdown(tables["contrasts"]),
        "",
        "## Arms",
        "",
        *_markdown(tables["arms"]),
        "",
    ]
    publish(folder / "report.md", "\n".join(text).encode())
    return folder


def _markdown(table: "pd.DataFrame") -> list[str]:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if value != value else f"{value:.4f}"
        return str(value)

    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    return lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in table.to_numpy().tolist()]
