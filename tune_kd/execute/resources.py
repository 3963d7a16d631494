"""A trial's share of the machine: what may be asked for, and what it is where nothing was asked for."""

from collections.abc import Callable
from dataclasses import dataclass

from tune_kd.system.errors import UserError


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
