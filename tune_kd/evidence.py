"""What a finished run leaves for the next plan: how well each epoch foretold the end. Light, since `plan` reads it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_kd.plan import Plan
from tune_kd.schedule import stratum
from tune_kd.storage import publish
from tune_kd.study import Study

if TYPE_CHECKING:
    import pandas as pd

AUDIT = "audit.json"  # in a run's folder


def record(folder: Path, run: str, study: Study, correlations: "pd.DataFrame") -> None:
    """Write a run's `audit.rank_correlations`, of every epoch, with what has to be alike in a run that relies on it."""
    strata: dict[str, dict[str, Any]] = {}
    for row in json.loads(correlations.to_json(orient="records")):
        strata.setdefault(row["stratum"], {})[str(row["epoch"])] = {
            name: row[name] for name in ("n", "rho", "low", "high")
        }
    publish(folder / AUDIT, json.dumps({"run": run, **_alike(study), "strata": strata}, indent=1).encode())


def warnings(plan: Plan, out: Path) -> list[str]:
    """A sentence for each stratum whose grace period is shorter than the newest run under `out` that is like this plan
    supports: where at some epoch from the grace period on the ranks then did not foretell those at the end, since the
    interval of their correlation has zero in it."""
    screen, alike = plan.study.screen, _alike(plan.study)
    if not screen.rungs(plan.study.recipe.epochs):
        return []
    said, found = [], [audit for audit in _audits(out) if {name: audit.get(name) for name in alike} == alike]
    for name in _contested(plan):
        of_stratum = next(((audit["run"], audit["strata"][name]) for audit in found if name in audit["strata"]), None)
        if of_stratum is None:
            continue
        run, epochs = of_stratum
        at = epochs.get(str(screen.grace))
        if at is None or at["low"] is None or screen.grace >= (supported := supported_from(epochs)):
            continue
        later = f"from epoch {supported} on they did" if str(supported) in epochs else "no epoch before the last did"
        said.append(
            f"screen.grace is {screen.grace}, and in the run {run} the ranks at epoch {screen.grace} did not foretell "
            f"those at the end in {name}, or those of a later epoch did not (Spearman {at['rho']:+.2f}, 95 % interval "
            f"{at['low']:+.2f} to {at['high']:+.2f}, {at['n']} trials); {later}"
        )
    return said


def supported_from(epochs: dict[str, Any]) -> int:
    """The first epoch from which on every interval lies above zero; one past the last where none does."""
    first = max(map(int, epochs)) + 1
    for epoch in sorted(map(int, epochs), reverse=True):
        low = epochs[str(epoch)]["low"]
        if low is None or low <= 0:
            break
        first = epoch
    return first


def _alike(study: Study) -> dict[str, Any]:
    return {"data": study.data.name, "scale": study.scale, "epochs": study.recipe.epochs}


def _audits(out: Path) -> list[dict[str, Any]]:
    """What runs under `out` left, the newest first. One that cannot be read is none."""
    found = []
    for path in sorted(out.glob(f"*/{AUDIT}"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            audit = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(audit, dict) and isinstance(audit.get("strata"), dict):
            found.append(audit)
    return found


def _contested(plan: Plan) -> list[str]:
    """The strata in which an arm can be stopped."""
    screen = plan.study.screen
    strata: dict[str, list[bool]] = {}
    for arm in plan.arms:
        strata.setdefault(stratum(screen, vars(arm.cell)), []).append(arm.immune)
    return [name for name, immune in strata.items() if len(immune) > screen.min_peers and not all(immune)]
