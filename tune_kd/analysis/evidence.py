"""The data behind the contrasts: accuracies by arm and seed, and differences by teacher and seed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tune_kd.analysis import statistics, teachers
from tune_kd.analysis.accuracy import (
    COMPARABLE,
    HEADLINE,
    cells,
    column_of,
    completed_trials,
    confirmation,
    confirmed,
    confirmed_trials,
    differing,
    judged_look,
    random_teachers,
    varied,
    without_factors,
)
from tune_kd.analysis.block_model import Array, Estimates, Flags, estimate
from tune_kd.analysis.verdicts import ALPHA
from tune_kd.records.reader import Records
from tune_kd.study.trial import ENDED

BY_MODEL = "block model"
BY_PAIRS = "pairs"
OVER_TEACHERS = "random teachers"
DECLARED_EARLIER = "pairs, one family, as declared by an earlier version"


@dataclass(frozen=True)
class Evidence:
    """The data behind the contrasts of a run: `arrays`, and the differences of contrasts that are judged over teachers.

    `taught` [contrasts] marks the latter. `differences` [contrasts, teachers, seeds] are NaN where a trial is missing.
    """

    values: Array
    strata: list[Any]
    weights: Array
    taught: Flags
    differences: Array

    @classmethod
    def of(cls, records: Records, seeds: Sequence[int], declared: Any, judged: Flags) -> "Evidence":
        (run,), arms = records.runs, [arm["name"] for arm in records.study["arms"]]
        values, strata, weights = arrays(records, seeds, declared)
        weights[~judged] = 0.0
        trials = confirmed_trials(records)
        has_teacher = set(trials.loc[trials["teacher_id"].notna(), "arm"]) if random_teachers(records, run) else set()
        with_one = np.array([arm in has_teacher for arm in arms], dtype=bool)
        # Means over teachers spread less than single trials, so the block model must not use them.
        values[with_one] = np.nan
        taught = (weights[:, with_one] != 0).any(1)
        if not taught.any():
            return cls(values, strata, weights, taught, np.empty((len(weights), 0, len(seeds))))
        ended = completed_trials(records)
        known = np.stack([cells(records, run, ended[ended["arm"] == arm], seeds) for arm in arms])
        differences = np.stack([np.tensordot(row[row != 0], known[row != 0], 1) for row in weights])
        return cls(values, strata, weights, taught, differences)

    def at(self, count: int, pairs_alone: bool) -> Estimates:
        """The estimates from the first `count` seeds."""
        found = estimate(self.values[:, :count], self.strata, self.weights, pairs_alone=pairs_alone)
        return teachers.judged(found, self.differences[..., :count], self.taught)

    @property
    def counts(self) -> list[int | None]:
        """The number of teachers of each contrast that is judged over teachers; None for the others."""
        counts = (~np.isnan(self.differences)).any(-1).sum(-1)
        return [int(count) if taught else None for count, taught in zip(counts, self.taught, strict=True)]

    def rules(self, found: Estimates, earlier: bool) -> list[str]:
        """The rule that judges each contrast."""
        if earlier:
            return [DECLARED_EARLIER] * len(self.taught)
        by = zip(self.taught, found.by_model, strict=True)
        return [OVER_TEACHERS if taught else BY_MODEL if model else BY_PAIRS for taught, model in by]

    def missing(self, found: Estimates, per_seed: int) -> list[str]:
        """The number of seeds, or of pairs of seed and teacher, that each contrast lacks, as text; empty if none."""
        seeds, there = self.values.shape[1], (~np.isnan(self.differences)).sum((1, 2))
        said = []
        for taught, n, pairs in zip(self.taught, found.pairs, there, strict=True):
            planned, what = (seeds * per_seed, "pairs of seed and teacher") if taught else (seeds, "seeds")
            lost = planned - int(pairs if taught else n)
            said.append(f"{lost} of {planned} {what} are missing" if lost > 0 else "")
        return said

    def by_seed(self, contrast: int) -> Array:
        """The known differences of a contrast by seed; with several teachers, their mean at each seed."""
        row = self.weights[contrast]
        paired = row[row != 0] @ self.values[row != 0]
        if self.taught[contrast]:
            paired = teachers.by_seed(self.differences[contrast])
        return np.asarray(paired[~np.isnan(paired)])


def looks_so_far(records: Records) -> tuple[list[float], list[int], list[int]]:
    """Each judged look's share of 0.05, the seeds of the last judged look, and the number of seeds at each look."""
    confirm, look = confirmation(records.study), judged_look(records)
    levels = statistics.spent(confirm.looks)[: look + 1] if confirm.looks else [ALPHA]
    return levels, list(confirm.seeds_at(look)), [len(confirm.seeds_at(each)) for each in range(len(levels))]


def arrays(
    records: Records, seeds: Sequence[int], declared: Sequence[Any], column: str = HEADLINE
) -> tuple[Array, list[Any], Array]:
    """Values [arms, seeds] with NaN where a trial is missing, the stratum of each arm, and weights [contrasts, arms].

    The values are from the trials' `column`. They are NaN for an arm whose trials differ in other settings.
    """
    (run,), study, trials = records.runs, records.study, confirmed_trials(records)
    arms = [arm["name"] for arm in study["arms"]]
    values = confirmed(records, column).reindex(pd.MultiIndex.from_product([[run], seeds]), columns=arms)
    found = values.to_numpy(dtype=float, na_value=np.nan).T.copy()
    unlike = (trials.groupby("arm")[list(COMPARABLE)].nunique() > 1).any(axis=1)
    found[[arm in unlike.index and bool(unlike[arm]) for arm in arms]] = np.nan
    named = trials.drop_duplicates("arm").set_index("arm")[
        [column for name in study["study"].get("strata", ["stem"]) if (column := column_of(name)) in trials]
    ]
    strata = {arm: tuple(map(str, row)) for arm, *row in named.itertuples()}
    weights, places = np.zeros((len(declared), len(arms))), {arm: place for place, arm in enumerate(arms)}
    for row, each in zip(weights, declared, strict=True):
        for arm, weight in each["weights"]:
            row[places[arm]] = weight
    return found, [strata.get(arm) for arm in arms], weights


def reasons(records: Records, seeds: Sequence[int], declared: Sequence[Any]) -> list[str]:
    """The reason why each contrast cannot be judged; empty if it can."""
    study, trials = records.study, confirmed_trials(records)
    trials = without_factors(records, trials[trials["seed"].isin(seeds)])
    ended = set(confirmed(records).columns)
    unended = Counter(trials.loc[~trials["status"].isin(ENDED), "arm"])
    alike = COMPARABLE[:-1] if study["study"].get("tuning") else COMPARABLE  # tuned arms differ in their recipes
    factors = varied(study)
    kinds = trials[["arm", *dict.fromkeys([*alike, *map(column_of, factors)])]].drop_duplicates()
    of_arm = dict(list(kinds.groupby("arm", sort=False)))
    one_kind = kinds.drop(columns="arm").nunique().max() <= 1  # no two arms differ, as in nearly every study
    notes = []
    for contrast in declared:
        arms = [arm for arm, _ in contrast["weights"]]
        missing = [arm for arm in arms if arm not in ended]
        if waiting := sum(unended[arm] for arm in arms):
            notes.append(f"{waiting} of its trials are waiting or running")
        elif missing:
            notes.append(f"{missing[0]} has no completed confirmation trial")
        else:
            compared = [contrast.get("factor")]
            compared += [study["study"].get("moderator")] if contrast.get("kind") == "moderation" else []
            same = [name for name in alike if name != "epochs_planned" or "epochs" not in compared]
            same += [column_of(name) for name in factors if name not in compared]
            theirs = () if one_kind else [of_arm[arm] for arm in of_arm if arm in arms]
            notes.append(differing(pd.concat(theirs), list(dict.fromkeys(same))) if theirs else "")
    return notes
