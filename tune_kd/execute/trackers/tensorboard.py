"""TensorBoard: a folder of event files for each attempt."""

from math import isnan
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars at every epoch and hyperparameters at the end, under the tags of Ray Tune's own callback."""

    def __init__(self, study: str, run: str, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._settings: dict[str, dict[str, Any]] = {}
        self._writers: dict[str, Any] = {}
        self._last: dict[str, dict[str, float]] = {}  # scalars of the last epoch

    def on_start(self, name: str, settings: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._settings[name] = settings
        self._writers[name] = SummaryWriter(str(self._folder / name), flush_secs=30)

    def on_epoch(self, name: str, epoch: int, measures: dict[str, float]) -> None:
        self._last[name] = {f"ray/tune/{key}": value for key, value in measures.items() if not isnan(value)}
        for tag, value in self._last[name].items():
            self._writers[name].add_scalar(tag, value, global_step=epoch)
        self._writers[name].flush()

    def on_end(self, name: str, failed: bool) -> None:
        from tensorboardX.summary import hparams

        settings, writer = self._settings.pop(name), self._writers.pop(name)
        if last := self._last.pop(name, None):
            for summary in hparams(settings, last):
                writer.file_writer.add_summary(summary)
        writer.close()

    def close(self) -> None:
        """Does nothing: `on_end` closed the writers."""
