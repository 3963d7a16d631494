"""The first form of execution: Ray Tune places the trials, the driver says which, and hears of every epoch.

Tune's searcher admits what is ready, its scheduler passes reports on, its trainable trains. Tune's own checkpoints,
retries and experiment state are switched off: what ran is what the ledger says.
"""

import asyncio
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.tune import CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune_kd.data.datasets import DataSet
from tune_kd.execute.cluster import words
from tune_kd.execute.driver import Driver
from tune_kd.execute.metrics import Metrics
from tune_kd.execute.worker import Failure, Task, Work, Workplace, failure, whereabouts, work
from tune_kd.records.ledger import FAILURES
from tune_kd.study.trial import Epoch
from tune_kd.system import overhead
from tune_kd.training import notices


class TrialRunner(tune.Trainable):
    """Trains trials, one after another: Tune reuses the actor, and imports, data and teachers stay.

    An actor keeps the name of its creation, so each trial shows itself as a task of its actor that is named after
    it and lasts as long as it: in the dashboard's task table and in `ray list tasks`. For that the actor is an
    asynchronous one, and trains in a thread of its own.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """Each trial's own share."""
        task: Task = config["task"]
        return PlacementGroupFactory([{"CPU": task.cpus, "GPU": task.gpus} if task.gpus else {"CPU": task.cpus}])

    def setup(self, config: dict[str, Any]) -> None:
        place: Workplace = config["place"]
        if place.umask is not None:  # Ray's processes have one that closes what they make to all others
            os.umask(place.umask)
        self._data: DataSet | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._task: Task = config["task"]
        self._place: Workplace = config["place"]
        self._shared: ray.ObjectRef[DataSet] | None = config["data"]
        self._work: Work = config["work"]
        self._epochs: Generator[Epoch] | None = None
        self._ended: asyncio.Event | None = None

    async def show(self, trial_id: str) -> None:
        """Last as long as the trial, if it is still the current one."""
        if self._ended is not None and trial_id == self._task.trial.trial_id:
            await self._ended.wait()

    async def train(self) -> dict[str, Any]:
        if self._ended is None:
            self._ended = asyncio.Event()
            actor = ray.get_runtime_context().current_actor
            actor.show.options(name=self._task.trial.label).remote(self._task.trial.trial_id)
        return await asyncio.get_running_loop().run_in_executor(self._thread, super().train)

    def step(self) -> dict[str, Any]:
        before = overhead.spent["checkpoint"]
        try:
            if self._shared is not None and self._data is None:
                self._data = ray.get(self._shared)
            if self._epochs is None:
                self._epochs = self._work(self._task, replace(self._place, data=self._data))
            epoch = next(self._epochs)
        except RayError as error:  # of a node or the object store, and none of the trial's
            return {"failure": Failure("lost", f"Ray failed it: {words(error)}")}
        except Exception as error:  # data for the driver, which decides whether to try again
            return {"failure": failure(error)}
        if epoch.outcome is not None:
            self._epochs.close()  # frees its memory, and a teacher's lock, before the next trial comes
        checkpoint_seconds = overhead.spent["checkpoint"] - before
        told = {"checkpoint_seconds": checkpoint_seconds, "notices": notices.take()}
        return {"epoch": epoch, "where": whereabouts(self._task), **told}

    def cleanup(self) -> None:
        if self._ended is not None:
            self._ended.set()


class _Admission(Searcher):
    """Suggests what the driver says is ready."""

    def __init__(self, bridge: "_Bridge") -> None:
        super().__init__()
        self._bridge = bridge

    def suggest(self, trial_id: str) -> Any:
        return self._bridge.admit(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._bridge.ended(trial_id, lost=error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def save_to_dir(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the ledger is the state."""


class _Decisions(TrialScheduler):
    """Passes each report to the driver and its answer to Tune; trials start in the order of admission."""

    def __init__(self, bridge: "_Bridge") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bridge = bridge

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        return TrialScheduler.CONTINUE if self._bridge.reported(trial.trial_id, result) else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Nothing to do: it was this scheduler that ended the trial."""

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> TuneTrial | None:
        pending = (trial for trial in tune_controller.get_trials() if trial.status == TuneTrial.PENDING)
        return next(pending, None)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Nothing to do: the driver knows it."""

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Nothing to do: the searcher hears of it."""

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Nothing to do: we never remove trials."""

    def debug_string(self) -> str:
        return "tune_kd"


class _Drain(Stopper):
    """Ends everything once the driver was asked to stop and the running trials have ended their epoch."""

    def __init__(self, bridge: "_Bridge") -> None:
        self._bridge = bridge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._bridge.drained


class _Events(tune.Callback):
    """Tells when a trial starts, and beats at every step of Tune's loop, also while nothing is reported."""

    def __init__(self, bridge: "_Bridge") -> None:
        self._bridge = bridge

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._bridge.started(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Let go of what Tune keeps of each trial, which nobody reads: a driver would grow by it as long as it runs."""
        kept = trial.run_metadata
        kept.metric_analysis.clear()
        kept.metric_n_steps.clear()
        kept.last_result = {"done": True}  # an empty one would be asked of the worker again
        trial._default_result_or_future = None  # a reference, for which Ray keeps the task that answered it

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._bridge.beat()


class _Bridge:
    """Between Tune's names of trials and the driver's."""

    def __init__(
        self, driver: Driver, place: Workplace, beat: Callable[[], None], work: Work, data: DataSet | None
    ) -> None:
        self._driver = driver
        self._data = None if data is None else ray.put(data)
        self._place = place
        self._work = work
        self._beat = beat
        self._metrics = Metrics(driver)
        self._tasks: dict[str, Task] = {}  # by Tune's trial id
        self._over: set[str] = set()  # Tune's ids of trials whose last result was seen
        self.why = ""  # a worker is lost, where its death alone does not say it
        self.broken: Exception | None = None  # what the records raised: Tune makes an error of its own of it

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes what it was given to a file of its own, which is never read."""
        return {}

    @property
    def drained(self) -> bool:
        return self._driver.stopping and not self._driver.running

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.broken = error
            raise

    def beat(self) -> None:
        with self._recording():
            self._driver.tick()
        self._metrics.renew()
        self._beat()

    def admit(self, tune_id: str) -> dict[str, Any] | str | None:
        task = self._driver.next()
        if task is None:
            # A trial that runs may fail and be tried again, so nothing is finished before all have ended.
            return Searcher.FINISHED if self._driver.finished and len(self._over) == len(self._tasks) else None
        self._tasks[tune_id] = task
        return {"task": task, "place": self._place, "work": self._work, "data": self._data}

    def started(self, tune_id: str) -> None:
        with self._recording():
            self._driver.on_start(self._tasks[tune_id])

    def reported(self, tune_id: str, result: dict[str, Any]) -> bool:
        trial = self._tasks[tune_id].trial
        problem: Failure | None = result.get("failure")
        with self._recording():
            if problem is None:
                self._driver.hear(result["notices"])
                self._metrics.reported(trial, result["checkpoint_seconds"])
                if self._driver.on_epoch(trial.trial_id, result["epoch"], result["where"]):
                    return True
            self._end(tune_id, problem)
        return False

    def ended(self, tune_id: str, lost: bool) -> None:
        """Tune is through with a trial. One that did not report its end lost its worker."""
        if tune_id in self._tasks and tune_id not in self._over:
            message = f"its worker died{self.why}" if lost else "Tune ended it"
            self.why = ""
            with self._recording():
                self._end(tune_id, Failure("lost", message))

    def _end(self, tune_id: str, problem: Failure | None) -> None:
        self._over.add(tune_id)
        trial_id = self._tasks[tune_id].trial.trial_id
        if self._driver.on_end(trial_id, problem) and problem is not None:
            self._metrics.retried(problem.reason)


def run_on_ray(
    driver: Driver,
    place: Workplace,
    slots: int,
    beat: Callable[[], None],
    work: Work = work,
    data: DataSet | None = None,
    trackers: Sequence[tune.Callback] = (),
) -> None:
    """Run a plan to its end on the connected Ray. `beat` is called about once a second, in this thread.

    `slots` is how many trials fit at a time; `work` is what a worker does with a task; `data` go to each node once,
    through Ray's object store; `trackers` see every trial. Raises what the records raise, and `RayError`.
    """
    bridge = _Bridge(driver, place, beat, work, data)
    # All slots' actors are to start together. One by one, the next would still be starting when the first has ended
    # its short trial, and Tune would give up the new actor for the free one, again and again.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)

    # Tune insists on a folder of its own. Nothing in it is ever read.
    scratch = Path(tempfile.mkdtemp(prefix="tune_kd-"))
    try:
        with _quiet(), _signals_left_alone(), _lost_workers(bridge):
            Tuner(
                TrialRunner,
                tune_config=TuneConfig(
                    num_samples=-1, search_alg=_Admission(bridge), scheduler=_Decisions(bridge), reuse_actors=True
                ),
                run_config=RunConfig(
                    name="run",
                    storage_path=str(scratch),
                    verbose=0,
                    stop=_Drain(bridge),
                    callbacks=[*trackers, _Events(bridge)],
                    failure_config=FailureConfig(max_failures=0, fail_fast=False),
                    checkpoint_config=CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                ),
            ).fit()
    except Exception as error:
        raise bridge.broken or _of_ray(error) or error from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if bridge.broken is not None:
        raise bridge.broken
    driver.conclude()


@contextmanager
def _lost_workers(bridge: _Bridge) -> Iterator[None]:
    """Have Tune take whatever Ray says befell a worker for its loss, which costs an attempt.

    Tune knows a lost worker by `RayActorError` alone, and ends the run at any other error of Ray's. But a worker that
    Ray's memory monitor kills raises `OutOfMemoryError`, and there are a dozen more, for nodes and objects that are
    lost and for actors that cannot be placed. What a trial itself raised is a `RayTaskError`, and stays one.
    """
    failed = RayActorManager._actor_task_failed

    def as_lost(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        bridge.why = ""
        if isinstance(exception, RayError) and not isinstance(exception, RayTaskError):
            if not isinstance(exception, RayActorError):
                bridge.why = f" ({words(exception)})"
            exception = ActorDiedError()
        failed(manager, tracked_actor_task=tracked_actor_task, exception=exception)

    with patch.object(RayActorManager, "_actor_task_failed", as_lost):
        yield


def _signals_left_alone() -> AbstractContextManager[object]:
    """Keep Tune from taking SIGINT and SIGUSR1, at which it would end by itself and leave the running trials."""
    return patch.object(sys.modules["ray.tune.tune"], "_setup_signal_catching", threading.Event)


def _of_ray(error: BaseException) -> RayError | None:
    """The error of Ray's that Tune made another one of, or null."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, RayError):
        found = found.__cause__ or found.__context__
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune's own messages out of the way; what matters in them reaches the driver."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
