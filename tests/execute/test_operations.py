"""A disk that fails in one operation, or in all from one on: nothing is lost, and the status is correct."""

from pathlib import Path
from unittest.mock import patch

import pytest

from faults import operations
from tune_kd.records import ledger
from tune_kd.system import files


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("onwards", "every"),
    [(False, 60), (True, 120), *(pytest.param(each, 40, marks=pytest.mark.slow) for each in (False, True))],
)
def test_a_disk_that_fails_costs_nothing_but_time(tmp_path: Path, onwards: bool, every: int) -> None:
    """Tries every `every`-th operation; `python tests/faults operations` tries each."""
    with patch.object(files, "PAUSES", (0.0, 0.0)):
        score = operations.fail_each(tmp_path, every, onwards, lambda _: None)
    assert score.found == []
    assert score.passes >= {40: 10, 60: 10, 120: 5}[every]
    assert (score.resumed if onwards else score.unharmed) >= score.passes // 2


@pytest.mark.usefixtures("one_thread")
def test_the_checker_detects_a_ledger_that_drops_transactions(tmp_path: Path) -> None:
    """A driver that acknowledges a row before it is on disk loses the row if the disk fails."""

    def lossy_commit(self: ledger.Ledger, writes: list[tuple[str, list[object]]]) -> None:
        """Write only every other transaction, as if a full disk reported no error."""
        lossy_commit.count += 1  # type: ignore[attr-defined]
        if lossy_commit.count % 2:  # type: ignore[attr-defined]
            commit(self, writes)

    lossy_commit.count = 0  # type: ignore[attr-defined]
    commit = ledger.Ledger._commit
    witness = operations.Witness(tmp_path / "log")
    assert operations.start(tmp_path / "reference", operations.Witness(tmp_path / "reference.log")) == 0
    with patch.object(ledger.Ledger, "_commit", lossy_commit):
        operations.start(tmp_path / "out", witness)
    found = operations.violations(tmp_path / "out", witness, tmp_path / "reference" / "r")
    assert {each[:2] for each in found} >= {"I1", "I2"}
