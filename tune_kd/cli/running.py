"""Commands that train: `run` and `resume`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tune_kd.analysis import grace
from tune_kd.cli import options
from tune_kd.cli.reading import print_report
from tune_kd.cli.remote import elsewhere
from tune_kd.execute.monitoring import is_url
from tune_kd.reporting.terminal import Terminal
from tune_kd.study import discover
from tune_kd.study.plan import plan
from tune_kd.system import signals
from tune_kd.system.errors import collect, raise_problems

if TYPE_CHECKING:
    from tune_kd.execute.options import Options
    from tune_kd.execute.session import Ended
    from tune_kd.records.run_folder import Run

Extend = Annotated[
    bool, typer.Option("--extend", help="Run the study's next look, or the seeds or levels added to its file.")
]
StudyNow = Annotated[
    str | None,
    typer.Option(
        help="The study file, if it was moved or changed. The file is executed.",
        metavar="STUDY",
        show_default="as recorded",
    ),
]
AddressNow = Annotated[
    str | None,
    typer.Option(help="As for `run`. For a submitted run: URL of the cluster's dashboard.", show_default=False),
]


def run(
    study: options.StudyName,
    scale: options.Scale = "auto",
    data: options.DataName = None,
    data_dir: options.DataDir = None,
    out: options.Out = options.DEFAULT_OUT,
    name: options.Name = None,
    settings: options.Settings = None,
    margin_from: options.MarginFrom = None,
    gpus_per_trial: options.Gpus = "auto",
    cpus_per_trial: options.Cpus = 1.0,
    max_concurrent: options.MaxConcurrent = None,
    mps: options.Mps = "auto",
    address: options.Address = None,
    keep_checkpoints: options.Keep = False,
    track: options.Track = None,
    no_dry_run: options.NoDryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Plan a study, train it with Ray Tune, and report the results."""
    from tune_kd.execute import session
    from tune_kd.execute.options import Options, check, parse_gpus
    from tune_kd.records import run_folder

    options.check_secrets({"STUDY": study, "--scale": scale, "--data": data, "--data-dir": data_dir and str(data_dir),
                   "--out": str(out), "--name": name, "--set": settings})  # fmt: skip
    console = Terminal(stderr=as_json)
    data_dir = data_dir and Path(os.path.expanduser(data_dir)).absolute()
    options.check_address(address)
    path = discover.find(study)
    chosen, why = options.scale_of(path, scale, address, data, settings or ())
    problems: list[str] = []
    settings = collect(problems, lambda: options.settings_with(settings, margin_from, path, chosen, data, out))
    resolved = collect(problems, lambda: discover.resolve(path, chosen, data, settings or ()))
    if resolved is not None:
        name = collect(problems, lambda: run_folder.check_new(out, name, resolved))
    gpus = collect(problems, lambda: parse_gpus(gpus_per_trial))
    asked = Options(gpus, cpus_per_trial, max_concurrent, keep_checkpoints, mps, tuple(track or ()))
    collect(problems, lambda: check(resolved, asked, address))
    raise_problems(problems)
    assert resolved is not None and name is not None
    if not no_dry_run:
        options.dry_run(plan(resolved), path)
    console.print(f"{resolved.name} at scale {chosen}{why}")
    for warning in grace.warnings(plan(resolved), out):
        console.say(f"warning: {warning}")
    source = discover.Source(path, chosen, data, tuple(settings or ()))
    with _resumable(out / name, console):
        _conclude(*session.start(resolved, out / name, data_dir, asked, address, console, source), console, as_json)


def resume(
    context: typer.Context,
    run: options.RunName,
    out: options.Out = options.DEFAULT_OUT,
    extend: Extend = False,
    settings: options.Settings = None,
    study: StudyNow = None,
    gpus_per_trial: options.GpusNow = None,
    cpus_per_trial: options.CpusNow = None,
    max_concurrent: options.MaxConcurrent = None,
    mps: options.MpsNow = None,
    track: options.Track = None,
    address: AddressNow = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a run: train the remaining trials from their last checkpoints."""
    from tune_kd.execute import session
    from tune_kd.execute.options import check, options_of, parse_gpus
    from tune_kd.records import run_folder

    file = None if study is None else options.naming("--study", lambda: discover.find(study), of="STUDY")
    if address is not None and is_url(address):
        elsewhere(context, "resume", run, address, "--address", "auto", study=study)
    options.check_secrets({"--set": settings})
    options.check_address(address)
    console = Terminal(stderr=as_json)
    reopened = run_folder.reopen(run_folder.find(out, run))
    problems: list[str] = []
    collect(problems, lambda: run_folder.check_links(reopened))
    if settings and not extend:
        problems.append("--set is given; allowed: only with --extend, since a run keeps the study that it started with")
    given: dict[str, Any] = {
        "gpus_per_trial": None if gpus_per_trial is None else collect(problems, lambda: parse_gpus(gpus_per_trial)),
        "cpus_per_trial": cpus_per_trial,
        "max_concurrent": max_concurrent,
        "mps": mps,
        "track": None if track is None else tuple(track),
    }
    asked = replace(options_of(reopened), **{name: value for name, value in given.items() if value is not None})
    collect(problems, lambda: check(reopened.study, asked, address))
    raise_problems(problems)
    if track is None:
        _tell_untracked(reopened, asked, console)
    with _resumable(reopened.folder, console):
        went = session.go_on(
            reopened, asked, address, console, file=file, extend=extend, settings=tuple(settings or ())
        )
        _conclude(*went, console, as_json)


def _tell_untracked(run: "Run", asked: "Options", console: Terminal) -> None:
    """Print the recorded trackers that are not used now because they send data to another machine."""
    if silent := [name for name in run.settings.get("track") or () if name not in asked.track]:
        console.say(
            f"recorded trackers that are not used now: {', '.join(silent)}. A tracker that sends results to another "
            f"machine is used only if you ask for it: --track {silent[0]}"
        )


@contextmanager
def _resumable(folder: Path, console: Terminal) -> Iterator[None]:
    """Within this context, print how to continue if a signal ends the command after the run was created."""
    from tune_kd.records.sync import STUDY

    advice = f"continue with: python -m tune_kd resume {quote(str(folder))}"
    with signals.advising(advice):
        try:
            yield
        except SystemExit:
            if signals.asked() is not None and (folder / STUDY).is_file():
                console.say(f"interrupted; {advice}")
            raise


def _conclude(run: "Run", ended: "Ended", console: Terminal, as_json: bool) -> NoReturn:
    """Report a run that has ended, and exit with its status."""
    from tune_kd.execute.session import concluded

    if ended.signal is not None:
        raise SystemExit(128 + ended.signal)
    print_report(concluded(run), run.folder / "report", console, as_json)
    looks, folder = run.study.confirm.looks or (), quote(str(run.folder))
    if run.look + 1 < len(looks):
        console.say(
            f"This was look {run.look + 1} of {len(looks)}; continue to {looks[run.look + 1]} seeds with: "
            f"python -m tune_kd resume {folder} --extend"
        )
    if ended.failed:
        console.say(f"{ended.failed} trials failed or were blocked; `tune_kd status {folder}` shows why")
    raise SystemExit(1 if ended.failed else 0)
