"""Turn estimates into verdicts: p values adjusted over families and looks, ruled-out differences, and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis.block_model import NO_SPREAD, Array, Estimates
from tune_kd.analysis.statistics import holm

ALPHA = 0.05
EARLIER = "as found at an earlier look"


def adjusted(
    looks: Sequence[Estimates], levels: Sequence[float], families: Sequence[str], margin: float
) -> tuple[Array, Array]:
    """p values [..., C] of no difference, and of a difference of at least `margin`. Compare them with 0.05.

    They are adjusted by Holm within each of the `families` [C], and scaled from the look's share of 0.05 to 0.05. With
    several looks, each is the smallest over the looks, so a finding stands at later looks. A finding lapses if the
    estimate has since changed sign, become zero, or left the margin.
    """
    last, found = looks[-1], []
    for estimates, level in zip(looks, levels, strict=True):
        both = [estimates.two_sided(), estimates.equivalence(margin)]
        for family in dict.fromkeys(families):
            theirs = [place for place, name in enumerate(families) if name == family]
            for p in both:
                p[..., theirs] = holm(p[..., theirs])
        p, close = (each * ALPHA / level for each in both)
        turned = (estimates.value * last.value <= 0) | (np.abs(last.value) <= NO_SPREAD)
        if estimates is not last:
            p = np.where(turned & ~np.isnan(p), 1.0, p)
            close = np.where((np.abs(last.value) >= margin) & ~np.isnan(close), 1.0, close)
        found.append((p, close))
    smallest = [np.fmin.reduce([each[which] for each in found]) for which in (0, 1)]
    return np.minimum(smallest[0], 1.0), np.minimum(smallest[1], 1.0)


def verdict(row: Mapping[Any, Any]) -> str:
    """better, worse, equivalent, inconclusive or not judged, at a level of 0.05 over its family and all looks."""
    if row["n"] == 0:
        return "not judged"
    if row["p_holm"] < ALPHA:
        return "better" if row["estimate"] > 0 else "worse"
    return "equivalent" if row["p_equivalence"] < ALPHA else "inconclusive"


def words(row: Mapping[Any, Any], margin: float) -> str:
    """The row as a sentence. It begins with the verdict; if that is inconclusive, it ends with the ruled-out
    differences."""
    if row["verdict"] == "not judged":
        return f"not judged: {row['note']}"
    found = evidence(row)
    close = f"the difference is less than {100 * margin:g} points"
    if row["verdict"] == "equivalent":
        return f"equivalent: {close} ({found})"
    if row["verdict"] != "inconclusive":
        return f"{row['verdict']}: {found}{f'; yet {close}' if row['p_equivalence'] < ALPHA else ''}"
    if reason := _without_interval(row):
        return f"inconclusive, since {reason}: {found}"
    return f"inconclusive: {found}; rules out {rules_out(row)}"


def evidence(row: Mapping[Any, Any]) -> str:
    """Estimate, number of seeds and interval: `+0.31 points over 5 seeds, 95 % interval +0.02 to +0.60`."""
    found = f"{points(row['estimate'])} points over {seeds(row)}"
    if has_interval(row):
        found += f", 95 % interval {points(row['low'])} to {points(row['high'])}"
    return f"{found}, {EARLIER}" if EARLIER in row["note"] else found


def seeds(row: Mapping[Any, Any]) -> str:
    """`5 seeds`, or `4 of 5 seeds`; for a verdict over several teachers, `5 seeds and 3 teachers`."""
    said = f"{row['n']} seed{'s' if row['n'] > 1 else ''}"
    if row["n"] < row["planned"]:
        said = f"{row['n']} of {row['planned']} seeds"
    if not pd.isna(row.get("teachers")):
        said += f" and {row['teachers']} teacher{'s' if row['teachers'] > 1 else ''}"
    return said


def has_interval(row: Mapping[Any, Any]) -> bool:
    return not pd.isna(row["low"]) and row["error"] > NO_SPREAD


def rules_out(row: Mapping[Any, Any]) -> str:
    """The differences outside the 95 % interval of an inconclusive contrast: `gains above 0.21 points and all losses`.

    Empty for other verdicts, and without an interval.
    """
    if row["verdict"] != "inconclusive" or _without_interval(row):
        return ""
    return " and ".join(_beyond(what, end) for what, end in _ends(row))


def gains_ruled_out(row: Mapping[Any, Any]) -> str:
    """The first half of `rules_out`: `gains above 0.21 points`, or `all gains`."""
    return rules_out(row).partition(" and ")[0]


def _without_interval(row: Mapping[Any, Any]) -> str:
    """The reason why a contrast has no interval; empty if it has one."""
    if row["n"] == 1:
        return "one seed gives no estimate of spread"
    if not pd.isna(count := row.get("teachers")) and count == 1:
        return "one teacher gives no estimate of the spread between teachers"
    return "" if has_interval(row) else "there is no estimate of its spread"


def _ends(row: Mapping[Any, Any]) -> list[tuple[str, float]]:
    """The names of positive and negative differences, each with the end of the interval on that side.

    A moderation has increases and decreases, since an effect can increase and still be a loss.
    """
    up, down = ("increases", "decreases") if row.get("kind") == "moderation" else ("gains", "losses")
    return [(up, row["high"]), (down, -row["low"])]


def _beyond(what: str, end: float) -> str:
    return f"{what} above {100 * end:.2f} points" if end >= 0 else f"all {what}"


def points(difference: float) -> str:
    """A signed difference in points; +0.00 if it rounds to zero."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"
