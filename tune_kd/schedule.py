"""Early stopping as a pure state machine: a trial reports, a decision comes back.

Asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning")
inside strata. An arm is compared at a rung with the arms that were there before it. It is stopped only when
enough of them were, when it is behind the cutoff by more than the margin, when it is not immune, and when
its stratum keeps another arm.
"""

from collections.abc import Iterable

import numpy as np

from tune_kd.study import Cell, Screen
from tune_kd.trial import Decision, Trial


def rungs(screen: Screen, epochs: int) -> list[int]:
    """The epochs at which arms are compared: grace * reduction**k, below the budget."""
    found = []
    epoch = screen.grace
    while epoch < epochs:
        found.append(epoch)
        epoch *= screen.reduction
    return found


def stratum(screen: Screen, cell: Cell) -> str:
    """The name of the group that a cell competes in: its levels, joined; `all` without strata."""
    if screen.strata is None:
        return "all"
    return "/".join(str(getattr(cell, name)) for name in screen.strata)


class Schedule:
    """Decides for the screen. Its whole state is the decisions it made, in order."""

    def __init__(self, screen: Screen, arms: dict[str, Cell], immune: Iterable[str]) -> None:
        """`arms` are all arms of the screen by name; `immune` names those that are never stopped."""
        self._screen = screen
        self._immune = frozenset(immune)
        self._stratum = {arm: stratum(screen, cell) for arm, cell in arms.items()}
        self._out: set[str] = set()  # arms that were stopped or failed
        self._scores: dict[tuple[str, int], dict[str, float]] = {}  # (stratum, rung) -> arm -> metric
        self._made: dict[tuple[str, int], Decision] = {}

    def report(self, trial: Trial, epoch: int, metric: float) -> Decision | None:
        """Decide about a trial of the screen that reached an epoch.

        Returns null where nothing is compared: outside the screen, between rungs. A score belongs to its exact
        epoch, so a report that comes again gets the same decision again.
        """
        if trial.phase != "screen":
            return None
        milestones = rungs(self._screen, trial.recipe.epochs)
        if epoch not in milestones:
            return None
        rung = milestones.index(epoch)
        if (trial.trial_id, rung) not in self._made:
            self.replay(self._decide(trial, epoch, rung, metric))
        return self._made[trial.trial_id, rung]

    def replay(self, decision: Decision) -> None:
        """Take over a decision that was made: by this schedule, or before a resume."""
        self._made[decision.trial_id, decision.rung] = decision
        self._scores.setdefault((decision.stratum, decision.rung), {})[decision.arm] = decision.metric
        if decision.action == "stop":
            self._out.add(decision.arm)

    def drop(self, arm: str) -> None:
        """Note that an arm failed, so that its stratum does not count on it."""
        self._out.add(arm)

    def _decide(self, trial: Trial, epoch: int, rung: int, metric: float) -> Decision:
        group = self._stratum[trial.arm]
        scores = list(self._scores.get((group, rung), {}).values())
        cutoff = float(np.percentile(scores, 100 * (1 - 1 / self._screen.reduction))) if scores else None
        others = [arm for arm, name in self._stratum.items() if name == group and arm != trial.arm]
        stop = False
        if cutoff is None or len(scores) < self._screen.min_peers:
            reason = "too_few_peers"
        elif metric >= cutoff:
            reason = "ahead"
        elif metric >= cutoff - self._screen.margin:
            reason = "near_tie"
        elif trial.arm in self._immune:
            reason = "immune"
        elif all(arm in self._out for arm in others):
            reason = "last_of_stratum"
        else:
            reason, stop = "behind", True
        return Decision(
            trial_id=trial.trial_id,
            arm=trial.arm,
            phase=trial.phase,
            stratum=group,
            epoch=epoch,
            rung=rung,
            metric=metric,
            cutoff=cutoff,
            rank=1 + sum(score > metric for score in scores),
            peers=len(scores),
            action="stop" if stop else "continue",
            reason=reason,  # type: ignore[arg-type]
        )
