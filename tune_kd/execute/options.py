"""Options of a run: how it uses the machine, and checks that the machine can satisfy them."""

import math
import os
import shutil
from dataclasses import dataclass, fields
from typing import Literal

from tune_kd.records.run_folder import Run
from tune_kd.study.spec import Study
from tune_kd.system import environment
from tune_kd.system.errors import UserError, collect, raise_problems

MODES = ("auto", "on", "off")
Asked = float | Literal["auto"]
"""A GPU share, or "auto": see `resources.gpu_shares`."""


def parse_gpus(given: str | float | None) -> Asked:
    """Parse `--gpus-per-trial`. None, which earlier versions recorded, means "auto". Raises `UserError`."""
    if given is None or given == "auto":
        return "auto"
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf or (share > 1 and share != int(share)):
        raise UserError(f"--gpus-per-trial is {given}; allowed: auto, 0 to 1, or a whole number")
    return share


@dataclass(frozen=True)
class Options:
    """How a run uses the machine. No option changes a result."""

    gpus_per_trial: Asked | None = "auto"
    cpus_per_trial: float = 1.0  # the whole part is the number of threads, at least 1
    max_concurrent: int | None = None  # trials at a time
    keep_checkpoints: bool = False  # keep the last checkpoint of each trial
    mps: str = "auto"  # NVIDIA's MPS: "auto" starts it if trials share GPUs that no MPS serves yet; "on"; "off"
    track: tuple[str, ...] = ()  # trackers to log to: tensorboard, mlflow, wandb


def check_shares(options: Options, address: str | None) -> None:
    """Raise `UserError` for shares that do not fit this machine. With an address, `resources.check_cluster` checks them
    once the cluster is joined."""
    problems: list[str] = []
    cpus, most = options.cpus_per_trial, options.max_concurrent
    gpus = collect(problems, lambda: parse_gpus(options.gpus_per_trial))
    here = os.cpu_count() or 1
    if not 0 < cpus < math.inf or (address is None and cpus > here):
        most_cpus = f", at most {here} (the cores of this machine)" if address is None else ""
        problems.append(f"--cpus-per-trial is {cpus:g}; allowed: above 0{most_cpus}")
    if isinstance(gpus, float) and address is None and gpus > _gpus_here():
        problems.append(f"--gpus-per-trial is {gpus:g}; allowed: at most {_gpus_here()} (the GPUs of this machine)")
    problems += _mps_problems(options, gpus, address)
    if most is not None and most < 1:
        problems.append(f"--max-concurrent is {most}; allowed: at least 1")
    raise_problems(problems)


def _mps_problems(options: Options, gpus: Asked | None, address: str | None) -> list[str]:
    if options.mps not in MODES:
        return [f"--mps is {options.mps}; allowed: {', '.join(MODES)}"]
    if options.mps != "on":
        return []
    from tune_kd.execute import mps_daemon

    if gpus == 0:
        return ["--mps is on, and --gpus-per-trial is 0; allowed: auto or off if trials use no GPU"]
    if address is None and not mps_daemon.is_there():
        return [f"--mps is on, and this machine has no {mps_daemon.PROGRAM}; allowed: auto or off"]
    if address is None and not _gpus_here():
        return ["--mps is on, and this machine has no GPU; allowed: auto or off"]
    return []


def _gpus_here() -> int:
    import torch  # late, since it takes seconds and most commands need no GPU share

    return torch.cuda.device_count()


def check(study: Study | None, options: Options, address: str | None) -> None:
    """Raise `UserError` with all problems that prevent a study from running here. Creates no files."""
    problems: list[str] = []
    collect(problems, lambda: _check_compiler(study))
    collect(problems, lambda: check_shares(options, address))
    collect(problems, lambda: check_trackers(options.track))
    collect(problems, lambda: environment.check_places(address))
    raise_problems(problems)


def _check_compiler(study: Study | None) -> None:
    """Raise `UserError` if a recipe uses torch.compile and there is no compiler: every trial would fail."""
    if study is None or not (study.recipe.compile or study.teacher_recipe.compile):
        return
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        raise UserError(
            "recipe.compile is true, and this machine has no C++ compiler; install one, such as g++, or set "
            "recipe.compile to false"
        )


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise `UserError` for trackers that are not installed."""
    if names:
        environment.home()  # Ray, which `trackers` imports, needs a home directory
        from tune_kd.execute import trackers

        trackers.check(list(names))


def trackers_unasked(recorded: tuple[str, ...]) -> tuple[str, ...]:
    """Return the recorded trackers that write only to the local disk. A resumed run uses them without `--track`. The
    other trackers could send the user's data to an address in records that somebody else made."""
    sends = {
        "mlflow": bool(os.environ.get("MLFLOW_TRACKING_URI")),
        "wandb": os.environ.get("WANDB_MODE") not in ("offline", "disabled"),
    }
    return tuple(name for name in recorded if not sends.get(name, False))


def options_of(run: Run) -> Options:
    """Return the recorded options of a run, with only those trackers that `trackers_unasked` returns."""
    known = {field.name: run.settings[field.name] for field in fields(Options) if field.name in run.settings}
    return Options(**known | {"track": trackers_unasked(tuple(known.get("track") or ()))})
