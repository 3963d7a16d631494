"""Commands that foretell: `plan`, `simulate` and `calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tune_kd.cli.options import (
    DEFAULT_OUT,
    AsJson,
    DataName,
    MarginFrom,
    Out,
    Phases,
    Scale,
    Settings,
    StudyName,
    Terminal,
    naming,
    print_json,
    scale_of,
    settings_with,
    tracked,
)
from tune_kd.study.spec import DATA_SETS
from tune_kd.system.errors import UserError, collect

if TYPE_CHECKING:
    from tune_kd.records.reader import Records
    from tune_kd.study.plan import Plan


def plan(
    study: StudyName,
    scale: Scale = "auto",
    data: DataName = None,
    out: Out = DEFAULT_OUT,
    settings: Settings = None,
    margin_from: MarginFrom = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run: arms, merged cells, trials, teachers, the price, and what the seeds can show."""
    from tune_kd.analysis import grace
    from tune_kd.records.adaptive_plan import to_come
    from tune_kd.study import discover
    from tune_kd.study.cost import estimate
    from tune_kd.study.plan import plan as expand

    path = discover.find(study)
    chosen, why = scale_of(path, scale, None, data, settings or ())
    resolved = discover.resolve(path, chosen, data, settings_with(settings, margin_from, path, chosen, data, out))
    planned = expand(resolved)
    trials = (*planned.trials, *to_come(planned))
    cost = estimate(trials, planned.answering, resolved.rate)
    summary = {
        "study": resolved.name,
        "scale": resolved.scale,
        "data": asdict(resolved.data),
        "raw_cells": planned.raw_cells,
        "arms": [{"name": arm.name, "role": arm.role, "merged_cells": arm.merged} for arm in planned.arms],
        "teachers": [{"arm": each.arm, "seed": each.seed, "epochs": each.recipe.epochs} for each in planned.teachers],
        "answers": _answers(planned),
        "trials": [{"arm": each.arm, "phase": each.phase, "seed": each.seed} for each in trials],
        "tuning": None if resolved.tuning is None else asdict(resolved.tuning),
        "contrasts": [contrast.name for contrast in planned.contrasts],
        "price": {"flop": cost.flop, "slot_seconds": cost.slot_seconds, "how": cost.how},
        "screen": asdict(resolved.screen) | {"rungs": resolved.screen.rungs(resolved.recipe.epochs)},
        "seeds": _seeds(planned),
        "warnings": grace.warnings(planned, out),
    }
    if as_json:
        print_json(summary)
    else:
        _print_plan(planned, summary, why)


def simulate(
    study: StudyName,
    curves: Annotated[
        str,
        typer.Option(help="Recorded curves: a run, a folder with trials.parquet, or PREFIX of PREFIX_trials.parquet."),
    ],
    strata: Annotated[
        str | None,
        typer.Option(help="Columns that make a stratum: student,teacher; `none` for one. The study's by default."),
    ] = None,
    orders: Annotated[int, typer.Option(help="Arrival orders to replay.")] = 1000,
    scale: Annotated[
        str, typer.Option(help="auto takes the one of the curves, or paper where they name none.")
    ] = "auto",
    out: Out = DEFAULT_OUT,
    settings: Settings = None,
    margin_from: MarginFrom = None,
    phases: Phases = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded curves through a study's early stopping: what it would have stopped, saved and lost."""
    from tune_kd.analysis import simulate as simulation
    from tune_kd.records.importer import Adapter, parse_phases
    from tune_kd.records.reader import load
    from tune_kd.reporting import terminal
    from tune_kd.study import discover

    problems: list[str] = []
    path = discover.find(study)
    if not 1 <= orders <= 1_000_000:
        problems.append(f"--orders is {orders}; allowed: from 1 to 1,000,000")
    meaning = collect(problems, lambda: parse_phases(phases or ()))
    adapt = Adapter(phases=meaning or {}, rest="screen")
    records = collect(problems, lambda: naming("--curves", lambda: load(curves, out=out, adapt=adapt)))
    if records is not None and meaning and records.studies:
        problems.append("--phase is given, and --curves is a run of tune_kd's; allowed: with tables of others only")
    if records is None or problems:
        raise UserError(*problems)
    chosen, why = _scale_of_curves(path, scale, records)
    theirs = [name for name in records.trials["dataset"].dropna().unique() if name in DATA_SETS]
    data = theirs[0] if len(theirs) == 1 else None  # a scale may have other settings for another data set
    resolved = discover.resolve(path, chosen, data, settings_with(settings, margin_from, path, chosen, data, out))
    named = resolved.screen.strata if strata is None else None if strata == "none" else strata.split(",")
    recorded = simulation.curves(records, resolved, named)
    simulation.check_screen(resolved.screen, recorded)
    console = Terminal(stderr=as_json)
    for epochs in sorted({epochs for _, epochs in recorded.grids if not resolved.screen.rungs(epochs)}):
        console.print(f"warning: screen.grace is {resolved.screen.grace}, so in curves of {epochs} epochs nothing is "
                      "compared")  # fmt: skip
    replays = iter(tracked(orders * len(recorded.grids), "replays"))
    outcomes = simulation.simulate(resolved.screen, recorded, orders, beat=lambda: next(replays))
    next(replays, None)
    if as_json:
        answer: dict[str, Any] = {"study": resolved.name, "scale": chosen, "screen": asdict(resolved.screen)}
        answer |= {"curves": curves, "orders": orders, "left_out": recorded.left_out}
        answer["strata"] = {name: _outcome(outcome) for name, outcome in outcomes.items()}
        print_json(answer)
        return
    console.print(f"{resolved.name} at scale {chosen}{why}: early stopping over the curves of {curves}")
    for sentence in recorded.left_out:
        console.print(f"left out: {sentence}")
    console.print(terminal.simulation(resolved.screen, outcomes, orders))


def calibrate(
    study: StudyName,
    studies: Annotated[int, typer.Option(help="Simulated studies of arms that are all alike.")] = 200,
    scale: Scale = "auto",
    data: DataName = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """How often a study finds something where nothing is: simulated from screen to verdict, beside usual practices."""
    import os

    from tune_kd.analysis import calibrate as calibration
    from tune_kd.reporting import terminal
    from tune_kd.study import discover as spaces

    path = spaces.find(study)
    if not 1 <= studies <= 1_000_000:
        raise UserError(f"--studies is {studies}; allowed: from 1 to 1,000,000")
    chosen, why = scale_of(path, scale, None, data, settings or ())
    resolved = spaces.resolve(path, chosen, data, settings or ())
    replays = iter(tracked(studies, "studies"))
    found = calibration.calibrate(resolved, studies, os.cpu_count() or 1, beat=lambda: next(replays))
    next(replays, None)
    if as_json:
        practices = {name: asdict(rate) | {"share": rate.share, "standard_error": rate.standard_error}
                     for name, rate in found.rates.items()}  # fmt: skip
        bias = {"finished": found.finished, "bias_in_deviations": found.bias}
        print_json({"study": resolved.name, "scale": chosen, "practices": practices, "plain_asha": bias})
        return
    console = Terminal()
    console.print(f"{resolved.name} at scale {chosen}{why}")
    console.print(terminal.calibration(calibration.PRACTICES, found))


def _seeds(planned: "Plan") -> dict[str, Any]:
    """What the seeds of each look can show, at the deviation that the study expects."""
    from tune_kd.analysis.statistics import detectable, smallest_exact_p, spent

    confirm, deviation = planned.study.confirm, planned.study.deviation
    looks = confirm.looks or (len(confirm.seeds),)
    found = [
        {
            "seeds": seeds,
            "level": level,
            "detectable_difference": detectable(seeds, deviation, alpha=level),
            "detectable_after_holm": detectable(seeds, deviation, alpha=level / max(1, len(planned.contrasts))),
            "smallest_exact_p": smallest_exact_p(seeds),
        }
        for seeds, level in zip(looks, spent(looks), strict=True)
    ]
    return {"confirm": list(confirm.all_seeds), "deviation": deviation, "looks": found} | found[0]


def _answers(planned: "Plan") -> list[dict[str, Any]]:
    """What each teacher with logit students answers: which views, how many, for how many draws."""
    from tune_kd.study.cost import draws, views_answered

    found = []
    for teacher in planned.teachers:
        if teacher.trial_id in planned.answering:
            answering = planned.answering[teacher.trial_id]
            found.append(
                {
                    "teacher": teacher.label,
                    "views": "all" if answering.ahead else "drawn",
                    "count": round(views_answered(answering, teacher)),
                    "draws": draws(answering, teacher),
                }
            )
    return found


def _print_plan(planned: "Plan", summary: dict[str, Any], why: str) -> None:
    from tune_kd.reporting.terminal import duration, points

    console = Terminal()
    seeds, cost = summary["seeds"], summary["price"]
    console.print(f"{summary['study']} at scale {summary['scale']}{why}", style="bold")
    console.print(
        f"{planned.raw_cells} raw cells are {len(planned.arms)} arms; {len(summary['trials'])} trials, of which "
        f"{len(planned.teachers)} are teachers; {len(planned.contrasts)} contrasts",
    )
    table = Table(box=None, header_style="bold")
    for title in ("arm", "role", "merged cells"):
        table.add_column(title, justify="right" if title == "merged cells" else "left")
    for arm in planned.arms:
        table.add_row(arm.name, arm.role, str(arm.merged) if arm.merged > 1 else "")
    console.print(table)
    if planned.contrasts:
        contrasts = Table(box=None, header_style="bold")
        for title in ("contrast", "kind"):
            contrasts.add_column(title, overflow="fold")
        for contrast in planned.contrasts:
            contrasts.add_row(contrast.name, contrast.kind)
        console.print(contrasts)
    for each in summary["answers"]:
        which = (
            f"all {each['count']:,} views ahead" if each["views"] == "all" else f"about {each['count']:,} drawn views"
        )
        console.print(f"{each['teacher']} answers {which}, for {each['draws']:,} draws of its students.")
    console.print(
        f"Price: {cost['flop'] / 1e15:.2g} PFLOP, {duration(cost['slot_seconds'])} of one slot ({cost['how']}).",
    )
    tuning = planned.study.tuning
    if tuning is not None:
        console.print(
            f"Each arm is tuned with {tuning.budget} {tuning.budget_unit} ({tuning.sampler}), by validation accuracy "
            f"at seed {planned.study.screen.seed}; its best and its default are confirmed."
        )
        for search in planned.searches:
            console.print(f"  {search.name}: {', '.join(f'{each.name} {each.over}' for each in search.ranges)}")
    screen = summary["screen"]
    rungs = ", ".join(map(str, screen["rungs"])) or "none"
    margins = screen["margin"] if isinstance(screen["margin"], tuple) else [screen["margin"]]
    what, peers = ("an arm", " and ".join(screen["strata"] or ["study"])) if tuning is None else ("a draw", "arm")
    console.print(
        f"Early stopping of the screen: rungs at epoch {rungs}; {what} stops that is more than "
        f"{', '.join(points(margin) for margin in margins)} points behind the best 1/{screen['reduction']} of at least "
        f"{screen['min_peers']} peers of the same {peers}.",
    )
    for warning in summary["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
    for look in seeds["looks"]:
        if look["detectable_difference"] is None:
            console.print("One seed to confirm: no difference can be judged.")
            continue
        level = f" and a level of {look['level']:g}" if len(seeds["looks"]) > 1 else ""
        console.print(
            f"{look['seeds']} seeds, at a seed-to-seed deviation of {points(seeds['deviation'])} points{level}: a "
            f"paired t test finds true differences from {points(look['detectable_difference'])} points on with 80 % "
            f"power ({points(look['detectable_after_holm'])} where Holm is hardest); the exact sign-flip p cannot fall "
            f"below {look['smallest_exact_p']:.4f}.",
        )


def _scale_of_curves(path: Path, scale: str, records: "Records") -> tuple[str, str]:
    """The scale whose settings fit recorded curves, and why."""
    from tune_kd.study import discover

    declared = discover.scales(path)
    if scale != "auto":
        return scale, ""
    theirs = records.trials["scale"].dropna().unique().tolist()
    if len(theirs) == 1 and theirs[0] in declared:
        return theirs[0], ", which the curves are of"
    return ("paper", ", since the curves name none") if "paper" in declared else (next(iter(declared)), "")


def _outcome(outcome: Any) -> dict[str, Any]:
    """A stratum's outcome as JSON: early stopping's own numbers at the top, the baselines' beneath."""
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
