"""The protocol of trackers, and a thread that passes the driver's events to a tracker."""

from collections.abc import Callable
from dataclasses import asdict
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol

from tune_kd.study.trial import Phase
from tune_kd.system.secrets import masked

if TYPE_CHECKING:  # the processes of Weights & Biases import this module, and need no torch
    from tune_kd.execute.worker import Task
    from tune_kd.study.trial import Epoch

PAUSE = 5.0  # seconds between bursts of calls: a burst costs a third less than the same calls one by one
PATIENCE = 60.0  # seconds to wait for a tracker at the end of a run
NOT_SHOWN = ("epoch", "seconds", "answer_seconds", "views_answered")  # measures that are only in the records


class Tracker(Protocol):
    """Logs a run to another tool. `name` identifies an attempt at a trial within the run. Several can be open."""

    def on_start(self, name: str, settings: dict[str, Any]) -> None:
        """Called when an attempt starts."""

    def on_epoch(self, name: str, epoch: int, measures: dict[str, float]) -> None:
        """Called when an attempt reports an epoch, counted from 1."""

    def on_end(self, name: str, failed: bool) -> None:
        """Called when an attempt ends."""

    def close(self) -> None:
        """Called at the end of the run. Returns once everything is sent."""


class Background:
    """Passes the driver's events to a tracker in its own thread, so the tracker can neither block nor fail the driver.

    `make` creates the tracker; `say` prints warnings.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._open: set[str] = set()  # names of attempts
        self._calls: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._closing = Event()
        self._failed: BaseException | None = None
        self._warned = False
        self._thread = Thread(target=self._work, args=(make,), name=f"tune_kd-{name}", daemon=True)
        self._thread.start()

    def on_start(self, task: "Task") -> None:
        self._open.add(name_of(task))
        self._tell(lambda tracker: tracker.on_start(name_of(task), settings_of(task)))

    def on_epoch(self, task: "Task", epoch: "Epoch") -> None:
        self._tell(lambda tracker: tracker.on_epoch(name_of(task), epoch.epoch, measures_of(epoch)))

    def on_end(self, task: "Task", failed: bool) -> None:
        if (name := name_of(task)) in self._open:  # otherwise its worker died before it started
            self._open.remove(name)
            self._tell(lambda tracker: tracker.on_end(name, failed))

    def close(self) -> None:
        """Wait until the tracker has all events, at most `PATIENCE` seconds."""
        self._tell(lambda tracker: tracker.close())
        self._calls.put(None)
        self._closing.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(f"warning: {self._name} did not finish within {PATIENCE:.0f} s; it may miss a part of this run")
        self._tell(lambda tracker: None)  # warns if it failed meanwhile

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        if self._failed is None:
            self._calls.put(call)
        elif not self._warned:
            self._warned = True
            why = masked(" ".join(str(self._failed).split()))[:200]
            self._say(f"warning: {self._name} failed ({why}); the run continues without it")

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()  # the import alone can take a second
            while (call := self._calls.get()) is not None:
                call(tracker)
                if self._calls.empty():
                    self._closing.wait(PAUSE)
        except BaseException as error:  # a tracker may even call sys.exit
            self._failed = error


def name_of(task: "Task") -> str:
    """Return the readable name of an attempt."""
    screen = " (screen)" if task.trial.phase == Phase.SCREEN else ""
    return f"{task.trial.label}{screen}{f' attempt {task.attempt}' if task.attempt > 1 else ''}"


def settings_of(task: "Task") -> dict[str, Any]:
    """Return the settings of an attempt: arm, phase, seed, attempt, cell, and the main fields of the recipe."""
    trial = task.trial
    settings = {"arm": trial.arm, "phase": trial.phase, "seed": trial.seed, "attempt": task.attempt}
    if trial.teacher_seed is not None:
        settings["teacher_seed"] = trial.teacher_seed
    cell = trial.cell.levels
    recipe = {name: getattr(trial.recipe, name) for name in ("epochs", "batch_size", "lr", "weight_decay")}
    return settings | cell | recipe


def measures_of(epoch: "Epoch") -> dict[str, float]:
    """Return the numbers of an epoch on learning and speed. The last epoch includes those of the outcome."""
    measures: dict[str, Any] = asdict(epoch) | (asdict(epoch.outcome) if epoch.outcome is not None else {})
    return {name: value for name, value in measures.items() if name not in NOT_SHOWN and isinstance(value, int | float)}
