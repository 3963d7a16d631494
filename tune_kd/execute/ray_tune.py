"""Run a plan with Ray Tune. Tune places the trials; the driver chooses them and gets every epoch.

Our searcher asks the driver for trials, our scheduler passes reports to the driver, and our trainable trains. Tune's
own checkpoints, retries and experiment state are switched off, since the ledger is the record.
"""

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.tune.experiment
from ray import tune
from ray.exceptions import RayError
from ray.tune import CheckpointConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune_kd.data.datasets import DataSet
from tune_kd.execute.cluster import words
from tune_kd.execute.driver import Driver
from tune_kd.execute.metrics import Metrics
from tune_kd.execute.trackers.background import Background
from tune_kd.execute.tune_internals import every_ray_error_a_lost_worker, forget, signals_left_alone
from tune_kd.execute.worker import Failure, Task, Work, Workplace, failure, whereabouts, work
from tune_kd.records.ledger import FAILURES
from tune_kd.study.brought import Code
from tune_kd.study.trial import Epoch
from tune_kd.system import overhead
from tune_kd.training import notices

Trials = list[tune.experiment.Trial]
Shared = tuple[DataSet, tuple[Code, ...]]  # sent to each node once


class TrialRunner(tune.Trainable):
    """Trains trials one after another. Tune reuses the actor, so imports, data and teachers stay loaded.

    The name of an actor cannot change. To show each trial in the dashboard's task table and in `ray list tasks`, the
    actor runs a task with the trial's name during the trial. So the actor is asynchronous and trains in a thread.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """Return the trial's share of CPUs and GPUs."""
        task: Task = config["task"]
        return PlacementGroupFactory([{"CPU": task.cpus, "GPU": task.gpus} if task.gpus else {"CPU": task.cpus}])

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)
        self._broken = False  # whether this process can no longer use its GPU
        os.environ.update(self._place.variables)
        if self._place.umask is not None:  # Ray's processes have a umask that makes files private
            os.umask(self._place.umask)
        self._fetched: Shared | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._task: Task = config["task"]
        self._place: Workplace = config["place"]
        self._shared: ray.ObjectRef[Shared] | None = config["shared"]
        self._work: Work = config["work"]
        self._epochs: Generator[Epoch] | None = None
        self._ended: asyncio.Event | None = None

    async def show(self, trial_id: str) -> None:
        """Wait until the trial ends. Return at once if it is not the current trial."""
        if self._ended is not None and trial_id == self._task.trial.trial_id:
            await self._ended.wait()

    async def train(self) -> dict[str, Any]:
        if self._broken:
            # Otherwise Tune would reuse this process for the next trial.
            ray.actor.exit_actor()  # type: ignore[no-untyped-call]
        if self._ended is None:
            self._ended = asyncio.Event()
            actor = ray.get_runtime_context().current_actor
            actor.show.options(name=self._task.trial.label).remote(self._task.trial.trial_id)
        return await asyncio.get_running_loop().run_in_executor(self._thread, super().train)

    def step(self) -> dict[str, Any]:
        before = overhead.spent["checkpoint"]
        try:
            if self._shared is not None and self._fetched is None:
                self._fetched = ray.get(self._shared)
            if self._epochs is None:
                data, codes = self._fetched or (None, ())
                self._epochs = self._work(self._task, replace(self._place, data=data, codes=codes))
            epoch = next(self._epochs)
        except RayError as error:  # from a node or the object store, so not the trial's fault
            return {"failure": Failure("lost", f"Ray failed it: {words(error)}")}
        except Exception as error:  # the driver decides whether to retry
            problem = failure(error)
            self._broken = problem.broken
            return {"failure": problem}
        if epoch.outcome is not None:
            self._epochs.close()  # frees the memory and a teacher's lock before the next trial
        checkpoint_seconds = overhead.spent["checkpoint"] - before
        told = {"checkpoint_seconds": checkpoint_seconds, "notices": notices.take()}
        return {"epoch": epoch, "where": whereabouts(self._task), **told}

    def cleanup(self) -> None:
        if self._ended is not None:
            self._ended.set()


class _Bridge(Searcher):
    """Translates events of Tune into calls of the driver. For Tune it is the searcher, which suggests the trials that
    the driver returns as ready."""

    def __init__(
        self, driver: Driver, config: dict[str, Any], beat: Callable[[], None], trackers: Sequence[Background]
    ) -> None:
        super().__init__()
        self._driver = driver
        self._config = config  # the same for all trials
        self._beat = beat
        self._trackers = trackers
        self._metrics = Metrics(driver)
        self._tasks: dict[str, Task] = {}  # by Tune's trial id
        self._over: set[str] = set()  # Tune's ids of trials that have ended
        self._why = ""  # the error of a lost worker, if Tune does not see it
        self.broken: Exception | None = None  # an error of the records; Tune would replace it with its own error

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its parts into a file that is never read."""
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

    def suggest(self, trial_id: str) -> Any:
        task = self._driver.next()
        if task is None:
            # A running trial may fail and be retried, so the run is not finished before all have ended.
            return Searcher.FINISHED if self._driver.finished and len(self._over) == len(self._tasks) else None
        self._tasks[trial_id] = task
        return self._config | {"task": task}

    def started(self, trial_id: str) -> None:
        task = self._tasks[trial_id]
        with self._recording():
            self._driver.on_start(task)
        for tracker in self._trackers:
            tracker.on_start(task)

    def reported(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Pass a result to the driver. Returns whether Tune calls the trainable again: if the trial continues, or to
        let a broken process exit."""
        task = self._tasks[trial_id]
        problem: Failure | None = result.get("failure")
        with self._recording():
            if problem is None:
                self._driver.hear(result["notices"])
                self._metrics.reported(task.trial, result["checkpoint_seconds"])
                continues = self._driver.on_epoch(task.trial.trial_id, result["epoch"], result["where"])
                for tracker in self._trackers:
                    tracker.on_epoch(task, result["epoch"])
                if continues:
                    return True
            self._end(trial_id, problem)
        return problem is not None and problem.broken

    def lost(self, error: RayError | None) -> None:
        """Note that Ray lost a worker. `error` is None if Tune sees the error itself."""
        self._why = f" ({words(error)})" if error is not None else ""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune is done with a trial. If the trial did not report its end, it lost its worker."""
        if trial_id in self._tasks and trial_id not in self._over:
            message = f"its worker died{self._why}" if error else "Tune ended it"
            self._why = ""
            with self._recording():
                self._end(trial_id, Failure("lost", message))

    def _end(self, trial_id: str, problem: Failure | None) -> None:
        task = self._tasks[trial_id]
        self._over.add(trial_id)
        if self._driver.on_end(task.trial.trial_id, problem) and problem is not None:
            self._metrics.retried(problem.reason)
        for tracker in self._trackers:
            tracker.on_end(task, failed=problem is not None)


class _Decisions(FIFOScheduler, Stopper):
    """Passes each report to the driver, and the driver's decision to Tune. Once the driver is stopping and no trial is
    running, ends the experiment."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bridge = bridge

    def on_trial_result(self, tune_controller: Any, trial: tune.experiment.Trial, result: dict[str, Any]) -> str:
        return TrialScheduler.CONTINUE if self._bridge.reported(trial.trial_id, result) else TrialScheduler.STOP

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._bridge.drained


class _Events(tune.Callback):
    """Reports the start of each trial, and each step of Tune's loop, even if no trial reports."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def on_trial_start(self, iteration: int, trials: Trials, trial: tune.experiment.Trial, **info: Any) -> None:
        self._bridge.started(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: Trials, trial: tune.experiment.Trial, **info: Any) -> None:
        forget(trial)

    def on_step_end(self, iteration: int, trials: Trials, **info: Any) -> None:
        self._bridge.beat()


def run_on_ray(
    driver: Driver,
    place: Workplace,
    slots: int,
    beat: Callable[[], None],
    work: Work = work,
    data: DataSet | None = None,
    trackers: Sequence[Background] = (),
) -> None:
    """Run a plan to its end on the connected Ray. Calls `beat` about once a second, in this thread.

    `slots` is the number of concurrent trials that fit; `work` executes a task in a worker; `data` and the study's code
    go to each node once, through Ray's object store. Raises the errors of the records, and `RayError`.
    """
    shared = None if data is None else ray.put((data, place.codes))
    config = {"place": replace(place, codes=()), "work": work, "shared": shared}
    bridge = _Bridge(driver, config, beat, trackers)
    decisions = _Decisions(bridge)
    # Start the actors of all slots together. If started one by one, an actor would still be starting when the previous
    # one has finished a short trial; Tune would then drop the new actor and reuse the free one, again and again.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)

    # Tune requires a folder. Nothing reads its files.
    scratch = Path(tempfile.mkdtemp(prefix="tune_kd-"))
    try:
        with _quiet(), signals_left_alone(), every_ray_error_a_lost_worker(bridge.lost):
            Tuner(
                TrialRunner,
                tune_config=TuneConfig(num_samples=-1, search_alg=bridge, scheduler=decisions, reuse_actors=True),
                run_config=RunConfig(
                    name="run",
                    storage_path=str(scratch),
                    verbose=0,
                    stop=decisions,
                    callbacks=[_Events(bridge)],
                    checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
    except Exception as error:
        raise bridge.broken or _of_ray(error) or error from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if bridge.broken is not None:
        raise bridge.broken
    for tracker in trackers:
        tracker.close()
    driver.conclude()


def _of_ray(error: BaseException) -> RayError | None:
    """Return the Ray error that Tune replaced with its own error, or None."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, RayError):
        found = found.__cause__ or found.__context__
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Tune's own messages. The driver gets the same events."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
