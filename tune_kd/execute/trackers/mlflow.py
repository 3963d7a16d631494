"""MLflow: each attempt is an MLflow run, in an experiment with the name of our run."""

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_kd.records.ledger import ASIDE
from tune_kd.records.sqlite_file import check_journal
from tune_kd.study.sampler import url
from tune_kd.system.files import check_regular
from tune_kd.system.object_store import MOST_SENT_BYTES, Mirror

DATABASE = "mlflow.db"  # in a run's folder
METRICS_A_BATCH = 900  # metrics per batch; MLflow accepts 1000 metrics and parameters at once
BATCH_EVERY = 10.0  # seconds between batches of an attempt


@dataclass
class _Unsent:
    """Parameters and metrics of an attempt that were not sent to MLflow yet."""

    run_id: str
    params: list[Any]  # mlflow.entities.Param
    metrics: list[Any] = field(default_factory=list)
    sent: float = field(default_factory=time.time)  # time of the last batch


class MLflow:
    """Logs in batches. One by one, each number would be a transaction or a request: 55 ms per epoch even in a file."""

    def __init__(self, study: str, run: str, folder: Path) -> None:
        file = database(folder)
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # otherwise it logs each table that it creates
        self._study = study
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or url(file))
        found = self._client.get_experiment_by_name(run)
        self._experiment = found.experiment_id if found else self._client.create_experiment(run)
        self._open: dict[str, _Unsent] = {}

    def on_start(self, name: str, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        tags = {"study": self._study, "trial_name": name}
        run_id = self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id
        self._open[name] = _Unsent(run_id, [Param(*each) for each in settings.items()])

    def on_epoch(self, name: str, epoch: int, measures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now, unsent = time.time(), self._open[name]
        unsent.metrics += [Metric(*each, int(1000 * now), epoch) for each in measures.items()]
        if len(unsent.metrics) > METRICS_A_BATCH or now - unsent.sent > BATCH_EVERY:
            self._send(unsent)
            unsent.sent = now

    def on_end(self, name: str, failed: bool) -> None:
        unsent = self._open.pop(name)
        self._send(unsent)
        self._client.set_terminated(unsent.run_id, "FAILED" if failed else "FINISHED")

    def close(self) -> None:
        """Does nothing: `on_end` sent everything."""

    def _send(self, unsent: _Unsent) -> None:
        self._client.log_batch(unsent.run_id, unsent.metrics, unsent.params)
        unsent.metrics, unsent.params = [], []


def database(folder: Path) -> Path:
    """Return the database file in a run's folder. Fetches a missing file from the run's object store. Raises
    `CorruptFile` if the file is not safe to open."""
    file = folder / DATABASE
    if not file.exists():  # the run may have started on another machine
        Mirror.of(folder).fetch(file, MOST_SENT_BYTES)
    check_journal(folder / f"{DATABASE}-journal")
    for end in ASIDE:
        check_regular(folder / f"{DATABASE}{end}", MOST_SENT_BYTES, writes=True)
    return file
