"""Trackers: log a run to TensorBoard, MLflow or Weights & Biases.

A tracker is only for display; the ledger is the record. If a tracker fails, the user gets a warning and the run
continues.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tune_kd.execute.trackers.background import Background, Tracker
from tune_kd.execute.trackers.mlflow import DATABASE, MLflow
from tune_kd.execute.trackers.tensorboard import TensorBoard
from tune_kd.execute.trackers.wandb import WandB
from tune_kd.system.errors import raise_problems

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # packages that they import
Adapter = Callable[[str, str, Path], Tracker]  # arguments: study, run and folder
ADAPTERS: dict[str, Adapter] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
FILES = ("tensorboard", "wandb", DATABASE)  # their files and folders in a run's folder


def check(names: list[str]) -> None:
    """Raise `UserError` for unknown trackers and for trackers whose package is not installed."""
    problems = []
    for name in names:
        if name not in PACKAGES:
            problems.append(f"--track is {name}; allowed: {', '.join(PACKAGES)}")
        elif find_spec(PACKAGES[name]) is None:
            problems.append(f"--track is {name}, whose package is not installed; run `pip install 'tune_kd[{name}]'`")
    raise_problems(problems)


def made(names: list[str], study: str, run: str, folder: Path, say: Callable[[str], None]) -> list[Background]:
    """Start these trackers, each in its own thread. They write to the run's `folder`.

    If `MLFLOW_TRACKING_URI` is set, MLflow writes to that server instead. Weights & Biases also sends to its servers,
    unless `WANDB_MODE` disables it.
    """
    for name in names:  # in this thread, where Tune also imports some of them: concurrent imports may see half a module
        with suppress(Exception):  # the tracker's thread raises and reports it again
            import_module(PACKAGES[name])
    return [Background(name, partial(ADAPTERS[name], study, run, folder), say) for name in dict.fromkeys(names)]
