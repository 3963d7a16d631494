"""What several commands share: their options, and how these are read."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from tune_kd.system.characters import visible
from tune_kd.system.errors import UserError
from tune_kd.system.object_store import local
from tune_kd.system.secrets import secrets

T = TypeVar("T")

StudyName = Annotated[str, typer.Argument(help="A name in search_spaces/ or the path of a file.", metavar="STUDY")]
RunName = Annotated[str, typer.Argument(help="A name under --out or a path.", metavar="RUN")]
Scale = Annotated[str, typer.Option(help="auto, or a scale that the study declares (paper, brief, laptop, smoke).")]
DataName = Annotated[str | None, typer.Option("--data", help="digits, cifar10 or cifar100.", show_default=False)]
DataDir = Annotated[
    Path | None,
    typer.Option(help="CIFAR: torchvision's files, an image folder, or a tar of one.", show_default=False),
]


class Unread(Exception):
    """A mistake in an option's text. Not a `UserError`, which the parser of arguments would take for one of its own."""

    def __init__(self, mistake: UserError) -> None:
        self.problems = mistake.problems
        super().__init__(str(mistake))


def _place(text: str) -> Path:
    """A folder, or for the URL of one in a store the folder on this disk that stands for it."""
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
    list[str] | None,
    typer.Option("--phase", help="In tables of others, what a phase is: select=screen. Repeatable."),
]
Gpus = Annotated[
    str | None, typer.Option(help="GPU share of a trial, such as 0.25; auto measures one.", show_default=False)
]
CPUS = "CPU share of a trial; its whole part is its threads, at least one."
Cpus = Annotated[float, typer.Option(help=CPUS)]
CpusNow = Annotated[float | None, typer.Option(help=CPUS, show_default="as the run began")]
MaxConcurrent = Annotated[int | None, typer.Option(help="Most trials at a time.", show_default=False)]
Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a Ray cluster that this machine is part of.", show_default=False),
]
Elsewhere = Annotated[
    str | None,
    typer.Option(help="URL of the dashboard of the cluster that it was submitted to.", show_default=False),
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Show the run in a tracker, too: tensorboard, mlflow or wandb. Repeatable.", show_default=False),
]
Keep = Annotated[bool, typer.Option("--keep-checkpoints", help="Keep the final checkpoint of each trial.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

DEFAULT_OUT = Path("results")


class Terminal(Console):
    """What is printed are data and sentences, never markup, and never a command to the terminal but rich's own."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def print_json(answer: dict[str, Any]) -> None:
    """An answer on standard output, in ASCII that can be printed: JSON has an escape for what cannot."""
    print(json.dumps(answer), flush=True)


def tracked(count: int, what: str) -> Iterable[int]:
    """Numbers up to a count, with a bar on standard error where that is a terminal."""
    from rich.progress import track

    shown = Terminal(stderr=True)
    return track(range(count), what, console=shown, transient=True, disable=not shown.is_terminal)


def naming(option: str, read: Callable[[], T], of: str = "RUN") -> T:
    """What is read; a mistake in it names the option, and not the argument that it would be elsewhere."""
    try:
        return read()
    except UserError as mistake:
        raise UserError(*(problem.replace(of, option, 1) for problem in mistake.problems)) from mistake


def check_secrets(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for options that go on record, or to a cluster, with a secret in them."""
    if problems := list(secrets(options)):
        raise UserError(*problems)


def check_address(address: str | None) -> None:
    """Raise `UserError` for an address that cannot be joined."""
    if "://" in (address or ""):
        raise UserError(
            f"--address is {address}; allowed: auto, or HOST:PORT of a cluster that this machine is part of; `tune_kd "
            "submit` sends a study to the http:// URL of another's dashboard"
        )


def scale_of(
    path: Path, scale: str, address: str | None, data: str | None = None, settings: Sequence[str] = ()
) -> tuple[str, str]:
    """The scale that `auto` means here, and why: where there is a GPU, with the time that it may take there."""
    from tune_kd.study import discover

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
        connection.disconnect(cluster)  # to join it again under the run's name
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
    """About how long a scale takes on so many GPUs, each a slot."""
    from tune_kd.records.adaptive_plan import to_come
    from tune_kd.reporting.terminal import duration
    from tune_kd.study import discover
    from tune_kd.study.cost import estimate
    from tune_kd.study.plan import plan

    try:
        study = discover.resolve(path, scale, data, settings)
    except UserError:  # which is told when the scale is chosen
        return "an unknown time"
    planned = plan(study)
    cost = estimate((*planned.trials, *to_come(planned)), planned.answering, study.rate)
    return f"about {duration(cost.slot_seconds / gpus)}"


def settings_with(
    settings: list[str] | None, margin_from: str | None, path: Path, scale: str, data: str | None, out: Path
) -> list[str]:
    """What is set of a study, with the margins that an earlier run's controls give; they are on record like any other
    setting."""
    given = settings or []
    if margin_from is None:
        return given
    if any(setting.partition("=")[0] == "screen.margin" for setting in given):
        raise UserError("--margin-from is given beside --set screen.margin; allowed: one of them")
    from tune_kd.analysis import early_stopping
    from tune_kd.records.importer import Adapter
    from tune_kd.records.reader import load
    from tune_kd.study import discover

    study = discover.resolve(path, scale, data, given)
    earlier = naming("--margin-from", lambda: load(margin_from, out=out, adapt=Adapter(rest="screen")))
    margins = early_stopping.noise_margins(earlier, study)
    return [*given, f"screen.margin={json.dumps(margins)}"]
