"""A run that needs several drivers in turn, because earlier ones are killed."""

import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from faults import processes, study
from faults.checker import lines, violations


@dataclass
class Life:
    """A run of the tiny study, below `folder`. As a context manager, it kills all remaining processes on exit."""

    folder: Path
    path: Path  # of the study's file
    settings: Sequence[str]
    checkpoint_every: float = 30.0
    name: str = "run"
    logs: list[Path] = field(default_factory=list)  # of the witnesses, one per driver
    killed_at: float = float("-inf")  # monotonic time of the last kill of a driver or a raylet
    unbegun: int = 0  # number of drivers that found a folder without `study.json`, which `run` must take over

    def __enter__(self) -> "Life":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.home = Path(tempfile.mkdtemp(prefix="faults-"))  # a short path, since Ray's sockets are in it
        self.tag = uuid.uuid4().hex
        self.shm_before = processes.shared_memory()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        processes.clean_up(self.tag)
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def run(self) -> Path:
        return self.folder / "results" / self.name

    @property
    def output(self) -> Path:
        """The output of all drivers."""
        return self.folder / "output.txt"

    def start_driver(
        self, extra: Mapping[str, str] | None = None, options: Sequence[str] = (), within: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a driver: `resume` with `options` if the run has begun, else `run`. `extra` is added to its
        environment; `within` is a command that wraps it."""
        begun = (self.run / "study.json").is_file()
        self.unbegun += not begun and self.run.exists()
        begin = study.arguments(self.path, self.folder / "results", self.name, self.settings)
        self.logs.append(self.folder / f"witness-{len(self.logs)}.jsonl")
        self.began = time.time()
        env = processes.environment(self.tag, self.home, extra)
        command = ["resume", str(self.run), *options] if begun else begin
        return processes.start(self.logs[-1], command, env, self.output, self.checkpoint_every, within)

    @property
    def epochs(self) -> list[list[dict[str, Any]]]:
        """The epochs that each driver acknowledged."""
        return [lines(log) for log in self.logs]

    def first_epoch_after(self) -> float | None:
        """Seconds from the start of the newest driver to its first acknowledged epoch; None if there is none."""
        acknowledged = lines(self.logs[-1])
        return acknowledged[0]["at"] - self.began if acknowledged else None

    def check_between(self) -> list[str]:
        """Return the violations after a driver has died, before the next one starts."""
        return violations(self.run, witness=self.logs) if (self.run / "study.json").is_file() else []

    def check_ended(self, exit_status: int | None, reference: Path | None, patience: float = 20.0) -> list[str]:
        """Return the violations after the last driver has ended and its processes have had time to exit."""
        lingering = processes.AGENTS if time.monotonic() - self.killed_at < processes.LINGER else ()
        processes.gone(self.tag, patience, lingering)
        found = violations(
            self.run, witness=self.logs, reference=reference, exit_status=exit_status, tag=self.tag,
            shm_before=self.shm_before,
        )  # fmt: skip
        return [each for each in found if not any(agent in each for agent in lingering)]

    def last_words(self) -> str:
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return " / ".join(text.splitlines()[-3:])[-300:]


@dataclass
class Progress:
    """Tells whether a driver is stuck: its witness's log no longer grows. Starts and reports take under a minute."""

    life: Life
    patience: float

    def __post_init__(self) -> None:
        self._size, self._since = -1, time.monotonic()

    @property
    def stuck(self) -> bool:
        log = self.life.logs[-1]
        size = log.stat().st_size if log.is_file() else 0
        if size != self._size:
            self._size, self._since = size, time.monotonic()
        return time.monotonic() - self._since > self.patience


@contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    """A folder for runs: `keep`, or a temporary one that is removed unless an exception is raised."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    yield folder  # after an exception it stays, for inspection
    shutil.rmtree(folder, ignore_errors=True)
