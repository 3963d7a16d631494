"""Commands that read what runs have recorded: `status`, `report` and `list`."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from tune_kd.cli.options import DEFAULT_OUT, AsJson, Elsewhere, Out, Phases, Terminal, print_json
from tune_kd.cli.remote import elsewhere
from tune_kd.system.environment import private
from tune_kd.system.errors import UserError, collect

if TYPE_CHECKING:
    from tune_kd.records.reader import Records


def status(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(help="A name under --out or a path; the newest by default.")] = None,
    out: Out = DEFAULT_OUT,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every file of the run, and say what can be made again.")
    ] = False,
    address: Elsewhere = None,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands, from its records, also while it goes on."""
    if address is not None:
        elsewhere(context, "status", run, address)
    from collections import Counter

    from tune_kd.records import lock
    from tune_kd.records import run_folder as runs
    from tune_kd.records.adaptive_plan import with_those_to_come
    from tune_kd.records.ledger import reading
    from tune_kd.records.schema import DECISIONS, LEDGER, TRIALS
    from tune_kd.reporting.progress import PHASES, SHOWN, progress
    from tune_kd.study.trial import Decision

    if run is None:
        found = runs.existing(out)
        if not found:
            raise UserError(f"--out is {out}, where there is no run; start one with `python -m tune_kd run ablation`")
        run = found[0].name
    folder = runs.find(out, run)
    if verify:
        _verify(folder, as_json)
    if not os.path.exists(folder / LEDGER):
        raise UserError(
            f"RUN is {folder}, which has no ledger yet; start it with `python -m tune_kd resume {quote(str(folder))}`"
        )
    with reading(folder / LEDGER) as ledger:
        rows, decisions = ledger.rows(TRIALS), ledger.rows(DECISIONS)
    shown = rows
    with suppress(UserError):  # where the plan cannot be read, those that a driver never took over are not known
        opened = runs.reopen(folder)
        rows = runs.trials(opened)
        shown = with_those_to_come(opened.plan, opened.name, rows)
    holder = lock.holder(folder)
    if as_json:
        phases = {phase: dict(Counter(row["status"] for row in rows if row["phase"] == phase)) for phase in PHASES}
        answer = {"run": folder.name, "held_by": holder, "phases": phases, "trials": rows, "decisions": decisions}
        print_json(answer)
        return
    console = Terminal()
    console.print(progress(folder.name, shown, [Decision.of(row) for row in decisions], None))
    if holder is not None:
        console.print(f"run by process {holder['pid']} on {holder['host']} since {holder['since']}", soft_wrap=True)
    elif any(row["status"] in ("pending", "running") for row in rows):
        console.print(f"nobody runs it; go on with: python -m tune_kd resume {quote(str(folder))}", soft_wrap=True)
    failed = [row for row in rows if row["status"] in ("failed", "blocked")]
    for row in failed[:SHOWN]:
        console.print(f"{row['arm']} seed {row['seed']} {row['status']}: {row['error']}", soft_wrap=True)
    if len(failed) > SHOWN:
        console.print(f"and {len(failed) - SHOWN} more; `--json` names all of them")


def _verify(folder: Path, as_json: bool) -> NoReturn:
    """Say what is wrong with a run, and exit with 3 where anything is."""
    from tune_kd.execute.verify import verify

    found = verify(folder)
    if as_json:
        print_json({"run": folder.name, "findings": [asdict(finding) for finding in found]})
    else:
        console = Terminal()
        for finding in found:
            console.print(f"{finding.part}: {finding.what}; {finding.remedy}", soft_wrap=True)
        if not found:
            console.print(f"{folder} is whole, from its plan to its teachers' answers", soft_wrap=True)
    raise SystemExit(3 if found else 0)


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
    from tune_kd.records.importer import Adapter, parse_phases
    from tune_kd.records.reader import load, place

    problems: list[str] = []
    meaning = collect(problems, lambda: parse_phases(phases or ()))
    records = collect(problems, lambda: load(*runs, out=out, adapt=Adapter(phases=meaning or {})))
    if records is not None and meaning and len(records.studies) == len(records.runs):
        problems.append("--phase is given, and RUN is a run of tune_kd's; allowed: with tables of others only")
    if records is None or problems:
        raise UserError(*problems)
    if to is None:
        own = place(runs[0], out)
        if (own / "report").is_symlink():
            raise UserError(
                f"RUN is {own}, whose report is a link, through which nothing is written; remove it, or say --to"
            )
        to = own / "report" if len(runs) == 1 and own.is_dir() else Path(f"report-{'-'.join(records.runs)}"[:200])
    first = print_report(records, to, Terminal(stderr=as_json), as_json, formats.split(","))
    if open_:
        typer.launch(first.absolute().as_uri())


def list_(out: Out = DEFAULT_OUT, as_json: AsJson = False) -> None:
    """List studies and runs."""
    from tune_kd.records import run_folder as runs
    from tune_kd.study import discover

    names = {name: str(path) for name, path in discover.available().items()}
    folders = [str(folder) for folder in runs.existing(out)]
    if as_json:
        print_json({"studies": names, "runs": folders})
        return
    console = Terminal()
    for name, path in names.items():
        console.print(f"study  {name}  {path}", soft_wrap=True)
    for folder in folders:
        console.print(f"run    {Path(folder).name}  {folder}", soft_wrap=True)
    if not folders:
        console.print(f"no runs under {out}", soft_wrap=True)


def print_report(
    records: "Records", folder: Path, console: Console, as_json: bool, formats: Sequence[str] | None = None
) -> Path:
    """Write a report and say what is in it; returns the file to read first."""
    from tune_kd.analysis import contrasts, provenance, tuned
    from tune_kd.records import sync
    from tune_kd.reporting import terminal
    from tune_kd.system.object_store import Mirror

    with private():  # Matplotlib makes folders in the home, and a list of fonts
        from tune_kd.reporting import report as reports

    try:
        first = reports.report(records, folder, formats or reports.FORMATS)
        sync.send(folder.parent, folder.name)
    except ValueError as error:  # tables of others, of which some statement has no sense
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    effects, arms, explored = contrasts.contrasts(records), contrasts.arms(records), contrasts.exploratory(records)
    if as_json:
        answer: dict[str, Any] = {"runs": records.runs, "report": str(first)}
        answer |= {name: json.loads(table.to_json(orient="records")) for name, table in
                   (("arms", arms), ("contrasts", effects), ("exploratory", explored),
                    ("settings", tuned.settings(records)), ("budgets", tuned.budgets(records)))}  # fmt: skip
        if len(records.runs) > 1:
            answer["differences"] = provenance.differences(records).to_dict("records")
        print_json(answer)
        return first
    console.print()
    console.print(terminal.arms(arms))
    if len(effects):
        console.print()
        teachers = {len(study["study"]["teacher_seeds"]) for study in records.studies.values()}
        console.print(terminal.effects(effects, max(teachers)))
    if len(found := tuned.settings(records)):
        console.print()
        console.print(terminal.settings(found, tuned.budgets(records)))
    if len(records.runs) > 1:
        console.print()
        console.print(terminal.differences(provenance.differences(records)))
    if not records.studies:
        console.print()
        console.print("No study fixed contrasts for these tables: everything in them is exploratory.")
    console.print()
    console.print(f"report: {first}", soft_wrap=True)
    if (mirror := Mirror.of(first)).url is not None:
        console.print(f"also at {mirror.place(first)}", soft_wrap=True)
    return first
