"""Commands that predict: `plan`, `simulate` and `calibrate`."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tune_kd.analysis import grace
from tune_kd.analysis.power import DIFFERENCES, powers, slot_seconds
from tune_kd.analysis.statistics import FEW_TEACHERS, detectable_over_teachers, smallest_exact_p, spent, t_quantile
from tune_kd.cli import options
from tune_kd.records.adaptive_plan import to_come
from tune_kd.reporting import terminal
from tune_kd.reporting.terminal import Terminal, duration, plural, points
from tune_kd.study import discover
from tune_kd.study.cost import draws, estimate, views_answered
from tune_kd.study.early_stopping import stratum
from tune_kd.study.plan import Plan, plan as expand
from tune_kd.study.spec import DATA_SETS, Study
from tune_kd.study.trial import Phase
from tune_kd.system.errors import UserError

if TYPE_CHECKING:
    from tune_kd.analysis.calibrate import Calibration, Performance, Rate
    from tune_kd.analysis.simulate import Outcome
    from tune_kd.records.reader import Records


def plan(
    study: options.StudyName,
    scale: options.Scale = "auto",
    data: options.DataName = None,
    out: options.Out = options.DEFAULT_OUT,
    settings: options.Settings = None,
    margin_from: options.MarginFrom = None,
    no_dry_run: options.NoDryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the plan of a study: arms, merged cells, trials, teachers, cost, and detectable differences."""
    path = discover.find(study)
    resolved, why = _resolved(path, scale, data, settings, margin_from, out)
    planned = expand(resolved)
    if not no_dry_run:
        options.dry_run(planned, path)
    summary = _summary(planned, out)
    if as_json:
        options.print_json(summary)
    else:
        _print_plan(planned, summary, why)


def _resolved(
    path: Path,
    scale: str,
    data: str | None,
    settings: list[str] | None,
    margin_from: str | None = None,
    out: Path = options.DEFAULT_OUT,
) -> tuple[Study, str]:
    """Return a study at the chosen scale, and the reason if `auto` chose it."""
    chosen, why = options.scale_of(path, scale, None, data, settings or ())
    given = options.settings_with(settings, margin_from, path, chosen, data, out)
    return discover.resolve(path, chosen, data, given), why


def _summary(planned: Plan, out: Path) -> dict[str, Any]:
    """Return the JSON output of `plan`."""
    resolved, trials = planned.study, (*planned.trials, *to_come(planned))
    cost = estimate(trials, planned.answering, resolved.rate)
    return {
        "study": resolved.name,
        "scale": resolved.scale,
        "data": asdict(resolved.data),
        "raw_cells": planned.raw_cells,
        "arms": [{"name": arm.name, "role": arm.role, "merged_cells": arm.merged} for arm in planned.arms],
        "teachers": [{"arm": each.arm, "seed": each.seed, "epochs": each.recipe.epochs} for each in planned.teachers],
        "answers": _answers(planned),
        "trials": [
            {"arm": each.arm, "phase": each.phase, "seed": each.seed, "teacher_seed": each.teacher_seed}
            for each in trials
        ],
        "tuning": None if resolved.tuning is None else asdict(resolved.tuning),
        "contrasts": [contrast.name for contrast in planned.contrasts],
        "families": {contrast.name: contrast.family for contrast in planned.contrasts},
        "price": {"flop": cost.flop, "slot_seconds": cost.slot_seconds, "how": cost.how},
        "screen": asdict(resolved.screen) | {"rungs": resolved.screen.rungs(resolved.most_epochs)},
        "seeds": _seeds(planned),
        "warnings": [*grace.warnings(planned, out), *_few_teachers(planned)],
    }


def simulate(
    study: options.StudyName,
    curves: Annotated[
        str,
        typer.Option(help="Recorded curves: a run, a folder with trials.parquet, or PREFIX of PREFIX_trials.parquet."),
    ],
    strata: Annotated[
        str | None,
        typer.Option(help="Columns that define strata, such as student,teacher; or none. Default: the study's."),
    ] = None,
    orders: Annotated[int, typer.Option(help="Number of arrival orders to replay.")] = 1000,
    scale: Annotated[
        str, typer.Option(help="Scale of the study. auto: the scale of the curves, or paper if they have none.")
    ] = "auto",
    out: options.Out = options.DEFAULT_OUT,
    settings: options.Settings = None,
    margin_from: options.MarginFrom = None,
    phases: options.Phases = None,
    as_json: options.AsJson = False,
) -> None:
    """Simulate a study's early stopping on recorded learning curves, and show its savings and losses."""
    from tune_kd.analysis import simulate as simulation

    path = discover.find(study)
    problems = [] if 1 <= orders <= 1_000_000 else [f"--orders is {orders}; allowed: from 1 to 1,000,000"]
    records = options.read_tables(problems, [curves], out, phases, option="--curves", rest=Phase.SCREEN)
    chosen, why = _scale_of_curves(path, scale, records)
    theirs = [name for name in records.trials["dataset"].dropna().unique() if name in DATA_SETS]
    data = theirs[0] if len(theirs) == 1 else None  # a scale may have different settings for another data set
    given = options.settings_with(settings, margin_from, path, chosen, data, out)
    resolved = discover.resolve(path, chosen, data, given)
    named = resolved.screen.strata if strata is None else None if strata == "none" else strata.split(",")
    recorded = simulation.curves(records, resolved, named)
    simulation.check_screen(resolved.screen, recorded)
    console = Terminal(stderr=as_json)
    for epochs in sorted({epochs for _, epochs in recorded.grids if not resolved.screen.rungs(epochs)}):
        console.print(f"warning: screen.grace is {resolved.screen.grace}, so curves of {epochs} epochs are never "
                      "compared")  # fmt: skip
    with options.progress(orders * len(recorded.grids), "replays") as beat:
        outcomes = simulation.simulate(resolved.screen, recorded, orders, beat=beat)
    if as_json:
        answer: dict[str, Any] = {"study": resolved.name, "scale": chosen, "screen": asdict(resolved.screen)}
        answer |= {"curves": curves, "orders": orders, "left_out": recorded.left_out}
        answer["strata"] = {name: _outcome(outcome) for name, outcome in outcomes.items()}
        options.print_json(answer)
        return
    console.print(f"{resolved.name} at scale {chosen}{why}: early stopping over the curves of {curves}")
    for sentence in recorded.left_out:
        console.print(f"left out: {sentence}")
    console.print(terminal.simulation(resolved.screen, outcomes, orders))


def calibrate(
    study: options.StudyName,
    studies: Annotated[int, typer.Option(help="Number of simulated studies per scenario.")] = 2000,
    scale: options.Scale = "auto",
    data: options.DataName = None,
    settings: options.Settings = None,
    as_json: options.AsJson = False,
) -> None:
    """Simulate studies to estimate the false-positive rate, coverage and power of a study's verdicts, and the
    false-positive rate of common practices."""
    from tune_kd.analysis import calibrate as calibration

    path = discover.find(study)
    if not 1 <= studies <= 1_000_000:
        raise UserError(f"--studies is {studies}; allowed: from 1 to 1,000,000")
    resolved, why = _resolved(path, scale, data, settings)
    with options.progress(calibration.steps(resolved, studies), "simulations") as beat:
        found = calibration.calibrate(resolved, studies, beat=beat)
    if as_json:
        options.print_json({"study": resolved.name, "scale": resolved.scale} | _calibrated(found))
        return
    console = Terminal()
    console.print(f"{resolved.name} at scale {resolved.scale}{why}")
    console.print(terminal.calibration(calibration.PRACTICES, found))


def _calibrated(found: "Calibration") -> dict[str, Any]:
    """Return the JSON output of `calibrate`, without the study."""

    def rate(each: "Rate") -> dict[str, Any]:
        return asdict(each) | {"share": each.share, "standard_error": each.standard_error}

    def performance(each: "Performance") -> dict[str, Any]:
        covered = {group: each.covered(names) for group, names in found.groups.items()}
        return {
            "scenario": asdict(each.scenario),
            "looks": each.looks,
            "any_false_finding": {family: rate(one) for family, one in each.false.items()},
            "coverage": {
                group: {"mean": both[0], "worst": both[1]} if both else None for group, both in covered.items()
            },
            "coverage_by_contrast": {name: rate(one) for name, one in each.coverage.items()},
            "power_by_points": {
                name: {f"{100 * size:g}": rate(one) for size, one in row.items()} for name, row in each.power.items()
            },
        }

    return {
        "contrasts": [
            {"name": each.name, "family": each.family, "across_strata": each.name in found.across}
            for each in found.contrasts
        ],
        "scenarios": {name: performance(each) for name, each in found.scenarios.items()},
        "before_0_7": performance(found.before),
        "practices": {name: rate(one) for name, one in found.false.items()},
        "plain_asha": {"finished": found.finished, "bias_in_deviations": found.bias},
    }


def _seeds(planned: Plan) -> dict[str, Any]:
    """Return the detectable differences at each look, for the seed-to-seed deviation that the study expects."""
    study, confirm, deviation = planned.study, planned.study.confirm, planned.study.deviation
    teachers, per_seed = len(study.teacher_seeds), study.teachers_per_seed
    looks = confirm.looks or (len(confirm.seeds),)
    found = [
        {
            "seeds": seeds,
            "level": level,
            "power": [asdict(each) for each in powers(planned, seeds, level)],
            "smallest_exact_p": smallest_exact_p(seeds),
            "detectable_over_teachers": detectable_over_teachers(teachers, seeds, per_seed, deviation, alpha=level),
        }
        for seeds, level in zip(looks, spent(looks), strict=True)
    ]
    whole, more = slot_seconds(planned)
    told = {"confirm": list(confirm.all_seeds), "deviation": deviation, "teachers": teachers, "looks": found}
    return told | found[0] | {"slot_seconds": whole, "slot_seconds_per_seed": more}


def _few_teachers(planned: Plan) -> list[str]:
    """Return a warning if a study has several teachers, but too few to estimate how teachers differ."""
    count = len(planned.study.teacher_seeds)
    if not 1 < count < FEW_TEACHERS or not planned.teachers or not planned.contrasts:
        return []
    df = count - 1
    return [
        f"teacher_seeds has {count} seeds: verdicts are about teachers of their kind, and {count} show little of how "
        f"these differ (t = {t_quantile(df):.1f} at {plural(df, 'degree')} of freedom; with "
        f"{FEW_TEACHERS} teachers {t_quantile(FEW_TEACHERS - 1):.1f})"
    ]


def _answers(planned: Plan) -> list[dict[str, Any]]:
    """Return the views for which each teacher's logits are cached: the kind, their number, and the number of draws."""
    return [
        {
            "teacher": teacher.label,
            "views": "all" if answering.ahead else "drawn",
            "count": round(views_answered(answering, teacher)),
            "draws": draws(answering, teacher),
        }
        for teacher in planned.teachers
        if (answering := planned.answering.get(teacher.trial_id)) is not None
    ]


def _print_plan(planned: Plan, summary: dict[str, Any], why: str) -> None:
    console, cost = Terminal(), summary["price"]
    console.print(f"{summary['study']} at scale {summary['scale']}{why}", style="bold")
    console.print(
        f"{plural(len(planned.arms), 'arm')}, {plural(len(summary['trials']), 'trial')} (including "
        f"{plural(len(planned.teachers), 'teacher')}), {plural(len(planned.contrasts), 'contrast')}"
    )
    arms = ((arm.name, arm.role, str(arm.merged) if arm.merged > 1 else "") for arm in planned.arms)
    console.print(_table(("arm", "role", "combinations"), arms))
    if planned.contrasts:
        declared = sorted(planned.contrasts, key=lambda each: each.family)
        rows = ((each.name, each.family, each.kind) for each in declared)
        console.print(_table(("contrast", "family", "kind"), rows, "fold", left=3))
    for each in summary["answers"]:
        which = "all {:,} views in advance" if each["views"] == "all" else "about {:,} drawn views"
        views = which.format(each["count"])
        console.print(f"{each['teacher']} computes logits of {views}, for {each['draws']:,} draws of its students.")
    console.print(
        f"Cost: {cost['flop'] / 1e15:.2g} PFLOP, {duration(cost['slot_seconds'])} if trials run one at a time "
        f"({cost['how']})."
    )
    for sentence in (*_tuning(planned), _stopping(planned)):
        console.print(sentence)
    for warning in summary["warnings"]:
        console.say(f"warning: {warning}")
    for part in _powers(summary["seeds"]):
        console.print(part)
    if planned.teachers and planned.contrasts and len(planned.study.teacher_seeds) == 1:
        console.print(
            "All students of a context share one teacher: verdicts hold only for that teacher (see teacher_seeds)."
        )


def _table(
    titles: tuple[str, ...], rows: Iterable[tuple[str, ...]], overflow: Any = "ellipsis", left: int = 2
) -> Table:
    """Return a table whose first `left` columns are text."""
    table = Table(box=None, header_style="bold")
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < left else "right", overflow=overflow)
    for row in rows:
        table.add_row(*row)
    return table


def _tuning(planned: Plan) -> Iterator[str]:
    if (tuning := planned.study.tuning) is not None:
        yield (
            f"Each arm is tuned with {tuning.budget} {tuning.budget_unit} ({tuning.sampler}), by validation accuracy "
            f"at seed {planned.study.screen.seed}; the best and the default settings are confirmed."
        )
        for search in planned.searches:
            yield f"  {search.name}: {', '.join(f'{each.name} {each.over}' for each in search.ranges)}"


def _stopping(planned: Plan) -> str:
    study, screen = planned.study, planned.study.screen
    rungs = ", ".join(map(str, screen.rungs(study.most_epochs))) or "none"
    margins = screen.margin if isinstance(screen.margin, tuple) else [screen.margin]
    what, peers = ("an arm", " and ".join(screen.strata or ["study"])) if study.tuning is None else ("a draw", "arm")
    never = (
        f" In this study it cannot stop any arm: no stratum has {screen.min_peers + 1} arms, one of them neither a "
        "control nor a reference."
    )
    return (
        f"Early stopping of the screen: rungs at epoch {rungs}; {what} stops if it is more than "
        f"{', '.join(map(points, margins))} points behind the best 1/{screen.reduction} of at least "
        f"{screen.min_peers} peers of the same {peers}.{'' if _can_stop(planned) else never}"
    )


def _can_stop(planned: Plan) -> bool:
    """Return whether a stratum has enough arms for early stopping. Draws of tuned arms are assumed to suffice."""
    strata: dict[str, list[bool]] = {}
    for arm in planned.arms:
        strata.setdefault(stratum(planned.study.screen, arm.cell.levels), []).append(arm.immune)
    enough = (immune for immune in strata.values() if len(immune) > planned.study.screen.min_peers)
    return planned.study.tuning is not None or any(not all(immune) for immune in enough)


def _powers(seeds: dict[str, Any]) -> Iterator[str | Table]:
    """Yield the detectable differences at each look, and the numbers of seeds that other differences need."""
    deviation = points(seeds["deviation"])
    if seeds["seeds"] < 2:
        yield "confirm has one seed: no difference can be judged."
        return
    columns = ("primary contrast", *(f"{look['seeds']} seeds" for look in seeds["looks"]), *map(points, DIFFERENCES))
    rows = []
    for place, first in enumerate(seeds["power"]):
        found = [points(look["power"][place]["detectable"]) for look in seeds["looks"]]
        rows.append((first["contrast"], *found, *("" if n is None else f"{n:,}" for n in first["seeds"].values())))
    if rows:
        levels = " and ".join(f"{look['level']:.4g}" for look in seeds["looks"])
        yield (
            "True differences (points) that are found with 80 % power, and the numbers of seeds that find "
            f"{points(DIFFERENCES[0])} to {points(DIFFERENCES[-1])}, at a seed-to-seed deviation of {deviation} and a "
            f"level of {levels}:"
        )
        yield _table(columns, rows, "fold", left=1)
        needed = sorted({n for each in seeds["power"] for n in each["seeds"].values() if n is not None})
        times = ", ".join(f"{n:,} seeds {_slot(n, seeds)}" for n in needed)
        yield f"Time of the whole study, one trial at a time: {times}."
    if seeds["teachers"] > 1:
        found = [f"{points(look['detectable_over_teachers'])} at {look['seeds']} seeds" for look in seeds["looks"]]
        yield (
            f"With {seeds['teachers']} teachers, a gain over a control is found with 80 % power if it is at least "
            f"{', '.join(found)}. This assumes that students differ as much between teachers as between seeds. The "
            "table is for one teacher."
        )
    least = ", ".join(f"{look['smallest_exact_p']:.4f} at {look['seeds']} seeds" for look in seeds["looks"])
    yield f"The exact sign-flip p cannot fall below {least}."


def _slot(n: int, seeds: dict[str, Any]) -> str:
    return duration(seeds["slot_seconds"] + (n - seeds["seeds"]) * seeds["slot_seconds_per_seed"])


def _scale_of_curves(path: Path, scale: str, records: "Records") -> tuple[str, str]:
    """Return the scale whose settings fit recorded curves, and the reason."""
    declared = discover.scales(path)
    if scale != "auto":
        return scale, ""
    theirs = records.trials["scale"].dropna().unique().tolist()
    if len(theirs) == 1 and theirs[0] in declared:
        return theirs[0], ", the scale of the curves"
    return ("paper", ", since the curves have none") if "paper" in declared else (next(iter(declared)), "")


def _outcome(outcome: "Outcome") -> dict[str, Any]:
    """Return a stratum's outcome as JSON: the numbers of early stopping at the top level, the baselines nested."""
    described = asdict(outcome)
    stopping, correlation = described.pop("stopping"), described.pop("rank_correlation")
    baselines = {name: described.pop(name) for name in ("cut", "random")}
    return {
        **described,
        **stopping,
        "baselines": baselines,
        "rank_correlation": {epoch: found["rho"] for epoch, found in correlation.items()},
        "rank_correlation_interval": {epoch: [found["low"], found["high"]] for epoch, found in correlation.items()},
    }
