"""The model that judges contrasts: accuracy = arm + seed + error within a stratum, by least squares.

All arms of a stratum use the same seeds, so a seed is a block. A few pairs estimate the spread of their difference
poorly. The residuals of all arms estimate it well, but arms may differ in spread. So a contrast's variance is
moderated: the variance of its own pairs is shrunk towards the model's, with `shipped_prior` degrees of freedom. This is
the posterior variance of limma (Smyth 2004, doi:10.2202/1544-6115.1027), with a fixed prior instead of an estimated
one; docs/statistics.md has the simulations.

Arrays may have leading axes, for many studies at once. The same trials must be missing in all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]

MOST_ARMS = 2_000  # in a stratum; the matrix grows with their square, so larger strata are judged by their pairs
NO_SPREAD = 1e-9  # below this standard error, a t statistic would be a ratio of rounding errors


@dataclass(frozen=True)
class Fit:
    """Least-squares fit in one stratum. `means` [..., A] are known up to a constant, `covariance` [A, A] up to the
    factor `variance`.

    `variance` [...] is the mean square of the residuals, with `df` degrees of freedom; NaN if `df` is 0.
    """

    means: Array
    covariance: Array
    projection: Array  # [A, A]: projects weights onto the estimable ones
    variance: Array
    df: int

    def leverage(self, weights: Array) -> Array:
        """Squared standard errors of contrasts [C, A], divided by `variance`."""
        return np.asarray(((weights @ self.covariance) * weights).sum(1))

    def estimates(self, weights: Array) -> Flags:
        """Which contrasts [C, A] are estimable: those that the projection does not change."""
        return np.asarray((np.abs(weights @ self.projection - weights) < 1e-9).all(1))


@dataclass(frozen=True)
class Estimates:
    """Estimates of C contrasts, each [..., C]. NaN if a contrast cannot be estimated, or has no standard error.

    `pairs` [C] counts the seeds that have all arms of a contrast; `spread` is the standard deviation of the differences
    at these seeds.
    """

    pairs: npt.NDArray[np.int64]
    by_model: Flags  # [C]: whether the weights sum to 0 in each stratum; other contrasts are judged by their pairs
    value: Array
    error: Array
    df: Array
    spread: Array
    paired: Array  # mean of the pairs' differences

    def p(self, at: float = 0.0) -> tuple[Array, Array]:
        """One-sided p values for a true difference of at most `at`, and of at least `at`."""
        from scipy import special

        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.where(self.error > NO_SPREAD, (self.value - at) / self.error, np.nan)
        return special.stdtr(self.df, -t), special.stdtr(self.df, t)

    def two_sided(self) -> Array:
        """p values for no difference. Without spread: 1 for a difference of 0, NaN for any other difference."""
        same = (self.error <= NO_SPREAD) & (np.abs(self.value) <= NO_SPREAD)
        return np.where(same, 1.0, 2 * np.minimum(*self.p()))

    def equivalence(self, margin: float) -> Array:
        """p values for a difference of at least `margin`: two one-sided tests (Schuirmann 1987).

        Raises `ValueError` unless `margin` is above 0 and finite.
        """
        if not 0 < margin < math.inf:
            raise ValueError(f"margin is {margin}; allowed: above 0 (accuracy, 0.001 is 0.1 points)")
        return np.maximum(self.p(-margin)[0], self.p(margin)[1])

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Ends of the two-sided t interval."""
        from scipy import special

        half = special.stdtrit(self.df, (1 + level) / 2) * self.error
        return self.value - half, self.value + half

    def pairs_alone(self) -> "Estimates":
        """The estimates from the pairs alone: paired t tests."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return replace(self, value=self.paired, error=self.spread / np.sqrt(self.pairs), df=self.pairs - 1.0)


def shipped_prior(own: Any) -> Any:
    """Degrees of freedom of the prior, for pairs with `own` degrees of freedom: twice as many, and 8 at most.

    So the prior has 4 at three seeds and 8 from five seeds on. With few pairs, a prior of 8 would dominate.
    """
    return np.minimum(8.0, 2.0 * own)


def fit(values: Array) -> Fit:
    """Fit accuracies [..., A, S] of A arms at S seeds; NaN where a trial is missing.

    The seeds' means are eliminated first, which leaves a system of A equations.
    """
    present = ~np.isnan(values[(0,) * (values.ndim - 2)])
    counts = present.astype(float)
    shares = counts / np.maximum(counts.sum(0), 1.0)  # weight of each arm in the seeds' means
    normal = np.diag(counts.sum(1)) - shares @ counts.T
    inverse = np.linalg.pinv(normal, hermitian=True)
    centre = np.nanmean(values, axis=(-2, -1), keepdims=True) if present.any() else 0.0
    filled = np.where(present, values - centre, 0.0)  # centred, for numerical precision
    means = (filled.sum(-1) - filled.sum(-2) @ shares.T) @ inverse
    seeds = filled.sum(-2) / np.maximum(counts.sum(0), 1.0) - means @ shares
    left = np.where(present, filled - means[..., :, None] - seeds[..., None, :], 0.0)
    df = int(present.sum() - present.any(0).sum()) - int(np.linalg.matrix_rank(normal, hermitian=True))
    squares = (left**2).sum((-2, -1))
    variance = squares / df if df > 0 else np.full_like(squares, np.nan)
    return Fit(means, inverse, inverse @ normal, variance, df)


def estimate(
    values: Array, strata: Sequence[Any], weights: Array, *, prior_df: float | None = None, pairs_alone: bool = False
) -> Estimates:
    """Estimate contrasts with `weights` [C, A] from accuracies [..., A, S] of arms in `strata` [A].

    A contrast whose weights are all 0 is not estimated. With `pairs_alone`, all contrasts are judged by their pairs.
    """
    groups = [np.array([each == stratum for each in strata]) for stratum in dict.fromkeys(strata)]
    within = np.array([weights[:, group].sum(1) for group in groups])
    small = np.array([group.sum() <= MOST_ARMS or not weights[:, group].any() for group in groups])
    by_model = np.all(np.abs(within) < 1e-12, axis=0) & small.all()
    pairs, paired, spread = _pairs(values, weights)
    found = Estimates(pairs, by_model, paired, paired, paired, spread, paired).pairs_alone()
    if pairs_alone or not by_model.any():
        return replace(found, by_model=np.zeros_like(by_model))
    model = _Sums.of(values, groups, weights)
    own = pairs - 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        most = shipped_prior(own) if prior_df is None else prior_df
        prior = np.clip(model.df - own, 0.0, most)  # the model includes the pairs themselves
        moderated = (prior * model.spread**2 + np.where(own > 0, own * spread**2, 0.0)) / (prior + own)
        error = np.sqrt(moderated * model.scale)
    usable = model.estimable & by_model & (pairs > 0)
    return replace(
        found,
        by_model=usable,
        value=np.where(usable, model.value, paired),
        error=np.where(usable, error, found.error),
        df=np.where(usable, prior + own, own),
    )


def joined(parts: Sequence[Estimates]) -> Estimates:
    """Concatenate estimates along the axis of contrasts."""
    return Estimates(*(np.concatenate([getattr(part, each.name) for part in parts], -1) for each in fields(Estimates)))


@dataclass(frozen=True)
class _Sums:
    """Each contrast [..., C], summed over the fits of all strata."""

    value: Array
    spread: Array  # standard deviation of the difference of one pair
    scale: Array  # squared error divided by squared spread; 1 / number of pairs if no trial is missing
    df: Array  # degrees of freedom of the spread; over several strata by Satterthwaite (1946)
    estimable: Flags  # [C]

    @classmethod
    def of(cls, values: Array, groups: Sequence[Flags], weights: Array) -> "_Sums":
        fits = [fit(values[..., group, :]) for group in groups]
        parts = [weights[:, group] for group in groups]
        sizes = np.stack([(part**2).sum(1) for part in parts])  # [K, C], of K strata
        leverages = np.stack([each.leverage(part) for part, each in zip(parts, fits, strict=True)])
        variances = np.stack([each.variance[..., None] for each in fits], axis=-2)  # [..., K, 1]
        shares = np.where(sizes > 0, variances * sizes, 0.0)
        total, freedoms = shares.sum(-2), np.array([[max(each.df, 1)] for each in fits])
        with np.errstate(invalid="ignore", divide="ignore"):
            squared = np.where(sizes > 0, variances * leverages, 0.0).sum(-2)
            scale = np.where(total > 0, squared / total, leverages.sum(0) / sizes.sum(0))
            df = np.where(total > 0, total**2 / (shares**2 / freedoms).sum(-2), 0.0)
        known = [each.estimates(part) for part, each in zip(parts, fits, strict=True)]
        value = np.stack([each.means @ part.T for part, each in zip(parts, fits, strict=True)]).sum(0)
        return cls(value, np.sqrt(total), scale, df, np.all(known, axis=0))


def joint(values: Array, weights: Array) -> tuple[float, float, int, float]:
    """Joint F test of contrasts [Q, A] of one stratum: F, its two degrees of freedom, and the p value.

    NaN if the model has no residuals, or if not all of the contrasts are estimable.
    """
    from scipy import special

    fitted = fit(values)
    effects = weights @ fitted.means
    covariance = weights @ fitted.covariance @ weights.T * fitted.variance
    df = float(np.linalg.matrix_rank(weights))
    if fitted.df < 1 or fitted.variance <= NO_SPREAD**2 or not fitted.estimates(weights).all():
        return math.nan, df, fitted.df, math.nan
    found = float(effects @ np.linalg.pinv(covariance, hermitian=True) @ effects) / df
    return found, df, fitted.df, float(special.fdtrc(df, fitted.df, found))


def _pairs(values: Array, weights: Array) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """Number, mean and standard deviation of each contrast's differences, over the seeds that have all of its arms."""
    counts, means, spreads = [], [], []
    for row in weights:
        used = row != 0
        differences = np.einsum("a,...as->...s", row[used], values[..., used, :])
        if not used.any():
            differences = np.full_like(differences, np.nan)
        differences = differences[..., ~np.isnan(differences[(0,) * (differences.ndim - 1)])]
        n = differences.shape[-1]
        counts.append(n)
        nothing = np.full(differences.shape[:-1], np.nan)
        means.append(differences.mean(-1) if n else nothing)
        spreads.append(differences.std(-1, ddof=1) if n > 1 else nothing)
    return np.array(counts), np.stack(means, -1), np.stack(spreads, -1)
