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
            name: row[name] for name in ("n", "rho", "rho_low", "rho_high")
        }
    publish(folder / AUDIT, json.dumps({"run": run, **_alike(study), "strata": strata}, indent=1).encode())


def warnings(plan: Plan, out: Path) -> list[str]:
    """A sentence for each stratum whose grace period is shorter than the newest run under `out` that is like this plan
    supports: at the grace period, or at an epoch after it, the interval of the rank correlation has zero in it."""
    screen, alike = plan.study.screen, _alike(plan.study)
    if not screen.rungs(plan.study.recipe.epochs):
        return []
    said, found = [], [audit for audit in _audits(out) if {name: audit.get(name) for name in alike} == alike]
    for name in _contested(plan):
        run, epochs = next(((each["run"], each["strata"][name]) for each in found if name in each["strata"]), ("", {}))
        doubtful = [epoch for epoch in epochs if int(epoch) >= screen.grace and not _foretells(epochs[epoch])]
        if not doubtful:
            continue
        at, supported = epochs[doubtful[0]], supported_from(epochs)
        rho = "unknown"
        if at["rho_low"] is not None:
            rho = f"{at['rho']:+.2f}, 95 % interval {at['rho_low']:+.2f} to {at['rho_high']:+.2f}"
        later = f"from epoch {supported} on they did" if str(supported) in epochs else "it supports none"
        said.append(
            f"screen.grace is {screen.grace}, shorter than the run {run} supports: in {name} the ranks at epoch "
            f"{doubtful[0]} did not foretell those at the end (Spearman {rho}, {at['n']} trials); {later}"
        )
    return said


def _foretells(found: dict[str, Any]) -> bool:
    """Whether the interval of a rank correlation lies above zero."""
    return found["rho_low"] is not None and found["rho_low"] > 0


def supported_from(epochs: dict[str, Any]) -> int:
    """The first epoch from which on every interval lies above zero; one past the last where none does."""
    first = max(map(int, epochs)) + 1
    for epoch in sorted(map(int, epochs), reverse=True):
        if not _foretells(epochs[str(epoch)]):
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
