"""The rank-correlation audit that a finished run writes for later plans. Imports no pandas, since `plan` reads it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tune_kd.study.early_stopping import stratum
from tune_kd.study.plan import Plan
from tune_kd.study.spec import Study
from tune_kd.system.adapters import adapter
from tune_kd.system.files import MOST_RECORD_BYTES, read
from tune_kd.system.object_store import Mirror

if TYPE_CHECKING:
    import pandas as pd

AUDIT = "audit.json"  # in a run's folder


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation between epoch and final accuracy over `n` trials, with its 95 % interval."""

    n: int
    rho: float | None
    rho_low: float | None
    rho_high: float | None

    @property
    def positive(self) -> bool:
        """Whether the interval is above zero."""
        return self.rho_low is not None and self.rho_low > 0

    def __str__(self) -> str:
        if self.rho is None or self.rho_low is None or self.rho_high is None:
            return f"Spearman unknown, {self.n} trials"
        interval = f"{self.rho_low:+.2f} to {self.rho_high:+.2f}"
        return f"Spearman {self.rho:+.2f}, 95 % interval {interval}, {self.n} trials"


@dataclass(frozen=True)
class Audit:
    """The audit of a run. A study must have the same data, scale and epochs to use it."""

    run: str
    data: str
    scale: str
    epochs: int
    strata: dict[str, dict[int, Correlation]]  # by epoch


def record(folder: Path, run: str, study: Study, correlations: "pd.DataFrame") -> None:
    """Write a run's `early_stopping.rank_correlations` of every epoch to its folder."""
    strata: dict[str, dict[int, Correlation]] = {}
    for row in json.loads(correlations.to_json(orient="records")):
        found = Correlation(*(row[name] for name in ("n", "rho", "rho_low", "rho_high")))
        strata.setdefault(row["stratum"], {})[row["epoch"]] = found
    audit = Audit(run, *_alike(study), strata)
    Mirror.of(folder).publish(folder / AUDIT, adapter(Audit).dump_json(audit, indent=1))


def warnings(plan: Plan, out: Path) -> list[str]:
    """A warning for each stratum whose grace period is too short according to the newest comparable run under `out`.

    It is too short if the interval of the rank correlation contains zero at its end or at a later epoch.
    """
    screen = plan.study.screen
    if not screen.rungs(plan.study.most_epochs):
        return []
    audits = [each for each in _audits(out) if (each.data, each.scale, each.epochs) == _alike(plan.study)]
    said = []
    for name in _contested(plan):
        found = next((each for each in audits if name in each.strata), None)
        epochs = found.strata[name] if found else {}
        doubtful = [epoch for epoch in sorted(epochs) if epoch >= screen.grace and not epochs[epoch].positive]
        if found is None or not doubtful:
            continue
        supported = min((epoch for epoch in epochs if epoch > max(doubtful)), default=None)
        later = f"from epoch {supported} on they did" if supported else "no grace period is supported"
        said.append(
            f"screen.grace is {screen.grace}, shorter than the run {found.run} supports: in {name} the ranks at epoch "
            f"{doubtful[0]} did not predict the final ranks ({epochs[doubtful[0]]}); {later}"
        )
    return said


def _alike(study: Study) -> tuple[str, str, int]:
    return study.data.name, study.scale, study.most_epochs


def _audits(out: Path) -> list[Audit]:
    """The readable audits of runs under `out`, newest first."""
    found = []
    there = [path for path in out.glob(f"*/{AUDIT}") if os.path.isfile(path)]
    for path in sorted(there, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found.append(adapter(Audit).validate_json(read(path, MOST_RECORD_BYTES)))
        except (OSError, ValueError):
            continue
    return found


def _contested(plan: Plan) -> list[str]:
    """The strata in which arms can be stopped."""
    screen = plan.study.screen
    strata: dict[str, list[bool]] = {}
    for arm in plan.arms:
        strata.setdefault(stratum(screen, arm.cell.levels), []).append(arm.immune)
    return [name for name, immune in strata.items() if len(immune) > screen.min_peers and not all(immune)]
