"""Is damage to a file ever missed? Truncate every file of a run and flip its bytes, and read it as `load`,
`status --verify` and `resume` do.

Damage is SEEN if a reader raises an allowed error or reports it, HARMLESS if every reader returns the same as before,
and SILENT if a reader returns something else without a report. No damage may be silent, escape as another kind of
error, or remain after a `resume` that succeeded.

    python tests/faults/damage.py                    200 truncations per file and 10,000 flips; about half an hour
    python tests/faults/damage.py --flips 500 --truncations 10
"""

import argparse
import random
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command

from conftest import tiny
from tune_kd.data import datasets
from tune_kd.execute import preflight
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.verify import verify
from tune_kd.execute.worker import Task, Workplace, work
from tune_kd.records import rebuild
from tune_kd.records.ledger import FAILURES, Ledger
from tune_kd.records.reader import load
from tune_kd.records.run_folder import Run, create, reopen
from tune_kd.records.schema import LEDGER, SCHEMAS, TRIALS
from tune_kd.records.tables import frame
from tune_kd.study.spec import Confirm, Factor, Study
from tune_kd.study.trial import Answering, Epoch
from tune_kd.system.errors import UserError
from tune_kd.training import logit_cache, teachers
from tune_kd.training.checkpoints import Checkpoints

ALLOWED = (UserError, teachers.TeacherChanged, *FAILURES)
VARIANTS = ("finished", "cut")


class Cut(BaseException):
    """Stands for a kill of the driver: no error handler catches a BaseException."""


def study() -> Study:
    """One stem, three methods and four epochs: a teacher and eight students."""
    base = tiny()
    factors = (Factor("stem", ("cifar",)), base.factors[1], Factor("temperature", (2.0, 4.0)))
    recipe = replace(base.recipe, epochs=4)
    screen = replace(base.screen, min_peers=1)
    return replace(base, factors=factors, moderator=None, recipe=recipe, screen=screen, confirm=Confirm(seeds=(1,)))


def make(results: Path, variant: str) -> Path:
    """Create the folder of a finished run, or of a run whose driver was killed in the middle of a student."""
    digits = datasets.load("digits", train=60, validation=20, test=20)
    run = Run("r", results / "r", study(), digits.digest, None, {"max_concurrent": None, "keep_checkpoints": False})
    create(run)
    place = Workplace(None, None, run.teachers, run.checkpoints, checkpoint_every=0.0)
    ledger = Ledger(run.folder / LEDGER)
    driver = Driver(run.plan, run.name, run.folder, ledger, place, cpus=1.0, gpus=0.0)
    last = next(trial.trial_id for trial in reversed(run.plan.trials) if trial.cell.method == "logit")

    def until_cut(task: Task, place: Workplace) -> Iterator[Epoch]:
        for epoch in work(task, place):
            if variant == "cut" and task.trial.trial_id == last:
                if epoch.epoch == 2:
                    driver.write_tables()  # tables that are older than the ledger, but consistent
                    with closing(sqlite3.connect(ledger.path)) as other:  # leaves rows in both of its files
                        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                if epoch.epoch == 4:
                    raise Cut
            yield epoch

    threads = torch.get_num_threads()
    try:
        run_in_process(driver, place, until_cut)  # type: ignore[arg-type]
    except Cut:
        # A kill leaves the files as they are while the ledger is open.
        shutil.copytree(results, results.with_name("killed"))
        ledger.close()
        shutil.rmtree(results)
        results.with_name("killed").rename(results)
    finally:
        torch.set_num_threads(threads)
        ledger.close()
    return run.folder


@dataclass
class Scratch:
    """A run whose files are damaged and restored one by one."""

    results: Path
    _whole: dict[Path, tuple[bytes, tuple[int, int]]] = field(default_factory=dict)
    _read: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.results.rglob("*"):
            if path.is_file():
                self._whole[path] = path.read_bytes(), _stamp(path)

    @property
    def folder(self) -> Path:
        return self.results / "r"

    def bytes_of(self, path: Path) -> bytes:
        return self._whole[path][0]

    def read_by(self, reader: "Callable[[Scratch], Reading]") -> Any:
        """Return a reader's result for the intact run, which is read once."""
        if reader.__name__ not in self._read:
            self._read[reader.__name__], reported = reader(self)
            assert not reported, f"{reader.__name__} reports an intact run as damaged"
            self.restore()
        return self._read[reader.__name__]

    def restore(self) -> None:
        """Restore all files. Untouched files are not rewritten."""
        for path in self.results.rglob("*"):
            if path.is_file() and path not in self._whole:
                path.unlink()
        for path, (content, stamp) in self._whole.items():
            if not path.is_file() or _stamp(path) != stamp:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self._whole[path] = content, _stamp(path)

    def targets(self) -> dict[str, Path]:
        """The files to damage, by readable names."""
        run, teacher = self.folder, next(self.results.glob("teachers/*/card.json")).parent
        found = {path.name: path for path in sorted(run.iterdir()) if path.is_file() and not path.name.startswith(".")}
        found.pop(f"{LEDGER}-shm", None)  # SQLite recreates it
        generations = sorted(run.glob("checkpoints/*/*.safetensors"), reverse=True)
        found |= dict(zip(("checkpoint, newest", "checkpoint, the one before"), generations, strict=False))
        found |= {"teacher's weights": teacher / "weights.safetensors", "teacher's card": teacher / "card.json"}
        table = next(teacher.glob("answers/*/views-*"))
        return found | {"answers": table / "logits.f32", "answers' digests": table / "digests.sha256"}


def _stamp(path: Path) -> tuple[int, int]:
    at = path.stat()
    return at.st_mtime_ns, at.st_size


Reading = tuple[Any, bool]  # what a reader returned, and whether it reported damage


def read_tables(scratch: Scratch) -> Reading:
    records = load(scratch.folder)
    return (records.trials, records.epochs, records.decisions, records.studies), False


def read_verified(scratch: Scratch) -> Reading:
    return (), bool(verify(scratch.folder))


def read_plan(scratch: Scratch) -> Reading:
    run = reopen(scratch.folder)
    return (run, run.plan), False


def read_resumed(scratch: Scratch) -> Reading:
    """Do everything that `resume` does before training, and write the tables."""
    run, said = reopen(scratch.folder), list[str]()
    ledger = rebuild.opened(run, said.append)
    try:
        rows: Any = {schema.name: ledger.rows(schema) for schema in SCHEMAS}
        if rebuild.set_aside(run.folder):
            records = load(run.folder)
            for schema in SCHEMAS:
                if not frame(schema, rows[schema.name]).equals(getattr(records, schema.name)):
                    raise WrongRebuild(f"the rows of {schema.name} are not those of the table")
        preflight.check(run, ledger.rows(TRIALS), 1)
        place = Workplace(None, None, run.teachers, run.checkpoints)
        driver = Driver(run.plan, run.name, run.folder, ledger, place, cpus=1.0, gpus=0.0)
        driver.write_tables()
    finally:
        ledger.close()
    for finding in verify(run.folder) if said else ():
        if "resume" in finding.remedy:
            raise Unhealed(f"{finding.part}: {finding.what}; {finding.remedy}")
    return (run, rows, driver.rows, driver.decisions, read_tables(scratch)[0]), bool(said)


def read_states(scratch: Scratch) -> Reading:
    """Load the checkpoints from which unfinished trials continue."""
    states, reported = [], False
    for folder in sorted(scratch.folder.glob("checkpoints/*")):
        checkpoints = Checkpoints(folder)
        states.append(checkpoints.load())
        reported = reported or bool(checkpoints.damaged())
    return states, reported


def read_teacher(scratch: Scratch) -> Reading:
    """Load a teacher as students of this run and of other runs do."""
    run = reopen(scratch.folder)
    trial = run.plan.teachers[0]
    epochs = teachers.published_epochs(run.teachers, trial.trial_id)
    digits = datasets.load("digits", train=60, validation=20, test=20)
    loaded = teachers.load_teacher(run.teachers, trial.trial_id, digits, torch.device("cpu"), Answering(False, ()))
    state = dict(loaded.net.state_dict())
    return (epochs, loaded.digest, loaded.precision, state), False


def read_answers(scratch: Scratch) -> Reading:
    """Read a whole table of cached logits. Damaged parts are recomputed by a function that returns the same logits."""
    run = reopen(scratch.folder)
    path = scratch.targets()["answers"]
    logits = torch.frombuffer(bytearray(scratch.bytes_of(path)), dtype=torch.float32).view(-1, 10)
    table = logit_cache.LogitCache(path.parent, len(logits), 10, lambda rows: logits[rows.start : rows.stop])
    return (run.name, table.take(torch.arange(len(logits)))[0]), False


class WrongRebuild(Exception):
    """A rebuilt ledger differs from the tables."""


class Unhealed(Exception):
    """`resume` succeeded, but something is still damaged."""


def readers(target: str) -> list[Callable[[Scratch], Reading]]:
    """Return the readers of a file. The last one may change files."""
    if target.startswith("teacher"):
        return [read_verified, read_teacher, read_resumed]
    if target.startswith("answers"):
        return [read_verified, read_answers]
    if target.startswith("checkpoint"):
        return [read_verified, read_states]
    if target.startswith("ledger"):
        return [read_verified, read_resumed]
    if target == "study.json":
        return [read_plan, read_tables, read_verified, read_resumed]
    return [read_tables, read_verified, read_resumed]


def same(one: Any, other: Any) -> bool:
    """Whether two readings are equal bit for bit."""
    if isinstance(one, pd.DataFrame) and isinstance(other, pd.DataFrame):
        return one.equals(other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@dataclass
class Score:
    """The verdicts on all damage to one file."""

    target: str
    size: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # flips, truncations, seen, harmless, silent, escaped
    examples: list[str] = field(default_factory=list)

    @property
    def broken(self) -> int:
        return self.counts["silent"] + self.counts["escaped"]


def damages(content: bytes, truncations: int, flips: int, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield truncations to evenly spread sizes, including 0 and one byte less; then random changes of random bytes."""
    size = len(content)
    cuts = {0, size - 1} | {round(place * (size - 1) / max(1, truncations - 1)) for place in range(truncations)}
    for cut in sorted(cuts):
        yield f"cut to {cut}", content[:cut]
    for number in range(flips):
        place, change = chance.randrange(size), chance.randrange(1, 256)
        if number % 4 == 0:  # the end of a file has its footer, seal or newest pages
            place = max(0, size - 1 - chance.randrange(100))
        flipped = bytearray(content)
        flipped[place] ^= change
        yield f"byte {place} ^ {change}", bytes(flipped)


def judge(
    scratch: Scratch,
    target: str,
    truncations: int,
    flips: int,
    used: list[Callable[[Scratch], Reading]] | None = None,
    until: str | None = None,
) -> Score:
    """Damage one file repeatedly, and judge what its readers return. Uses all readers of the file, or those of `used`.
    Stops at the first verdict `until`."""
    path, used = scratch.targets()[target], used or readers(target)
    content = scratch.bytes_of(path)
    before = [scratch.read_by(reader) for reader in used]
    score = Score(target, len(content))
    for words, altered in damages(content, truncations, flips, random.Random(target)):
        path.write_bytes(altered)
        score.counts["truncations" if words.startswith("cut") else "flips"] += 1
        verdicts = set()
        for reader, known in zip(used, before, strict=True):
            try:
                returned, reported = reader(scratch)
                verdict = "seen" if reported else "harmless" if same(returned, known) else "silent"
            except ALLOWED:
                verdict = "seen"
            except Exception as error:
                verdict = "escaped"
                what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                score.examples.append(f"{target}, {words}: {reader.__name__} raises {what}")
            if verdict == "silent":
                score.examples.append(f"{target}, {words}: {reader.__name__} misses it")
            verdicts.add(verdict)
        worst = next(each for each in ("silent", "escaped", "seen", "harmless") if each in verdicts)
        score.counts[worst] += 1
        scratch.restore()
        if worst == until:
            break
    return score


def _job(whole: Path, variant: str, target: str, truncations: int, flips: int) -> Score:
    """Judge one target in its own process, on its own copy."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
        results = Path(shutil.copytree(whole, Path(folder) / "results"))
        score = judge(Scratch(results), target, truncations, flips)
    score.target = f"{variant}: {target}"
    return score


COLUMNS = ("flips", "truncations", "seen", "harmless", "silent", "escaped")


def table(scores: list[Score]) -> str:
    """Return a table of the verdicts."""
    lines = [f"{'file':<36} {'bytes':>8} " + " ".join(f"{name:>11}" for name in COLUMNS)]
    lines += [f"{each.target:<36} {each.size:>8} " + " ".join(f"{each.counts[name]:>11}" for name in COLUMNS)
              for each in scores]  # fmt: skip
    total = sum((each.counts for each in scores), Counter())
    lines.append(f"{'total':<36} {'':>8} " + " ".join(f"{total[name]:>11}" for name in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--flips", type=int, default=10_000, help="total number")
    options.add_argument("--truncations", type=int, default=200, help="per file")
    options.add_argument("--only", default="", help="only files whose name contains this")
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    memory = Path("/dev/shm")  # syncs are free here
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        jobs = []
        for variant in VARIANTS:
            make(Path(folder) / variant, variant)
            targets = Scratch(Path(folder) / variant).targets()
            jobs += [(Path(folder) / variant, variant, target) for target in targets]
        each = -(-given.flips // len(jobs))
        jobs = [job for job in jobs if given.only in f"{job[1]}: {job[2]}"]
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:  # reports a crashed process
            futures = [pool.submit(_job, *job, given.truncations, each) for job in jobs]
            scores = []
            for future in as_completed(futures):
                scores.append(future.result())
                print(f"{scores[-1].target}: {dict(scores[-1].counts)}", file=sys.stderr, flush=True)
    print(table(sorted(scores, key=lambda score: score.target)))
    for example in [example for score in scores for example in score.examples][:40]:
        print(example)
    sys.exit(1 if any(score.broken for score in scores) else 0)


if __name__ == "__main__":
    main()
