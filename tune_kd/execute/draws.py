"""Copy the draws of a tuned study to an Optuna storage, for tools such as `optuna-dashboard`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tune_kd.records.schema import TrialRow
from tune_kd.study import sampler
from tune_kd.study.plan import Search
from tune_kd.study.trial import Phase
from tune_kd.system.secrets import masked

T = TypeVar("T")


class Draws:
    """The Optuna storage of a run. Its errors do not end the run, since it can be rebuilt from the ledger."""

    def __init__(self, folder: Path, run: str, searches: Mapping[str, Search], say: Callable[[str], None]) -> None:
        self._path = folder / sampler.STORAGE
        self._searches = searches
        self._say = say
        self._storage = self._try(lambda: sampler.Storage(self._path, run)) if searches else None

    def add(self, row: TrialRow) -> None:
        """Add a finished draw. Ignores other trials."""
        if (storage := self._storage) is not None and row["phase"] == Phase.SCREEN:
            self._try(lambda: storage.add(row["arm"], self._searches[row["arm"]].ranges, row))

    def close(self) -> None:
        if self._storage is not None:
            self._try(self._storage.close)

    def _try(self, do: Callable[[], T]) -> T | None:
        try:
            return do()
        except Exception as error:  # from Optuna, SQLAlchemy, Alembic, SQLite or the disk
            self._storage = None
            why = masked(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
            self._say(
                f"warning: {self._path} cannot be written to ({why}); the run continues without it, and `resume` "
                "rebuilds it"
            )
            return None
