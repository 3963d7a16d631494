"""Weights & Biases: each attempt is a run there, logged by its own process."""

import os
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class WandB:
    """Starts a process for each attempt. This protects the driver: the library keeps its state and working folder per
    process, and can hang when a process exits."""

    def __init__(self, study: str, run: str, folder: Path) -> None:
        self._folder = folder / "wandb"
        # The library reads such a file in its working folder. The file can make it send the user's key to any server.
        if strange := next(self._folder.rglob("settings"), None):
            raise ValueError(f"{strange} has settings for Weights & Biases, which are unsafe in results; remove it")
        self._options = {"project": os.environ.get("WANDB_PROJECT") or f"tune_kd-{study}", "group": run}
        self._spawn = get_context("spawn")
        self._problems = self._spawn.SimpleQueue()
        self._open: dict[str, Connection] = {}

    def on_start(self, name: str, settings: dict[str, Any]) -> None:
        place = self._folder / name
        place.mkdir(parents=True, exist_ok=True)
        options = self._options | {"name": name, "config": settings | {"trial_log_path": str(place)}}
        read, self._open[name] = self._spawn.Pipe(duplex=False)
        self._spawn.Process(target=_log, args=(place, options, read, self._problems), daemon=True).start()
        read.close()

    def on_epoch(self, name: str, epoch: int, measures: dict[str, float]) -> None:
        self._check()
        self._open[name].send(measures | {"training_iteration": epoch})

    def on_end(self, name: str, failed: bool) -> None:
        self._check()
        with self._open.pop(name) as pipe:
            pipe.send(None)

    def close(self) -> None:
        for process in active_children():
            process.join()
        self._check()

    def _check(self) -> None:
        if not self._problems.empty():
            raise RuntimeError(self._problems.get())


def _log(place: Path, options: dict[str, Any], pipe: Connection, problems: Any) -> None:
    """Log the measures from a pipe until None arrives, and report errors through `problems`."""
    os.setsid()  # only the driver handles the terminal's Ctrl+C
    os.environ["WANDB_SILENT"] = "true"
    try:
        import wandb

        os.chdir(place)  # after the import, which must not find modules there
        with wandb.init(**options) as run:
            for measures in iter(pipe.recv, None):
                run.log(measures, step=measures["training_iteration"])
    except EOFError:
        pass  # the driver is gone
    except BaseException as error:
        problems.put(str(error))
