"""Options that several commands share, and functions to read and check them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from tune_kd.records.adaptive_plan import to_come
from tune_kd.records.importer import Adapter, parse_phases
from tune_kd.reporting.terminal import Terminal, duration
from tune_kd.study import discover
from tune_kd.study.brought import codes
from tune_kd.study.cost import estimate
from tune_kd.study.plan import Plan, plan
from tune_kd.study.trial import Phase
from tune_kd.system.errors import UserError, collect, raise_problems
from tune_kd.system.object_store import local
from tune_kd.system.secrets import secrets

if TYPE_CHECKING:
    from tune_kd.records.reader import Records

T = TypeVar("T")

StudyName = Annotated[str, typer.Argument(help="A name in search_spaces/ or the path of a file.", metavar="STUDY")]
RunName = Annotated[str, typer.Argument(help="A name under --out or a path.", metavar="RUN")]
Scale = Annotated[str, typer.Option(help="auto, or a scale that the study declares (paper, brief, laptop, smoke).")]
DataName = Annotated[str | None, typer.Option("--data", help="digits, cifar10 or cifar100.", show_default=False)]
DataDir = Annotated[
    Path | None, typer.Option(help="CIFAR: torchvision's files, an image folder, or a tar of one.", show_default=False)
]


class Unread(Exception):
    """A mistake in an option's text. Not a `UserError`: typer reports each ValueError of a parser in its own words."""

    def __init__(self, mistake: UserError) -> None:
        self.problems = mistake.problems
        super().__init__(str(mistake))


def _place(text: str) -> Path:
    """Parse a folder, or the URL of one in an object store, whose local mirror is returned."""
    try:
        return local(str(text))
    except UserError as mistake:
        raise Unread(mistake) from mistake


Out = Annotated[
    Path,
    typer.Option(
        help="Folder of all runs and of the teachers they share; or s3://BUCKET/PATH.", parser=_place, metavar="PLACE"
    ),
]
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
    list[str] | None, typer.Option("--phase", help="In tables of others, what a phase is: select=screen. Repeatable.")
]
GPUS = "GPU share of a trial, such as 0.25; auto measures which is best, where that pays."
Gpus = Annotated[str, typer.Option(help=GPUS)]
GpusNow = Annotated[str | None, typer.Option(help=GPUS, show_default="as the run began")]
CPUS = "CPU share of a trial; its whole part is its threads, at least one."
Cpus = Annotated[float, typer.Option(help=CPUS)]
CpusNow = Annotated[float | None, typer.Option(help=CPUS, show_default="as the run began")]
MPS = "NVIDIA's MPS: auto starts one where trials share a GPU, on starts one or fails, off starts none."
Mps = Annotated[str, typer.Option(help=MPS, metavar="auto|on|off")]
MpsNow = Annotated[str | None, typer.Option(help=MPS, metavar="auto|on|off", show_default="as the run began")]
MaxConcurrent = Annotated[int | None, typer.Option(help="Most trials at a time.", show_default=False)]
Address = Annotated[
    str | None, typer.Option(help="HOST:PORT of a Ray cluster that this machine is part of.", show_default=False)
]
Elsewhere = Annotated[
    str | None, typer.Option(help="URL of the dashboard of the cluster that it was submitted to.", show_default=False)
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Show the run in a tracker, too: tensorboard, mlflow or wandb. Repeatable.", show_default=False),
]
Keep = Annotated[bool, typer.Option("--keep-checkpoints", help="Keep the final checkpoint of each trial.")]
NoDryRun = Annotated[
    bool, typer.Option("--no-dry-run", help="Skip the two steps that try each loss which the study brings.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

DEFAULT_OUT = Path("results")


def print_json(answer: dict[str, Any]) -> None:
    """Print an answer to standard output as JSON in ASCII."""
    print(json.dumps(answer), flush=True)


@contextmanager
def progress(count: int, what: str) -> Iterator[Callable[[], object]]:
    """Show a progress bar on standard error if that is a terminal. Yields a function that advances it by one step."""
    from rich.progress import track

    shown = Terminal(stderr=True)
    steps = iter(track(range(count), what, console=shown, transient=True, disable=not shown.is_terminal))
    yield lambda: next(steps)
    next(steps, None)


def naming(option: str, read: Callable[[], T], of: str = "RUN") -> T:
    """Return what `read` returns. In its errors, the argument `of` is replaced by the name of the option."""
    try:
        return read()
    except UserError as mistake:
        raise UserError(*(problem.replace(of, option, 1) for problem in mistake.problems)) from mistake


def check_secrets(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for secrets in options that are recorded or sent to a cluster."""
    raise_problems(secrets(options))


def check_address(address: str | None) -> None:
    """Raise `UserError` for an address that is a URL: a cluster is joined by HOST:PORT."""
    if "://" in (address or ""):
        raise UserError(
            f"--address is {address}; allowed: auto, or HOST:PORT of a cluster that this machine is part of; `tune_kd "
            "submit` sends a study to the http:// URL of another's dashboard"
        )


def scale_of(
    path: Path, scale: str, address: str | None, data: str | None = None, settings: Sequence[str] = ()
) -> tuple[str, str]:
    """Return the scale that `auto` means on this machine, and the reason; with a GPU, also the estimated time."""
    if scale != "auto":
        return scale, ""
    declared = discover.scales(path)
    if len(declared) == 1:
        return next(iter(declared)), ", its only one"
    if not {"paper", "laptop"} <= set(declared):
        raise UserError(f"--scale is auto, which means paper or laptop; {path} declares: {', '.join(declared)}")
    if address is not None:
        from tune_kd.execute import cluster as connection

        cluster = connection.connect(address)
        gpus = cluster.gpus
        connection.disconnect(cluster)  # the run joins again under its own name
    else:
        import torch

        gpus = float(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not gpus:
        return "laptop", ", since Ray sees no GPU (--scale paper for the whole study)"
    times = {each: _time(path, each, data, settings, gpus) for each in ("paper", "brief") if each in declared}
    on = "one GPU" if gpus == 1 else f"{gpus:g} GPUs"
    why = f", since Ray sees a GPU: {times['paper']} on {on} as fast as an H100"
    others = [f"--scale {each}: {time}" for each, time in times.items() if each != "paper"]
    return "paper", f"{why} ({'; '.join([*others, '--scale laptop for a small one'])})"


def _time(path: Path, scale: str, data: str | None, settings: Sequence[str], gpus: float) -> str:
    """Return the estimated time that a scale takes on so many GPUs with one trial at a time on each."""
    try:
        study = discover.resolve(path, scale, data, settings)
    except UserError:  # reported when this scale is chosen
        return "an unknown time"
    planned = plan(study)
    cost = estimate((*planned.trials, *to_come(planned)), planned.answering, study.rate)
    return f"about {duration(cost.slot_seconds / gpus)}"


def settings_with(
    settings: list[str] | None, margin_from: str | None, path: Path, scale: str, data: str | None, out: Path
) -> list[str]:
    """Return the settings of a study, plus the margins from the controls of the run `margin_from`, if that is given.
    They are recorded like any other setting."""
    given = settings or []
    if margin_from is None:
        return given
    if any(setting.partition("=")[0] == "screen.margin" for setting in given):
        raise UserError("--margin-from is given beside --set screen.margin; allowed: one of them")
    from tune_kd.analysis import early_stopping
    from tune_kd.records.reader import load

    study = discover.resolve(path, scale, data, given)
    earlier = naming("--margin-from", lambda: load(margin_from, out=out, adapt=Adapter(rest=Phase.SCREEN)))
    margins = early_stopping.noise_margins(earlier, study)
    return [*given, f"screen.margin={json.dumps(margins)}"]


def read_tables(
    problems: list[str],
    names: Sequence[str],
    out: Path,
    phases: list[str] | None,
    *,
    option: str = "RUN",
    rest: str | None = None,
) -> "Records":
    """Load runs or tables of others, whose phases `--phase` names and `rest` completes. `option` names the argument in
    errors. Raises `UserError` with these and the earlier problems."""
    from tune_kd.records.reader import load

    meaning = collect(problems, lambda: parse_phases(phases or ()))
    adapt = Adapter(phases=meaning or {}, rest=rest)
    records = collect(problems, lambda: naming(option, lambda: load(*names, out=out, adapt=adapt)))
    if records is not None and meaning and len(records.studies) == len(records.runs):
        problems.append(f"--phase is given, and {option} is a run of tune_kd's; allowed: with tables of others only")
    raise_problems(problems)
    assert records is not None
    return records


def dry_run(planned: Plan, file: Path) -> None:
    """Try each loss that a study brings. Raises `UserError`."""
    if planned.study.methods:
        from tune_kd.training import dry_run

        dry_run.check(planned, codes(planned.study, file.parent, file))
