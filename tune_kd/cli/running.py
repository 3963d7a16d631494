"""Commands that train: `run` and `resume`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from tune_kd.cli.options import (
    DEFAULT_OUT,
    Address,
    AsJson,
    Cpus,
    CpusNow,
    DataDir,
    DataName,
    Gpus,
    Keep,
    MarginFrom,
    MaxConcurrent,
    Name,
    Out,
    RunName,
    Scale,
    Settings,
    StudyName,
    Terminal,
    Track,
    check_address,
    check_secrets,
    collect,
    naming,
    scale_of,
    settings_with,
)
from tune_kd.cli.reading import print_report
from tune_kd.cli.remote import elsewhere
from tune_kd.system import environment, signals
from tune_kd.system.errors import UserError

if TYPE_CHECKING:
    from tune_kd.execute.session import Ended
    from tune_kd.records.run_folder import Run


SHARES = {"gpus_per_trial": None, "cpus_per_trial": 1.0, "max_concurrent": None, "keep_checkpoints": False}


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
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Plan a study, train it with Ray Tune, record and report it."""
    from tune_kd.analysis import grace
    from tune_kd.execute import resources, session
    from tune_kd.records import run_folder as runs
    from tune_kd.study import discover
    from tune_kd.study.plan import plan as expand

    check_secrets({"STUDY": study, "--scale": scale, "--data": data, "--data-dir": data_dir and str(data_dir),
                   "--out": str(out), "--name": name, "--set": settings})  # fmt: skip
    console = Terminal(stderr=as_json)
    data_dir = data_dir and Path(os.path.expanduser(data_dir)).absolute()
    check_address(address)
    path = discover.find(study)
    chosen, why = scale_of(path, scale, address, data, settings or ())
    problems: list[str] = []
    settings = collect(problems, lambda: settings_with(settings, margin_from, path, chosen, data, out))
    resolved = collect(problems, lambda: discover.resolve(path, chosen, data, settings or ()))
    if resolved is not None:
        name = collect(problems, lambda: runs.check_new(out, name, resolved))
    collect(problems, lambda: session.check_compiler(resolved))
    gpus = collect(problems, lambda: resources.parse_gpus(gpus_per_trial))
    collect(problems, lambda: resources.check(cpus_per_trial, gpus, max_concurrent, address))
    collect(problems, lambda: session.check_trackers(track))
    collect(problems, lambda: environment.check_places(address))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    assert resolved is not None and name is not None
    console.print(f"{resolved.name} at scale {chosen}{why}")
    for warning in grace.warnings(expand(resolved), out):
        console.print(f"warning: {warning}", soft_wrap=True)
    loaded = session.load_data(resolved, data_dir, console)
    begun = runs.Run(
        name=name,
        folder=out / name,
        study=resolved,
        data_digest=loaded.digest,
        data_dir=data_dir,
        settings={
            "gpus_per_trial": session.measured_share(resolved, loaded, console) if gpus == "auto" else gpus,
            "cpus_per_trial": cpus_per_trial,
            "max_concurrent": max_concurrent,
            "keep_checkpoints": keep_checkpoints,
            "track": track or [],
        },
        source=discover.Source(path, chosen, data, tuple(settings or ())),
    )
    session.fetch_weights(resolved)
    with _resumable(begun.folder, console):
        with runs.begun(begun):
            ended = session.execute(begun, loaded, console, address)
        _conclude(begun, ended, console, as_json)


def resume(
    run: RunName,
    out: Out = DEFAULT_OUT,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go to the study's next look, or add seeds or levels that it declares now.")
    ] = False,
    settings: Settings = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="The study, where its file is elsewhere now or was changed: it is executed.",
            metavar="STUDY",
            show_default="as on record",
        ),
    ] = None,
    gpus_per_trial: Gpus = None,
    cpus_per_trial: CpusNow = None,
    max_concurrent: MaxConcurrent = None,
    track: Track = None,
    address: Annotated[
        str | None,
        typer.Option(help="As of `run`; or, of a run that was submitted, its URL.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of a run, from where it stood. Shares are as it began, unless they are given."""
    from tune_kd.execute import resources, session
    from tune_kd.execute.monitoring import is_url
    from tune_kd.records import extension, lock
    from tune_kd.records import run_folder as runs
    from tune_kd.study import discover

    file = None if study is None else naming("--study", lambda: discover.find(study), of="STUDY")
    if address is not None and is_url(address):
        flags: dict[str, Any] = {
            "--extend": extend,
            "--set": settings,
            "--gpus-per-trial": gpus_per_trial,
            "--json": as_json,
        }
        flags |= {"--cpus-per-trial": cpus_per_trial, "--max-concurrent": max_concurrent, "--track": track}
        elsewhere("resume", run, address, {**flags, "--address": "auto"}, study)
    check_secrets({"--set": settings})
    check_address(address)
    console = Terminal(stderr=as_json)
    reopened = runs.reopen(runs.find(out, run))
    problems: list[str] = []
    collect(problems, lambda: runs.check_links(reopened))
    if settings and not extend:
        problems.append("--set is given; allowed: with --extend only, since a run keeps the study that it began with")
    collect(problems, lambda: session.check_compiler(reopened.study))
    asked = collect(problems, lambda: resources.parse_gpus(gpus_per_trial))
    recorded = reopened.settings.get("track") or []
    tracked = session.trackers_unasked(recorded) if track is None else track
    collect(problems, lambda: session.check_trackers(tracked))
    given = {
        "gpus_per_trial": asked,
        "cpus_per_trial": cpus_per_trial,
        "max_concurrent": max_concurrent,
        "track": tracked if recorded or track else None,
    }
    share = SHARES | reopened.settings | {name: value for name, value in given.items() if value is not None}
    collect(
        problems,
        lambda: resources.check(share["cpus_per_trial"], share["gpus_per_trial"], share["max_concurrent"], address),
    )
    collect(problems, lambda: environment.check_places(address))
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if track is None and (silent := [name for name in recorded if name not in tracked]):
        console.print(
            f"{', '.join(silent)} showed this run; it goes on without, unless you say --track {silent[0]}: where "
            "results are sent is for you to say, and not for their record",
            soft_wrap=True,
        )
    with lock.held(reopened.folder):  # whoever else holds it is told of before anything is read or changed
        reopened = runs.reopen(reopened.folder)
        reopened = reopened if file is None else extension.with_file(reopened, file)
        if extend:
            reopened = extension.extended(reopened, settings or ())
        elif changes := extension.changes(reopened):
            raise UserError(
                f"RUN is {reopened.name}, whose study was changed since it began: {'; '.join(changes)}. Put the study "
                "back, start a new run, or, where only seeds or levels were added, resume with --extend"
            )
        # To a folder that only the record names nothing is written.
        loaded = session.load_data(reopened.study, reopened.data_dir, console, download=reopened.data_dir is None)
        if loaded.digest != reopened.data_digest:
            raise UserError(
                f"RUN is {reopened.name}, begun on data with the digest {reopened.data_digest[:16]}; the data now have "
                f"{loaded.digest[:16]}: put the same data back at {reopened.data_dir or 'their place'}"
            )
        if share["gpus_per_trial"] == "auto":
            share["gpus_per_trial"] = session.measured_share(reopened.study, loaded, console)
        reopened = replace(reopened, settings=share)
        session.fetch_weights(reopened.study)
        record = (lambda: extension.record_extension(reopened)) if extend else (lambda: None)
        with _resumable(reopened.folder, console):
            ended = session.execute(reopened, loaded, console, address, record)
    with _resumable(reopened.folder, console):
        _conclude(reopened, ended, console, as_json)


@contextmanager
def _resumable(folder: Path, console: Console) -> Iterator[None]:
    """Say how to go on where a signal ends what is done here, if there is something to go on with."""
    from tune_kd.records.sync import STUDY

    advice = f"go on with: python -m tune_kd resume {quote(str(folder))}"
    with signals.advising(advice):
        try:
            yield
        except SystemExit:
            if signals.asked() is not None and (folder / STUDY).is_file():
                console.print(f"interrupted; {advice}", soft_wrap=True)
            raise


def _conclude(run: "Run", ended: "Ended", console: Console, as_json: bool) -> NoReturn:
    """Report a run that has ended, and exit with what became of it."""
    from tune_kd.analysis import early_stopping, grace
    from tune_kd.records import sync
    from tune_kd.records.reader import load

    if ended.signal is not None:
        raise SystemExit(128 + ended.signal)
    records = load(run.folder)
    grace.record(run.folder, run.name, run.study, early_stopping.rank_correlations(records, everywhere=True))
    sync.send(run.folder, grace.AUDIT)
    print_report(records, run.folder / "report", console, as_json)
    looks = run.study.confirm.looks or ()
    if run.look + 1 < len(looks):
        console.print(
            f"This was look {run.look + 1} of {len(looks)}; go on to {looks[run.look + 1]} seeds with: "
            f"python -m tune_kd resume {quote(str(run.folder))} --extend",
            soft_wrap=True,
        )
    if ended.failed:
        sentence = f"{ended.failed} trials failed or were blocked; `tune_kd status {quote(str(run.folder))}` says why"
        console.print(sentence, soft_wrap=True)
    raise SystemExit(1 if ended.failed else 0)
