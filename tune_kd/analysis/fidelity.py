"""Contrasts of likeness to the teacher and of calibration, judged like those of accuracy.

A student may gain in likeness without gaining in accuracy, and the reverse.

A control has no teacher, so contrasts with a control cover calibration only. The likeness between a control and the
teacher of the arms compared with it is unknown: the control starts before that teacher is trained, its trial names no
teacher, and its weights are removed when it ends. A study that needs this baseline declares the level 0 of `alpha`: a
`logit` arm with alpha 0 has a teacher and trains exactly as the control does, on a CPU bit for bit.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from tune_kd.analysis import verdicts
from tune_kd.analysis.accuracy import confirmed_trials
from tune_kd.analysis.block_model import Estimates, estimate, joined
from tune_kd.analysis.evidence import arrays, looks_so_far, reasons
from tune_kd.analysis.statistics import MARGIN
from tune_kd.analysis.verdicts import ALPHA, points
from tune_kd.records.reader import Records
from tune_kd.records.tables import as_typed, typed

MEASURES: Final = ("agreement", "kl_t1", "kl_t4", "ece")
LIKENESS = {"agreement": "agreement", "kl_t1": "KL divergence at T=1", "kl_t4": "KL divergence at T=4"}
GAINS = {"closer to teacher": "better", "further from teacher": "worse"}  # verdicts on likeness: on accuracy
COLUMNS = "run contrast measure verdict n planned estimate low high error df p_holm p note"


def fidelity(records: Records) -> pd.DataFrame:
    """One row per measure and declared effect: the difference in `agreement`, `kl_t1`, `kl_t4` and `ece`.

    Agreement and ECE are fractions, KL is in nats. Each student is compared with its own teacher. With several
    teachers, its values are means over them, and the rows hold for these teachers. The block model estimates each
    measure, as it does accuracy in `contrasts`. `p_holm` is adjusted over all rows of a run. The rows are a separate,
    exploratory family, so they cost the verdicts on accuracy no power. A row without data stays in the family, without
    a p value. There are no rows of agreement and KL if an arm has no teacher.
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
    """Pairs of a measure and a declared effect whose arms all have the measure."""
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
    """The estimates at each look, in the order of `asked`, which is grouped by measure."""
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
    """The direction of a difference, tested at a level of 0.05 over the family and all looks."""
    if pd.isna(row["p_holm"]):
        return "not judged"
    if row["p_holm"] >= ALPHA:
        return "no difference found"
    good = row["estimate"] > 0 if row["measure"] == "agreement" else row["estimate"] < 0
    if row["measure"] == "ece":
        return "better calibrated" if good else "worse calibrated"
    return "closer to teacher" if good else "further from teacher"


def _note(row: Any) -> str:
    if row["n"] < row["planned"]:
        return f"{row['planned'] - row['n']} of {row['planned']} seeds are missing"
    return "no estimate of its spread" if pd.isna(row["p"]) else ""


def sentence(records: Records, verdicts_on_accuracy: pd.DataFrame) -> str | None:
    """A sentence on whether a student becomes more like its teacher without becoming more accurate, with figures.

    A student counts as more like its teacher than another if one measure of likeness says so and none says the
    opposite; KL at two temperatures may disagree. `verdicts_on_accuracy` are the `contrasts` of the records. Returns
    None if no contrast is judged on both likeness and accuracy, for example if all contrasts are with a control.
    """
    likeness = fidelity(records)
    likeness = likeness[likeness["measure"].isin(list(LIKENESS)) & (likeness["verdict"] != "not judged")]
    both = likeness.merge(verdicts_on_accuracy, on=["run", "contrast"], suffixes=("", "_accuracy"))
    both = both[both["verdict_accuracy"] != "not judged"]
    compared = [group.sort_values("p_holm") for _, group in both.groupby(["run", "contrast"], sort=False)]
    if not compared:
        return None
    alike = [group.iloc[0] for group in compared if len(set(group["verdict"]) & set(GAINS)) == 1]
    without = [row for row in alike if row["verdict_accuracy"] != GAINS[row["verdict"]]]
    several = f"{len(compared)} comparison{'s' if len(compared) > 1 else ''} of distilled students"
    closer = f"of {several}, one student is closer to its teacher, in agreement or KL divergence,"
    if without:
        shown, found = without, f"in {len(without)} {closer} but is not found to be more accurate"
    elif alike:
        shown, found = alike, f"in {len(alike)} {closer} and is also more accurate"
    else:
        shown = [group.iloc[0] for group in compared]
        found = f"in {several}, no student is found to be closer to its teacher"
    clearest = min(shown, key=lambda row: float(row["p_holm"]))
    name = f"{clearest['run']}: {clearest['contrast']}" if len(records.runs) > 1 else clearest["contrast"]
    which = f", {clearest['verdict']}" if alike else ""
    return (
        f"Exploratory: {found}. The clearest case is {name}{which} "
        f"({LIKENESS[clearest['measure']]} {_figures(clearest)}; accuracy {_figures(clearest, '_accuracy')}; "
        f"{clearest['n']} seeds)."
    )


def _figures(row: Any, suffix: str = "") -> str:
    """An estimate with its unit and interval, for the row's measure or (by `suffix`) for accuracy."""
    ends = [row[f"{name}{suffix}"] for name in ("estimate", "low", "high")]
    in_nats = row["measure"].startswith("kl") and not suffix
    value, low, high = (f"{round(end, 4) + 0.0:+.4f}" if in_nats else points(end) for end in ends)
    interval = "" if pd.isna(ends[1]) else f", 95 % interval {low} to {high}"
    return f"{value} {'nats' if in_nats else 'points'}{interval}"
