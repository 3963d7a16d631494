"""The study's statistics on arrays. One value a seed; pairs stand at the same position in both arrays."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


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
    p: float | None  # paired t test
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
        # Without spread the t statistic is 0/0 or infinite, and scipy warns.
        unspread = 1.0 if described.mean == 0 else 0.0
        p = float(stats.ttest_1samp(values, 0.0).pvalue) if described.sd else unspread
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
    the power is 0.8. From the noncentral t distribution. Null for fewer than two seeds.
    """
    from scipy import special

    if n < 2:
        return None
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    noncentrality = float(special.nctdtrinc(n - 1, 1 - power, critical))
    return noncentrality * deviation * math.sqrt(2 / n)


def smallest_exact_p(n: int) -> float:
    """The smallest two-sided p that the exact sign-flip test can give with `n` pairs."""
    return min(1.0, 2.0 * 0.5**n)
