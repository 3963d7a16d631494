"""A trial's share of CPUs and GPUs: limits and defaults."""

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


@dataclass(frozen=True)
class Mps:
    """Whether NVIDIA's MPS serves all GPUs of a run."""

    served: bool
    words: str = ""  # for the user; empty if it does not matter to this run
    variables: tuple[tuple[str, str], ...] = ()  # by which workers find the one that was started for them


def gpu_share(asked: float | None, available: float, mps: Mps) -> Share:
    """Return the share that was asked for; by default a whole GPU, or a quarter if MPS serves the GPUs.

    Without MPS, processes take turns on a GPU: on an H100, four trials at a time took 1.1 times as long as one after
    another, and with MPS 0.72 times as long (docs/performance.md).
    """
    if asked is not None:
        return Share(asked, f"as --gpus-per-trial says{'; ' if mps.words else ''}{mps.words}")
    if not available:
        return Share(0.0, "since Ray sees none")
    if mps.served:
        return Share(0.25, f"since {mps.words}, on which four then train at the same time")
    return Share(1.0, f"since {mps.words}, and without it trials on one GPU would take turns")
