"""Likeness to the teacher, and calibration, contrasted as accuracy is: a student may gain one without the other.

A control has no teacher, so contrasts with one are of calibration alone. How alike a control is to the teacher of the
arms that are compared with it is not known: it starts before that teacher is trained, its trial does not name one, and
its weights are removed when it ends. A study that needs this baseline declares the level 0 of `alpha`: a `logit` arm
with alpha 0 has a teacher and trains as the control does, on a CPU to the bit.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from tune_kd.analysis import verdicts
from tune_kd.analysis.accuracy import confirmed_trials
from tune_kd.analysis.block_model import Estimates, estimate, joined
from tune_kd.analysis.contrasts import arrays, contrasts, looks_so_far, reasons
from tune_kd.analysis.statistics import MARGIN
from tune_kd.analysis.verdicts import ALPHA, points
from tune_kd.records.reader import Records
from tune_kd.records.tables import as_typed, typed

MEASURES: Final = ("agreement", "kl_t1", "kl_t4", "ece")
COLUMNS = "run contrast measure verdict n planned estimate low high error df p_holm p note"


def fidelity(records: Records) -> pd.DataFrame:
    """One row per measure and declared effect: the difference in `agreement`, `kl_t1`, `kl_t4` and `ece`.

    Agreement and ECE are fractions, KL is in nats; each student is compared with its own teacher. Each measure is
    estimated by the block model, as accuracy is in `contrasts`. `p_holm` is adjusted over all rows of a run. They are a
    family of their own: exploratory beside the verdicts on accuracy, from which they take no power. A row without data
    stays in the family, without a p value. Rows of agreement and KL are left out where an arm has no teacher.
    """
    found = [_fidelity_of(records.of(run)) for run in records.runs if run in records.studies]
    return pd.concat(found, ignore_index=True) if found else typed([], COLUMNS)


def _fidelity_of(records: Records) -> pd.DataFrame:
    (run,), asked = records.runs, _asked(records)
    if not asked:
        return typed([], COLUMNS)
    levels, seeds, counts = looks_so_far(records)
    notes = reasons(records, seeds, [contrast for _, contrast in asked])
    looks = _estimates(records, seeds, counts, asked, notes)
    last = looks[-1]
    columns: dict[str, Any] = {
        "run": run,
        "contrast": [contrast["name"] for _, contrast in asked],
        "measure": [measure for measure, _ in asked],
        "n": last.pairs,
        "planned": len(seeds),
        "estimate": last.value,
        "error": last.error,
        "df": np.where(np.isnan(last.error), np.nan, last.df),
        "p": last.two_sided(),
        "p_holm": verdicts.adjusted(looks, levels, ["fidelity"] * len(asked), MARGIN)[0],
    }
    columns["low"], columns["high"] = last.interval(1 - levels[-1])
    table = pd.DataFrame(columns)
    rows = table.to_dict("records")
    table["verdict"] = [_verdict(row) for row in rows]
    table["note"] = [note or _note(row) for note, row in zip(notes, rows, strict=True)]
    return as_typed(table, COLUMNS)


def _asked(records: Records) -> list[tuple[str, Any]]:
    """Each measure with each declared effect whose arms all have it."""
    trials = confirmed_trials(records)
    taught = set(trials.loc[trials["teacher_id"].notna(), "arm"])
    return [
        (measure, contrast)
        for measure in MEASURES
        for contrast in records.study["contrasts"]
        if contrast["kind"] == "effect" and (measure == "ece" or all(arm in taught for arm, _ in contrast["weights"]))
    ]


def _estimates(
    records: Records,
    seeds: Sequence[int],
    counts: Sequence[int],
    asked: Sequence[tuple[str, Any]],
    notes: Sequence[str],
) -> list[Estimates]:
    """The estimates at each look, in the order of `asked`, whose measures come one after another."""
    parts = []
    for measure in dict.fromkeys(measure for measure, _ in asked):
        places = [place for place, (name, _) in enumerate(asked) if name == measure]
        values, strata, weights = arrays(records, seeds, [asked[place][1] for place in places], measure)
        weights[[bool(notes[place]) for place in places]] = 0.0
        parts.append((values, strata, weights))
    return [
        joined([estimate(values[:, :count], strata, weights) for values, strata, weights in parts]) for count in counts
    ]


def _verdict(row: Any) -> str:
    """The direction of a difference, at a level of 0.05 over the family and all looks."""
    if pd.isna(row["p_holm"]):
        return "not judged"
    if row["p_holm"] >= ALPHA:
        return "no difference found"
    good = row["estimate"] > 0 if row["measure"] == "agreement" else row["estimate"] < 0
    if row["measure"] == "ece":
        return "better calibrated" if good else "worse calibrated"
    return "more alike" if good else "less alike"


def _note(row: Any) -> str:
    if row["n"] < row["planned"]:
        return f"{row['planned'] - row['n']} of {row['planned']} seeds are missing"
    return "no spread to judge it by" if pd.isna(row["p"]) else ""


def sentence(records: Records) -> str | None:
    """Whether a student becomes more like its teacher where it does not become more accurate, with figures.

    `None` if no contrast is judged on both agreement and accuracy, such as where all of them are with a control.
    """
    likeness = fidelity(records)
    likeness = likeness[(likeness["measure"] == "agreement") & (likeness["verdict"] != "not judged")]
    both = likeness.merge(contrasts(records), on=["run", "contrast"], suffixes=("", "_accuracy"))
    both = both[both["verdict_accuracy"] != "not judged"]
    if both.empty:
        return None
    alike = both[both["verdict"] != "no difference found"]
    gained = alike["verdict_accuracy"] == alike["estimate"].gt(0).map({True: "better", False: "worse"})
    without = alike[~gained]
    shown, what = without, "one agrees with its teacher more often and is not found to be more accurate"
    if without.empty:
        shown, what = alike, "one agrees with its teacher more often, and it is the more accurate one"
    if alike.empty:
        shown, what = both, "one is found to agree with its teacher more often"
    count = f"{len(without if len(without) else alike)} of {len(both)} comparison{'s' if len(both) > 1 else ''}"
    row = max(shown.to_dict("records"), key=lambda each: abs(each["estimate"]))
    name = f"{row['run']}: {row['contrast']}" if len(records.runs) > 1 else row["contrast"]
    return (
        f"In {count} of distilled students, {what} (exploratory); the largest such difference is {name}, with "
        f"agreement {_figures(row)} and accuracy {_figures(row, '_accuracy')}, over {row['n']} seeds."
    )


def _figures(row: Any, suffix: str = "") -> str:
    value, low, high = (points(row[f"{name}{suffix}"]) for name in ("estimate", "low", "high"))
    interval = "" if pd.isna(row[f"low{suffix}"]) else f" (95 % interval {low} to {high})"
    return f"{value} points{interval}"
