"""Make each storage operation of a run fail in turn: the first, the second, ... until a run passes without a failure.

Runs are in this process, with real training. `once` is a disk with a transient error, `onwards` a disk that fails until
the run is over. Then a new driver continues on a disk that works again.
"""

import builtins
import errno
import io
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from faults import checker
from faults.here import go_on
from tune_kd.data.datasets import load_declared
from tune_kd.execute.driver import Driver
from tune_kd.execute.verify import verify
from tune_kd.execute.worker import Where
from tune_kd.records import ledger
from tune_kd.records.ledger import FAILURES
from tune_kd.records.lock import held
from tune_kd.records.run_folder import Run, begun, find, reopen
from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.trial import Epoch
from tune_kd.system import files
from tune_kd.system.errors import UserError

CALLS = ("open", "pwrite", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "scandir")


def smallest() -> Study:
    """A teacher, a control and a logit arm, a screen and a seed to confirm: five trials of two epochs."""
    return Study(
        name="smallest",
        question="Is anything lost?",
        factors=(Factor("stem", ("cifar",)), Factor("method", ("none", "logit")), Factor("temperature", (4.0,))),
        contrasts=(Compare("method", "logit", "none"),),
        cell=Cell(width=0.0625),
        scale="test",
        data=Data("digits", train=40, validation=20, test=20),
        recipe=Recipe(epochs=2, batch_size=20, lr=0.05),
        teacher_recipe=Recipe(epochs=2, batch_size=20, lr=0.05),
        screen=Screen(seed=0, grace=1, reduction=2, margin=0.0, min_peers=99),
        confirm=Confirm(seeds=(1,)),
    )


@dataclass
class Disk:
    """Counts the operations on files under a folder. Number `at` fails, and if `onwards`, so do all after it."""

    folder: Path
    at: int | None = None
    onwards: bool = False
    count: int = 0
    failed: str = ""  # the first operation that failed
    _files: set[int] = field(default_factory=set)  # descriptors of files in the folder

    def _pass(self, what: str) -> None:
        self.count += 1
        if self.at is not None and (self.count == self.at or (self.onwards and self.count > self.at)):
            self.failed = self.failed or what
            raise OSError(errno.EIO, "Input/output error", what)

    def _ours(self, target: Any) -> bool:
        if isinstance(target, int):
            return target in self._files
        return isinstance(target, str | os.PathLike) and str(target).startswith(str(self.folder))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if not self._ours(target):
                return real(target, *arguments, **options)
            self._pass(f"{name} {target}")
            result = real(target, *arguments, **options)
            if name == "open" and isinstance(result, int):
                self._files.add(result)
            return result

        return call

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context, count this process's operations on the folder: those of `os`, of files and of SQLite."""
        real_connect, disk = sqlite3.connect, self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                try:
                    disk._pass(f"SQL {statement[:40]}")
                except OSError as error:
                    raise sqlite3.OperationalError("disk I/O error") from error
                return super().execute(statement, *values)

        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            return real_connect(*arguments, **options, factory=Connection)

        close = os.close

        def closed(descriptor: int) -> None:
            self._files.discard(descriptor)
            close(descriptor)

        patches = [patch.object(os, name, self._wrapped(name, getattr(os, name))) for name in CALLS]
        patches += [patch.object(os, "close", closed), patch.object(ledger.sqlite3, "connect", connect)]
        patches += [patch.object(module, "open", self._wrapped("file", io.open)) for module in (io, builtins)]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()


@dataclass
class Witness:
    """Logs what a driver acknowledges, in the format of `witness.py`, outside of the folder with faults."""

    log: Path

    def watch(self, driver: Driver) -> None:
        on_epoch = driver.on_epoch

        def watched(trial_id: str, epoch: Epoch, where: Where) -> bool:
            counts = driver.rows[trial_id]["status"] == "running"
            go_on = on_epoch(trial_id, epoch, where)
            if counts:
                with self.log.open("a") as file:
                    file.write(json.dumps({"trial_id": trial_id, "epoch": asdict(epoch)}) + "\n")
            return go_on

        driver.on_epoch = watched  # type: ignore[method-assign]


def start(out: Path, witness: Witness) -> int:
    """Do what `run` does, in this process. Returns the exit status."""
    study = smallest()
    digest = load_declared(study.data, None, say=lambda _: None, progress=False).digest
    run = Run("r", out / "r", study, digest, None, {})
    return _status(lambda: _through(run, witness, new=True))


def resume(out: Path, witness: Witness) -> int:
    """Do what `resume` does, in this process. Returns the exit status."""
    return _status(lambda: _through(reopen(find(out, "r")), witness, new=False))


def _through(run: Run, witness: Witness, *, new: bool) -> int:
    with begun(run) if new else held(run.folder):
        driver = go_on(run, witness.watch)
    return int(any(row["status"] in ("failed", "blocked") for row in driver.rows.values()))


def _status(command: Callable[[], int]) -> int:
    try:
        return command()
    except UserError:
        return 2
    except FAILURES:
        return 3


def violations(out: Path, witness: Witness, reference: Path) -> list[str]:
    """Return the violations of I1 to I7 by a run that has ended."""
    found = checker.read(out / "r")
    return [
        *checker.contiguous(found),
        *checker.acknowledged(found, [witness.log]),
        *checker.same(found, checker.read(reference)),
        *checker.computed_alike(found),
        *checker.as_planned(found, 0),
        *checker.taught(found),
        *checker.readable(found),
        *(f"I7: {finding.part}: {finding.what}" for finding in verify(out / "r")),
    ]


@dataclass
class Score:
    """Counts over runs in which different operations failed."""

    passes: int = 0
    unharmed: int = 0  # runs that completed anyway
    resumed: int = 0  # runs that another driver completed
    begun_anew: int = 0  # runs that failed before they existed
    found: list[str] = field(default_factory=list)


def fail_each(root: Path, every: int, onwards: bool, say: Callable[[str], None]) -> Score:
    """Fail the first operation, then each `every`-th one after it, until a run passes without a failure."""
    score = Score()
    reference = root / "reference"
    assert start(reference, Witness(root / "reference.log")) == 0
    number = 1
    while True:
        out = root / str(number)
        witness, disk = Witness(root / f"{number}.log"), Disk(out, number, onwards)
        with disk.in_use():
            status = start(out, witness)
        if not disk.failed:
            say(f"{score.passes} runs; the last one passed {disk.count} operations, of which none failed")
            return score
        score.passes += 1
        found = _after(out, witness, reference / "r", status, score)
        score.found += [f"operation {number} ({disk.failed}): {each}" for each in found]
        for each in found:
            say(f"operation {number} ({disk.failed}): {each}")
        shutil.rmtree(out, ignore_errors=True)
        number += every


def _after(out: Path, witness: Witness, reference: Path, status: int, score: Score) -> list[str]:
    """Return the violations after a run that ended with `status`, and after another driver has continued it."""
    if status == 0:
        score.unharmed += 1
        return violations(out, witness, reference)
    if not (out / "r" / "study.json").is_file():
        score.begun_anew += 1
        if witness.log.exists():
            return ["I2: epochs were acknowledged, but there is no run"]
        shutil.rmtree(out, ignore_errors=True)
        return [] if start(out, witness) == 0 else ["I7: a new run does not complete"]
    score.resumed += 1
    if status == 1:
        return ["I7: an error of the disk made trials fail"]
    again = resume(out, witness)
    if again != 0:
        return [f"I7: resume ends with {again}"]
    return violations(out, witness, reference)


def operations(
    every: Annotated[int, typer.Option(help="Fail only every n-th operation.")] = 1,
    mode: Annotated[list[str] | None, typer.Option(help="once, onwards; both by default. Repeatable.")] = None,
) -> None:
    """Make every storage operation of a run fail in turn, once and permanently, and print the score."""
    torch.set_num_threads(1)
    bad = 0
    with TemporaryDirectory(prefix="tune_kd-faults-") as folder, patch.object(files, "PAUSES", (0.0, 0.0)):
        for each in mode or ("once", "onwards"):
            root = Path(folder, each)
            root.mkdir()
            score = fail_each(root, every, each == "onwards", typer.echo)
            bad += len(score.found)
            typer.echo(
                f"{each}: {score.passes} operations failed in turn; {score.unharmed} runs completed anyway, "
                f"{score.resumed} were completed by `resume`, {score.begun_anew} had not begun; "
                f"violations: {len(score.found)}"
            )
    raise SystemExit(1 if bad else 0)
