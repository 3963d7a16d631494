"""The command line: wiring and words. What takes long to import is imported by the command that needs it."""

import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from tune_kd.privacy import masked
from tune_kd.records import FAILURES
from tune_kd.study import DATA_SETS, Mistake

if TYPE_CHECKING:
    from tune_kd.launch import Ended
    from tune_kd.plan import Plan
    from tune_kd.run import Run
    from tune_kd.tables import Records

T = TypeVar("T")

app = typer.Typer(
    help="Controlled ablation studies of knowledge distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StudyName = Annotated[str, typer.Argument(help="A name in search_spaces/ or the path of a file.", metavar="STUDY")]
RunName = Annotated[str, typer.Argument(help="A name under --out or a path.", metavar="RUN")]
Scale = Annotated[str, typer.Option(help="auto, or a scale that the study declares (paper, laptop, smoke).")]
DataName = Annotated[str | None, typer.Option("--data", help="Data set: digits or cifar10.", show_default=False)]
DataDir = Annotated[
    Path | None,
    typer.Option(help="CIFAR-10: torchvision's files, an image folder, or a tar of one.", show_default=False),
]
Out = Annotated[Path, typer.Option(help="Folder of all runs and of the teachers they share.")]
Name = Annotated[str | None, typer.Option(help="Name of the run; made from study and time by default.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field of the study: recipe.epochs=4. Repeatable.")
]
MarginFrom = Annotated[
    str | None,
    typer.Option(
        metavar="RUN", help="Take screen.margin from the spread of an earlier run's controls.", show_default=False
    ),
]
Phases = Annotated[
    list[str] | None,
    typer.Option("--phase", help="In tables of others, what a phase is: select=screen. Repeatable."),
]
Gpus = Annotated[
    str | None, typer.Option(help="GPU share of a trial, such as 0.25; auto measures one.", show_default=False)
]
Cpus = Annotated[float, typer.Option(help="CPU share of a trial; its whole part is its threads, at least one.")]
MaxConcurrent = Annotated[int | None, typer.Option(help="Most trials at a time.", show_default=False)]
Address = Annotated[str | None, typer.Option(help="Address of a running Ray cluster.", show_default=False)]
Keep = Annotated[bool, typer.Option("--keep-checkpoints", help="Keep the final checkpoint of each trial.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

DEFAULT_OUT = Path("results")


@app.command()
def run(
    study: StudyName,
    scale: Scale = "auto",
    data: DataName = None,
    data_dir: DataDir = None,
    out: Out = DEFAULT_OUT,
    name: Name = None,
    settings: Settings = None,
    margin_from: MarginFrom = None,
    gpus_per_trial: Gpus = None,
    cpus_per_trial: Cpus = 1.0,
    max_concurrent: MaxConcurrent = None,
    address: Address = None,
    keep_checkpoints: Keep = False,
    as_json: AsJson = False,
) -> None:
    """Plan a study, train it with Ray Tune, record and report it."""
    from tune_kd import evidence, launch, shares, studies
    from tune_kd import run as runs
    from tune_kd.plan import plan as expand

    console = _console(as_json)
    data_dir = data_dir and data_dir.expanduser().absolute()
    path = studies.find(study)
    chosen, why = _scale(path, scale, address)
    problems: list[str] = []
    settings = _collect(problems, lambda: _settings(settings, margin_from, path, chosen, data, out))
    resolved = _collect(problems, lambda: studies.resolve(path, chosen, data, settings or ()))
    if resolved is not None:
        name = _collect(problems, lambda: runs.check_new(out, name, resolved))
    _collect(problems, lambda: launch.check_compiler(resolved))
    gpus = _collect(problems, lambda: shares.parse_gpus(gpus_per_trial))
    _collect(problems, lambda: shares.check(cpus_per_trial, gpus, max_concurrent, address))
    if problems:
        raise Mistake(*problems)
    assert resolved is not None and name is not None
    console.print(f"{resolved.name} at scale {chosen}{why}", highlight=False)
    for warning in evidence.warnings(expand(resolved), out):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    loaded = launch.load_data(resolved, data_dir, console)
    begun = runs.Run(
        name=name,
        folder=out / name,
        study=resolved,
        data_digest=loaded.digest,
        data_dir=data_dir,
        settings={
            "gpus_per_trial": launch.measured_share(resolved, loaded, console) if gpus == "auto" else gpus,
            "cpus_per_trial": cpus_per_trial,
            "max_concurrent": max_concurrent,
            "keep_checkpoints": keep_checkpoints,
        },
        source=runs.Source(path, chosen, data, tuple(settings or ())),
    )
    launch.fetch_weights(resolved)
    with _resumable(begun.folder, console):
        with runs.begun(begun):
            ended = launch.execute(begun, console, address)
        _conclude(begun, ended, console, as_json)


@app.command()
def resume(
    run: RunName,
    out: Out = DEFAULT_OUT,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go to the study's next look, or add seeds or levels that it declares now.")
    ] = False,
    settings: Settings = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of a run, from where it stood."""
    from tune_kd import launch
    from tune_kd import run as runs

    console = _console(as_json)
    reopened = runs.reopen(runs.find(out, run))
    if settings and not extend:
        raise Mistake("--set is given; allowed: with --extend only, since a run keeps the study that it began with")
    with runs.held(reopened.folder):  # whoever else holds it is told of before anything is read or changed
        reopened = runs.reopen(reopened.folder)
        if extend:
            reopened = runs.extended(reopened, settings or ())
        elif changes := runs.changes(reopened):
            raise Mistake(
                f"RUN is {reopened.name}, whose study was changed since it began: {'; '.join(changes)}. Put the study "
                "back, start a new run, or, where only seeds or levels were added, resume with --extend"
            )
        digest = launch.load_data(reopened.study, reopened.data_dir, console).digest
        if digest != reopened.data_digest:
            raise Mistake(
                f"RUN is {reopened.name}, begun on data with the digest {reopened.data_digest[:16]}; the data now have "
                f"{digest[:16]}: put the same data back at {reopened.data_dir or 'their place'}"
            )
        launch.fetch_weights(reopened.study)
        extension = (lambda: runs.record_extension(reopened)) if extend else (lambda: None)
        with _resumable(reopened.folder, console):
            ended = launch.execute(reopened, console, address, extension)
    with _resumable(reopened.folder, console):
        _conclude(reopened, ended, console, as_json)


@app.command()
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
    from tune_kd import evidence, studies
    from tune_kd.plan import plan as expand
    from tune_kd.price import price

    path = studies.find(study)
    chosen, why = _scale(path, scale, None)
    resolved = studies.resolve(path, chosen, data, _settings(settings, margin_from, path, chosen, data, out))
    planned = expand(resolved)
    cost = price(planned.trials, planned.answering, resolved.rate)
    summary = {
        "study": resolved.name,
        "scale": resolved.scale,
        "data": asdict(resolved.data),
        "raw_cells": planned.raw_cells,
        "arms": [{"name": arm.name, "role": arm.role, "merged_cells": arm.merged} for arm in planned.arms],
        "teachers": [{"arm": each.arm, "seed": each.seed, "epochs": each.recipe.epochs} for each in planned.teachers],
        "answers": _answers(planned),
        "trials": [{"arm": each.arm, "phase": each.phase, "seed": each.seed} for each in planned.trials],
        "contrasts": [contrast.name for contrast in planned.contrasts],
        "price": {"flop": cost.flop, "slot_seconds": cost.slot_seconds, "how": cost.how},
        "screen": asdict(resolved.screen) | {"rungs": resolved.screen.rungs(resolved.recipe.epochs)},
        "seeds": _seeds(planned),
        "warnings": evidence.warnings(planned, out),
    }
    if as_json:
        print(json.dumps(summary))
    else:
        _print_plan(planned, summary, why)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="A name under --out or a path; the newest by default.")] = None,
    out: Out = DEFAULT_OUT,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every file of the run, and say what can be made again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands, from its records, also while it goes on."""
    from collections import Counter

    from tune_kd import run as runs
    from tune_kd.records import DECISIONS, LEDGER, TRIALS, reading
    from tune_kd.trial import Decision
    from tune_kd.view import PHASES, progress

    if run is None:
        found = runs.existing(out)
        if not found:
            raise Mistake(f"--out is {out}, where there is no run; start one with `python -m tune_kd run ablation`")
        folder = found[0]
    else:
        folder = runs.find(out, run)
    if verify:
        _verify(folder, as_json)
    if not (folder / LEDGER).is_file():
        raise Mistake(f"RUN is {folder}, which has no ledger yet; start it with `python -m tune_kd resume {folder}`")
    with reading(folder / LEDGER) as ledger:
        rows, decisions = ledger.rows(TRIALS), ledger.rows(DECISIONS)
    holder = runs.holder(folder)
    if as_json:
        phases = {phase: dict(Counter(row["status"] for row in rows if row["phase"] == phase)) for phase in PHASES}
        answer = {"run": folder.name, "held_by": holder, "phases": phases, "trials": rows, "decisions": decisions}
        print(json.dumps(answer))
        return
    console = Console()
    console.print(progress(folder.name, rows, [Decision.of(row) for row in decisions], None))
    if holder is not None:
        console.print(f"run by process {holder['pid']} on {holder['host']} since {holder['since']}", highlight=False)
    elif any(row["status"] in ("pending", "running") for row in rows):
        console.print(f"nobody runs it; go on with: python -m tune_kd resume {folder}", highlight=False)
    for row in rows:
        if row["status"] in ("failed", "blocked"):
            console.print(f"{row['arm']} seed {row['seed']} {row['status']}: {row['error']}", highlight=False)


def _verify(folder: Path, as_json: bool) -> NoReturn:
    """Say what is wrong with a run, and exit with 3 where anything is."""
    from tune_kd.verify import verify

    found = verify(folder)
    if as_json:
        print(json.dumps({"run": folder.name, "findings": [asdict(finding) for finding in found]}))
    else:
        console = Console()
        for finding in found:
            console.print(f"{finding.part}: {finding.what}; {finding.remedy}", highlight=False, soft_wrap=True)
        if not found:
            console.print(f"{folder} is whole, from its plan to its teachers' answers", highlight=False, soft_wrap=True)
    raise SystemExit(3 if found else 0)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Names under --out or paths; several are compared.", metavar="RUN...")
    ],
    out: Out = DEFAULT_OUT,
    formats: Annotated[
        str, typer.Option("--format", help="What to write: html,md,csv,tex,png,svg, or some of them.")
    ] = "html,md,csv,tex,png,svg",
    to: Annotated[
        Path | None, typer.Option(help="Folder to write to; RUN/report by default.", show_default=False)
    ] = None,
    phases: Phases = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the report when it is written.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the tables, figures and page of runs, and print their effects."""
    from tune_kd.foreign import Adapter, parse_phases
    from tune_kd.tables import load, place

    problems: list[str] = []
    meaning = _collect(problems, lambda: parse_phases(phases or ()))
    records = _collect(problems, lambda: load(*runs, out=out, adapt=Adapter(phases=meaning or {})))
    if records is not None and meaning and len(records.studies) == len(records.runs):
        problems.append("--phase is given, and RUN is a run of tune_kd's; allowed: with tables of others only")
    if records is None or problems:
        raise Mistake(*problems)
    if to is None:
        own = place(runs[0], out)
        to = own / "report" if len(runs) == 1 and own.is_dir() else Path(f"report-{'-'.join(records.runs)}"[:200])
    first = _report(records, to, _console(as_json), as_json, formats.split(","))
    if open_:
        typer.launch(str(first.absolute()))


@app.command()
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
    from tune_kd import simulate as simulation
    from tune_kd import studies, view
    from tune_kd.foreign import Adapter, parse_phases
    from tune_kd.tables import load

    problems: list[str] = []
    path = studies.find(study)
    if not 1 <= orders <= 1_000_000:
        problems.append(f"--orders is {orders}; allowed: from 1 to 1,000,000")
    meaning = _collect(problems, lambda: parse_phases(phases or ()))
    adapt = Adapter(phases=meaning or {}, rest="screen")
    records = _collect(problems, lambda: _named("--curves", lambda: load(curves, out=out, adapt=adapt)))
    if records is not None and meaning and records.studies:
        problems.append("--phase is given, and --curves is a run of tune_kd's; allowed: with tables of others only")
    if records is None or problems:
        raise Mistake(*problems)
    chosen, why = _scale_of_curves(path, scale, records)
    theirs = [name for name in records.trials["dataset"].dropna().unique() if name in DATA_SETS]
    data = theirs[0] if len(theirs) == 1 else None  # a scale may have other settings for another data set
    resolved = studies.resolve(path, chosen, data, _settings(settings, margin_from, path, chosen, data, out))
    named = resolved.screen.strata if strata is None else None if strata == "none" else strata.split(",")
    recorded = simulation.curves(records, resolved, named)
    simulation.check_screen(resolved.screen, recorded)
    console = _console(as_json)
    for epochs in sorted({epochs for _, epochs in recorded.grids if not resolved.screen.rungs(epochs)}):
        console.print(f"warning: screen.grace is {resolved.screen.grace}, so in curves of {epochs} epochs nothing is "
                      "compared", highlight=False)  # fmt: skip
    replays = iter(_tracked(orders * len(recorded.grids), "replays"))
    outcomes = simulation.simulate(resolved.screen, recorded, orders, beat=lambda: next(replays))
    next(replays, None)
    if as_json:
        answer: dict[str, Any] = {"study": resolved.name, "scale": chosen, "screen": asdict(resolved.screen)}
        answer |= {"curves": curves, "orders": orders, "left_out": recorded.left_out}
        answer["strata"] = {name: _outcome(outcome) for name, outcome in outcomes.items()}
        print(json.dumps(answer))
        return
    console.print(
        f"{resolved.name} at scale {chosen}{why}: early stopping over the curves of {curves}", highlight=False
    )
    for sentence in recorded.left_out:
        console.print(f"left out: {sentence}", highlight=False)
    console.print(view.simulation(resolved.screen, outcomes, orders))


@app.command()
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

    from tune_kd import calibrate as calibration
    from tune_kd import studies as spaces
    from tune_kd import view

    path = spaces.find(study)
    if not 1 <= studies <= 1_000_000:
        raise Mistake(f"--studies is {studies}; allowed: from 1 to 1,000,000")
    chosen, why = _scale(path, scale, None)
    resolved = spaces.resolve(path, chosen, data, settings or ())
    replays = iter(_tracked(studies, "studies"))
    found = calibration.calibrate(resolved, studies, os.cpu_count() or 1, beat=lambda: next(replays))
    next(replays, None)
    if as_json:
        practices = {name: asdict(rate) | {"share": rate.share, "standard_error": rate.standard_error}
                     for name, rate in found.rates.items()}  # fmt: skip
        bias = {"finished": found.finished, "bias_in_deviations": found.bias}
        print(json.dumps({"study": resolved.name, "scale": chosen, "practices": practices, "plain_asha": bias}))
        return
    console = Console()
    console.print(f"{resolved.name} at scale {chosen}{why}", highlight=False)
    console.print(view.calibration(calibration.PRACTICES, found))


@app.command(name="list")
def list_(out: Out = DEFAULT_OUT, as_json: AsJson = False) -> None:
    """List studies and runs."""
    from tune_kd import run as runs
    from tune_kd import studies

    names = {name: str(path) for name, path in studies.available().items()}
    folders = [str(folder) for folder in runs.existing(out)]
    if as_json:
        print(json.dumps({"studies": names, "runs": folders}))
        return
    console = Console()
    for name, path in names.items():
        console.print(f"study  {name}  {path}", highlight=False, soft_wrap=True)
    for folder in folders:
        console.print(f"run    {Path(folder).name}  {folder}", highlight=False, soft_wrap=True)
    if not folders:
        console.print(f"no runs under {out}", highlight=False)


def main() -> None:
    """The entry point: a mistake of the caller's is one message and exit status 2."""
    try:
        with _left_by_signals():
            app()
    except Mistake as mistake:
        for problem in mistake.problems:
            print(f"tune_kd: {masked(problem)}", file=sys.stderr)
        sys.exit(2)
    except FAILURES as error:  # of the machine, not of the caller
        print(f"tune_kd: {type(error).__name__}: {error}", file=sys.stderr)
        if advice := _advice(error):
            print(f"tune_kd: {advice}", file=sys.stderr)
        sys.exit(3)
    except Exception:  # ours: 1 would say that trials failed
        traceback.print_exc()
        print("tune_kd: this is an error in tune_kd; what is on record is whole, please report it", file=sys.stderr)
        sys.exit(3)


def _advice(error: Exception) -> str:
    """What to do about a failure of the machine. Whatever it was, what is on record stays."""
    from tune_kd.records import damage

    if damage(error):
        return "`tune_kd status RUN --verify` says what is damaged, and what `tune_kd resume RUN` can make again"
    if isinstance(error, OSError) and error.errno is None:  # ours, whose words say it
        return ""
    return "what is on record is whole; see that the disk has room and can be written to, then `tune_kd resume RUN`"


INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


@contextmanager
def _left_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the command with 130 and 143, whatever it is at, except while trials run."""
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:  # Python drops what is raised while it frees an object, so it is told again
            raise SystemExit(128 + received[0])


@contextmanager
def _resumable(folder: Path, console: Console) -> Iterator[None]:
    """Say how to go on where a signal ends what is done here, if there is something to go on with."""
    from tune_kd.run import STUDY

    try:
        yield
    except SystemExit as left:
        if left.code in INTERRUPTED and (folder / STUDY).is_file():
            console.print(f"interrupted; go on with: python -m tune_kd resume {folder}", highlight=False)
        raise


def _console(as_json: bool) -> Console:
    return Console(stderr=as_json)


def _tracked(count: int, what: str) -> Iterable[int]:
    """Numbers up to a count, with a bar on standard error where that is a terminal."""
    from rich.progress import track

    shown = Console(stderr=True)
    return track(range(count), what, console=shown, transient=True, disable=not shown.is_terminal)


def _collect(problems: list[str], check: Callable[[], T]) -> T | None:
    """What a check returns; its problems are added to the others, so that all are told at once."""
    try:
        return check()
    except Mistake as mistake:
        problems += mistake.problems
        return None


def _scale(path: Path, scale: str, address: str | None) -> tuple[str, str]:
    """The scale that `auto` means here, and why."""
    from tune_kd import studies

    if scale != "auto":
        return scale, ""
    declared = studies.scales(path)
    if len(declared) == 1:
        return next(iter(declared)), ", its only one"
    if not {"paper", "laptop"} <= set(declared):
        raise Mistake(f"--scale is auto, which means paper or laptop; {path} declares: {', '.join(declared)}")
    if address is not None:
        from tune_kd.execute.on_ray import connect

        seen = connect(address).gpus > 0
    else:
        import torch

        seen = torch.cuda.is_available()
    if seen:
        return "paper", ", since Ray sees a GPU (--scale laptop for a small one)"
    return "laptop", ", since Ray sees no GPU (--scale paper for the whole study)"


def _scale_of_curves(path: Path, scale: str, records: "Records") -> tuple[str, str]:
    """The scale whose settings fit recorded curves, and why."""
    from tune_kd import studies

    declared = studies.scales(path)
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


def _conclude(run: "Run", ended: "Ended", console: Console, as_json: bool) -> NoReturn:
    """Report a run that has ended, and exit with what became of it."""
    from tune_kd import audit, evidence
    from tune_kd.tables import load

    if ended.signal is not None:
        raise SystemExit(128 + ended.signal)
    records = load(run.folder)
    evidence.record(run.folder, run.name, run.study, audit.rank_correlations(records, everywhere=True))
    _report(records, run.folder / "report", console, as_json)
    looks = run.study.confirm.looks or ()
    if run.look + 1 < len(looks):
        console.print(
            f"This was look {run.look + 1} of {len(looks)}; go on to {looks[run.look + 1]} seeds with: "
            f"python -m tune_kd resume {run.folder} --extend",
            highlight=False,
            soft_wrap=True,
        )
    if ended.failed:
        console.print(
            f"{ended.failed} trials failed or were blocked; `tune_kd status {run.folder}` says why", highlight=False
        )
    raise SystemExit(1 if ended.failed else 0)


def _report(
    records: "Records", folder: Path, console: Console, as_json: bool, formats: Sequence[str] | None = None
) -> Path:
    """Write a report and say what is in it; returns the file to read first."""
    from tune_kd import provenance, results, view
    from tune_kd import report as reports

    try:
        first = reports.write(folder, records, formats or reports.FORMATS)
    except ValueError as error:  # tables of others, of which some statement has no sense
        raise error if isinstance(error, Mistake) else Mistake(str(error)) from error
    effects, arms, explored = results.contrasts(records), results.arms(records), results.exploratory(records)
    if as_json:
        answer: dict[str, Any] = {"runs": records.runs, "report": str(first)}
        answer |= {name: json.loads(table.to_json(orient="records")) for name, table in
                   (("arms", arms), ("contrasts", effects), ("exploratory", explored))}  # fmt: skip
        if len(records.runs) > 1:
            answer["differences"] = provenance.differences(records).to_dict("records")
        print(json.dumps(answer))
        return first
    console.print()
    console.print(view.arms(arms))
    if len(effects):
        console.print()
        teachers = {len(study["study"]["teacher_seeds"]) for study in records.studies.values()}
        console.print(view.effects(effects, max(teachers)))
    if len(records.runs) > 1:
        console.print()
        console.print(view.differences(provenance.differences(records)))
    if not records.studies:
        console.print()
        console.print("No study fixed contrasts for these tables: everything in them is exploratory.", highlight=False)
    console.print()
    console.print(f"report: {first}", highlight=False, soft_wrap=True)
    return first


def _settings(
    settings: list[str] | None, margin_from: str | None, path: Path, scale: str, data: str | None, out: Path
) -> list[str]:
    """What is set of a study, with the margins that an earlier run's controls give; they are on record like any other
    setting."""
    given = settings or []
    if margin_from is None:
        return given
    if any(setting.partition("=")[0] == "screen.margin" for setting in given):
        raise Mistake("--margin-from is given beside --set screen.margin; allowed: one of them")
    from tune_kd import audit, studies
    from tune_kd.foreign import Adapter
    from tune_kd.tables import load

    study = studies.resolve(path, scale, data, given)
    earlier = _named("--margin-from", lambda: load(margin_from, out=out, adapt=Adapter(rest="screen")))
    margins = audit.noise_margins(earlier, study)
    return [*given, f"screen.margin={json.dumps(margins)}"]


def _named(option: str, read: Callable[[], T]) -> T:
    """What is read; a mistake in it names the option, and not the argument RUN that it would be elsewhere."""
    try:
        return read()
    except Mistake as mistake:
        raise Mistake(*(problem.replace("RUN", option, 1) for problem in mistake.problems)) from mistake


def _seeds(planned: "Plan") -> dict[str, Any]:
    """What the seeds of each look can show, at the deviation that the study expects."""
    from tune_kd.stats import detectable, smallest_exact_p, spent

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
    from tune_kd.price import draws, views_answered

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
    from tune_kd.view import duration, points

    console = Console()
    seeds, price = summary["seeds"], summary["price"]
    console.print(f"{summary['study']} at scale {summary['scale']}{why}", highlight=False, style="bold")
    console.print(
        f"{planned.raw_cells} raw cells are {len(planned.arms)} arms; {len(planned.trials)} trials, of which "
        f"{len(planned.teachers)} are teachers; {len(planned.contrasts)} contrasts",
        highlight=False,
    )
    table = Table(box=None, header_style="bold")
    for title in ("arm", "role", "merged cells"):
        table.add_column(title, justify="right" if title == "merged cells" else "left")
    for arm in planned.arms:
        table.add_row(arm.name, arm.role, str(arm.merged) if arm.merged > 1 else "")
    console.print(table)
    for each in summary["answers"]:
        which = (
            f"all {each['count']:,} views ahead" if each["views"] == "all" else f"about {each['count']:,} drawn views"
        )
        console.print(
            f"{each['teacher']} answers {which}, for {each['draws']:,} draws of its students.", highlight=False
        )
    console.print(
        f"Price: {price['flop'] / 1e15:.2g} PFLOP, {duration(price['slot_seconds'])} of one slot ({price['how']}).",
        highlight=False,
    )
    screen = summary["screen"]
    rungs = ", ".join(map(str, screen["rungs"])) or "none"
    margins = screen["margin"] if isinstance(screen["margin"], tuple) else [screen["margin"]]
    console.print(
        f"Early stopping of the screen: rungs at epoch {rungs}; an arm stops that is more than "
        f"{', '.join(points(margin) for margin in margins)} points behind the best 1/{screen['reduction']} of at least "
        f"{screen['min_peers']} peers of the same {' and '.join(screen['strata'] or ['study'])}.",
        highlight=False,
    )
    for warning in summary["warnings"]:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    for look in seeds["looks"]:
        if look["detectable_difference"] is None:
            console.print("One seed to confirm: no difference can be judged.", highlight=False)
            continue
        level = f" and a level of {look['level']:g}" if len(seeds["looks"]) > 1 else ""
        console.print(
            f"{look['seeds']} seeds, at a seed-to-seed deviation of {points(seeds['deviation'])} points{level}: a "
            f"paired t test finds true differences from {points(look['detectable_difference'])} points on with 80 % "
            f"power ({points(look['detectable_after_holm'])} where Holm is hardest); the exact sign-flip p cannot fall "
            f"below {look['smallest_exact_p']:.4f}.",
            highlight=False,
        )
