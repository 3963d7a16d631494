"""Runs in trackers that people already use: Ray Tune's own callbacks, shown each trial as its users know it.

A tracker is for looking. What ran is what the ledger says, so one that fails is told of and left, and the run goes on.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.logger import LoggerCallback

from tune_kd.execute.worker import Task
from tune_kd.records.ledger import ASIDE
from tune_kd.records.sqlite_file import check_journal
from tune_kd.study.sampler import url
from tune_kd.study.trial import Epoch
from tune_kd.system.errors import UserError
from tune_kd.system.files import check_regular
from tune_kd.system.object_store import MOST_SENT_BYTES, Mirror
from tune_kd.system.secrets import masked

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # that Ray's callbacks import
DATABASE = "mlflow.db"  # in a run's folder
FILES = ("tensorboard", "wandb", DATABASE)  # what trackers write there, with a folder a trial
ACCOUNTS = ("epoch", "seconds", "answer_seconds", "views_answered")  # of the records alone
PAUSE = 5.0  # seconds in which calls gather: in a row, they cost a third less than one by one
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker
BATCH = 900  # measures that go to MLflow at once; with settings, it takes 1000
BATCH_EVERY = 10.0  # seconds between batches of a trial


def check(names: list[str]) -> None:
    """Raise `UserError` for trackers that there are not, or whose package is not installed."""
    problems = []
    for name in names:
        if name not in PACKAGES:
            problems.append(f"--track is {name}; allowed: {', '.join(PACKAGES)}")
        elif find_spec(PACKAGES[name]) is None:
            problems.append(
                f"--track is {name}, whose package is not installed; `pip install 'tune_kd[{name}]'` does that"
            )
    if problems:
        raise UserError(*problems)


def made(names: list[str], study: str, run: str, folder: Path, say: Callable[[str], None]) -> list[tune.Callback]:
    """Tune's callbacks for these trackers. What they write goes into the run's folder: MLflow's where no server is
    named (`MLFLOW_TRACKING_URI`), and that of Weights & Biases also to its servers, unless `WANDB_MODE` forbids it."""

    def tensorboard() -> LoggerCallback:
        from ray.tune.logger import TBXLoggerCallback

        return TBXLoggerCallback()  # type: ignore[no-untyped-call]

    def mlflow() -> LoggerCallback:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it makes, into the picture
        if not (folder / DATABASE).exists():  # the run may have begun elsewhere
            Mirror.of(folder).fetch(folder / DATABASE, MOST_SENT_BYTES)
        check_journal(folder / f"{DATABASE}-journal")
        for end in ASIDE:
            check_regular(folder / f"{DATABASE}{end}", MOST_SENT_BYTES, writes=True)
        place = os.environ.get("MLFLOW_TRACKING_URI") or url(folder / DATABASE)
        callback = MLflowLoggerCallback(tracking_uri=place, experiment_name=run, tags={"study": study})
        in_batches: Any = _InBatches(callback.mlflow_util)
        callback.mlflow_util = in_batches
        return callback

    def wandb() -> LoggerCallback:
        from ray.air.integrations.wandb import WandbLoggerCallback

        class InItsFolder(WandbLoggerCallback):
            def log_trial_start(self, trial: Any) -> None:
                trial.init_local_path()  # where Ray's expects to work
                super().log_trial_start(trial)

        # Its library takes what it finds there for the user's, such as where to send runs and the key for it.
        if strange := next((folder / "wandb").rglob("settings"), None):
            raise ValueError(f"{strange} says how Weights & Biases is to be used; remove it")
        project = os.environ.get("WANDB_PROJECT") or f"tune_kd-{study}"
        return InItsFolder(project=project, group=run, mode=os.environ.get("WANDB_MODE"))  # the worker's may be others

    makers = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}
    return [_Shown(name, makers[name], folder, say) for name in dict.fromkeys(names)]


class _InBatches:
    """What Ray's callback writes to MLflow with, but for many numbers at once. Each by itself is a transaction or a
    request: 55 ms an epoch even in a file."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._params: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[Any]] = {}
        self._sent: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def log_params(self, params_to_log: Mapping[str, Any], run_id: str) -> None:
        from mlflow.entities import Param

        self._params[run_id] = [Param(*each) for each in params_to_log.items()]
        self._sent[run_id] = time.time()

    def log_metrics(self, step: int, metrics_to_log: Mapping[str, float], run_id: str) -> None:
        from mlflow.entities import Metric

        now = time.time()
        waiting = self._metrics.setdefault(run_id, [])
        for name, value in metrics_to_log.items():
            if name != "training_iteration":  # that is the step
                waiting.append(Metric(name, value, int(1000 * now), step))
        if now - self._sent[run_id] > BATCH_EVERY:
            self._send(run_id)
            self._sent[run_id] = now

    def end_run(self, status: str, run_id: str) -> None:
        self._send(run_id)
        self._get_client().set_terminated(run_id, status)
        del self._sent[run_id]

    def _send(self, run_id: str) -> None:
        metrics = self._metrics.pop(run_id, [])
        self._get_client().log_batch(run_id, metrics[:BATCH], self._params.pop(run_id, []))
        for start in range(BATCH, len(metrics), BATCH):
            self._get_client().log_batch(run_id, metrics[start : start + BATCH])


@dataclass(eq=False)
class Trial:
    """A trial as trackers see it: with its readable name, its settings as plain values, and a folder of its own."""

    trial_id: str
    name: str
    config: dict[str, Any]
    local_path: str
    experiment_dir_name: str
    evaluated_params: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.evaluated_params = self.config

    def __str__(self) -> str:
        return self.name

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)


def shown(task: Task, tune_id: str, folder: Path, tracker: str) -> Trial:
    """What a tracker is shown of one attempt at a trial, in a run's folder."""
    trial, cell = task.trial, {name: value for name, value in asdict(task.trial.cell).items() if value is not None}
    settings = {"arm": trial.arm, "phase": trial.phase, "seed": trial.seed, "attempt": task.attempt, **cell}
    recipe = {name: getattr(trial.recipe, name) for name in ("epochs", "batch_size", "lr", "weight_decay")}
    again = f" attempt {task.attempt}" if task.attempt > 1 else ""
    name = f"{trial.label}{f' ({trial.phase})' if trial.phase == 'screen' else ''}{again}"
    return Trial(tune_id, name, {**settings, **recipe}, str(folder / tracker / name), folder.name)


def numbers(epoch: Epoch) -> dict[str, float]:
    """The measures of an epoch that tell of learning and of speed, and of the last one also those of its outcome."""
    measures: Mapping[str, Any] = {**asdict(epoch), **(asdict(epoch.outcome) if epoch.outcome is not None else {})}
    told = {name: value for name, value in measures.items() if name not in ACCOUNTS and isinstance(value, int | float)}
    return {**told, "training_iteration": epoch.epoch}


class _Shown(tune.Callback):
    """One of Ray's callbacks, behind which trials look as their users know them. It works in a thread of its own: a
    server that is slow, or hangs, holds up no trial."""

    def __init__(self, name: str, make: Callable[[], LoggerCallback], folder: Path, say: Callable[[str], None]) -> None:
        self._name = name
        self._make = make
        self._folder = folder
        self._say = say
        self._trials: dict[str, Trial] = {}
        self._calls: SimpleQueue[Callable[[LoggerCallback], None] | None] = SimpleQueue()
        self._ended = Event()
        self._failed: BaseException | None = None
        self._told = False
        self._thread = Thread(target=self._work, name=f"tune_kd-{name}", daemon=True)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes what it was given to a file of its own, which is never read."""
        return {}

    def _work(self) -> None:
        try:
            inner = self._make()  # imports take a second, too
            while (call := self._calls.get()) is not None:
                call(inner)
                if self._calls.empty():
                    self._ended.wait(PAUSE)
        except BaseException as error:  # of a tracker, which is not the run's business, as that it calls sys.exit
            self._failed = error

    def _tell(self, call: Callable[[Any], None]) -> None:
        if self._failed is None:
            self._calls.put(call)
        elif not self._told:
            self._told = True
            why = masked(" ".join(str(self._failed).split()))[:200]
            self._say(f"warning: {self._name} does not take this run any more ({why}); the run goes on without it")

    def setup(self, *arguments: Any, **info: Any) -> None:
        self._tell(lambda inner: inner.setup(*arguments, **info))
        self._thread.start()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        this = self._trials[trial.trial_id] = shown(trial.config["task"], trial.trial_id, self._folder, self._name)
        self._tell(lambda inner: inner.log_trial_start(this))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        this = self._trials.get(trial.trial_id)
        if this is not None and "epoch" in result:
            self._tell(lambda inner: inner.log_trial_result(iteration, this, numbers(result["epoch"])))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._end(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._end(trial, failed=True)

    def _end(self, trial: TuneTrial, failed: bool) -> None:
        this = self._trials.pop(trial.trial_id, None)
        if this is not None:
            self._tell(lambda inner: inner.log_trial_end(this, failed=failed))

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        self._tell(lambda inner: inner.on_experiment_end(trials, **info))
        self._calls.put(None)
        self._ended.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(f"warning: {self._name} has not taken all of this run in {PATIENCE:.0f} s; it is left")
        self._tell(lambda inner: None)  # how it failed, if it did
