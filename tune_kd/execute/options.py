"""How a run uses the machine: what can be asked for, and what keeps it from running here."""

import math
import os
import shutil
from dataclasses import dataclass, replace
from typing import Literal

from tune_kd.records.run_folder import Run
from tune_kd.study.spec import Study
from tune_kd.system import environment
from tune_kd.system.errors import UserError, collect

Asked = float | Literal["auto"] | None
"""A GPU share; "auto" to have it measured; null for the usual one."""


def parse_gpus(text: str | None) -> Asked:
    """What `--gpus-per-trial` says. Raises `UserError`."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf or (share > 1 and share != int(share)):
        raise UserError(f"--gpus-per-trial is {text}; allowed: auto, 0 to 1, or a whole number")
    return share


@dataclass(frozen=True)
class Options:
    """How a run uses the machine, and what it leaves there. None of these changes a result."""

    gpus_per_trial: Asked = None
    cpus_per_trial: float = 1.0  # the whole part is the number of threads, at least 1
    max_concurrent: int | None = None  # trials at a time
    keep_checkpoints: bool = False  # the last one of each trial
    track: tuple[str, ...] = ()  # trackers that show the run, too: tensorboard, mlflow, wandb


def check_shares(options: Options, address: str | None) -> None:
    """Raise `UserError` for what cannot fit on this machine. On a cluster `check_cluster` does so once it is joined."""
    problems = []
    cpus, gpus, most = options.cpus_per_trial, options.gpus_per_trial, options.max_concurrent
    here = os.cpu_count() or 1
    if not 0 < cpus < math.inf or (address is None and cpus > here):
        most_cpus = f", at most {here} (the cores of this machine)" if address is None else ""
        problems.append(f"--cpus-per-trial is {cpus:g}; allowed: above 0{most_cpus}")
    if gpus == "auto" and address is not None:
        problems.append(f"--gpus-per-trial is auto, and --address is {address}; allowed: a number, since auto measures "
                        "the GPU of this machine")  # fmt: skip
    elif isinstance(gpus, float) and address is None and gpus > _gpus_here():
        problems.append(f"--gpus-per-trial is {gpus:g}; allowed: at most {_gpus_here()} (the GPUs of this machine)")
    if most is not None and most < 1:
        problems.append(f"--max-concurrent is {most}; allowed: at least 1")
    if problems:
        raise UserError(*problems)


def _gpus_here() -> int:
    import torch  # takes seconds, and most commands ask for no share

    return torch.cuda.device_count()


def check(study: Study | None, options: Options, address: str | None) -> None:
    """Raise `UserError` with everything that keeps a study from running here. Makes nothing."""
    problems: list[str] = []
    collect(problems, lambda: _check_compiler(study))
    collect(problems, lambda: check_shares(options, address))
    collect(problems, lambda: check_trackers(options.track))
    collect(problems, lambda: environment.check_places(address))
    if problems:
        raise UserError(*dict.fromkeys(problems))


def _check_compiler(study: Study | None) -> None:
    """torch.compile without a compiler would fail in every trial."""
    if study is None or not (study.recipe.compile or study.teacher_recipe.compile):
        return
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        raise UserError(
            "recipe.compile is true, and there is no C++ compiler here; install one, such as g++, or leave "
            "recipe.compile false"
        )


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise `UserError` for trackers that this machine does not have."""
    if names:
        environment.home()  # which Ray's own parts need to be imported
        from tune_kd.execute import trackers

        trackers.check(list(names))


def trackers_unasked(recorded: tuple[str, ...]) -> tuple[str, ...]:
    """The recorded trackers that send nothing anywhere. A resumed run uses these unasked; its record may be anybody's,
    and others could send the user's data to an address that it names."""
    sends = {
        "mlflow": bool(os.environ.get("MLFLOW_TRACKING_URI")),
        "wandb": os.environ.get("WANDB_MODE") not in ("offline", "disabled"),
    }
    return tuple(name for name in recorded if not sends.get(name, False))


def options_of(run: Run) -> Options:
    """The options that a run began with, and of its trackers those that may be used unasked."""
    known = Options(**{**run.settings, "track": tuple(run.settings.get("track") or ())})
    return replace(known, track=trackers_unasked(known.track))
