"""The study's statistics on arrays. One value a seed; pairs stand at the same position in both arrays."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


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
    p: float | None  # paired t test; null for one pair, and for differences that are all alike
    p_exact: float | None  # sign-flip test; never below 2 / 2**n


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
    if len(treated) != len(control):
        raise ValueError(f"treated has {len(treated)} values and control {len(control)}; pairs need as many of both")
    return differences([one - other for one, other in zip(treated, control, strict=True)])


def differences(values: Sequence[float]) -> Paired:
    """Judge paired differences [n] against zero."""
    from scipy import stats

    described = summary(values)
    p = None
    if described.n >= 2:
        # Differences that are all alike (of few test images, say) have no spread to judge them by: the t statistic
        # would be rounding over rounding.
        if described.sd is not None and described.sd > 1e-9:
            p = float(stats.ttest_1samp(values, 0.0).pvalue)
        elif abs(described.mean or 0.0) <= 1e-9:
            p = 1.0
    exact = sign_flip(values) if described.n else None
    return Paired(described.n, described.mean, described.sd, described.low, described.high, p, exact)


def sign_flip(values: Sequence[float], most: int = 16) -> float:
    """Exact two-sided p of the mean under random signs (Fisher 1935), over all 2**n; n is at most `most`.

    Above that it is estimated from 100,000 sign vectors of a fixed seed.
    """
    import numpy as np

    array = np.asarray(values, dtype=float)
    if len(array) <= most:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(array))))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(100_000, len(array)))
        signs[0] = 1.0
    sums = np.abs(signs @ array)
    return float(np.mean(sums >= abs(array.sum()) * (1 - 1e-12)))


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
