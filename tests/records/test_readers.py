"""Tables can be read at any time during a run, by pandas and by `load`, while the driver keeps rewriting them."""

import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import dataset
from pyarrow.fs import LocalFileSystem

from conftest import tiny
from tune_kd.records import ledger as records, reader
from tune_kd.records.ledger import Ledger
from tune_kd.records.run_folder import Run, create
from tune_kd.records.schema import EPOCHS, LEDGER, SCHEMAS, TRIALS, first_row
from tune_kd.records.tables import arrow, to_parquet

MANY = 200  # trials; with this many, the tables only change and no longer grow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run("r", tmp_path / "r", tiny(), "d" * 64, None, {})
    create(made)
    return made


def grow(run: Run, ledger: Ledger, number: int) -> None:
    """The `number`-th change of the tables: first new trials with one epoch each, later more epochs of these trials."""
    trial = replace(run.plan.trials[-1], seed=number % MANY)
    epoch = 1 + number // MANY
    row = first_row(run.name, trial) | {"status": "running", "epochs_run": epoch, "attempts": 1}
    with ledger.transaction():
        ledger.put(TRIALS, row)
        ledger.put(EPOCHS, {"run": run.name, "trial_id": trial.trial_id, "epoch": epoch, "attempt": 1})
    ledger.write_tables(run.folder)


def keep_growing(run: Run) -> None:
    """The writer's process, which runs until it is killed."""
    ledger = Ledger(run.folder / LEDGER)
    for number in range(1, sys.maxsize):
        grow(run, ledger, number)


@contextmanager
def growing(run: Run) -> Iterator[None]:
    ledger = Ledger(run.folder / LEDGER)
    grow(run, ledger, 0)
    ledger.close()
    writer = get_context("spawn").Process(target=keep_growing, args=(run,))
    writer.start()
    try:
        yield
        assert writer.is_alive(), "the writer failed"
    finally:
        writer.kill()
        writer.join()


def changed(path: Path, before: int) -> bool:
    return path.stat().st_ino != before


@pytest.mark.long
@pytest.mark.parametrize("reads", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_no_reader_fails_while_the_tables_are_replaced(run: Run, reads: int) -> None:
    with growing(run):
        first = (run.folder / "trials.parquet").stat().st_ino
        end = time.monotonic() + 120
        while not changed(run.folder / "trials.parquet", first):
            assert time.monotonic() < end, "nothing is written"
            time.sleep(0.05)
        versions: set[int] = set()

        def read_one(number: int) -> None:
            path = run.folder / f"{SCHEMAS[number % 3].name}.parquet"
            versions.add(path.stat().st_mtime_ns)  # inode numbers are reused
            pd.read_parquet(path)
            if number % 10 == 0:
                read = reader.load(run.folder)
                assert set(read.epochs["trial_id"]) <= set(read.trials["trial_id"])

        with ThreadPoolExecutor(2) as readers:
            assert len(list(readers.map(read_one, range(reads)))) == reads
    assert len(versions) > 10, "the tables were hardly replaced"


def test_rewrites_of_the_tables_are_a_minimum_time_apart(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "TABLES_APART", 0.2)
    ledger, path = Ledger(run.folder / LEDGER), run.folder / "trials.parquet"
    grow(run, ledger, 0)
    made = path.stat().st_mtime
    grow(run, ledger, 1)
    assert path.stat().st_mtime - made >= 0.2


def test_load_succeeds_if_the_tables_are_rewritten_between_its_reads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` reads three files, and each may have a different age."""
    ledger = Ledger(run.folder / LEDGER)
    grow(run, ledger, 0)
    numbers, whole = iter(range(1, MANY)), reader._whole

    def then_made_again(path: Path, digested: bool) -> bytes:
        data = whole(path, digested)
        grow(run, ledger, next(numbers))
        return data

    monkeypatch.setattr(reader, "_whole", then_made_again)
    assert len(reader.load(run.folder).trials) >= 1


def test_pyarrow_reads_the_old_table_if_it_has_read_the_old_footer(run: Run) -> None:
    """pyarrow opens a file once for the footer and once for the pages. This must work however tables grow or shrink."""
    ledger, path = Ledger(run.folder / LEDGER), run.folder / "epochs.parquet"
    grow(run, ledger, 0)
    chance, sizes = random.Random(0), []
    for _ in range(15):
        before = pd.read_parquet(path)
        opened = dataset.ParquetFileFormat().make_fragment(str(path), LocalFileSystem())
        assert opened.physical_schema  # reads the footer
        for number in chance.sample(range(MANY), chance.choice((1, 5, 40))):
            row = {"run": run.name, "trial_id": str(number), "epoch": 1, "attempt": 1, "val_loss": chance.random()}
            ledger.put(EPOCHS, row)
        ledger.write_tables(run.folder)
        pd.testing.assert_frame_equal(opened.to_table().to_pandas(), before, check_dtype=False)
        assert len(pd.read_parquet(path)) >= len(before)
        sizes.append(path.stat().st_size / len(to_parquet(arrow(EPOCHS, ledger.rows(EPOCHS)))))
    assert max(sizes) < 4


def test_a_table_replaced_while_its_digest_is_read_is_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(run.folder / LEDGER)
    grow(run, ledger, 0)
    digests, numbers = records.digests, iter((1, 2))

    def twice_replaced(folder: Path) -> dict[str, list[str]] | None:
        for number in numbers:  # so that the digest of the table that was read is no longer on record
            grow(run, ledger, number)
        return digests(folder)

    monkeypatch.setattr(reader, "digests", twice_replaced)
    assert len(reader.load(run.folder).trials) == 3
