"""The study's statistics on arrays. One value a seed; pairs stand at the same position in both arrays."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

MARGIN = 0.001  # accuracy: a difference of less than 0.1 points is taken to be none
NO_SPREAD = 1e-9  # values that are all alike (of few test images, say) give a t statistic of rounding over rounding


@dataclass(frozen=True)
class Summary:
    """Mean of `n` values, their sample standard deviation, and the mean's 95 % t interval. Null: n is too small."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """Mean of `n` paired differences with their deviation, 95 % t interval, and two-sided p values."""

    n: int
    estimate: float | None
    sd: float | None
    low: float | None
    high: float | None
    p: float | None  # paired t test; null for one pair, and for differences that are all alike and not zero
    p_exact: float | None  # sign-flip test; never below `smallest_exact_p(n)`
    effect_size: float | None  # mean over deviation of the differences (Cohen's d_z); null without a spread


@dataclass(frozen=True)
class Welch:
    """Difference of two means that are not paired, with its 95 % interval and two-sided p (Welch 1947)."""

    n: int  # values of both arms
    n_treated: int
    n_control: int
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None  # null where an arm has one value, or neither has a spread
    df: float | None  # of the t distribution, after Welch and Satterthwaite
    effect_size: float | None  # difference over the root of the mean variance; null without a spread


@dataclass(frozen=True)
class Equivalence:
    """Whether paired differences are smaller than a margin: two one-sided t tests (Schuirmann 1987)."""

    n: int
    estimate: float | None
    low: float | None  # of the 90 % interval, which lies inside the margin where p is below 0.05
    high: float | None
    p: float | None  # the larger of the two; null for one pair, and for differences that are all alike
    margin: float


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation over `n` things, and its 95 % interval. Null: n is too small."""

    n: int
    rho: float | None
    low: float | None
    high: float | None


def summary(values: Sequence[float], level: float = 0.95) -> Summary:
    """Describe one arm's values [n]."""
    import numpy as np
    from scipy import special

    n = len(values)
    if n == 0:
        return Summary(0, None, None, None, None)
    mean = float(np.mean(values))
    if n == 1:
        return Summary(1, mean, None, None, None)
    sd = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def paired(treated: Sequence[float], control: Sequence[float]) -> Paired:
    """Compare two arms [n] seed by seed: treated minus control. Raises `ValueError` where lengths differ."""
    return differences(_paired(treated, control))


def differences(values: Sequence[float], level: float = 0.95) -> Paired:
    """Judge paired differences [n] against zero; the interval is of this level."""
    from scipy import stats

    described = summary(values, level)
    p = effect_size = None
    if described.sd is not None and described.mean is not None:
        if described.sd > NO_SPREAD:
            p = float(stats.ttest_1samp(values, 0.0).pvalue)
            effect_size = described.mean / described.sd
        elif abs(described.mean) <= NO_SPREAD:
            p = 1.0
    exact = sign_flip(values) if described.n else None
    return Paired(described.n, described.mean, described.sd, described.low, described.high, p, exact, effect_size)


def welch(treated: Sequence[float], control: Sequence[float]) -> Welch:
    """Compare two arms [n] and [m] whose values are not paired: treated minus control."""
    from statsmodels.stats.weightstats import CompareMeans

    one, other = summary(treated), summary(control)
    n = one.n + other.n
    if one.mean is None or other.mean is None:
        return Welch(n, one.n, other.n, None, None, None, None, None, None)
    estimate = one.mean - other.mean
    if one.sd is None or other.sd is None or max(one.sd, other.sd) <= NO_SPREAD:
        return Welch(n, one.n, other.n, estimate, None, None, None, None, None)
    both = CompareMeans.from_data(treated, control)
    _, p, df = map(float, both.ttest_ind(usevar="unequal"))
    low, high = map(float, both.tconfint_diff(usevar="unequal"))
    return Welch(n, one.n, other.n, estimate, low, high, p, df, estimate / math.hypot(one.sd, other.sd) * math.sqrt(2))


def equivalence(treated: Sequence[float], control: Sequence[float], margin: float = MARGIN) -> Equivalence:
    """Ask whether two arms [n], paired by seed, differ by less than `margin` (accuracy; 0.001 is 0.1 points).

    Raises `ValueError` where lengths differ and for a margin that is not above 0.
    """
    return equivalent_to_zero(_paired(treated, control), margin)


def equivalent_to_zero(values: Sequence[float], margin: float = MARGIN) -> Equivalence:
    """Ask whether paired differences [n] are within `margin` of zero."""
    from scipy import special
    from statsmodels.stats.weightstats import DescrStatsW

    if not 0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; allowed: above 0 (accuracy, 0.001 is 0.1 points)")
    described = summary(values)
    if described.sd is None or described.mean is None or described.sd <= NO_SPREAD:
        return Equivalence(described.n, described.mean, None, None, None, margin)
    p = float(DescrStatsW(values).ttost_mean(-margin, margin)[0])
    half = float(special.stdtrit(described.n - 1, 0.95)) * described.sd / math.sqrt(described.n)
    return Equivalence(described.n, described.mean, described.mean - half, described.mean + half, p, margin)


def pairs_needed(estimate: float, sd: float, *, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """How many pairs a two-sided paired t test needs to find this difference at this spread of differences.

    Null where the difference or the spread is zero, or more than a million pairs would be needed.
    """
    from scipy import stats

    if abs(estimate) <= NO_SPREAD or sd <= NO_SPREAD:
        return None
    size = abs(estimate) / sd

    def reached(n: int) -> bool:
        critical = stats.t.ppf(1 - alpha / 2, n - 1)
        return bool(stats.nct.sf(critical, n - 1, size * math.sqrt(n)) >= power)

    low, high = 1, 2
    while not reached(high):
        low, high = high, 2 * high
        if high > 2**20:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _paired(treated: Sequence[float], control: Sequence[float]) -> list[float]:
    if len(treated) != len(control):
        raise ValueError(f"treated has {len(treated)} values and control {len(control)}; pairs need as many of both")
    return [float(one) - float(other) for one, other in zip(treated, control, strict=True)]


def sign_flip(values: Sequence[float]) -> float:
    """Two-sided p of the mean of differences [n] under random signs (Fisher 1935): exact over all 2**n up to n = 16,
    above that estimated from 1,999 sign vectors of a fixed seed.

    Raises `ValueError` for values that are not finite.
    """
    import numpy as np
    from scipy import stats

    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"values has {int((~np.isfinite(array)).sum())} that are not finite; allowed: finite numbers")
    if len(array) < 2:
        return 1.0
    # As whole numbers, whose sums are exact: accuracies are counts over counts, so sums tie, and rounding would part
    # them. scipy goes through all signs where they are no more than what it may draw.
    whole = np.round(array / NO_SPREAD)
    most = 2**16 if len(array) <= 16 else 1_999
    signs: dict[str, Any] = {"permutation_type": "samples", "n_resamples": most, "batch": 1024, "rng": 0}
    return float(stats.permutation_test((whole,), np.sum, **signs).pvalue)


def spent(looks: Sequence[int], alpha: float = 0.05) -> list[float]:
    """The level of each of several looks at growing data: to each its share of `alpha` by the values that it adds.

    `looks` [k] are the numbers of values at each, which grow. A test that keeps its own level at every look, whatever
    it is, then finds something false at any of them with a probability of at most `alpha`, since probabilities of
    several events add up to no less than that of any of them (Bonferroni); looks at the same data are alike, so it is
    less. Linear spending, after Lan and DeMets 1983.
    """
    return [alpha * (here - before) / looks[-1] for before, here in zip((0, *looks), looks, strict=False)]


def rank_correlation(one: Sequence[float], other: Sequence[float], level: float = 0.95) -> RankCorrelation:
    """Spearman's correlation of two measures [n] of the same things, with an interval on Fisher's scale, whose standard
    error is sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright 2000).

    Null for fewer than three, and where all are tied; the interval is null for fewer than four. A perfect correlation
    has no place on that scale; it is put there half a step from the next that n ranks can have, so that few that agree
    by luck have a wide interval.
    """
    import numpy as np
    from scipy import special
    from scipy.stats import spearmanr

    n = len(one)
    if n < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return RankCorrelation(n, None, None, None)
    rho = float(spearmanr(one, other).statistic)
    if n < 4:
        return RankCorrelation(n, rho, None, None)
    most = 1 - 6 / (n**3 - n)
    scaled = math.atanh(max(-most, min(most, rho)))
    half = float(special.ndtri((1 + level) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return RankCorrelation(n, rho, min(rho, math.tanh(scaled - half)), max(rho, math.tanh(scaled + half)))


def noise_margin(groups: Sequence[Sequence[float]], level: float = 0.95) -> float | None:
    """By how much one of two equals may seem worse: what their difference stays below with probability `level`, judged
    from the spread inside of groups [k][n] of equals. Null where no group has two.

    The standard deviation is pooled over groups, a difference has sqrt(2) of it, and the quantile is Student's, since
    the deviation of few is itself uncertain.
    """
    import numpy as np
    from scipy import special

    free = sum(max(0, len(group) - 1) for group in groups)
    if free == 0:
        return None
    squares = sum(float(np.var(group)) * len(group) for group in groups if len(group) > 1)
    return float(special.stdtrit(free, level)) * math.sqrt(2 * squares / free)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted over their family (Holm 1979), in the same order."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def detectable(n: int, deviation: float, *, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest true difference that a paired t test on `n` seeds finds with `power`.

    `deviation` is the seed-to-seed standard deviation of an arm; pairs are taken not to correlate, so that a
    difference has sqrt(2) of it. Two-sided at `alpha`; the far tail is left out, as its share is below 1e-5 where
    the power is 0.8. Null for fewer than two seeds.
    """
    if n < 2:
        return None
    critical = _solve(lambda t: alpha / 2 - _upper_tail(t, 0.0, n - 1))
    noncentrality = _solve(lambda d: _upper_tail(critical, d, n - 1) - power)
    return noncentrality * deviation * math.sqrt(2 / n)


def _upper_tail(t: float, noncentrality: float, df: int) -> float:
    """P(T > t) of the noncentral t distribution, by Simpson's rule over its chi-distributed denominator s.

    P = integral of Phi(noncentrality - t s) f(s) ds with f(s) = 2 (df/2)^(df/2) / Gamma(df/2) s^(df-1) exp(-df s^2/2).
    Here and not from scipy, whose import takes longer than the whole plan, which is to answer at once. To four
    digits, and to two in the corner of two seeds and a tiny alpha, where the integrand is steep.
    """
    normal, steps, low, high = NormalDist(), 400, -16.0, math.log(1 + 8 / math.sqrt(df))
    log_scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    total = 0.0
    for step in range(steps + 1):  # over log s, in which the integrand is smooth however large t is
        log_s = low + (high - low) * step / steps
        s = math.exp(log_s)
        density = math.exp(log_scale + df * log_s - df * s * s / 2)
        weight = 1 if step in (0, steps) else 4 if step % 2 else 2
        total += weight * normal.cdf(noncentrality - t * s) * density
    return total * (high - low) / steps / 3


def _solve(rising: Callable[[float], float]) -> float:
    """Where a rising function crosses zero, to 12 digits, at 0 or above."""
    low, high = 0.0, 1.0
    while rising(high) < 0:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


def smallest_exact_p(n: int) -> float:
    """The smallest two-sided p that the exact sign-flip test can give with `n` pairs."""
    return min(1.0, 2.0 * 0.5**n)
