"""Summaries, tests and intervals as pure functions of arrays, one value per seed. Paired arrays have the same order.

scipy.stats and statsmodels take over 0.2 s to import, so each function imports only the parts that it needs.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MARGIN = 0.001  # accuracy: arms that differ by less than 0.1 points are equivalent
FEW_TEACHERS = 5  # with fewer teachers, the spread between teachers is poorly known
NO_SPREAD = 1e-9  # below this standard deviation, a t statistic would be a ratio of rounding errors


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of `n` values, with a t interval of the mean. None where `n` is too small."""

    n: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """Mean and standard deviation of `n` paired differences, with a 95 % t interval and two-sided p values."""

    n: int
    estimate: float | None
    sd: float | None
    low: float | None
    high: float | None
    p: float | None  # paired t test; None for one pair, and for equal differences other than zero
    p_exact: float | None  # sign-flip test; at least `smallest_exact_p(n)`
    effect_size: float | None  # mean over standard deviation (Cohen's d_z); None without spread


@dataclass(frozen=True)
class Welch:
    """Difference of two unpaired means, with its 95 % interval and two-sided p value (Welch 1947)."""

    n: int  # values of both arms together
    n_treated: int
    n_control: int
    estimate: float | None
    low: float | None
    high: float | None
    p: float | None  # None if an arm has fewer than two values, or neither has a spread
    df: float | None  # degrees of freedom (Welch-Satterthwaite)
    effect_size: float | None  # difference over the root of the mean variance; None without spread


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation over `n` pairs, with its 95 % interval. None where `n` is too small."""

    n: int
    rho: float | None
    low: float | None
    high: float | None


def summary(values: Sequence[float], level: float = 0.95) -> Summary:
    """Mean, standard deviation and t interval of one arm's values [n]."""
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
    """Compare two arms [n] seed by seed: treated minus control. Raises `ValueError` if their lengths differ."""
    if len(treated) != len(control):
        raise ValueError(f"treated has {len(treated)} values and control {len(control)}; pairs need equal numbers")
    return differences([float(one) - float(other) for one, other in zip(treated, control, strict=True)])


def differences(values: Sequence[float], level: float = 0.95) -> Paired:
    """Test paired differences [n] against zero. `level` is the level of the interval."""
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
    """Compare two unpaired arms [n] and [m]: treated minus control."""
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


def less_one(n: int, more: float = 0.0) -> float:
    """Degrees of freedom of a standard deviation of `n` values, plus `more` from other sources."""
    return n - 1.0 + more


def pairs_needed(
    estimate: float, sd: float, *, df: Callable[[int], float] = less_one, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """The number of pairs for which a two-sided t test finds a true difference `estimate` with `power`.

    `sd` is the standard deviation of the differences; `df` maps a number of pairs to its degrees of freedom. Returns
    None if the difference or `sd` is zero, or above 2**20 pairs. Ignores the far tail, as `detectable` does.
    """
    from scipy import special

    if abs(estimate) <= NO_SPREAD or sd <= NO_SPREAD:
        return None
    size = abs(estimate) / sd

    def reached(n: int) -> bool:
        critical = special.stdtrit(df(n), 1 - alpha / 2)
        return bool(special.nctdtr(df(n), size * math.sqrt(n), critical) <= 1 - power)

    # Bracket from below: nctdtr is NaN for large noncentralities. TTestPower.solve_power of statsmodels returns NaN or
    # too few pairs for differences of over five standard deviations.
    high = next((2**k for k in range(1, 21) if reached(2**k)), None)
    return None if high is None else bisect_left(range(high), True, lo=2, key=reached)


def sign_flip(values: Sequence[float]) -> float:
    """Two-sided p value of a sign-flip permutation test on the mean of differences [n] (Fisher 1935).

    Exact up to n = 16 (all 2**n sign vectors); for larger n, estimated from 1,999 sign vectors with a fixed seed.
    Raises `ValueError` for values that are not finite.
    """
    import numpy as np
    from scipy import stats

    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"values has {int((~np.isfinite(array)).sum())} non-finite numbers; allowed: finite numbers")
    if len(array) < 2:
        return 1.0
    # Accuracies are ratios of counts, so sums tie. Integers add up exactly; float rounding would break the ties.
    # scipy enumerates all sign vectors if there are at most `n_resamples`.
    whole = np.round(array / NO_SPREAD)
    most = 2**16 if len(array) <= 16 else 1_999
    signs: dict[str, Any] = {"permutation_type": "samples", "n_resamples": most, "batch": 1024, "rng": 0}
    return float(stats.permutation_test((whole,), np.sum, **signs).pvalue)


def spent(looks: Sequence[int], alpha: float = 0.05) -> list[float]:
    """The significance level of each interim look: its share of `alpha` is the share of values that the look adds.

    `looks` [k] are the increasing numbers of values at the looks. By Bonferroni's inequality, tests at these levels
    have a false-positive rate of at most `alpha` over all looks; the rate is lower, since looks share data. This is
    linear alpha spending (Lan and DeMets 1983).
    """
    return [alpha * (here - before) / looks[-1] for before, here in zip((0, *looks), looks, strict=False)]


def rank_correlation(one: Sequence[float], other: Sequence[float], level: float = 0.95) -> RankCorrelation:
    """Spearman's correlation of two measures [n], with an interval on Fisher's z scale.

    The standard error is sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright 2000). The result is None for n < 3 or if
    all values tie; the interval is None for n < 4. A rho of 1 would be infinite on the z scale, so it is clipped to
    half a step below 1. A step is the distance between the values that n ranks allow. So a few ranks that agree by luck
    get a wide interval.
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
    """The `level` quantile of the difference between two equally good trials, from groups [k][n] of such trials.

    The standard deviation is pooled over groups and multiplied by sqrt(2) for a difference; the quantile is Student's.
    Returns None if no group has two values.
    """
    import numpy as np
    from scipy import special

    free = sum(max(0, len(group) - 1) for group in groups)
    if free == 0:
        return None
    squares = sum(float(np.var(group)) * len(group) for group in groups if len(group) > 1)
    return float(special.stdtrit(free, level)) * math.sqrt(2 * squares / free)


def holm(p: Any) -> Any:
    """Adjust p values [..., n] over the last axis, each row a family (Holm 1979).

    A missing p value (NaN) stays missing and counts as 1 in its family. statsmodels adjusts one family per call, but
    simulations have thousands.
    """
    import numpy as np

    p = np.asarray(p, dtype=float)
    counted = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(counted, axis=-1)
    scaled = np.take_along_axis(counted, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(counted)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(scaled, -1), 1.0), -1)
    return np.where(np.isnan(p), np.nan, adjusted)


def detectable(
    n: int, sd: float, *, df: Callable[[int], float] = less_one, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """The smallest true difference that a two-sided t test on `n` pairs finds with `power`.

    `sd` is the standard deviation of the differences; `df` maps a number of pairs to its degrees of freedom. Ignores
    the far tail, which is below 1e-5 at a power of 0.8. Returns None for fewer than two pairs.
    """
    return None if n < 2 else noncentrality(df(n), power, alpha) * sd / math.sqrt(n)


def detectable_over_teachers(
    teachers: int, seeds: int, per_seed: int, deviation: float, *, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """The smallest gain over a control without a teacher that a verdict over teachers finds with `power`.

    Each of `seeds` meets `per_seed` of the `teachers`. `deviation` is the students' standard deviation, both between
    teachers and between seeds. The degrees of freedom are the smaller of those of teachers and seeds. Returns None for
    fewer than two of either.
    """
    fewest = min(teachers, seeds)
    error = deviation * math.sqrt(1 / teachers + 1 / seeds + 1 / (seeds * per_seed))
    return None if fewest < 2 else noncentrality(fewest - 1, power, alpha) * error


def t_quantile(df: float, alpha: float = 0.05) -> float:
    """The critical value of a two-sided t test: 12.7 at 1 degree of freedom, 4.3 at 2."""
    from scipy import special

    return float(special.stdtrit(df, 1 - alpha / 2))


def noncentrality(df: float, power: float, alpha: float) -> float:
    """The true difference, in standard errors, that a two-sided t test finds with `power`."""
    from scipy import special

    return float(special.nctdtrinc(df, 1 - power, t_quantile(df, alpha)))


def smallest_exact_p(n: int) -> float:
    """The smallest two-sided p value that the exact sign-flip test can return for `n` pairs."""
    return min(1.0, 2.0 * 0.5**n)
