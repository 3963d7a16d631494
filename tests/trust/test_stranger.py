"""A results folder from a stranger does nothing that it must not. More of these: `python tests/faults/stranger.py`."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from faults import mutations, stranger
from faults.mutations import Chance, Mutation, Stranger, mutate
from faults.stranger import Fuzz
from tune_kd.analysis import grace
from tune_kd.records import ledger as records, schema
from tune_kd.records.schema import DIGESTS, SCHEMAS
from tune_kd.records.sync import HOLDER, STUDY
from tune_kd.system import files
from tune_kd.training import checkpoints

ROOT = Path(__file__).parents[2]
SEED = 20  # of the files that are tried here


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole runs that are mutated."""
    threads = torch.get_num_threads()
    try:
        stranger.make_bases(folder := tmp_path_factory.mktemp("bases") / "of")
    finally:
        torch.set_num_threads(threads)
    return folder


@contextmanager
def harness(*arguments: str) -> Iterator[Callable[[str], Any]]:
    """A process of its own, since one that has trained must not fork. What is given asks it for an answer of `ANSWERS`:
    all that is asked shares its imports and its first run through all commands."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    code = "import sys, test_stranger; test_stranger.answer(*sys.argv[1:])"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, stderr=errors,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def ask(what: str) -> Any:
            print(what, file=process.stdin, flush=True)
            for line in process.stdout:
                asked, told = json.loads(line)
                if asked == what:  # and not what a test asked for that ran out of time
                    return told
            errors.seek(0)
            raise AssertionError(errors.read()[-3000:])

        try:
            yield ask
        finally:
            process.stdin.close()


def answer(bases: str, scratch: str) -> None:
    """In that process: an answer a line, in JSON, for each line that asks for one."""
    fuzz = Fuzz(Path(bases), Path(scratch), SEED, quick=True)
    stranger.ready(fuzz)
    for line in sys.stdin:
        what = line.strip()
        sys.stdout.write(json.dumps([what, ANSWERS[what](fuzz)]) + "\n")
        sys.stdout.flush()
    os._exit(0)  # at an ordinary end, libraries that were imported tell of their own leaks


@pytest.fixture(scope="module")
def ask(bases: Path) -> Iterator[Callable[[str], Any]]:
    memory = Path("/dev/shm")  # where a sync costs nothing
    with (
        tempfile.TemporaryDirectory(prefix="stranger-", dir=memory if memory.is_dir() else None) as scratch,
        harness(str(bases), scratch) as asked,
    ):
        yield asked


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nothing_happens_that_must_not(ask: Callable[[str], Any]) -> None:
    """Two hundred files, each through some of the commands."""
    told = ask("files")
    assert "0 files of 200 with violations" in told, told


def files_tried(fuzz: Fuzz) -> str:
    return stranger.measured(fuzz, range(200), 1).told()


# Each kind of violation is seen


class Opens:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def unpickled(data: bytes) -> Any:
    return pickle.loads(data)


def with_a_pickle(where: Stranger, chance: Chance, kind: str) -> Mutation:
    path = max(where.run.glob("checkpoints/*/*.safetensors"))
    path.unlink()
    data = pickle.dumps(Opens())
    path.with_name(f"999999-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    return Mutation("a pickle", True)


def with_a_fifo(where: Stranger, chance: Chance, kind: str) -> Mutation:
    (where.run / HOLDER).unlink()
    os.mkfifo(where.run / HOLDER)
    return Mutation("a FIFO", True)


def as_it_is(where: Stranger, chance: Chance, kind: str) -> Mutation:
    return Mutation("nothing", True)


def here() -> Path:
    """The folder in which all is that belongs to a stranger's results."""
    return Path.cwd().parent


def runs_a_file() -> None:
    import runpy

    runpy.run_path(str(here() / "results" / "r" / "evil.py"))


def starts_a_program() -> None:
    subprocess.run(["true"], check=True)


def writes_through_a_link() -> None:
    (here() / "results" / "r" / "link").symlink_to(here() / "canary" / "file")
    (here() / "results" / "r" / "link").write_text("changed")


def removes_a_folder_elsewhere() -> None:
    shutil.rmtree(here() / "canary")


def writes_unseen_by_python() -> None:
    with closing(sqlite3.connect(":memory:")) as base:
        base.execute("ATTACH ? AS other", [str(here() / "home" / "new")])
        base.execute("CREATE TABLE other.t (x)")


def connects() -> None:
    import socket

    with suppress(OSError):
        socket.create_connection(("127.0.0.1", 1), timeout=1)


def connects_unseen_by_python() -> None:
    from pyarrow.fs import FileSystem

    where = (here() / "results" / "store").read_text()
    FileSystem.from_uri(where)[0].get_file_info("bucket/x")


def with_a_store(where: Stranger, chance: Chance, kind: str) -> Mutation:
    (where.results / "store").write_text(where.store)
    return Mutation("nothing", True)


def works_for_ever() -> None:
    while True:
        pass


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fills_memory() -> None:
    b"\1" * (stranger.MOST_BYTES + 2**28)


def leaves_with_another_status() -> None:
    raise SystemExit(7)


def fails() -> None:
    raise KeyError("versions")


def instead_of_warnings(does: Callable[[], None]) -> Callable[[], None]:
    """Have `plan` do it where it reads what runs have left."""

    def meet() -> None:
        def warnings(*_: Any) -> list[str]:
            does()
            return []

        grace.warnings = warnings

    return meet


def no_check_of_files() -> None:
    """Files are opened as they are, whatever they are."""
    files._open = lambda path, flags, most=None: os.open(path, flags, 0o644)  # type: ignore[assignment]


def states_are_unpickled() -> None:
    checkpoints.unpack = unpickled


PLANTED: dict[str, tuple[str, Callable[[], None], str, Callable[[Stranger, Chance, str], Mutation]]] = {
    "files are not checked before they are opened": ("hang", no_check_of_files, HOLDER, with_a_fifo),
    "states of trials are unpickled": ("code", states_are_unpickled, "checkpoint", with_a_pickle),
} | {
    each.__name__.replace("_", " "): (kind, instead_of_warnings(each), "audit.json", mutation)
    for kind, each, mutation in (
        ("code", runs_a_file, as_it_is),
        ("code", starts_a_program, as_it_is),
        ("outside", writes_through_a_link, as_it_is),
        ("outside", removes_a_folder_elsewhere, as_it_is),
        ("outside", writes_unseen_by_python, as_it_is),
        ("connection", connects, as_it_is),
        ("connection", connects_unseen_by_python, with_a_store),
        ("hang", works_for_ever, as_it_is),
        ("signal", crashes, as_it_is),
        ("memory", fills_memory, as_it_is),
        ("status", leaves_with_another_status, as_it_is),
        ("traceback", fails, as_it_is),
    )
}
"""Where a defence is off: the kind of violation that is seen, what turns it off, and the file that then does harm."""


def planted(fuzz: Fuzz) -> dict[str, list[str]]:
    """Which kinds of violations are seen of each, and of nothing at all."""
    listener, kinds = stranger.nobody_comes(), {}
    nothing = ("", lambda: None, "holder.json", as_it_is)
    with patch.multiple(stranger, WITHIN=3.0, IDLE=1.0):
        for number, (name, (_, meet, kind, mutation)) in enumerate([("nothing", nothing), *PLANTED.items()], 1):
            outcome = replace(fuzz, meet=meet).outcome(number, listener, kind, mutation)
            kinds[name] = sorted({each.kind for each in outcome.violations})
    return kinds


ANSWERS: dict[str, Callable[[Fuzz], Any]] = {"files": files_tried, "planted": planted}


@pytest.fixture(scope="module")
def seen(ask: Callable[[str], Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = ask("planted")
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", PLANTED)
def test_what_a_missing_defence_lets_through_is_seen(seen: dict[str, list[str]], name: str) -> None:
    assert PLANTED[name][0] in seen[name]


@pytest.mark.long
def test_a_whole_run_is_no_violation(seen: dict[str, list[str]]) -> None:
    assert seen["nothing"] == []


# Digests fit


def fits(where: Stranger, kind: str) -> bool:
    """Whether what the project compares is alike, of a file of this kind."""
    run, card = where.run, mutations._card(where)
    if kind == "study.json":
        return sealed(run / STUDY)
    if kind == "teacher's card":
        return sealed(card)
    if kind == "teacher's weights":
        told = json.loads(card.read_bytes())["weights_sha256"]
        return sealed(card) and told == hashlib.sha256(card.with_name("weights.safetensors").read_bytes()).hexdigest()
    if kind == "checkpoint":
        return all(checkpoints._is_whole(path) for path in run.glob("checkpoints/*/[0-9]*"))
    if kind == "tables":
        known = records.digests(run)
        assert known is not None
        paths = [run / f"{schema.name}.parquet" for schema in SCHEMAS]
        return all(hashlib.sha256(path.read_bytes()).hexdigest() in known[path.name] for path in paths)
    assert kind == "tables.json"
    return sealed(run / DIGESTS)


def sealed(path: Path) -> bool:
    try:
        files.unsealed(path.read_bytes(), path)
    except (files.CorruptFile, RecursionError) as error:
        return "its digest does not match" not in str(error)
    return True


@pytest.mark.parametrize(
    "kind", ["study.json", "tables", "tables.json", "checkpoint", "teacher's weights", "teacher's card"]
)
def test_digests_fit_what_was_altered(bases: Path, tmp_path: Path, kind: str) -> None:
    """Or no mutation would come further than they do."""
    fuzz, told = Fuzz(bases, tmp_path, SEED), 0
    for number in range(20):
        where = Stranger(tmp_path / str(number), 1)
        fuzz.copy(where, "cut")
        mutation = mutate(where, Chance(f"{kind} {number}"), kind)
        assert fits(where, kind) or not mutation.fits, mutation.what
        told += mutation.fits
        shutil.rmtree(where.root)
    assert told >= 10


def test_rows_of_a_ledger_carry_the_sums_of_what_they_hold(bases: Path, tmp_path: Path) -> None:
    where = Stranger(tmp_path, 1)
    Fuzz(bases, tmp_path, SEED).copy(where, "finished")
    with closing(sqlite3.connect(where.run / schema.LEDGER, isolation_level=None)) as base:
        base.execute("UPDATE trials SET arm = 'other'")
        mutations._summed(base)
    with records.reading(where.run / schema.LEDGER) as ledger:
        assert {row["arm"] for row in ledger.rows(schema.TRIALS)} == {"other"}


def test_a_mutation_is_the_same_again(bases: Path, tmp_path: Path) -> None:
    """So that a file that did harm can be made again."""
    said = []
    for place in ("one", "two"):
        where = Stranger(tmp_path / place, 1)
        Fuzz(bases, tmp_path, SEED).copy(where, "tuned")
        said.append(mutate(where, Chance("7"), "study.json").what.replace(place, ""))
    assert said[0] == said[1]
