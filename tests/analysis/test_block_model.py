"""The block model against statsmodels, and its findings in studies with a known truth."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from numpy.testing import assert_allclose
from scipy import stats as scipy_stats
from statsmodels.formula.api import ols

from tune_kd.analysis import block_model
from tune_kd.analysis.block_model import estimate

ARMS, SEEDS = 5, 6
CONTRAST = np.array([[0.0, 1.0, -1.0, 0.0, 0.0]])


def accuracies(seed: int, arms: int = ARMS, seeds: int = SEEDS, studies: int | None = None) -> np.ndarray:
    """Accuracies [arms, seeds], or [studies, arms, seeds] for many studies. A seed shifts all arms together."""
    drawn = np.random.default_rng(seed)
    shape = (arms, seeds) if studies is None else (studies, arms, seeds)
    blocks = 0.002 * drawn.standard_normal((*shape[:-2], 1, seeds))
    return 0.95 + blocks + 0.0015 * drawn.standard_normal(shape)


def by_statsmodels(values: np.ndarray) -> tuple[float, float, float, int]:
    """The contrast of arms 1 and 2 by least squares with categorical arm and seed."""
    arms, seeds = np.nonzero(~np.isnan(values))
    table = pd.DataFrame({"y": values[arms, seeds], "arm": arms.astype(str), "seed": seeds.astype(str)})
    fitted = ols("y ~ C(arm) + C(seed)", table).fit()
    tested = fitted.t_test("C(arm)[T.1] - C(arm)[T.2] = 0")
    return tested.effect.item(), tested.sd.item(), fitted.mse_resid, int(fitted.df_resid)


@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_the_model_matches_statsmodels_with_and_without_missing_trials(seed: int, lost: int) -> None:
    values = accuracies(seed)
    places = np.random.default_rng(seed).permutation(ARMS * SEEDS)[:lost]
    values[np.unravel_index(places, values.shape)] = np.nan
    if np.isnan(values[1:3]).any(0).all() or np.isnan(values).all(1).any():
        return
    expected, error, variance, df = by_statsmodels(values)
    fitted = block_model.fit(values)
    weights = CONTRAST[0]
    assert_allclose(fitted.means @ weights, expected, atol=1e-10)
    assert_allclose(np.sqrt(fitted.variance * fitted.leverage(CONTRAST)[0]), error, atol=1e-10)
    assert_allclose(fitted.variance, variance, atol=1e-10)
    assert fitted.df == df
    assert_allclose(estimate(values, ["s"] * ARMS, CONTRAST).value, [expected], atol=1e-10)


def test_with_two_arms_the_model_equals_a_paired_t_test() -> None:
    values = accuracies(1, arms=2)
    found = estimate(values, ["s", "s"], np.array([[1.0, -1.0]]))
    expected = scipy_stats.ttest_rel(*values)
    assert found.by_model.tolist() == [True]
    assert found.df.tolist() == [SEEDS - 1]
    assert found.two_sided()[0] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert [end[0] for end in found.interval()] == pytest.approx([interval.low, interval.high])


@given(st.integers(0, 2**32 - 1), st.floats(0.0005, 0.01))
def test_the_equivalence_p_value_is_the_larger_of_two_one_sided_t_tests(seed: int, margin: float) -> None:
    values = accuracies(seed, arms=2)
    apart = values[0] - values[1]
    above = scipy_stats.ttest_1samp(apart, -margin, alternative="greater").pvalue
    below = scipy_stats.ttest_1samp(apart, margin, alternative="less").pvalue
    found = estimate(values, ["s", "s"], np.array([[1.0, -1.0]])).equivalence(margin)
    assert_allclose(found, [max(above, below)], atol=1e-12)


@pytest.mark.parametrize("values", [np.full((2, 0), np.nan), np.full((2, 1), 0.9), np.full((2, 3), 0.9)])
def test_the_equivalence_p_value_is_nan_without_a_spread(values: np.ndarray) -> None:
    assert np.isnan(estimate(values, ["s", "s"], np.array([[1.0, -1.0]])).equivalence(0.001)).all()


@pytest.mark.parametrize("margin", [0.0, -0.001, float("inf"), float("nan")])
def test_a_margin_that_is_not_positive_and_finite_is_rejected(margin: float) -> None:
    with pytest.raises(ValueError, match=r"margin is .*; allowed: above 0"):
        estimate(accuracies(1), ["s"] * ARMS, CONTRAST).equivalence(margin)


def test_the_variance_of_pairs_is_shrunk_to_the_models_with_8_prior_degrees_of_freedom() -> None:
    values = accuracies(2)
    found = estimate(values, ["s"] * ARMS, CONTRAST)
    own, model = np.var(values[1] - values[2], ddof=1), 2 * block_model.fit(values).variance
    assert found.error[0] ** 2 * SEEDS == pytest.approx((8 * model + 5 * own) / 13)
    assert found.df[0] == 13


def test_each_stratum_has_its_own_variance_and_contrasts_across_strata_use_pairs() -> None:
    values = np.concatenate([accuracies(3), 10 * accuracies(4)])
    strata = ["one"] * ARMS + ["other"] * ARMS
    inside, across, change = (np.zeros(2 * ARMS) for _ in range(3))
    inside[[0, 1]], change[[0, 1, ARMS, ARMS + 1]], across[[0, ARMS]] = (1, -1), (1, -1, -1, 1), (1, -1)
    found = estimate(values, strata, np.stack([inside, across, change]))
    alone = estimate(values[:ARMS], ["one"] * ARMS, inside[None, :ARMS])
    assert found.by_model.tolist() == [True, False, True]
    assert found.error[0] == alone.error[0]
    paired = scipy_stats.ttest_rel(values[0], values[ARMS])
    assert found.two_sided()[1] == pytest.approx(paired.pvalue)
    assert 5 + 8 >= found.df[2] > 5


def test_seeds_with_a_missing_trial_are_not_dropped() -> None:
    values = accuracies(5)
    values[1, 0] = np.nan
    found = estimate(values, ["s"] * ARMS, CONTRAST)
    assert found.pairs.tolist() == [SEEDS - 1]
    assert found.value[0] != pytest.approx(found.paired[0])


def test_a_contrast_of_arms_without_a_common_seed_has_no_p_value() -> None:
    values = accuracies(6, arms=3)
    values[0, :3] = values[1, 3:] = np.nan
    found = estimate(values, ["s"] * 3, np.array([[1.0, -1.0, 0.0]]))
    assert found.pairs.tolist() == [0]
    assert np.isnan(found.two_sided()).all()


def test_a_batch_of_studies_has_the_same_estimates_as_each_study_alone() -> None:
    many = accuracies(7, studies=20)
    many[:, 3, 2] = np.nan
    weights = np.array([[1.0, -1.0, 0, 0, 0], [0, 1.0, 0, -1.0, 0]])
    strata = ["s", "s", "s", "s", "t"]
    together = estimate(many, strata, weights)
    for place, values in enumerate(many):
        alone = estimate(values, strata, weights)
        for name in ("value", "error", "df", "spread", "paired"):
            assert_allclose(getattr(together, name)[place], getattr(alone, name), atol=1e-14)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_at_the_nominal_rate_and_false_positives_are_rare(seeds: int) -> None:
    values = accuracies(8, seeds=seeds, studies=4000)
    found = estimate(values, ["s"] * ARMS, CONTRAST)
    low, high = found.interval()
    assert 0.94 < np.mean((low < 0) & (high > 0)) < 0.97
    assert np.mean(found.two_sided() < 0.05) < 0.06


def test_extra_seeds_of_the_control_alone_do_not_change_its_contrasts() -> None:
    values = accuracies(10)
    more = np.concatenate([values, np.full((ARMS, 3), np.nan)], axis=1)
    more[2, SEEDS:] = 0.99
    one, other = (estimate(each, ["s"] * ARMS, CONTRAST) for each in (values, more))
    for name in ("value", "error", "df"):
        assert_allclose(getattr(other, name), getattr(one, name))


def test_a_stratum_with_more_arms_than_the_limit_is_judged_by_pairs() -> None:
    values = accuracies(11, arms=block_model.MOST_ARMS + 1, seeds=3)
    weights = np.zeros((1, len(values)))
    weights[0, :2] = 1, -1
    found = estimate(values, ["s"] * len(values), weights)
    assert found.by_model.tolist() == [False]
    assert found.two_sided()[0] == pytest.approx(scipy_stats.ttest_rel(values[0], values[1]).pvalue)


def test_a_single_seed_gives_no_standard_error_and_no_p_value() -> None:
    found = estimate(accuracies(9, seeds=1), ["s"] * ARMS, CONTRAST)
    assert found.pairs.tolist() == [1]
    assert np.isnan(found.error).all() and np.isnan(found.two_sided()).all()
