"""Teachers as a random effect: a verdict that generalises over teachers, from the students of a few teachers.

The differences of a contrast are d[teacher, seed] = mean + teacher + seed + rest, where teacher, seed and rest are
random. Their mean has the variance (sum r^2 / N^2) teacher + (sum k^2 / N^2) seed + rest / N, where a teacher has r of
the N cells and a seed k. The components are estimated from the sums of squares of teachers, of seeds, and in total
(Henderson 1953, method 1, doi:10.2307/3001853). If each teacher meets each seed, this is the analysis of variance, and
the variance of the mean is (MS teacher + MS seed - MS rest) / N. The method handles any layout: a missing cell does not
remove other cells.

A negative component counts as zero, so the error is never below that of the larger component. The degrees of freedom
are Satterthwaite's (1946), and at least the smaller number of teachers or seeds minus one. Other arms do not moderate
the variance: they share the teachers, so they add no information about the spread between teachers.
"""

from dataclasses import dataclass, replace

import numpy as np

from tune_kd.analysis.block_model import Array, Estimates, Flags

COMPONENTS = ("teacher", "seed", "rest")


@dataclass(frozen=True)
class Crossed:
    """Estimates from differences over teachers and seeds [..., T, S]. NaN with fewer than two teachers or seeds.

    `variances` [..., 3] are those of `COMPONENTS`. If each seed has one teacher, the layout cannot separate the seeds
    from the rest: their component is NaN, and included in the rest.
    """

    teachers: int
    seeds: int
    cells: int
    mean: Array
    error: Array
    df: Array
    variances: Array

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Ends of the two-sided t interval of the mean."""
        from scipy import special

        half = special.stdtrit(self.df, (1 + level) / 2) * self.error
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class _Layout:
    """The parts of the variance of the mean in a layout. Axes of length C are the components that it can separate."""

    told: Flags  # [3]: whether the layout can separate a component
    solved: Array  # [C, 3]: maps sums of squares to components
    shares: Array  # [C]: weight of each component in the variance of the mean
    spread: Array  # [C, C]: half the variance of that variance, as a quadratic form of the components

    @classmethod
    def of(cls, present: Array) -> "_Layout":
        """`present` [T, S] is 1 for each existing cell. No row or column may be empty."""
        of_teacher, of_seed, total = present.sum(1), present.sum(0), present.sum()
        teachers, seeds = present.shape
        by_teacher, by_seed = (of_teacher**2).sum() / total, (of_seed**2).sum() / total
        expected = np.array(  # rows: sums of squares of teachers, seeds and total; columns: components
            [
                [total - by_teacher, teachers - by_seed, teachers - 1],
                [seeds - by_teacher, total - by_seed, seeds - 1],
                [total - by_teacher, total - by_seed, total - 1],
            ]
        )
        told = np.array([of_teacher.max() > 1, of_seed.max() > 1, True])
        solved = np.linalg.pinv(expected[:, told], rcond=1e-10)
        shares = np.array([by_teacher, by_seed, 1.0])[told] / total
        # The estimated variance of the mean is d'Qd. With Z = [teachers, seeds, 1], Q = a I + Z D Z', and the
        # covariance of d is a sum over components of b I + Z K Z'. D and K are diagonal.
        factors = shares @ solved
        a = factors[2]
        d = np.concatenate([factors[0] / of_teacher, factors[1] / of_seed, [-factors.sum() / total]])
        gram = np.block(
            [
                [np.diag(of_teacher), present, of_teacher[:, None]],
                [present.T, np.diag(of_seed), of_seed[:, None]],
                [of_teacher, of_seed, total],
            ]
        )
        of_which = np.repeat([0, 1, -1], [teachers, seeds, 1])
        products = []  # Q times each component's covariance is a b I + Z H Z': holds a b, and H Z'Z
        for place in np.flatnonzero(told):
            b, k = float(place == 2), (of_which == place).astype(float)
            products.append((a * b, (np.diag(a * k + b * d) + d[:, None] * gram * k) @ gram))
        spread = [
            [one * other * total + one * np.trace(y) + other * np.trace(x) + np.sum(x * y.T) for other, y in products]
            for one, x in products
        ]
        return cls(told, solved, shares, np.array(spread))


def crossed(values: Array) -> Crossed:
    """Estimate the mean of differences [..., T, S] over the populations of teachers and seeds.

    A missing cell is NaN. The same cells must be missing in all studies of the leading axes.
    """
    known = ~np.isnan(values[(0,) * (values.ndim - 2)])
    values = values[..., known.any(1), :][..., known.any(0)]
    present = known[known.any(1)][:, known.any(0)].astype(float)
    (teachers, seeds), cells = present.shape, int(present.sum())
    nothing = np.full(values.shape[:-2], np.nan)
    if min(teachers, seeds) < 2:
        mean = np.nanmean(values, axis=(-2, -1)) if cells else nothing
        return Crossed(teachers, seeds, cells, np.asarray(mean), nothing, nothing, np.stack([nothing] * 3, -1))
    layout = _Layout.of(present)
    mean = np.nanmean(values, axis=(-2, -1))
    left = np.where(present > 0, values - mean[..., None, None], 0.0)
    sums = [
        (left.sum(-1) ** 2 / present.sum(1)).sum(-1),
        (left.sum(-2) ** 2 / present.sum(0)).sum(-1),
        (left**2).sum((-2, -1)),
    ]
    found = np.maximum(np.stack(sums, -1) @ layout.solved.T, 0.0)
    variance = found @ layout.shares
    with np.errstate(invalid="ignore", divide="ignore"):
        df = variance**2 / np.einsum("...c,cd,...d->...", found, layout.spread, found)
    variances = np.full((*mean.shape, 3), np.nan)
    variances[..., layout.told] = found
    return Crossed(teachers, seeds, cells, mean, np.sqrt(variance), np.fmax(df, min(teachers, seeds) - 1.0), variances)


def judged(found: Estimates, differences: Array, taught: Flags) -> Estimates:
    """The estimates of contrasts, with those of the `taught` ones [C] replaced by estimates over teachers.

    These come from `differences` [C, T, S]. Their pairs are the seeds, each with the mean over teachers.
    """
    columns = {name: np.array(getattr(found, name)) for name in ("pairs", "by_model", "value", "error", "df")}
    paired, spread = np.array(found.paired), np.array(found.spread)
    for place in np.flatnonzero(taught):
        over = crossed(differences[place])
        seeds = by_seed(differences[place])
        for name, value in zip(columns, (over.seeds, False, over.mean, over.error, over.df), strict=True):
            columns[name][place] = value
        paired[place] = np.nanmean(seeds) if over.seeds else np.nan
        spread[place] = np.nanstd(seeds, ddof=1) if over.seeds > 1 else np.nan
    return replace(found, **columns, paired=paired, spread=spread)


def by_seed(differences: Array) -> Array:
    """The means [S] over teachers of differences [T, S]; NaN for a seed without differences."""
    known = ~np.isnan(differences)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, differences, 0.0).sum(0) / known.sum(0))
