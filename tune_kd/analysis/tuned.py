"""Results of tuning: the budget of each arm, the best settings, and the importance of each setting."""

from collections.abc import Iterator

import pandas as pd

from tune_kd.records import adaptive_plan
from tune_kd.records.reader import Records, rows
from tune_kd.records.schema import TRIALS, TrialRow
from tune_kd.records.tables import typed
from tune_kd.study.discover import from_json
from tune_kd.study.plan import Search
from tune_kd.study.spec import Study
from tune_kd.study.trial import Status
from tune_kd.study.tuning import Choice
from tune_kd.system.adapters import adapter

ENDS: tuple[str, ...] = (Status.COMPLETED, Status.STOPPED, Status.FAILED)


def budgets(records: Records) -> pd.DataFrame:
    """One row per tuned arm: its draws by status, their epochs, the best validation accuracy of a completed draw, and
    the number of that draw (from 1)."""
    found = []
    for run, study, search, theirs in searches(records):
        assert study.tuning is not None
        best = adaptive_plan.best(study.tuning, theirs)
        found.append(
            {
                "run": run,
                "arm": search.name,
                "draws": len(theirs),
                **{status: sum(row["status"] == status for row in theirs) for status in ENDS},
                "epochs": sum(row["epochs_run"] for row in theirs),
                "val_accuracy_best": None if best is None else best["val_accuracy_best"],
                "best_draw": None if best is None else 1 + theirs.index(best),
            }
        )
    return typed(found, "run arm draws completed stopped failed epochs val_accuracy_best best_draw")


def settings(records: Records) -> pd.DataFrame:
    """One row per tuned arm and setting: the published default, the ends of the range, the best value, and the share of
    the draws' variance that the setting explains (`importance`, null if undetermined)."""
    found = []
    for run, study, search, theirs in searches(records):
        from tune_kd.study.sampler import importances  # slow to import (Optuna), and most runs are not tuned

        assert study.tuning is not None
        best = adaptive_plan.best(study.tuning, theirs)
        shares = importances(search.ranges, theirs)
        method = str(theirs[0]["method"]) if theirs else ""
        for each in search.ranges:
            ends = each.over.levels if isinstance(each.over, Choice) else (each.over.low, each.over.high)
            found.append(
                {
                    "run": run,
                    "arm": search.name,
                    "setting": each.name,
                    "default": study.value(each.name, method) if theirs else None,
                    "least": min(ends),
                    "most": max(ends),
                    "tuned": None if best is None else adaptive_plan.values(search, best)[each.name],
                    "importance": shares.get(each.name),
                }
            )
    return typed(found, "run arm setting default least most tuned importance")


def searches(records: Records) -> Iterator[tuple[str, Study, Search, list[TrialRow]]]:
    """Run, study, search and ordered draws of each tuned arm of each run."""
    for run in records.runs:
        declared = records.studies.get(run, {})
        declared = declared.get("extended") or declared
        of_run = rows(TRIALS, records.trials[records.trials["run"] == run])
        for search in adapter(tuple[Search, ...]).validate_python(declared.get("searches", ())):
            yield run, from_json(declared["study"]), search, adaptive_plan.draws(search, of_run)
