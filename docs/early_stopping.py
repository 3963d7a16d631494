"""`python -m docs.early_stopping CURVES`: make the tables and figures of docs/early-stopping.md from published curves.

CURVES is the common prefix of two files, `CURVES_trials.parquet` and `CURVES_epochs.parquet`. Takes about fifteen
minutes on two cores. `--only NAME` makes a single block: pairs, choice, margins, stems, calibration.
"""

import argparse
import itertools
import os
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from docs.blocks import put, table
from search_spaces.ablation import study
from tune_kd import Confirm, Screen, load
from tune_kd.analysis import calibrate
from tune_kd.analysis.early_stopping import noise_margins
from tune_kd.analysis.simulate import Curves, Outcome, curves, simulate
from tune_kd.records.importer import Adapter
from tune_kd.records.reader import Records
from tune_kd.reporting.style import COLUMN_INCHES, OTHER_COLOURS, STYLE

ROOT = Path(__file__).parents[1]
PAGE, CONCEPTS = ROOT / "docs" / "early-stopping.md", ROOT / "docs" / "concepts.md"
BAR = 0.0005  # mean regret, as accuracy
CHOOSING = ("resnet18/resnet50", "resnet34/resnet101")
SCORING = ("resnet18/resnet34", "resnet34/resnet50")
SHOWN = (10, 20, 30, 50, 80, 90, 95)
CENTRES = (10, 20, 30, 50, 60, 70, 80)
AROUND = (0.8, 0.9, 1.0, 1.1, 1.2)  # other grace periods to try for each setting, relative to its own
MARGINS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05)
FEW, MANY = 200, 1000  # arrival orders
STUDIES = 2000
USUAL = Screen(grace=10, reduction=3, margin=0.0, min_peers=1)
PROCESSES = os.cpu_count() or 1


def only(recorded: Curves, strata: Sequence[str]) -> Curves:
    """The curves of some strata."""
    grids = {key: tuple(curve for curve in grid if curve.stratum in strata) for key, grid in recorded.grids.items()}
    return Curves({key: grid for key, grid in grids.items() if grid}, recorded.left_out)


def name(pair: str) -> str:
    """`R50 to R18`."""
    student, teacher = (part.replace("resnet", "R") for part in pair.split("/"))
    return f"{teacher} to {student}"


def points(accuracy: float) -> str:
    return f"{100 * accuracy:.3f}"


def pairs(recorded: Curves) -> None:
    """Results of the default and the usual settings on each pair, and rank correlations by epoch."""
    rows = []
    found: dict[str, Outcome] = {}
    for called, screen in (("usual", USUAL), ("default", study().screen)):
        found = simulate(screen, recorded, MANY)
        rows += [
            [called, name(pair), f"{100 * each.stopping.epochs_saved:.1f} %", points(each.stopping.mean_regret),
             f"{100 * each.stopping.best_lost:.1f} %", points(each.cut.mean_regret), points(each.random.mean_regret)]
            for pair, each in found.items()
        ]  # fmt: skip
    heads = [
        "settings",
        "pair",
        "epochs saved",
        "mean regret (points)",
        "best arm lost",
        "regret of a fixed cut",
        "regret by chance",
    ]
    put(PAGE, "pairs", table(heads, rows))
    cells = [
        [name(pair), *(f"{found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
                       for found in (each.rank_correlation[epoch] for epoch in SHOWN))]
        for pair, each in found.items()
    ]  # fmt: skip
    put(PAGE, "correlations", table(["pair", *(f"epoch {epoch}" for epoch in SHOWN)], cells))
    draw(partial(_correlations, found), "rank-correlation.png")


def _correlations(found: dict[str, Outcome]) -> Figure:
    figure = Figure(figsize=(2 * COLUMN_INCHES, 3.6))
    for axes, (pair, each) in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, found.items(), strict=True):
        epochs = list(each.rank_correlation)
        known = list(each.rank_correlation.values())
        axes.axhline(0, color="#666666", lw=0.8)
        low, high = ([getattr(one, side) for one in known] for side in ("low", "high"))
        axes.fill_between(epochs, low, high, color="#0072B2", alpha=0.15, lw=0)
        axes.plot(epochs, [one.rho for one in known], color="#0072B2")
        axes.set_title(f"{name(pair)}, {each.arms} arms", loc="left")
        axes.set_ylim(-1.05, 1.05)
    figure.supxlabel("epoch", fontsize=8)
    figure.supylabel("rank correlation with epoch 100", fontsize=8)
    return figure


def draw(make: Callable[[], Figure], file: str) -> None:
    with rc_context(STYLE):
        make().savefig(ROOT / "docs" / file, dpi=150)


def _score(recorded: Curves, orders: int, screen: Screen) -> dict[str, tuple[float, float]]:
    """Epochs saved and mean regret of each stratum."""
    found = simulate(screen, recorded, orders)
    return {pair: (each.stopping.epochs_saved, each.stopping.mean_regret) for pair, each in found.items()}


def choice(recorded: Curves) -> None:
    """Settings chosen on two pairs and scored on the other two, compared with chance and a fixed cut."""
    choosing, scoring = only(recorded, CHOOSING), only(recorded, SCORING)
    settings = [
        Screen(grace=centre, reduction=reduction, margin=margin, min_peers=peers)
        for centre, reduction, margin, peers in itertools.product(CENTRES, (2, 3, 4), MARGINS, (2, 5))
    ]
    near = {screen: [replace(screen, grace=round(screen.grace * by)) for by in AROUND] for screen in settings}
    every = list(dict.fromkeys(each for around in near.values() for each in around))
    with ProcessPoolExecutor(PROCESSES) as pool:
        chosen_on = dict(zip(every, _shown(pool, partial(_score, choosing, FEW), every), strict=True))
        worst = {screen: max(regret for each in around for _, regret in chosen_on[each].values())
                 for screen, around in near.items()}  # fmt: skip
        saved = {screen: float(np.mean([share for each in around for share, _ in chosen_on[each].values()]))
                 for screen, around in near.items()}  # fmt: skip
        at_once = [screen for screen in settings if max(regret for _, regret in chosen_on[screen].values()) <= BAR]
        rules = {
            "most saved, within the bar at this grace period": max(
                at_once, key=lambda screen: np.mean([share for share, _ in chosen_on[screen].values()])
            ),
            "within the bar at all nearby grace periods": max(
                (screen for screen in settings if worst[screen] <= BAR), key=lambda screen: saved[screen]
            ),
            "within half the bar at all of them": max(
                (screen for screen in settings if worst[screen] <= BAR / 2), key=lambda screen: saved[screen]
            ),
        }
        rows = []
        for rule, screen in rules.items():
            around = list(pool.map(partial(_score, recorded, MANY), near[screen]))
            here = around[AROUND.index(1.0)]
            for which, chosen in (("chosen on", CHOOSING), ("scored on", SCORING)):
                rows.append([
                    rule if which == "chosen on" else "",
                    _words(screen) if which == "chosen on" else "",
                    which,
                    f"{100 * np.mean([here[pair][0] for pair in chosen]):.1f} %",
                    " and ".join(points(here[pair][1]) for pair in chosen),
                    points(max(each[pair][1] for each in around for pair in chosen)),
                ])  # fmt: skip
        scored = dict(zip(settings, _shown(pool, partial(_score, scoring, FEW), settings), strict=True))
    heads = ["rule", "settings", "", "epochs saved", "mean regret of each pair (points)", "worst nearby"]
    put(PAGE, "choice", table(heads, rows))
    default = study().screen
    assert any(_words(screen) == _words(default) for screen in rules.values()), "no rule gives the default"
    draw(partial(_trade, {"chosen on": (choosing, chosen_on), "scored on": (scoring, scored)}, settings), "trade.png")


def margins(recorded: Curves, records: Records) -> None:
    """Margins from the published controls, at two grace periods and near them."""
    rows = []
    for grace in (10, 30):
        found = []
        for by in AROUND:
            screen = Screen(grace=round(grace * by), reduction=3, min_peers=2)
            given = tuple(noise_margins(records, replace(study(), screen=screen)))
            found.append((given, _score(recorded, FEW, replace(screen, margin=given))))
        given, here = found[AROUND.index(1.0)]
        at = zip(Screen(grace=grace, reduction=3).rungs(100), given, strict=True)
        rows.append([
            ", ".join(f"{100 * margin:.1f} at {epoch}" for epoch, margin in at),
            f"{100 * np.mean([saved for saved, _ in here.values()]):.1f} %",
            points(max(regret for _, regret in here.values())),
            points(max(regret for _, each in found for _, regret in each.values())),
        ])  # fmt: skip
    heads = ["margins (points at epoch)", "epochs saved", "worst mean regret of a pair (points)", "worst nearby"]
    put(PAGE, "margins", table(heads, rows))


Scores = dict[str, tuple[float, float]]  # by stratum: epochs saved, mean regret


def _shown(pool: ProcessPoolExecutor, work: Callable[[Screen], Scores], todo: list[Screen]) -> list[Scores]:
    return list(track(pool.map(work, todo, chunksize=4), "settings", len(todo), console=Console(stderr=True)))


def _words(screen: Screen) -> str:
    margin = f"margin {100 * screen.margin_at(0):g} points"
    return f"grace {screen.grace}, reduction {screen.reduction}, {margin}, {screen.min_peers} peers"


def _trade(sides: dict[str, tuple[Curves, dict[Screen, Scores]]], settings: list[Screen]) -> Figure:
    """Epochs saved against regret: a dot per setting, with lines for chance and fixed cuts."""
    figure = Figure(figsize=(2 * COLUMN_INCHES, 3.2))
    for axes, (which, (recorded, scores)) in zip(figure.subplots(1, 2, sharey=True), sides.items(), strict=True):
        dots = np.array([np.mean(list(scores[screen].values()), axis=0) for screen in settings])
        axes.plot(100 * dots[:, 0], 100 * dots[:, 1], ".", color="#999999", ms=3, label="settings of early stopping")
        (default,) = (dots[at] for at, screen in enumerate(settings) if _words(screen) == _words(study().screen))
        axes.plot(100 * default[0], 100 * default[1], "D", color="#D55E00", ms=6, label="the default", zorder=4)
        axes.plot(*100 * chance(recorded), "-", color="#000000", label="arms kept by chance")
        for colour, epoch, line in zip(OTHER_COLOURS, (30, 60, 90), ("--", "-.", ":"), strict=False):
            axes.plot(*100 * cuts(recorded, epoch), line, color=colour, label=f"one cut at epoch {epoch}")
        axes.axhline(100 * BAR, color="#666666", lw=0.6)
        axes.set_title(f"pairs they were {which}", loc="left")
        axes.set_xlabel("epochs saved (%)")
    figure.axes[0].set_ylabel("mean regret (points)")
    figure.axes[0].set_ylim(-0.005, 0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _finals(recorded: Curves) -> list[np.ndarray]:
    """The curves of each stratum [arms, epochs]."""
    return [
        np.array([curve.accuracy for curve in grid if curve.stratum == pair])
        for grid in recorded.grids.values()
        for pair in recorded.strata
    ]


def chance(recorded: Curves) -> np.ndarray:
    """Epochs saved and expected regret [2, arms] if some arms are chosen at random before training."""
    found = []
    for table_ in _finals(recorded):
        final = np.sort(table_[:, -1])[::-1]
        arms = len(final)
        # The best of m drawn without replacement from n is the k-th best with probability C(n-k, m-1) / C(n, m).
        regrets = []
        for kept in range(1, arms + 1):
            ways = np.array([_choose(arms - place, kept - 1) for place in range(1, arms + 1)]) / _choose(arms, kept)
            regrets.append(final[0] - float(ways @ final))
        found.append([[1 - kept / arms for kept in range(1, arms + 1)], regrets])
    return np.mean(found, axis=0)


def _choose(n: int, k: int) -> float:
    from scipy.special import comb

    return float(comb(n, k))


def cuts(recorded: Curves, epoch: int) -> np.ndarray:
    """The same [2, arms] if the best arms at one epoch continue and the others end there."""
    found = []
    for table_ in _finals(recorded):
        order, final = np.argsort(-table_[:, epoch - 1], kind="stable"), table_[:, -1]
        arms, budget = table_.shape
        saved = [(1 - kept / arms) * (1 - epoch / budget) for kept in range(1, arms + 1)]
        found.append([saved, [final.max() - final[order[:kept]].max() for kept in range(1, arms + 1)]])
    return np.mean(found, axis=0)


def stems(records: Records) -> None:
    """Results for both stems in a study that only searches for its best student: no strata, and no arm is immune."""
    trials = records.trials[records.trials["student"] == "resnet18"]
    wanted = set(trials.loc[(trials["teacher"] == "resnet50") | (trials["stem"] == "imagenet"), "trial_id"])
    grid = tuple(
        replace(curve, arm=f"{curve.arm} seed {seed}", stratum="all", immune=False)
        for (seed, _), each in curves(records, study(), ["student"]).grids.items()
        for curve in each
        if curve.trial_id in wanted
    )
    recorded = Curves({(0, 100): grid}, ())
    poor = [curve.arm for curve in grid if "imagenet" in curve.arm]
    rows = []
    for margin in (0.0, 0.02, 0.05):
        screen = Screen(grace=10, reduction=3, margin=margin, min_peers=2, strata=None)
        (each,) = simulate(screen, recorded, MANY).values()
        stopped = [sum(each.stopped[arm].values()) for arm in poor]
        at_first = [each.stopped[arm].get(10, 0.0) for arm in poor]
        rows.append([
            f"{100 * margin:g}", f"{100 * each.stopping.epochs_saved:.1f} %", points(each.stopping.mean_regret),
            f"{100 * each.stopping.best_lost:.1f} %", f"{100 * np.mean(at_first):.1f} %",
            f"{100 * np.mean(stopped):.1f} %",
        ])  # fmt: skip
    heads = ["margin (points)", "epochs saved", "mean regret (points)", "best arm lost",
             "ImageNet stem stopped at epoch 10", "ImageNet stem stopped at any epoch"]  # fmt: skip
    put(PAGE, "stems", table(heads, rows))


def calibration() -> None:
    """Studies in which all arms are identical."""
    rows = []
    for called, confirm in (("5 seeds", Confirm()), ("looks at 5, 10, 20", Confirm(looks=(5, 10, 20)))):
        declared = replace(study(), confirm=confirm)
        beats = iter(track(range(calibrate.steps(declared, STUDIES)), called, console=Console(stderr=True)))
        found = calibrate.calibrate(declared, STUDIES, partial(next, beats))
        for practice, words in calibrate.PRACTICES.items():
            rate = found.false[practice]
            rows.append([called, words, f"{rate.found} of {rate.studies}",
                         f"{100 * rate.share:.1f} % ± {100 * rate.standard_error:.1f}"])  # fmt: skip
    heads = ["study", "procedure", "studies with a false finding", "share ± standard error"]
    bias = (
        f"Of plain ASHA's trials at 20 seeds, {100 * found.finished:.0f} % finish, and their test accuracies are "
        f"{found.bias:.2f} standard deviations ({100 * found.bias * study().deviation:.2f} points) too high on "
        "average.\n"
    )
    put(PAGE, "calibration", f"{table(heads, rows)}\n{bias}")
    shares = {name: f"{100 * rate.share:.1f} % (standard error {100 * rate.standard_error:.1f})"
              for name, rate in (found.false | found.scenarios["alike"].false).items()}  # fmt: skip
    text = (
        f"Of {STUDIES:,} simulated studies of identical arms, with looks at 5, 10 and 20 seeds, {shares['primary']} "
        "have a false finding among their primary contrasts, and "
        f"{shares['secondary']} among their secondary contrasts. "
        f"Adding seeds until something is significant gives a false finding in {shares['until_significant']}. Plain "
        "ASHA over arms and seeds, which averages the trials that finish, gives one in "
        f"{shares['plain_asha']} of {calibrate.MOST_ASHA} studies, and its means are {found.bias:.2f} standard "
        "deviations too high."
    )
    put(CONCEPTS, "calibration", textwrap.fill(text, 120) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", type=Path)
    blocks = ("pairs", "choice", "margins", "stems", "calibration")
    parser.add_argument("--only", choices=blocks, action="append")
    given = parser.parse_args()
    wanted = given.only or blocks
    records = load(str(given.curves), adapt=Adapter(rest="screen", phases={"teachers": "teacher"}))
    recorded = curves(records, study(), ["student", "teacher"])
    if "pairs" in wanted:
        pairs(recorded)
    if "choice" in wanted:
        choice(recorded)
    if "margins" in wanted:
        margins(recorded, records)
    if "stems" in wanted:
        stems(records)
    if "calibration" in wanted:
        calibration()


if __name__ == "__main__":
    main()
