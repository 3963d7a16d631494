"""A trial's share of the machine: what may be asked for, and what it is where nothing was asked for."""

import math
import os
from typing import Literal

from tune_kd.study import Mistake

Asked = float | Literal["auto"] | None
"""A GPU share; "auto" to have it measured; null for the usual one."""


def parse_gpus(text: str | None) -> Asked:
    """What `--gpus-per-trial` says. Raises `Mistake`."""
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf or (share > 1 and share != int(share)):
        raise Mistake(f"--gpus-per-trial is {text}; allowed: auto, 0 to 1, or a whole number")
    return share


def check(cpus: float, gpus: Asked, most: int | None, address: str | None) -> None:
    """Refuse what cannot fit before anything starts; on a cluster, `check_cluster` does so when it is joined."""
    problems = []
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
        raise Mistake(*problems)


def check_cluster(cpus: float, gpus: float, have_cpus: float, have_gpus: float) -> None:
    """Refuse shares that are larger than what Ray has."""
    problems = []
    if cpus > have_cpus:
        problems.append(f"--cpus-per-trial is {cpus:g}; allowed: at most {have_cpus:g} (the CPUs that Ray has)")
    if gpus > have_gpus:
        problems.append(f"--gpus-per-trial is {gpus:g}; allowed: at most {have_gpus:g} (the GPUs that Ray has)")
    if problems:
        raise Mistake(*problems)


def gpu_share(asked: float | None, available: float) -> float:
    """A quarter of a GPU by default where there is one: four students train beside each other."""
    if asked is not None:
        return asked
    return 0.25 if available else 0.0


def _gpus_here() -> int:
    import torch  # takes seconds, and most commands ask for no share

    return torch.cuda.device_count()
