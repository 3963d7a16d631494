"""Trackers: show a run in TensorBoard, MLflow or Weights & Biases.

A tracker is for looking; the ledger is the record. If a tracker fails, the user gets a warning and the run continues.
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

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # that they import
Adapter = Callable[[str, str, Path], Tracker]  # of study, run and folder
ADAPTERS: dict[str, Adapter] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
FILES = ("tensorboard", "wandb", DATABASE)  # what they write in a run's folder


def check(names: list[str]) -> None:
    """Raise `UserError` for unknown trackers and for those whose package is not installed."""
    problems = []
    for name in names:
        if name not in PACKAGES:
            problems.append(f"--track is {name}; allowed: {', '.join(PACKAGES)}")
        elif find_spec(PACKAGES[name]) is None:
            problems.append(
                f"--track is {name}, whose package is not installed; `pip install 'tune_kd[{name}]'` does that"
            )
    raise_problems(problems)


def made(names: list[str], study: str, run: str, folder: Path, say: Callable[[str], None]) -> list[Background]:
    """Start these trackers, each in a thread of its own. They write into the run's `folder`.

    MLflow writes to the server of `MLFLOW_TRACKING_URI` instead, if that is set. Weights & Biases also sends to its
    servers, unless `WANDB_MODE` forbids it.
    """
    for name in names:  # in this thread: Tune imports some of them in it, and of two at once one may see half a module
        with suppress(Exception):  # which the tracker's thread raises again, and tells
            import_module(PACKAGES[name])
    return [Background(name, partial(ADAPTERS[name], study, run, folder), say) for name in dict.fromkeys(names)]
