"""A trial's share of the machine: what may be asked for, and what it is where nothing was asked for."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tune_kd.system.errors import UserError

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


def check(options: Options, address: str | None) -> None:
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


def check_cluster(cpus: float, gpus: float, have_cpus: float, have_gpus: float) -> None:
    """Refuse shares that are larger than what Ray has."""
    problems = []
    if cpus > have_cpus:
        problems.append(f"--cpus-per-trial is {cpus:g}; allowed: at most {have_cpus:g} (the CPUs that Ray has)")
    if gpus > have_gpus:
        problems.append(f"--gpus-per-trial is {gpus:g}; allowed: at most {have_gpus:g} (the GPUs that Ray has)")
    if problems:
        raise UserError(*problems)


@dataclass(frozen=True)
class Share:
    """A trial's share of a GPU, and why it is that."""

    gpus: float
    why: str

    @property
    def words(self) -> str:
        """As the user reads it."""
        sizes = {0.0: "no GPU", 1.0: "a whole GPU"}
        size = sizes.get(self.gpus, f"{self.gpus:g} {'GPUs' if self.gpus > 1 else 'of a GPU'}")
        return f"Each trial gets {size}, {self.why}."


def gpu_share(asked: float | None, available: float, served: Callable[[], bool]) -> Share:
    """What was asked for; else a whole GPU, or a quarter where MPS has the GPUs `served`.

    Without MPS processes take turns on a GPU: four trials at a time took 1.1 times as long as one after another on an
    H100, and with it 0.72 times (docs/performance.md).
    """
    if asked is not None:
        return Share(asked, "as --gpus-per-trial says")
    if not available:
        return Share(0.0, "since Ray sees none")
    if served():
        return Share(0.25, "since MPS serves the GPUs, on which four then train at the same time")
    return Share(1.0, "since MPS does not serve the GPUs, and without it trials on one GPU would take turns")


def _gpus_here() -> int:
    import torch  # takes seconds, and most commands ask for no share

    return torch.cuda.device_count()
