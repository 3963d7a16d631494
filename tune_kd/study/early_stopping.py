"""Early stopping as a pure state machine: a trial reports its accuracy and gets a decision.

Asynchronous successive halving within strata (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning").
At a rung, a trial (of an arm or of a draw) is compared with its peers, the trials that reported earlier. It is stopped
only if it has enough peers, it is behind the cutoff by more than the margin, it is not immune, and another trial of its
stratum is still in the running.
"""

from collections.abc import Container, Mapping

import numpy as np

from tune_kd.study.spec import COUNTS, Screen
from tune_kd.study.trial import Action, Decision, DecisionReason, Phase, Trial


def stratum(screen: Screen, levels: Mapping[str, object]) -> str:
    """The name of the stratum in which an arm competes: its levels, joined. Without strata, `all`."""
    if screen.strata is None:
        return "all"
    # A table's row has the recipe's epochs in `epochs_planned`, and a batch size of 16 as 16.0.
    found = {name: levels.get(name, levels.get(f"{name}_planned")) for name in screen.strata}
    return "/".join(
        str(int(level)) if name in COUNTS and isinstance(level, float) and level.is_integer() else str(level)
        for name, level in found.items()
    )


def levels_of(trial: Trial) -> dict[str, object]:
    """The levels of a trial by name, including the fields of its recipe."""
    return vars(trial.recipe) | dict(trial.cell.levels)


class Schedule:
    """Decides about the trials of a screen, each of which has entered a stratum. To restore its state, replay its
    decisions in order."""

    def __init__(
        self, screen: Screen, epochs: int, immune_arms: Container[str] = (), tuned_arms: Container[str] = ()
    ) -> None:
        """`epochs` is the largest budget of a trial. Draws of a tuned arm compete only with each other."""
        self._immune_arms, self._tuned_arms = immune_arms, tuned_arms
        self._screen = screen
        self._rungs = {epoch: rung for rung, epoch in enumerate(screen.rungs(epochs))}
        self._immune: set[str] = set()
        self._stratum: dict[str, str] = {}  # by trial id
        self._last: dict[str, int] = {}  # trial id -> its last epoch, at which no decision is needed
        self._left: dict[str, set[str]] = {}  # stratum -> trials neither stopped nor failed
        self._scores: dict[tuple[str, int], dict[str, float]] = {}  # (stratum, rung) -> trial id -> metric
        self._made: dict[tuple[str, int], Decision] = {}

    def admit(self, trial: Trial) -> None:
        """Let a trial of the screen compete: a draw within its arm, any other trial within its stratum."""
        if trial.phase == Phase.SCREEN:
            group = trial.arm if trial.arm in self._tuned_arms else stratum(self._screen, levels_of(trial))
            self.enter(trial.trial_id, group, trial.arm in self._immune_arms)
            self._last[trial.trial_id] = trial.recipe.epochs

    def enter(self, trial_id: str, stratum: str, immune: bool = False) -> None:
        """Let a trial compete in a stratum. An immune trial is never stopped."""
        self._stratum[trial_id] = stratum
        self._left.setdefault(stratum, set()).add(trial_id)
        if immune:
            self._immune.add(trial_id)

    def report(self, trial_id: str, arm: str, epoch: int, metric: float) -> Decision | None:
        """Decide about a trial that reached an epoch with this validation accuracy.

        Returns None between rungs and at the trial's last epoch. A score counts only at its exact epoch: a trial that
        resumes at a later epoch does not fill earlier rungs. A repeated report gets the same decision.
        """
        if epoch not in self._rungs or epoch >= self._last.get(trial_id, epoch + 1):
            return None
        rung = self._rungs[epoch]
        if (trial_id, rung) not in self._made:
            self.replay(self._decide(trial_id, arm, epoch, rung, metric))
        return self._made[trial_id, rung]

    def replay(self, decision: Decision) -> None:
        """Record a decision of this schedule, or one from before a resume."""
        self._made[decision.trial_id, decision.rung] = decision
        self._scores.setdefault((decision.stratum, decision.rung), {})[decision.trial_id] = decision.metric
        if decision.stops:
            self.drop(decision.trial_id)

    def drop(self, trial_id: str) -> None:
        """Remove a trial that was stopped or failed from the trials that are left in its stratum."""
        self._left[self._stratum[trial_id]].discard(trial_id)

    def _decide(self, trial_id: str, arm: str, epoch: int, rung: int, metric: float) -> Decision:
        group = self._stratum[trial_id]
        scores = list(self._scores.get((group, rung), {}).values())
        cutoff = float(np.percentile(scores, 100 * (1 - 1 / self._screen.reduction))) if scores else None
        if cutoff is None or len(scores) < self._screen.min_peers:
            reason = DecisionReason.TOO_FEW_PEERS
        elif metric >= cutoff:
            reason = DecisionReason.AHEAD
        elif metric >= cutoff - self._screen.margin_at(rung):
            reason = DecisionReason.NEAR_TIE
        elif trial_id in self._immune:
            reason = DecisionReason.IMMUNE
        elif not self._left[group] - {trial_id}:
            reason = DecisionReason.LAST_OF_STRATUM
        else:
            reason = DecisionReason.BEHIND
        return Decision(
            trial_id=trial_id,
            arm=arm,
            phase=Phase.SCREEN,
            stratum=group,
            epoch=epoch,
            rung=rung,
            metric=metric,
            cutoff=cutoff,
            rank=1 + sum(score > metric for score in scores),
            peers=len(scores),
            action=Action.STOP if reason == DecisionReason.BEHIND else Action.CONTINUE,
            reason=reason,
        )
