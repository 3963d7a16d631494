"""Commands on a remote cluster: `submit`, and `status` and `resume` with `--address`."""

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, NoReturn

import typer

from tune_kd.cli import options
from tune_kd.execute.monitoring import OPEN, asks_for_token, is_here, is_url
from tune_kd.reporting.terminal import Terminal
from tune_kd.study import discover
from tune_kd.study.brought import codes, with_sources
from tune_kd.study.source import INSTALLED, executed
from tune_kd.system.errors import UserError, collect, raise_problems

Install = Annotated[
    bool, typer.Option("--install", help="First install tune_kd's dependencies on the cluster, in the local versions.")
]
ClusterData = Annotated[str | None, typer.Option(help="Path of the CIFAR data on the cluster.", show_default=False)]
ClusterOut = Annotated[str, typer.Option(help="Folder for all runs on the cluster, or s3://BUCKET/PATH.")]
Detach = Annotated[bool, typer.Option("--detach", help="Exit once the job is submitted, without following its log.")]


def submit(
    context: typer.Context,
    study: options.StudyName,
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's dashboard.")],
    scale: options.Scale = "auto",
    data: options.DataName = None,
    data_dir: ClusterData = None,
    out: ClusterOut = str(options.DEFAULT_OUT),
    name: options.Name = None,
    settings: options.Settings = None,
    margin_from: options.MarginFrom = None,
    gpus_per_trial: options.Gpus = "auto",
    cpus_per_trial: options.Cpus = 1.0,
    max_concurrent: options.MaxConcurrent = None,
    mps: options.Mps = "auto",
    keep_checkpoints: options.Keep = False,
    track: options.Track = None,
    install: Install = False,
    detach: Detach = False,
) -> None:
    """Run a study on a remote cluster as a Ray job, and follow its log."""
    from tune_kd.execute import jobs
    from tune_kd.execute.options import Options, check_shares, parse_gpus
    from tune_kd.records import run_folder

    flags = _given(context, "out", "name", "address", "install", "detach")
    # The cluster shows a job's command and metadata to all its users.
    options.check_secrets({"STUDY": study, "--out": out, "--name": name, **flags})
    path = discover.find(study)
    problems: list[str] = []
    if scale != "auto":
        collect(problems, lambda: discover.resolve(path, scale, data, settings or ()))
    else:  # the cluster chooses the scale
        collect(problems, lambda: _all_made(path, data))
    name = name or f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    problems += run_folder.problems_with_name(name)
    gpus = collect(problems, lambda: parse_gpus(gpus_per_trial))
    collect(problems, lambda: check_shares(Options(gpus, cpus_per_trial, max_concurrent, mps=mps), address))
    place = collect(problems, lambda: _place(out, address))
    cluster = collect(problems, lambda: jobs.client(address))
    raise_problems(problems)
    assert cluster is not None and place is not None
    there, files = _sent(study, path)
    arguments = ["run", there, "--address", "auto"]
    arguments += _words(flags | {"--out": place, "--name": name})
    metadata = {"job_name": name, "run": name, "study": path.stem, "scale": scale, "out": place}
    job = jobs.submit(cluster, arguments, metadata, study=files, install=install)
    brings = any(each.methods for each in executed(path).made.values())
    _follow(cluster, job, name, address, detach, study if brings else None)


def elsewhere(
    context: typer.Context, command: str, run: str | None, address: str, *more: str, study: str | None = None
) -> NoReturn:
    """Run a command on the cluster of a submitted run, with the options given here, and exit with the command's status.
    If `study` is given, send its files along."""
    from tune_kd.execute import jobs

    flags = _given(context, "out", "address", "study")
    if flags.get("--json"):
        raise UserError("--json is given with --address; allowed: only one of them, since a job's log is not JSON")
    if run is None:
        raise UserError("--address is given without RUN; allowed: the name of a run that was submitted to that cluster")
    options.check_secrets({"RUN": run, **flags})
    files: Mapping[str, Path] = {}
    if study is not None:
        path = discover.find(study)
        _all_made(path)
        there, files = _sent(study, path)
        flags["--study"] = there
    cluster = jobs.client(address)
    found = jobs.find(cluster, run)
    arguments = [command, run, "--out", found["out"], *_words(flags), *more]
    job = jobs.submit(cluster, arguments, {**found, "job_name": f"{command} {run}"}, study=files)
    if command == "status":
        raise SystemExit(jobs.follow(cluster, job, _show))
    _follow(cluster, job, run, address, study=study)


def _sent(study: str, path: Path) -> tuple[str, Mapping[str, Path]]:
    """Return the name of a study on the cluster, and the files to send: the study, its imports and its own losses.

    Execute the study first. The studies of tune_kd itself are not sent.
    """
    if INSTALLED.resolve() in path.resolve().parents:
        return study, {}
    files, made = dict(executed(path).files), executed(path).made.values()
    for each in made:
        found = codes(with_sources(each, path.parent, path), path.parent, path)
        files |= {
            f"studies/{name}": path.parent / name for code in found if not code.is_installed for name, _ in code.files
        }
    return f"studies/{path.name}", files


def _all_made(path: Path, data: str | None = None) -> None:
    """Execute the study of a file at all its scales, to find all its imports."""
    for each in discover.scales(path):
        with suppress(UserError):
            discover.resolve(path, each, data)


def _follow(cluster: Any, job: str, run: str, address: str, detach: bool = False, study: str | None = None) -> NoReturn:
    """Print how to control a job, show its log, and exit with its status. If given, `study` is needed to resume."""
    from tune_kd.execute import jobs

    console, at = Terminal(stderr=True), f"--address {quote(address)}"
    named = f" --study {quote(study)}" if study else ""
    for line in (
        f"{run} is job {job} at {address}, and continues if this terminal closes",
        f"  status:  python -m tune_kd status {run} {at}",
        f"  stop:    ray job stop {at} {job}",
        f"  resume:  python -m tune_kd resume {run} {at}{named}",
    ):
        console.say(line)
    if not asks_for_token(address):
        console.say(OPEN)
    raise SystemExit(0 if detach else jobs.follow(cluster, job, _show))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _place(out: str, address: str) -> str:
    """Return the folder for runs on the cluster. Raises `UserError` for a relative path on another machine."""
    if "://" in out or os.path.isabs(out) or not is_url(address):
        return out
    if not is_here(address):
        raise UserError(
            f"--out is {out}; allowed: an absolute path on the cluster, or s3://BUCKET/PATH, since {address} is "
            "another machine"
        )
    return os.path.abspath(out)


def _given(context: typer.Context, *but: str) -> dict[str, Any]:
    """Return the options on the command line by name, without those of the parameters `but`."""
    found = {}
    for option in context.command.params:
        assert option.name is not None
        source = context.get_parameter_source(option.name)
        if option.param_type_name == "option" and option.name not in but and source and source.name == "COMMANDLINE":
            found[option.opts[0]] = context.params[option.name]
    return found


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as arguments of a command line."""
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [name] if value is True else [word for each in values for word in (name, str(each))]
    return words
