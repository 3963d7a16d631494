"""Options that several commands share, and functions that parse and check them."""

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

StudyName = Annotated[
    str, typer.Argument(help="A study in search_spaces/, or the path of a study file.", metavar="STUDY")
]
RunName = Annotated[str, typer.Argument(help="Name of a run under --out, or its path.", metavar="RUN")]
Scale = Annotated[
    str,
    typer.Option(help="Scale of the study (paper, brief, laptop, smoke, ...). auto: paper with a GPU, laptop without."),
]
DataName = Annotated[
    str | None, typer.Option("--data", help="Data set: digits, cifar10 or cifar100.", show_default=False)
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Path of the CIFAR data: torchvision's files, an image folder or its tar archive.", show_default=False
    ),
]


class Unread(Exception):
    """An option that cannot be parsed. Not a `UserError`, which is a ValueError: typer rewords those of a parser."""

    def __init__(self, mistake: UserError) -> None:
        self.problems = mistake.problems
        super().__init__(str(mistake))


def _place(text: str) -> Path:
    """Parse a folder, or the URL of a folder in an object store. Returns the local mirror of a URL."""
    try:
        return local(str(text))
    except UserError as mistake:
        raise Unread(mistake) from mistake


Out = Annotated[
    Path,
    typer.Option(
        help="Folder for all runs and their shared teachers, or s3://BUCKET/PATH.", parser=_place, metavar="PLACE"
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run. Default: the study's name and the time.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field of the study, such as recipe.epochs=4. Repeatable.")
]
MarginFrom = Annotated[
    str | None,
    typer.Option(
        metavar="RUN", help="Compute screen.margin from the spread of an earlier run's controls.", show_default=False
    ),
]
Phases = Annotated[
    list[str] | None,
    typer.Option("--phase", help="For imported tables: rename a phase, as in select=screen. Repeatable."),
]
GPUS = "GPU share of each trial, such as 0.25. auto measures the fastest share, unless the study is short."
Gpus = Annotated[str, typer.Option(help=GPUS)]
GpusNow = Annotated[str | None, typer.Option(help=GPUS, show_default="as recorded")]
CPUS = "CPUs of each trial, such as 0.5. Also sets the number of threads (rounded down, at least 1)."
Cpus = Annotated[float, typer.Option(help=CPUS)]
CpusNow = Annotated[float | None, typer.Option(help=CPUS, show_default="as recorded")]
MPS = "Whether to start NVIDIA MPS. auto: if trials share a GPU. on: always, or fail. off: never."
Mps = Annotated[str, typer.Option(help=MPS, metavar="auto|on|off")]
MpsNow = Annotated[str | None, typer.Option(help=MPS, metavar="auto|on|off", show_default="as recorded")]
MaxConcurrent = Annotated[int | None, typer.Option(help="Maximum number of concurrent trials.", show_default=False)]
Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a Ray cluster that includes this machine, or auto to find it.", show_default=False),
]
Elsewhere = Annotated[
    str | None, typer.Option(help="For a submitted run: URL of the cluster's dashboard.", show_default=False)
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Log to an experiment tracker: tensorboard, mlflow or wandb. Repeatable.", show_default=False),
]
Keep = Annotated[bool, typer.Option("--keep-checkpoints", help="Keep the final checkpoint of each trial.")]
NoDryRun = Annotated[
    bool, typer.Option("--no-dry-run", help="Skip the dry run, which tries each custom loss for 2 steps.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]

DEFAULT_OUT = Path("results")


def print_json(answer: dict[str, Any]) -> None:
    """Print a result to standard output as JSON in ASCII."""
    print(json.dumps(answer), flush=True)


@contextmanager
def progress(count: int, what: str) -> Iterator[Callable[[], object]]:
    """Show a progress bar if standard error is a terminal. Yields a function that advances the bar by one step."""
    from rich.progress import track

    shown = Terminal(stderr=True)
    steps = iter(track(range(count), what, console=shown, transient=True, disable=not shown.is_terminal))
    yield lambda: next(steps)
    next(steps, None)


def naming(option: str, read: Callable[[], T], of: str = "RUN") -> T:
    """Call `read` and return its result. Errors name the option instead of the argument `of`."""
    try:
        return read()
    except UserError as mistake:
        raise UserError(*(problem.replace(of, option, 1) for problem in mistake.problems)) from mistake


def check_secrets(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for secrets in options that are recorded or sent to a cluster."""
    raise_problems(secrets(options))


def check_address(address: str | None) -> None:
    """Raise `UserError` if an address is a URL: joining a cluster takes HOST:PORT."""
    if "://" in (address or ""):
        raise UserError(
            f"--address is {address}; allowed: auto, or HOST:PORT of a cluster that includes this machine. To run a "
            "study on a remote cluster, use `tune_kd submit` with the http:// URL of its dashboard"
        )


def scale_of(
    path: Path, scale: str, address: str | None, data: str | None = None, settings: Sequence[str] = ()
) -> tuple[str, str]:
    """Return the scale that `auto` selects on this machine, and the reason. On a GPU the reason has the estimated
    times."""
    if scale != "auto":
        return scale, ""
    declared = discover.scales(path)
    if len(declared) == 1:
        return next(iter(declared)), ", its only scale"
    if not {"paper", "laptop"} <= set(declared):
        raise UserError(f"--scale is auto, which means paper or laptop; {path} declares: {', '.join(declared)}")
    if address is not None:
        from tune_kd.execute import cluster as connection

        cluster = connection.connect(address)
        gpus = cluster.gpus
        connection.disconnect(cluster)  # the run connects again under its own name
    else:
        import torch

        gpus = float(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not gpus:
        return "laptop", ", since Ray sees no GPU (--scale paper for the full study)"
    times = {each: _time(path, each, data, settings, gpus) for each in ("paper", "brief") if each in declared}
    on = "one GPU" if gpus == 1 else f"{gpus:g} GPUs"
    why = f", since Ray sees a GPU: {times['paper']} on {on} as fast as an H100"
    others = [f"--scale {each}: {time}" for each, time in times.items() if each != "paper"]
    return "paper", f"{why} ({'; '.join([*others, '--scale laptop for a small one'])})"


def _time(path: Path, scale: str, data: str | None, settings: Sequence[str], gpus: float) -> str:
    """Return the estimated time of a scale on `gpus` GPUs, each with one trial at a time."""
    try:
        study = discover.resolve(path, scale, data, settings)
    except UserError:  # reported when the user selects this scale
        return "an unknown time"
    planned = plan(study)
    cost = estimate((*planned.trials, *to_come(planned)), planned.answering, study.rate)
    return f"about {duration(cost.slot_seconds / gpus)}"


def settings_with(
    settings: list[str] | None, margin_from: str | None, path: Path, scale: str, data: str | None, out: Path
) -> list[str]:
    """Return the settings of a study. If `margin_from` is given, add the margins from the controls of that run, which
    are recorded like any other setting."""
    given = settings or []
    if margin_from is None:
        return given
    if any(setting.partition("=")[0] == "screen.margin" for setting in given):
        raise UserError("--margin-from is given together with --set screen.margin; allowed: one of them")
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
    """Load runs or imported tables. `phases` (from `--phase`) maps phases of imported tables; `rest` is for all others.

    `option` is the name of the argument in errors. Raises `UserError` with its problems and those in `problems`.
    """
    from tune_kd.records.reader import load

    meaning = collect(problems, lambda: parse_phases(phases or ()))
    adapt = Adapter(phases=meaning or {}, rest=rest)
    records = collect(problems, lambda: naming(option, lambda: load(*names, out=out, adapt=adapt)))
    if records is not None and meaning and len(records.studies) == len(records.runs):
        problems.append(f"--phase is given, and {option} is a run of tune_kd; allowed: only with imported tables")
    raise_problems(problems)
    assert records is not None
    return records


def dry_run(planned: Plan, file: Path) -> None:
    """Try each of a study's own losses. Raises `UserError`."""
    if planned.study.methods:
        from tune_kd.training import dry_run

        dry_run.check(planned, codes(planned.study, file.parent, file))
