"""Commands on a stranger's results folder do nothing forbidden. For more files: `python tests/faults/stranger.py`."""

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
SEED = 20  # of the mutations in this file


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The intact runs to mutate."""
    threads = torch.get_num_threads()
    try:
        stranger.make_bases(folder := tmp_path_factory.mktemp("bases") / "of")
    finally:
        torch.set_num_threads(threads)
    return folder


@contextmanager
def harness(*arguments: str) -> Iterator[Callable[[str], Any]]:
    """Start a process that runs functions of `ANSWERS` by name. A process that has trained must not fork, so tests
    share this one, with its imports and its warm-up."""
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
                name, answer = json.loads(line)
                if name == what:  # and not the answer to a test that timed out
                    return answer
            errors.seek(0)
            raise AssertionError(errors.read()[-3000:])

        try:
            yield ask
        finally:
            process.stdin.close()


def answer(bases: str, scratch: str) -> None:
    """Serve `harness` in its process: for each name on standard input, print the answer as a line of JSON."""
    fuzz = Fuzz(Path(bases), Path(scratch), SEED, quick=True)
    stranger.warm_up(fuzz)
    for line in sys.stdin:
        what = line.strip()
        sys.stdout.write(json.dumps([what, ANSWERS[what](fuzz)]) + "\n")
        sys.stdout.flush()
    os._exit(0)  # on a normal exit, imported libraries report their own leaks


@pytest.fixture(scope="module")
def ask(bases: Path) -> Iterator[Callable[[str], Any]]:
    memory = Path("/dev/shm")  # syncs are free here
    with (
        tempfile.TemporaryDirectory(prefix="stranger-", dir=memory if memory.is_dir() else None) as scratch,
        harness(str(bases), scratch) as ask_harness,
    ):
        yield ask_harness


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_commands_on_mutated_files_do_nothing_forbidden(ask: Callable[[str], Any]) -> None:
    """200 mutated files, each with some of the commands."""
    summary = ask("files")
    assert "0 files of 200 with violations" in summary, summary


def files_summary(fuzz: Fuzz) -> str:
    return stranger.try_files(fuzz, range(200), 1).summary()


# Each kind of violation is detected


class Opens:
    """An object whose pickle starts a program when it is loaded."""

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


def unchanged(where: Stranger, chance: Chance, kind: str) -> Mutation:
    return Mutation("nothing", True)


def top() -> Path:
    """The folder that holds a stranger's results."""
    return Path.cwd().parent


def runs_a_file() -> None:
    import runpy

    runpy.run_path(str(top() / "results" / "r" / "evil.py"))


def starts_a_program() -> None:
    subprocess.run(["true"], check=True)


def writes_through_a_link() -> None:
    (top() / "results" / "r" / "link").symlink_to(top() / "canary" / "file")
    (top() / "results" / "r" / "link").write_text("changed")


def removes_a_folder_elsewhere() -> None:
    shutil.rmtree(top() / "canary")


def writes_unseen_by_python() -> None:
    with closing(sqlite3.connect(":memory:")) as base:
        base.execute("ATTACH ? AS other", [str(top() / "home" / "new")])
        base.execute("CREATE TABLE other.t (x)")


def connects() -> None:
    import socket

    with suppress(OSError):
        socket.create_connection(("127.0.0.1", 1), timeout=1)


def connects_unseen_by_python() -> None:
    from pyarrow.fs import FileSystem

    where = (top() / "results" / "store").read_text()
    FileSystem.from_uri(where)[0].get_file_info("bucket/x")


def with_a_store(where: Stranger, chance: Chance, kind: str) -> Mutation:
    (where.results / "store").write_text(where.store)
    return Mutation("nothing", True)


def loops_forever() -> None:
    while True:
        pass


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fills_memory() -> None:
    b"\1" * (stranger.MOST_BYTES + 2**28)


def exits_with_status_7() -> None:
    raise SystemExit(7)


def fails() -> None:
    raise KeyError("versions")


def in_plan(action: Callable[[], None]) -> Callable[[], None]:
    """Return a patch that makes `plan` do something when it reads the audits of earlier runs."""

    def setup() -> None:
        def warnings(*_: Any) -> list[str]:
            action()
            return []

        grace.warnings = warnings

    return setup


def skip_file_checks() -> None:
    """Open files of any type and size."""
    files._open = lambda path, flags, most=None: os.open(path, flags, 0o644)  # type: ignore[assignment]


def unpickle_checkpoints() -> None:
    checkpoints.unpack = unpickled


PLANTED: dict[str, tuple[str, Callable[[], None], str, Callable[[Stranger, Chance, str], Mutation]]] = {
    "files are not checked before they are opened": ("hang", skip_file_checks, HOLDER, with_a_fifo),
    "states of trials are unpickled": ("code", unpickle_checkpoints, "checkpoint", with_a_pickle),
} | {
    each.__name__.replace("_", " "): (kind, in_plan(each), "audit.json", mutation)
    for kind, each, mutation in (
        ("code", runs_a_file, unchanged),
        ("code", starts_a_program, unchanged),
        ("outside", writes_through_a_link, unchanged),
        ("outside", removes_a_folder_elsewhere, unchanged),
        ("outside", writes_unseen_by_python, unchanged),
        ("connection", connects, unchanged),
        ("connection", connects_unseen_by_python, with_a_store),
        ("hang", loops_forever, unchanged),
        ("signal", crashes, unchanged),
        ("memory", fills_memory, unchanged),
        ("status", exits_with_status_7, unchanged),
        ("traceback", fails, unchanged),
    )
}
"""For each missing defence: the expected violation, the patch that removes the defence, and the file and mutation."""


def planted(fuzz: Fuzz) -> dict[str, list[str]]:
    """Return the detected kinds of violations for each missing defence, and without any."""
    listener, kinds = stranger.forbidden_port(), {}
    nothing = ("", lambda: None, "holder.json", unchanged)
    with patch.multiple(stranger, WITHIN=3.0, IDLE=1.0):
        for number, (name, (_, setup, kind, mutation)) in enumerate([("nothing", nothing), *PLANTED.items()], 1):
            outcome = replace(fuzz, setup=setup).outcome(number, listener, kind, mutation)
            kinds[name] = sorted({each.kind for each in outcome.violations})
    return kinds


ANSWERS: dict[str, Callable[[Fuzz], Any]] = {"files": files_summary, "planted": planted}


@pytest.fixture(scope="module")
def seen(ask: Callable[[str], Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = ask("planted")
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", PLANTED)
def test_the_violation_from_a_missing_defence_is_detected(seen: dict[str, list[str]], name: str) -> None:
    assert PLANTED[name][0] in seen[name]


@pytest.mark.long
def test_an_intact_run_has_no_violations(seen: dict[str, list[str]]) -> None:
    assert seen["nothing"] == []


# Digests match


def digests_match(where: Stranger, kind: str) -> bool:
    """Whether the digests that tune_kd checks match for a file of this kind."""
    run, card = where.run, mutations._card(where)
    if kind == "study.json":
        return sealed(run / STUDY)
    if kind == "teacher's card":
        return sealed(card)
    if kind == "teacher's weights":
        recorded = json.loads(card.read_bytes())["weights_sha256"]
        return (
            sealed(card) and recorded == hashlib.sha256(card.with_name("weights.safetensors").read_bytes()).hexdigest()
        )
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
def test_digests_match_the_altered_files(bases: Path, tmp_path: Path, kind: str) -> None:
    """Otherwise, every mutation would only test the check of digests."""
    fuzz, matching = Fuzz(bases, tmp_path, SEED), 0
    for number in range(20):
        where = Stranger(tmp_path / str(number), 1)
        fuzz.copy(where, "cut")
        mutation = mutate(where, Chance(f"{kind} {number}"), kind)
        assert digests_match(where, kind) or not mutation.fits, mutation.what
        matching += mutation.fits
        shutil.rmtree(where.root)
    assert matching >= 10


def test_altered_ledger_rows_have_matching_checksums(bases: Path, tmp_path: Path) -> None:
    where = Stranger(tmp_path, 1)
    Fuzz(bases, tmp_path, SEED).copy(where, "finished")
    with closing(sqlite3.connect(where.run / schema.LEDGER, isolation_level=None)) as base:
        base.execute("UPDATE trials SET arm = 'other'")
        mutations._update_checksums(base)
    with records.reading(where.run / schema.LEDGER) as ledger:
        assert {row["arm"] for row in ledger.rows(schema.TRIALS)} == {"other"}


def test_a_mutation_is_reproducible(bases: Path, tmp_path: Path) -> None:
    """So that a harmful file can be created again."""
    changes = []
    for place in ("one", "two"):
        where = Stranger(tmp_path / place, 1)
        Fuzz(bases, tmp_path, SEED).copy(where, "tuned")
        changes.append(mutate(where, Chance("7"), "study.json").what.replace(place, ""))
    assert changes[0] == changes[1]
