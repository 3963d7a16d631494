"""Statistics against scipy, statsmodels and counting by hand."""

import gc
import itertools
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from tune_kd.analysis import statistics

values = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@given(values)
def test_a_summary_has_the_mean_sample_deviation_and_t_interval(some: list[float]) -> None:
    found = statistics.summary(some)
    assert found.n == len(some)
    assert found.mean == pytest.approx(np.mean(some))
    assert found.sd == pytest.approx(np.std(some, ddof=1))
    if found.sd:
        low, high = scipy_stats.t.interval(0.95, len(some) - 1, np.mean(some), scipy_stats.sem(some))
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_no_spread_and_an_empty_list_has_no_mean() -> None:
    assert statistics.summary([0.5]) == statistics.Summary(1, 0.5, None, None, None)
    assert statistics.summary([]) == statistics.Summary(0, None, None, None, None)
    assert statistics.paired([0.5], [0.4]).p is None


@given(values, st.randoms())
def test_paired_matches_scipys_paired_t_test(some: list[float], chance: object) -> None:
    other = list(np.random.default_rng(len(some)).normal(size=len(some)).round(3))
    found = statistics.paired(some, other)
    if found.sd == pytest.approx(0, abs=1e-9):
        return
    expected = scipy_stats.ttest_rel(some, other)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.estimate == pytest.approx(np.mean(some) - np.mean(other))
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@given(values)
def test_the_exact_p_value_enumerates_all_sign_flips(some: list[float]) -> None:
    sums = [abs(sum(sign * value for sign, value in zip(signs, some, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(some))]  # fmt: skip
    expected = np.mean([each >= abs(sum(some)) - 1e-9 for each in sums])
    assert statistics.sign_flip(some) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(9400, 9500), st.integers(9400, 9500)), min_size=2, max_size=6))
def test_equal_sums_of_image_counts_are_ties_despite_rounding(counts: list[tuple[int, int]]) -> None:
    """Accuracies over 10,000 images: sums of integers tie exactly, but rounding can break the ties of fractions."""
    apart = [one - other for one, other in counts]
    sums = [abs(sum(sign * each for sign, each in zip(signs, apart, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(apart))]  # fmt: skip
    found = statistics.paired([one / 10_000 for one, _ in counts], [other / 10_000 for _, other in counts])
    assert found.p_exact == pytest.approx(np.mean([each >= abs(sum(apart)) for each in sums]))


def test_sign_flip_rejects_non_finite_values() -> None:
    with pytest.raises(ValueError, match="1 non-finite numbers"):
        statistics.sign_flip([float("nan"), 0.1, 0.2])


def test_five_differences_of_one_sign_give_the_smallest_exact_p_value() -> None:
    assert statistics.sign_flip([0.1, 0.2, 0.3, 0.1, 0.2]) == statistics.smallest_exact_p(5) == 0.0625


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> Iterator[None]:
    """statsmodels collects garbage in every call of Holm's method; other tests' objects make that take 0.1 s."""
    gc.freeze()
    yield
    gc.unfreeze()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_matches_statsmodels_and_is_never_below_the_raw_p_value(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    assert adjusted == pytest.approx(multipletests(p_values, method="holm")[1])
    assert all(one >= other - 1e-12 for one, other in zip(adjusted, p_values, strict=True))


def test_equal_differences_have_no_p_value_unless_they_are_zero() -> None:
    """A t test of three equal differences of 1/359 would be a ratio of rounding errors, not evidence."""
    third = 1 / 359
    found = statistics.paired([0.9 + third, 0.8 + third, 0.7 + third], [0.9, 0.8, 0.7])
    assert found.p is None
    assert statistics.paired([0.5, 0.6], [0.5, 0.6]).p == 1.0


def test_paired_rejects_samples_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 values and control 1"):
        statistics.paired([0.1, 0.2], [0.1])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 35, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 21])
def test_a_detectable_difference_is_found_with_80_percent_power(n: int, alpha: float) -> None:
    found = statistics.detectable(n, 0.0015, alpha=alpha, df=lambda n: n + 7)
    assert found is not None
    critical = scipy_stats.t.ppf(1 - alpha / 2, n + 7)
    assert scipy_stats.nct.sf(critical, n + 7, found / 0.0015 * n**0.5) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("n", [3, 5, 10, 35])
def test_the_detectable_difference_matches_statsmodels(n: int) -> None:
    effect = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
    assert statistics.detectable(n, 0.0015) == pytest.approx(effect * 0.0015, rel=1e-4)


def test_a_difference_of_0_1_points_needs_about_38_seeds_at_a_deviation_of_0_15_points() -> None:
    needed = next(n for n in range(2, 100) if (statistics.detectable(n, 0.0015 * 2**0.5) or 1) <= 0.001)
    assert 34 <= needed <= 38
    assert statistics.detectable(1, 0.0015) is None


@given(values, st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=8))
def test_welch_matches_scipys_t_test_with_unequal_variances(some: list[float], other: list[float]) -> None:
    found = statistics.welch(some, other)
    assert (found.n, found.n_treated, found.n_control) == (len(some) + len(other), len(some), len(other))
    assert found.estimate == pytest.approx(np.mean(some) - np.mean(other))
    if max(np.std(some), np.std(other)) < 1e-6:
        assert found.p is None
        return
    with warnings.catch_warnings():  # scipy warns if one of the two has no spread
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = scipy_stats.ttest_ind(some, other, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.df) == (pytest.approx(expected.pvalue), pytest.approx(expected.df))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize(("some", "other"), [([], [1.0]), ([1.0], [0.5, 0.6]), ([1.0, 1.0], [0.5, 0.5])])
def test_welch_has_no_interval_and_no_p_value_without_a_spread(some: list[float], other: list[float]) -> None:
    found = statistics.welch(some, other)
    assert (found.low, found.high, found.p, found.effect_size) == (None, None, None, None)
    assert found.estimate == (None if not some else pytest.approx(np.mean(some) - np.mean(other)))


@pytest.mark.parametrize(("estimate", "sd"), [(0.001, 0.0015), (-0.001, 0.0015 * 2**0.5), (0.005, 0.002), (0.1, 0.05)])
def test_pairs_needed_is_the_smallest_count_with_80_percent_power(estimate: float, sd: float) -> None:
    needed = statistics.pairs_needed(estimate, sd)
    assert needed is not None
    power = TTestPower().power(abs(estimate) / sd, needed, 0.05)
    before = TTestPower().power(abs(estimate) / sd, needed - 1, 0.05) if needed > 2 else 0.0
    assert before < 0.8 <= power + 1e-9


@pytest.mark.parametrize("size", np.geomspace(0.01, 2, 30).tolist())
def test_pairs_needed_matches_statsmodels_on_a_grid_of_effect_sizes(size: float) -> None:
    needed = TTestPower().solve_power(effect_size=size, power=0.8, alpha=0.025, alternative="larger")
    assert statistics.pairs_needed(size, 1.0) == math.ceil(needed)


@pytest.mark.parametrize(("size", "pairs"), [(1e6, 2), (20.0, 2), (12.0, 2), (0.0028, 1_001_135), (0.0027, None)])
def test_pairs_needed_ranges_from_two_to_about_a_million(size: float, pairs: int | None) -> None:
    assert statistics.pairs_needed(size, 1.0) == pairs


def test_about_38_uncorrelated_or_20_correlated_pairs_find_a_difference_of_0_1_points() -> None:
    """With a deviation of 0.15 points, and pairs with correlations of 0 and 0.5."""
    assert statistics.pairs_needed(0.001, 0.0015 * 2**0.5) == pytest.approx(37, abs=2)
    assert statistics.pairs_needed(0.001, 0.0015) == pytest.approx(20, abs=2)


@pytest.mark.parametrize(("estimate", "sd"), [(0.0, 0.1), (0.1, 0.0), (1e-7, 1.0)])
def test_pairs_needed_returns_none_without_a_spread_or_for_a_negligible_effect(estimate: float, sd: float) -> None:
    assert statistics.pairs_needed(estimate, sd) is None


def test_the_effect_size_is_the_mean_difference_over_its_deviation() -> None:
    found = statistics.paired([0.5, 0.7, 0.6], [0.4, 0.5, 0.6])
    assert found.effect_size == pytest.approx(0.1 / 0.1)
    assert statistics.paired([0.5, 0.7], [0.4, 0.6]).effect_size is None  # equal differences


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 12])
def test_intervals_cover_at_their_nominal_rate(n: int) -> None:
    """With 10,000 draws each, three standard errors are 0.65 points at 95 % and 0.9 points at 90 %."""
    chance, draws, true = np.random.default_rng(7), 10_000, 0.002
    treated, control = chance.normal(0.952, 0.0015, (draws, n)), chance.normal(0.950, 0.002, (draws, n))
    covered = np.zeros(4)
    for one, other in zip(treated.tolist(), control.tolist(), strict=True):
        alone, apart = statistics.summary(one), statistics.paired(one, other)
        unpaired, narrow = statistics.welch(one, other), statistics.summary(np.subtract(one, other).tolist(), 0.9)
        covered += [alone.low < 0.952 < alone.high, apart.low < true < apart.high, unpaired.low < true < unpaired.high,
                    narrow.low < true < narrow.high]  # fmt: skip
    alone, paired, unpaired, narrow = covered / draws
    assert (alone, paired, narrow) == (*[pytest.approx(0.95, abs=0.007)] * 2, pytest.approx(0.90, abs=0.009))
    assert 0.943 < unpaired < 0.957 + 0.02 * (n < 5)  # Welch's interval is wide for few values: 96.4 % at three per arm


def test_looks_spend_the_level_in_proportion_to_their_added_seeds() -> None:
    assert statistics.spent([5]) == [0.05]
    assert statistics.spent([5, 10, 20]) == pytest.approx([0.0125, 0.0125, 0.025])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6).map(lambda steps: list(itertools.accumulate(steps))))
def test_all_looks_together_spend_exactly_the_level(looks: list[int]) -> None:
    assert sum(statistics.spent(looks)) == pytest.approx(0.05)
    assert min(statistics.spent(looks)) > 0


def test_the_rank_correlation_matches_scipy_and_has_a_fisher_z_interval() -> None:
    one, other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 4.0, 3.0, 6.0, 5.5]
    found = statistics.rank_correlation(one, other)
    rho = scipy_stats.spearmanr(one, other).statistic
    half = scipy_stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / 3)  # Bonett and Wright 2000
    assert found.rho == pytest.approx(rho)
    assert (found.low, found.high) == (pytest.approx(np.tanh(np.arctanh(rho) - half)),
                                       pytest.approx(np.tanh(np.arctanh(rho) + half)))  # fmt: skip


def test_the_rank_correlation_of_few_or_tied_values_is_none_or_uncertain() -> None:
    assert statistics.rank_correlation([1.0, 2.0], [1.0, 2.0]).rho is None
    assert statistics.rank_correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).rho is None
    three = statistics.rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (three.rho, three.low) == (pytest.approx(1.0), None)
    four = statistics.rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert four.low is not None and four.low < 0 < four.high == pytest.approx(1.0)  # luck, in 1 of 24 orders
    many = statistics.rank_correlation(range(30), range(30))
    assert many.low is not None and many.low > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.4, 0.8])
def test_the_rank_correlation_interval_covers_at_about_its_nominal_rate(rho: float) -> None:
    """For normal data with Pearson's correlation r, Spearman's correlation is 6 / pi * asin(r / 2)."""
    chance, draws, n = np.random.default_rng(5), 4000, 12
    r = 2 * np.sin(np.pi * rho / 6)
    covered = 0
    for _ in range(draws):
        one, noise = chance.standard_normal((2, n))
        found = statistics.rank_correlation(one, r * one + np.sqrt(1 - r**2) * noise)
        assert found.low is not None and found.high is not None
        covered += found.low <= rho <= found.high
    assert 0.93 <= covered / draws <= 0.98


def test_the_noise_margin_is_the_t_quantile_of_a_difference_of_equal_arms() -> None:
    groups = [[0.9, 0.92, 0.94], [0.5, 0.5]]
    deviation = np.sqrt((2 * 0.02**2 + 0) / 3)  # pooled, with 2 + 1 degrees of freedom
    assert statistics.noise_margin(groups) == pytest.approx(scipy_stats.t.ppf(0.95, 3) * np.sqrt(2) * deviation)
    assert statistics.noise_margin([[0.9], []]) is None


@pytest.mark.slow
def test_an_equal_arm_falls_behind_by_a_noise_margin_in_5_percent_of_draws() -> None:
    chance, draws = np.random.default_rng(3), 20_000
    behind = sum(
        float(np.subtract(*chance.normal(0, 0.01, 2))) > (statistics.noise_margin(chance.normal(0, 0.01, (2, 3))) or 0)
        for _ in range(draws)
    )
    assert 0.045 <= behind / draws <= 0.055
