"""Simulated studies are judged as real ones are, and the claims about the design hold for them."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats as scipy_stats

from conftest import tunable
from search_spaces.ablation import study as ablation
from tune_kd.analysis import calibrate as calibration, contrasts as results, practices
from tune_kd.analysis.accuracy import HEADLINE
from tune_kd.analysis.block_model import estimate
from tune_kd.analysis.calibrate import Rate, Rule, calibrate, performance
from tune_kd.analysis.scenarios import ACCURACY, SCENARIOS, Design, Scenario, draw, looks, scenarios
from tune_kd.analysis.verdicts import ALPHA
from tune_kd.records.reader import Records
from tune_kd.records.schema import DECISIONS, EPOCHS, TRIALS, TrialRow, first_row
from tune_kd.records.tables import frame
from tune_kd.study.plan import plan
from tune_kd.study.spec import Confirm, Study
from tune_kd.study.trial import Phase, Status, StopReason, Trial
from tune_kd.study.tuning import LogUniform, Range, Tuning
from tune_kd.system.errors import UserError

LOOKS = replace(ablation(), confirm=Confirm(looks=(5, 10, 20)))
FEW_LOOKS = replace(ablation(), confirm=Confirm(looks=(2, 3, 5)))
LEVEL = 0.05
UNEQUAL = ("very_unequal_methods", "very_correlated")  # weaker guarantees hold for these
LOGIT, STEM = "cifar: logit - none", "none: cifar - imagenet"


def design(study: Study) -> Design:
    return Design.of(plan(study, "0" * 64))


def drawn(name: str, study: Study, studies: int) -> np.ndarray:
    """Deviations [studies, arms, seeds] from the true accuracy, divided by the deviation that the study expects."""
    values = draw(name, scenarios(study)[name], design(study), 0, studies)
    return (values - ACCURACY) / study.deviation


def none_stopped(of: Design, studies: int) -> np.ndarray:
    return np.zeros((studies, len(of.strata)), dtype=bool)


def by_stem(imagenet: float, cifar: float, logit: float = 1.0, feature: float = 1.0) -> list[float]:
    return [stem * method for stem in (imagenet, cifar) for method in (1.0, *[logit] * 5, feature)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alike", by_stem(1, 1)),
        ("equal", by_stem(0.22 / 0.15, 0.14 / 0.15)),
        ("unequal_methods", by_stem(0.22 / 0.15, 0.14 / 0.15, 11 / 14, 17 / 14)),
        ("very_unequal_methods", by_stem(0.22 / 0.15, 0.14 / 0.15, 8 / 14, 20 / 14)),
        ("correlated", by_stem(0.22 / 0.15, 0.14 / 0.15)),
    ],
)
def test_simulated_arms_have_equal_means_and_the_standard_deviations_of_their_scenario(
    name: str, expected: list[float]
) -> None:
    values = drawn(name, ablation(), 4000)
    assert_allclose(values.std(axis=(0, 2)), expected, rtol=0.03)
    assert np.abs(values.mean(axis=(0, 2)) / expected).max() < 4 / 20_000**0.5


def test_each_unequal_arm_has_one_of_two_standard_deviations_per_study() -> None:
    study = replace(ablation(), confirm=Confirm(looks=(400,)))
    spreads = drawn("unequal_arms", study, 20).std(axis=-1) / by_stem(0.22 / 0.15, 0.14 / 0.15)
    low = np.abs(np.log(spreads) + 0.4) < 0.2
    assert (low | (np.abs(np.log(spreads) - 0.4) < 0.2)).all()
    assert 0.35 < low.mean() < 0.65


# The variance of a seed's effect, divided by the variance of accuracies: of the CIFAR stem, and of both stems.
SEED = 1 / (1 + (14 / 15) ** 2)
SEED_OF_BOTH = (SEED / (1 + (22 / 15) ** 2)) ** 0.5


@pytest.mark.parametrize(
    ("name", "none_logit", "logit_feature", "across"),
    [
        ("equal", 0.0, 0.0, 0.0),
        ("correlated", 0.0, 0.3, 0.0),
        ("very_correlated", 0.0, 0.5, 0.0),
        ("shared_blocks", SEED, SEED, SEED_OF_BOTH),
        ("own_blocks", SEED, SEED, 0.0),
    ],
)
def test_simulated_arms_have_the_correlations_of_their_scenario(
    name: str, none_logit: float, logit_feature: float, across: float
) -> None:
    values = drawn(name, ablation(), 4000)
    found = np.corrcoef(values.transpose(1, 0, 2).reshape(values.shape[1], -1))
    places = {arm.name: place for place, arm in enumerate(plan(ablation()).arms)}
    none, logit, feature = (places[f"cifar/{each}"] for each in ("none", "logit/T=4", "feature"))
    assert found[none, logit] == pytest.approx(none_logit, abs=0.03)
    assert found[logit, feature] == pytest.approx(logit_feature, abs=0.03)
    assert found[none, places["imagenet/none"]] == pytest.approx(across, abs=0.03)
    assert found[logit, places["imagenet/feature"]] == pytest.approx(across, abs=0.03)


def test_draws_are_reproducible_and_seeded_by_name_and_first_study() -> None:
    of = design(ablation())
    first, again = (draw("a", Scenario("one"), of, 0, 3) for _ in range(2))
    assert (first == again).all()
    assert (first != draw("b", Scenario("one"), of, 0, 3)).all()
    assert (first != draw("a", Scenario("one"), of, 3, 3)).all()
    assert (practices.stopped(of.planned, 5) == practices.stopped(of.planned, 5)).all()


def test_scenarios_use_the_looks_of_the_study_and_add_one_with_a_single_look() -> None:
    assert "one_look" not in scenarios(ablation())
    found = {name: looks(FEW_LOOKS, each) for name, each in scenarios(FEW_LOOKS).items()}
    assert found.pop("one_look") == (2,)
    assert found.pop("looks_5_10_20") == (5, 10, 20)
    assert set(found.values()) == {(2, 3, 5)}


def records_of(study: Study, values: np.ndarray, stopped: np.ndarray, rule: Rule) -> Records:
    """The records of a run with these accuracies [A, S], without the `stopped` arms [A]. A run of a version before 0.7
    declares no families."""
    look = len(study.confirm.looks or (0,)) - 1
    planned = plan(study, "0" * 64, look)
    arms = {arm.name: place for place, arm in enumerate(planned.arms)}
    seeds = {seed: place for place, seed in enumerate(study.confirm.all_seeds)}

    def row(trial: Trial) -> TrialRow:
        if stopped[arms[trial.arm]]:
            return first_row("r", trial) | {"status": Status.STOPPED, "stop_reason": StopReason.ASHA}
        test = float(values[arms[trial.arm], seeds[trial.seed]])
        return first_row("r", trial) | {"status": Status.COMPLETED, "epochs_run": 100, HEADLINE: test}

    rows = [row(trial) for trial in planned.trials if trial.phase == Phase.CONFIRM]
    record = {
        "study": asdict(study),
        "look": look,
        "contrasts": [asdict(each) | ({"family": None} if rule.pairs_alone else {}) for each in planned.contrasts],
        "arms": [{"name": arm.name, "role": arm.role} for arm in planned.arms],
    }
    return Records(frame(TRIALS, rows), frame(EPOCHS, []), frame(DECISIONS, []), {"r": record})


BEFORE = Rule(pairs_alone=True)


@pytest.mark.parametrize(
    ("study", "rule"),
    [(ablation(), Rule()), (FEW_LOOKS, Rule()), (FEW_LOOKS, BEFORE)],
    ids=["one look", "looks", "before 0.7"],
)
@pytest.mark.parametrize("studies", [8, pytest.param(50, marks=pytest.mark.long)])
def test_simulated_studies_get_the_same_verdicts_as_their_records(study: Study, rule: Rule, studies: int) -> None:
    """Half of the studies have arms that the screen stopped, and true differences, so that there are findings."""
    of = design(study)
    counts = looks(study, SCENARIOS["equal"])
    values = draw("equal", SCENARIOS["equal"], of, 0, studies)
    values += 0.003 * np.random.default_rng(1).standard_normal((studies, len(of.strata), 1))
    stopped = none_stopped(of, studies)
    able = [not arm.immune for arm in of.planned.arms]
    stopped[::2, able] = np.random.default_rng(2).random((len(stopped[::2]), sum(able))) < 0.3
    at = [calibration.estimates(values[..., :count], stopped, of, rule) for count in counts]
    p_holm = calibration.p_values(at, counts, ["all"] * len(of.weights) if rule.pairs_alone else of.families)
    low, high = at[-1].interval(1 - calibration.spent(counts)[-1])
    verdicts = set()
    for number in range(studies):
        table = results.contrasts(records_of(study, values[number], stopped[number], rule))
        assert table["contrast"].tolist() == [each.name for each in of.planned.contrasts]
        for name, found in (("p_holm", p_holm), ("low", low), ("high", high), ("estimate", at[-1].value)):
            assert_allclose(table[name].to_numpy(float), found[number], rtol=0, atol=1e-12)
        claims = table["verdict"].isin(["better", "worse"]).to_numpy()
        assert (claims == (p_holm[number] < ALPHA)).all()
        verdicts |= set(table["verdict"])
    assert verdicts >= {"better", "worse", "inconclusive", "not judged"}


@pytest.mark.parametrize("rule", [Rule(), BEFORE])
@pytest.mark.parametrize("contrast", [LOGIT, STEM])
def test_power_is_the_rate_of_findings_in_studies_with_better_treated_arms(contrast: str, rule: Rule) -> None:
    of, size = design(LOOKS), 0.002
    counts, scenario = (5, 10, 20), SCENARIOS["equal"]
    stopped = np.array([practices.stopped(of.planned, number) for number in range(300)])
    found = performance(of, "equal", scenario, stopped, rule).power[contrast][size]
    moved = [arm.name.startswith("cifar/logit" if contrast == LOGIT else "cifar/none") for arm in of.planned.arms]
    values = draw("equal", scenario, of, 0, 300) + size * np.array(moved)[:, None]
    at = [calibration.estimates(values[..., :count], stopped, of, rule) for count in counts]
    p = calibration.p_values(at, counts, ["all"] * len(of.families) if rule.pairs_alone else of.families)
    place = [each.name for each in of.planned.contrasts].index(contrast)
    assert found == Rate(int(((p[:, place] < ALPHA) & (at[-1].value[:, place] > 0)).sum()), 300)
    assert 0 < found.found < 300


def test_findings_with_the_wrong_sign_do_not_count_as_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "DIFFERENCES", (-0.01,))
    of = design(ablation())
    assert performance(of, "equal", SCENARIOS["equal"], none_stopped(of, 20)).power[LOGIT][-0.01].found == 0


def most(level: float, studies: int) -> float:
    """The level plus two standard errors."""
    return level + 2 * (level * (1 - level) / studies) ** 0.5


def check(of: Design, name: str, studies: int) -> None:
    found = performance(of, name, SCENARIOS[name], none_stopped(of, studies))
    level = 0.1 if name in UNEQUAL else most(LEVEL, studies)
    assert found.false["primary"].share <= level
    assert found.false["secondary"].share <= level
    mean, least = found.covered(list(found.coverage)) or (0.0, 0.0)
    assert 0.94 <= mean <= 0.97
    assert 0.94 <= found.coverage[STEM].share <= 0.97
    assert least == min(rate.share for rate in found.coverage.values())


def test_level_coverage_and_power_hold_over_2_000_studies() -> None:
    of = design(ablation())
    check(of, "equal", 2000)
    power = performance(of, "equal", SCENARIOS["equal"], none_stopped(of, 2000)).power[LOGIT]
    assert power[0.003].share >= 0.57
    assert power[0.005].share >= 0.95


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "equal"])
def test_level_and_coverage_hold_over_2_000_studies_of_each_scenario(name: str) -> None:
    check(design(ablation()), name, 2000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_level_and_coverage_hold_over_20_000_studies_of_each_scenario(name: str) -> None:
    check(design(ablation()), name, 20_000)


def test_a_rule_that_exceeds_the_level_is_detected() -> None:
    """Otherwise the tests above would prove nothing. The bad rule uses only the pooled spread of the block model."""
    of = design(ablation())
    pooled = performance(
        of, "very_unequal_methods", SCENARIOS["very_unequal_methods"], none_stopped(of, 2000), Rule(prior_df=np.inf)
    )
    assert pooled.false["primary"].share > 0.12
    assert min(rate.share for rate in pooled.coverage.values()) < 0.85


def test_a_rate_has_a_binomial_standard_error() -> None:
    assert Rate(5, 100).share == 0.05
    assert Rate(5, 100).standard_error == pytest.approx((0.05 * 0.95 / 100) ** 0.5)


def test_drawn_trials_have_the_spread_and_correlation_of_published_ones() -> None:
    study = ablation()
    curves, tests = practices.trials(study, 2000, np.random.default_rng(0))
    assert tests.std() == pytest.approx(study.deviation, rel=0.06)
    spread = curves.std(axis=0)
    assert spread[9] > 10 * spread[-1]  # as in the published curves: 2.6 points at epoch 10, 0.2 at the last
    assert np.corrcoef(curves[:, -1], tests)[0, 1] == pytest.approx(0.7, abs=0.1)


def test_the_simulated_screen_stops_some_compared_arms_and_no_immune_arm() -> None:
    planned = plan(ablation())
    stopped = np.array([practices.stopped(planned, number) for number in range(40)])
    immune = np.array([arm.immune for arm in planned.arms])
    assert not stopped[:, immune].any()
    assert 0.02 < stopped[:, ~immune].mean() < 0.3


def test_plain_asha_overestimates_the_arms_that_finish() -> None:
    found = [practices.plain_asha(plan(LOOKS), number) for number in range(10)]
    errors = [error for each in found for error in each.errors]
    assert 0.05 < len(errors) / sum(each.tried for each in found) < 0.3
    assert 0.2 < np.mean(errors) / LOOKS.deviation < 1


def test_until_significant_runs_paired_t_tests_at_each_seed_count() -> None:
    of = design(ablation())
    values = draw("x", Scenario("alike", looks=(4, 8)), of, 0, 100)
    found = practices.until_significant(of, values, (4, 8))
    expected = []
    for study in values:
        differences = of.weights @ study
        p = [min(scipy_stats.ttest_1samp(differences[:, :count], 0, axis=1).pvalue) for count in (4, 8)]
        expected.append(min(p) * len(differences) < ALPHA)
    assert found.tolist() == expected
    assert 0 < sum(expected) < 100


@pytest.mark.long
def test_seeds_until_significance_raise_false_positives_and_the_earlier_rule_has_less_power() -> None:
    found = calibrate(LOOKS, 400)
    assert found.false["designed"].share < 0.1 < found.false["until_significant"].share
    assert found.false["before_0_7"] == found.before.false["any"]
    assert found.false["before_0_7"].share <= most(LEVEL, 400)
    assert found.shown == LOGIT
    assert found.before.power[LOGIT][0.001].share < found.scenarios["alike"].power[LOGIT][0.001].share
    assert found.false["plain_asha"].studies == calibration.MOST_ASHA


def test_a_calibration_reports_each_of_its_steps(monkeypatch: pytest.MonkeyPatch, study: Study) -> None:
    monkeypatch.setattr(calibration, "CHUNK", 4)
    monkeypatch.setattr(calibration, "MOST_ASHA", 2)
    beats: list[int] = []
    found = calibrate(study, 5, beat=lambda: beats.append(1))
    assert found.shown == LOGIT
    assert len(beats) == calibration.steps(study, 5)
    assert found.false["plain_asha"].studies == 2
    assert {rate.studies for each in found.scenarios.values() for rate in each.false.values()} == {5}


def test_calibration_of_a_tuned_study_uses_its_tuned_arms() -> None:
    found = calibrate(tunable(Tuning((Range("lr", LogUniform(0.01, 0.5)),), budget=12)), 3)
    assert found.shown == "logit - none, tuned"
    assert found.groups["across_strata"] == []
    assert "logit: tuned - default" in found.groups["secondary"]


def test_calibration_with_one_seed_has_no_coverage_and_no_power(study: Study) -> None:
    found = calibrate(replace(study, confirm=Confirm(seeds=(1,))), 3).scenarios["equal"]
    assert (found.coverage, found.covered([LOGIT])) == ({}, None)
    assert found.power[LOGIT][0.005] == Rate(0, 3)


def test_calibration_rejects_a_study_without_contrasts(study: Study) -> None:
    with pytest.raises(UserError, match="declares no contrasts"):
        calibrate(replace(study, contrasts=(), moderator=None, control=None), 3)


def test_batched_estimates_equal_those_of_each_study() -> None:
    of = design(ablation())
    values, stopped = draw("equal", SCENARIOS["equal"], of, 0, 6), none_stopped(of, 6)
    stopped[[1, 4], 1] = stopped[2, 9] = True
    found = calibration.estimates(values, stopped, of, Rule())
    for number in range(6):
        one = estimate(np.where(stopped[number][:, None], np.nan, values[number]), of.strata, of.weights)
        assert_allclose(found.error[number], one.error, rtol=0, atol=1e-15)
        assert found.pairs[number].tolist() == one.pairs.tolist()


def test_only_the_stem_contrast_of_the_ablation_crosses_strata() -> None:
    of = design(ablation())
    names = [each.name for each in of.planned.contrasts]
    assert [name for name, across in zip(names, of.across, strict=True) if across] == [STEM]
    other = design(replace(ablation(), strata=("student",)))
    assert not other.across.any()
