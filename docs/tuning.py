"""`python -m docs.tuning`: measure the samplers' distance from a known optimum, for docs/search-spaces.md. Takes a
minute."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.progress import track

from docs.blocks import put
from tune_kd import LogUniform, Range, Tuning, Uniform
from tune_kd.study import sampler as search

PAGE = Path(__file__).parents[1] / "docs" / "search-spaces.md"
RANGES = (
    Range("lr", LogUniform(0.01, 1.0)),
    Range("weight_decay", LogUniform(5e-5, 5e-3)),
    Range("alpha", Uniform(0.05, 0.95)),
    Range("temperature", LogUniform(1.0, 16.0)),
)
DEFAULT = {"lr": 0.1, "weight_decay": 5e-4, "alpha": 0.5, "temperature": 4.0}
OPTIMUM = {"lr": 0.2, "weight_decay": 1e-3, "alpha": 0.8, "temperature": 6.0}
BEST = 0.95  # accuracy at the optimum
SAMPLERS = ("tpe", "random", "quasi-random")
DRAWS, SEEDS = 40, 100
NEAR = 0.01  # relative to the optimum's accuracy


def accuracy(values: Mapping[str, float]) -> float:
    """A response surface: the optimum's accuracy, minus a square in each setting (in its logarithm, except for alpha).
    At the far end of its range the learning rate costs 25 points, weight decay 7, alpha 7 and the temperature 3."""
    lr, decay, temperature = (math.log(values[name] / OPTIMUM[name]) for name in ("lr", "weight_decay", "temperature"))
    alpha = values["alpha"] - OPTIMUM["alpha"]
    return max(0.0, BEST - 0.028 * lr**2 - 0.008 * decay**2 - 0.125 * alpha**2 - 0.01 * temperature**2)


def reached(sampler: str, seed: int, draws: int = DRAWS) -> float:
    """The best accuracy among the draws of one arm."""
    tuning = Tuning(RANGES, budget=draws, sampler=sampler, seed=seed)  # type: ignore[arg-type]
    rows: list[dict[str, object]] = []
    for _ in range(draws):
        values = search.draw(tuning, "logit", RANGES, DEFAULT, rows)
        found = accuracy(values)
        ended = {"status": "completed", "stop_reason": None, "epochs_run": 1}
        rows.append({**values, **ended, "val_accuracy": found, "val_accuracy_best": found})
    return max(float(str(row["val_accuracy_best"])) for row in rows)


def main() -> None:
    lines = [
        f"| sampler | seeds within {100 * NEAR:g} % of the optimum in {DRAWS} draws | median distance | worst |",
        "|---|---|---|---|",
    ]
    for sampler in SAMPLERS:
        found = np.array([reached(sampler, seed) for seed in track(range(SEEDS), sampler, transient=True)])
        near = int((found >= BEST * (1 - NEAR)).sum())
        median, worst = 100 * (BEST - np.median(found)), 100 * (BEST - found.min())
        lines.append(f"| {sampler} | {near} of {SEEDS} | {median:.2f} points | {worst:.2f} points |")
    put(PAGE, "samplers", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
