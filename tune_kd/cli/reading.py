"""Commands that read the records of runs: `status`, `report` and `list`."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import RenderableType

from tune_kd.cli.options import DEFAULT_OUT, AsJson, Elsewhere, Out, Phases, print_json, read_tables
from tune_kd.cli.remote import elsewhere
from tune_kd.records.adaptive_plan import with_those_to_come
from tune_kd.records.ledger import reading
from tune_kd.records.schema import DECISIONS, LEDGER, TRIALS, TrialRow, labels
from tune_kd.reporting import progress, terminal
from tune_kd.reporting.terminal import Terminal
from tune_kd.study import discover
from tune_kd.study.trial import UNENDED, UNSUCCESSFUL, Decision, Phase
from tune_kd.system.environment import private
from tune_kd.system.errors import UserError
from tune_kd.system.object_store import Mirror

if TYPE_CHECKING:
    from tune_kd.records.reader import Records


def status(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(help="Name of a run under --out, or its path. Default: the newest run.", metavar="RUN"),
    ] = None,
    out: Out = DEFAULT_OUT,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every file of the run, and list problems and remedies.")
    ] = False,
    address: Elsewhere = None,
    as_json: AsJson = False,
) -> None:
    """Show the progress of a run, finished or running, from its records."""
    if address is not None:
        elsewhere(context, "status", run, address)
    from tune_kd.records import lock, run_folder

    folder = _found(out, run)
    if verify:
        _verify(folder, as_json)
    if not os.path.exists(folder / LEDGER):
        raise UserError(
            f"RUN is {folder}, which has no ledger yet; start it with `python -m tune_kd resume {quote(str(folder))}`"
        )
    with reading(folder / LEDGER) as ledger:
        rows, decisions = ledger.rows(TRIALS), ledger.rows(DECISIONS)
    shown = rows
    with suppress(UserError):  # without a readable plan, show only the trials that a driver has recorded
        opened = run_folder.reopen(folder)
        rows = run_folder.trials(opened)
        shown = with_those_to_come(opened.plan, opened.name, rows)
    holder = lock.holder(folder)
    if as_json:
        phases = {phase: Counter(row["status"] for row in rows if row["phase"] == phase) for phase in Phase}
        answer = {"run": folder.name, "held_by": holder, "phases": phases, "trials": rows, "decisions": decisions}
        print_json(answer)
        return
    Terminal().print(progress.progress(folder.name, shown, [Decision.of(row) for row in decisions], None))
    _print_state(folder, holder, rows)


def _found(out: Path, run: str | None) -> Path:
    """Return the folder of a run. If `run` is None, return that of the newest run."""
    from tune_kd.records import run_folder

    if run is None:
        found = run_folder.existing(out)
        if not found:
            raise UserError(f"--out is {out}, which has no run; start one with `python -m tune_kd run ablation`")
        run = found[0].name
    return run_folder.find(out, run)


def _print_state(folder: Path, holder: Mapping[str, Any] | None, rows: Sequence[TrialRow]) -> None:
    """Print the process that executes a run, and the failed trials."""
    console = Terminal()
    if holder is not None:
        console.say(f"running in process {holder['pid']} on {holder['host']} since {holder['since']}")
    elif any(row["status"] in UNENDED for row in rows):
        console.say(f"not running; continue with: python -m tune_kd resume {quote(str(folder))}")
    failed, names = [row for row in rows if row["status"] in UNSUCCESSFUL], labels(rows)
    for row in failed[: progress.SHOWN]:
        console.say(f"{names[row['trial_id']]} {row['status']}: {row['error']}")
    if len(failed) > progress.SHOWN:
        console.print(f"and {len(failed) - progress.SHOWN} more; `--json` lists all of them")


def _verify(folder: Path, as_json: bool) -> NoReturn:
    """Print the problems of a run, and exit with 3 if there are any."""
    from tune_kd.execute.verify import verify

    found = verify(folder)
    if as_json:
        print_json({"run": folder.name, "findings": [asdict(finding) for finding in found]})
    else:
        console = Terminal()
        for finding in found:
            console.say(f"{finding.part}: {finding.what}; {finding.remedy}")
        if not found:
            console.say(f"{folder} is intact, from the plan to the teachers' cached logits")
    raise SystemExit(3 if found else 0)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(help="Names of runs under --out, or paths. Several runs are compared.", metavar="RUN..."),
    ],
    out: Out = DEFAULT_OUT,
    formats: Annotated[
        str, typer.Option("--format", help="Comma-separated formats to write.")
    ] = "html,md,csv,tex,png,svg",
    to: Annotated[Path | None, typer.Option(help="Output folder. Default: RUN/report.", show_default=False)] = None,
    phases: Phases = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the report once it is written.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the tables, figures and HTML page of one or more runs, and print the effects."""
    from tune_kd.records.reader import place

    records = read_tables([], runs, out, phases)
    if to is None:
        own = place(runs[0], out)
        if (own / "report").is_symlink():
            raise UserError(
                f"RUN is {own}, whose report is a link; links are not written to. Remove the link, or set --to"
            )
        to = own / "report" if len(runs) == 1 and own.is_dir() else Path(f"report-{'-'.join(records.runs)}"[:200])
    first = print_report(records, to, Terminal(stderr=as_json), as_json, formats.split(","))
    if open_:
        typer.launch(first.absolute().as_uri())


def list_(out: Out = DEFAULT_OUT, as_json: AsJson = False) -> None:
    """List studies and runs."""
    from tune_kd.records import run_folder

    names = {name: str(path) for name, path in discover.available().items()}
    folders = [str(folder) for folder in run_folder.existing(out)]
    if as_json:
        print_json({"studies": names, "runs": folders})
        return
    console = Terminal()
    for name, path in names.items():
        console.say(f"study  {name}  {path}")
    for folder in folders:
        console.say(f"run    {Path(folder).name}  {folder}")
    if not folders:
        console.say(f"no runs under {out}")


def print_report(
    records: "Records", folder: Path, console: Terminal, as_json: bool, formats: Sequence[str] | None = None
) -> Path:
    """Write a report, print a summary, and return the report's main file."""
    from tune_kd.analysis import accuracy, contrasts, provenance, summary, tuned
    from tune_kd.records import sync

    with private():  # Matplotlib creates folders in the home directory for its configuration and font list
        from tune_kd.reporting import report as reports

    try:
        first = reports.report(records, folder, formats or reports.FORMATS)
        sync.send(folder.parent, folder.name)
    except ValueError as error:  # imported tables may not support some statistic
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    effects, arms, explored = contrasts.contrasts(records), accuracy.arms(records), accuracy.exploratory(records)
    settings, budgets, spreads = tuned.settings(records), tuned.budgets(records), contrasts.variances(records)
    if as_json:
        answer: dict[str, Any] = {"runs": records.runs, "report": str(first)}
        answer["summary"] = summary.summary(records).sentences
        tables = {"arms": arms, "contrasts": effects, "exploratory": explored, "settings": settings, "budgets": budgets}
        tables |= {"variances": spreads} if len(spreads) else {}
        answer |= {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        if len(records.runs) > 1:
            answer["differences"] = provenance.differences(records).to_dict("records")
        print_json(answer)
        return first
    parts: list[RenderableType] = []
    if len(effects):
        said = summary.summary(records)
        parts = [terminal.sentences(said.sentences), terminal.effects(effects), "\n".join(said.method + said.holds_for)]
    if len(spreads):
        parts.append(terminal.variances(spreads))
    parts.append(terminal.arms(arms))
    if len(settings):
        parts.append(terminal.settings(settings, budgets))
    if len(records.runs) > 1:
        parts.append(terminal.differences(provenance.differences(records)))
    if not records.studies:
        parts.append("These tables have no study with declared contrasts: all their results are exploratory.")
    for part in parts:
        console.print()
        console.print(part)
    console.print()
    console.say(f"report: {first}")
    if (mirror := Mirror.of(first)).url is not None:
        console.say(f"also at {mirror.place(first)}")
    return first
