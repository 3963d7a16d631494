"""Early stopping: which trials it stops, which it must not stop, and its decisions."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tune_kd.study.early_stopping import Schedule, levels_of, stratum
from tune_kd.study.spec import Cell, Data, Recipe, Screen
from tune_kd.study.trial import Decision, Phase, Trial

SCREEN = Screen(seed=0, grace=2, reduction=2, margin=0.01, min_peers=2)
ARMS = {f"cifar/logit/T={level}": {"stem": "cifar", "method": "logit"} for level in (1, 2, 4, 8, 16)}
ARMS["cifar/none"] = {"stem": "cifar", "method": "none"}
EPOCHS = 9


def made(screen: Screen, immune: Iterable[str]) -> Schedule:
    schedule, kept = Schedule(screen, EPOCHS), set(immune)
    for arm, levels in ARMS.items():
        schedule.enter(f"id of {arm}", stratum(screen, levels), arm in kept)
    return schedule


def report(schedule: Schedule, arm: str, epoch: int, metric: float) -> Decision:
    decision = schedule.report(f"id of {arm}", arm, epoch, metric)
    assert decision is not None
    return decision


@pytest.fixture
def schedule() -> Schedule:
    return made(SCREEN, immune={"cifar/none", "cifar/logit/T=4"})


def test_rungs_grow_by_the_reduction_factor_and_end_before_the_budget() -> None:
    assert replace(SCREEN, grace=10, reduction=3).rungs(100) == [10, 30, 90]
    assert replace(SCREEN, grace=1, reduction=2).rungs(8) == [1, 2, 4]
    assert replace(SCREEN, grace=8).rungs(8) == []


def test_no_decision_is_made_at_a_trials_last_epoch_or_later() -> None:
    """If epochs are a factor, the rungs are those of the arms with the most epochs."""
    schedule = Schedule(SCREEN, 9)
    shorter, longer = (
        Trial(f"{epochs}", Phase.SCREEN, Cell(), Recipe(epochs=epochs), 0, Data(), None, "test") for epochs in (4, 9)
    )
    for trial in (shorter, longer):
        schedule.admit(trial)

    def decided(trial: Trial) -> list[int]:
        return [at for at in range(1, 10) if schedule.report(trial.trial_id, trial.arm, at, 0.5) is not None]

    assert (decided(shorter), decided(longer)) == ([2], [2, 4, 8])


def test_a_stratum_has_the_same_name_for_a_trial_and_its_row() -> None:
    screen = replace(SCREEN, strata=("method", "epochs", "batch_size", "lr", "weight"))
    cell = Cell(settings={"weight": 2.0}, recipe=(("batch_size", 16),))
    trial = Trial("a", Phase.SCREEN, cell, Recipe(epochs=4, batch_size=16), 0, Data(), None, "test")
    row = {"method": "none", "epochs_planned": 4, "batch_size": 16.0, "lr": 0.1, "weight": 2.0}
    assert stratum(screen, levels_of(trial)) == stratum(screen, row) == "none/4/16/0.1/2.0"


def test_an_arm_far_behind_enough_peers_is_stopped(schedule: Schedule) -> None:
    report(schedule, "cifar/logit/T=1", 2, 0.90)
    report(schedule, "cifar/logit/T=2", 2, 0.80)
    decision = report(schedule, "cifar/logit/T=8", 2, 0.70)
    assert (decision.action, decision.reason) == ("stop", "behind")
    assert (decision.rung, decision.rank, decision.peers) == (0, 3, 2)
    assert decision.cutoff == pytest.approx(0.85)  # the median of its two peers


def test_an_arm_behind_by_less_than_the_margin_continues_as_a_near_tie(schedule: Schedule) -> None:
    report(schedule, "cifar/logit/T=1", 2, 0.90)
    report(schedule, "cifar/logit/T=2", 2, 0.90)
    assert report(schedule, "cifar/logit/T=8", 2, 0.8901).reason == "near_tie"
    assert report(schedule, "cifar/logit/T=16", 2, 0.88).reason == "behind"


def test_no_trial_is_stopped_before_enough_peers_have_reported(schedule: Schedule) -> None:
    first = report(schedule, "cifar/logit/T=1", 2, 0.90)
    assert (first.cutoff, first.peers, first.reason) == (None, 0, "too_few_peers")
    assert report(schedule, "cifar/logit/T=2", 2, 0.10).reason == "too_few_peers"


def test_an_immune_arm_is_never_stopped(schedule: Schedule) -> None:
    for arm in ("cifar/logit/T=1", "cifar/logit/T=2"):
        report(schedule, arm, 2, 0.90)
    assert report(schedule, "cifar/logit/T=4", 2, 0.10).reason == "immune"


def test_the_last_arm_of_a_stratum_is_not_stopped() -> None:
    schedule = made(SCREEN, immune=())
    for arm in ("cifar/logit/T=1", "cifar/logit/T=2"):
        report(schedule, arm, 2, 0.90)
        schedule.drop(f"id of {arm}")  # failed later
    assert report(schedule, "cifar/logit/T=4", 2, 0.10).action == "stop"
    assert report(schedule, "cifar/logit/T=8", 2, 0.10).action == "stop"
    assert report(schedule, "cifar/logit/T=16", 2, 0.05).reason == "last_of_stratum"


def test_arms_compete_only_within_their_stratum(schedule: Schedule) -> None:
    for arm in ("cifar/logit/T=1", "cifar/logit/T=2"):
        report(schedule, arm, 2, 0.90)
    control = report(schedule, "cifar/none", 2, 0.10)
    assert (control.stratum, control.peers) == ("cifar/none", 0)
    assert stratum(replace(SCREEN, strata=None), ARMS["cifar/none"]) == "all"


def test_a_report_between_rungs_gets_no_decision_and_adds_no_peer(schedule: Schedule) -> None:
    assert schedule.report("id", "cifar/logit/T=1", 3, 0.5) is None
    assert report(schedule, "cifar/logit/T=2", 2, 0.1).peers == 0


def test_a_repeated_report_gets_the_same_decision_and_counts_once(schedule: Schedule) -> None:
    first = report(schedule, "cifar/logit/T=1", 2, 0.90)
    assert report(schedule, "cifar/logit/T=1", 2, 0.10) is first
    assert report(schedule, "cifar/logit/T=2", 2, 0.90).peers == 1


reports = st.permutations([(arm, epoch) for arm in ARMS for epoch in (2, 4, 8)]).flatmap(
    lambda order: st.tuples(st.just(order), st.lists(st.floats(0, 1), min_size=len(order), max_size=len(order)))
)
settings = st.builds(
    Screen,
    grace=st.just(2),
    reduction=st.just(2),
    margin=st.sampled_from([0.0, 0.05]),
    min_peers=st.integers(1, 3),
    strata=st.sampled_from([("stem", "method"), ("stem",), None]),
)


def play(
    schedule: Schedule, drawn: tuple[list[tuple[str, int]], list[float]], skip: int = 0
) -> tuple[list[Decision], list[str]]:
    """Report each arm's rungs in order of epochs, in the drawn order of arms. Stopped arms do not report again."""
    reached: dict[str, list[int]] = {arm: [2, 4, 8] for arm in ARMS}
    made, stopped = [], []
    for number, ((arm, _), metric) in enumerate(zip(*drawn, strict=True)):
        if arm in stopped:
            continue
        epoch = reached[arm].pop(0)
        decision = report(schedule, arm, epoch, metric)
        if decision.action == "stop":
            stopped.append(arm)
        if number >= skip:
            made.append(decision)
    return made, stopped


@given(settings, reports)
def test_in_any_order_immune_arms_continue_and_every_stratum_keeps_an_arm(
    screen: Screen, drawn: tuple[list[tuple[str, int]], list[float]]
) -> None:
    immune = {"cifar/none", "cifar/logit/T=4"}
    _, stopped = play(made(screen, immune), drawn)
    assert not immune & set(stopped)
    _, stopped = play(made(screen, ()), drawn)
    kept = {stratum(screen, cell) for arm, cell in ARMS.items() if arm not in stopped}
    assert kept == {stratum(screen, cell) for cell in ARMS.values()}


@given(settings, reports, st.integers(0, 18))
def test_a_schedule_resumed_from_replayed_decisions_makes_the_same_later_ones(
    screen: Screen, drawn: tuple[list[tuple[str, int]], list[float]], cut: int
) -> None:
    whole, _ = play(made(screen, ()), drawn)
    resumed = made(screen, ())
    for decision in whole[:cut]:
        resumed.replay(decision)
    again, _ = play(resumed, drawn)
    assert again == whole


def test_a_margin_may_be_given_for_each_rung() -> None:
    schedule = made(replace(SCREEN, margin=(0.3, 0.1, 0.0)), immune=())
    arms = ("cifar/logit/T=1", "cifar/logit/T=2", "cifar/logit/T=8")
    reasons = {}
    for epoch in (2, 4, 8):
        for arm, metric in zip(arms, (0.9, 0.9, 0.75), strict=True):
            reasons[epoch] = report(schedule, arm, epoch, metric).reason
    assert reasons == {2: "near_tie", 4: "behind", 8: "behind"}


class RayTrial:
    """The attributes of a trial that Ray's scheduler reads."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


@given(
    st.integers(1, 4),
    st.integers(2, 4),
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.7]) | st.floats(0, 1)), max_size=120),
)
def test_without_strata_immunity_and_margin_decisions_equal_those_of_rays_asha(
    grace: int, reduction: int, budget: int, sequence: list[tuple[int, float]]
) -> None:
    budget = max(budget, grace)
    theirs = ASHAScheduler(
        metric="accuracy", mode="max", time_attr="epoch", grace_period=grace, reduction_factor=reduction, max_t=budget
    )
    trials = {number: RayTrial(str(number)) for number in range(8)}
    for trial in trials.values():
        theirs.on_trial_add(None, trial)  # type: ignore[arg-type]
    screen = Screen(grace=grace, reduction=reduction, margin=0.0, min_peers=1, strata=None)
    ours = Schedule(screen, budget)
    for number in trials:
        ours.enter(str(number), "all")
    reached = dict.fromkeys(trials, 0)
    for number, metric in sequence:
        if reached[number] >= budget:
            continue
        reached[number] += 1
        result = {"epoch": reached[number], "accuracy": metric}
        expected = theirs.on_trial_result(None, trials[number], result)  # type: ignore[arg-type]
        decision = ours.report(str(number), str(number), reached[number], metric)
        ends = reached[number] == budget or (decision is not None and decision.action == "stop")
        assert ends == (expected == TrialScheduler.STOP)
        if ends:
            theirs.on_trial_complete(None, trials[number], result)  # type: ignore[arg-type]
            reached[number] = budget
