"""Early stopping as a pure state machine: a trial reports, a decision comes back.

Asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning")
inside strata. A trial, which stands for its arm or for a draw, is compared at a rung with those that were there before
it. It is stopped only when enough of them were, when it is behind the cutoff by more than the margin, when it is not
immune, and when its stratum keeps another one.
"""

from collections.abc import Mapping

import numpy as np

from tune_kd.study.spec import Screen
from tune_kd.study.trial import Decision


def stratum(screen: Screen, levels: Mapping[str, object]) -> str:
    """The name of the group that an arm competes in: its levels, joined; `all` without strata."""
    if screen.strata is None:
        return "all"
    return "/".join(str(levels[name]) for name in screen.strata)


class Schedule:
    """Decides for the trials of one screen, each of which has entered a stratum. Its whole state is that, and the
    decisions it made, in order."""

    def __init__(self, screen: Screen, epochs: int) -> None:
        """`epochs` is the budget of every trial."""
        self._screen = screen
        self._rungs = {epoch: rung for rung, epoch in enumerate(screen.rungs(epochs))}
        self._immune: set[str] = set()
        self._stratum: dict[str, str] = {}  # by trial id
        self._left: dict[str, set[str]] = {}  # stratum -> trials that were neither stopped nor failed
        self._scores: dict[tuple[str, int], dict[str, float]] = {}  # (stratum, rung) -> trial id -> metric
        self._made: dict[tuple[str, int], Decision] = {}

    def enter(self, trial_id: str, stratum: str, immune: bool = False) -> None:
        """Have a trial compete in a stratum. An immune one is never stopped."""
        self._stratum[trial_id] = stratum
        self._left.setdefault(stratum, set()).add(trial_id)
        if immune:
            self._immune.add(trial_id)

    def report(self, trial_id: str, arm: str, epoch: int, metric: float) -> Decision | None:
        """Decide about a trial that reached an epoch with this validation accuracy.

        Returns null between rungs, where nothing is compared. A score belongs to its exact epoch: a trial that goes on
        after a pause fills no rung that it left behind, and a report that comes again gets the same decision again.
        """
        if epoch not in self._rungs:
            return None
        rung = self._rungs[epoch]
        if (trial_id, rung) not in self._made:
            self.replay(self._decide(trial_id, arm, epoch, rung, metric))
        return self._made[trial_id, rung]

    def replay(self, decision: Decision) -> None:
        """Take over a decision that was made: by this schedule, or before a resume."""
        self._made[decision.trial_id, decision.rung] = decision
        self._scores.setdefault((decision.stratum, decision.rung), {})[decision.trial_id] = decision.metric
        if decision.action == "stop":
            self.drop(decision.trial_id)

    def drop(self, trial_id: str) -> None:
        """Note that a trial is out, stopped or failed, so that its stratum does not count on it."""
        self._left[self._stratum[trial_id]].discard(trial_id)

    def _decide(self, trial_id: str, arm: str, epoch: int, rung: int, metric: float) -> Decision:
        group = self._stratum[trial_id]
        scores = list(self._scores.get((group, rung), {}).values())
        cutoff = float(np.percentile(scores, 100 * (1 - 1 / self._screen.reduction))) if scores else None
        stop = False
        if cutoff is None or len(scores) < self._screen.min_peers:
            reason = "too_few_peers"
        elif metric >= cutoff:
            reason = "ahead"
        elif metric >= cutoff - self._screen.margin_at(rung):
            reason = "near_tie"
        elif trial_id in self._immune:
            reason = "immune"
        elif not self._left[group] - {trial_id}:
            reason = "last_of_stratum"
        else:
            reason, stop = "behind", True
        return Decision(
            trial_id=trial_id,
            arm=arm,
            phase="screen",
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
