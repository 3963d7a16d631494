"""A trial's share of CPUs and GPUs: limits and defaults."""

from collections.abc import Callable
from dataclasses import dataclass

from tune_kd.system.errors import raise_problems


def check_cluster(cpus: float, gpus: float, have_cpus: float, have_gpus: float) -> None:
    """Raise `UserError` for shares that exceed what Ray has."""
    problems = []
    if cpus > have_cpus:
        problems.append(f"--cpus-per-trial is {cpus:g}; allowed: at most {have_cpus:g} (the CPUs that Ray has)")
    if gpus > have_gpus:
        problems.append(f"--gpus-per-trial is {gpus:g}; allowed: at most {have_gpus:g} (the GPUs that Ray has)")
    raise_problems(problems)


@dataclass(frozen=True)
class Share:
    """A trial's share of a GPU and the reason for it."""

    gpus: float
    why: str

    @property
    def words(self) -> str:
        """The share as a sentence for the user."""
        sizes = {0.0: "no GPU", 1.0: "a whole GPU"}
        size = sizes.get(self.gpus, f"{self.gpus:g} {'GPUs' if self.gpus > 1 else 'of a GPU'}")
        return f"Each trial gets {size}, {self.why}."


def gpu_share(asked: float | None, available: float, served: Callable[[], bool]) -> Share:
    """Return the share that was asked for; by default a whole GPU, or a quarter if MPS serves the GPUs.

    Without MPS, processes take turns on a GPU: on an H100, four trials at a time took 1.1 times as long as one after
    another, and with MPS 0.72 times as long (docs/performance.md).
    """
    if asked is not None:
        return Share(asked, "as --gpus-per-trial says")
    if not available:
        return Share(0.0, "since Ray sees none")
    if served():
        return Share(0.25, "since MPS serves the GPUs, on which four then train at the same time")
    return Share(1.0, "since MPS does not serve the GPUs, and without it trials on one GPU would take turns")
