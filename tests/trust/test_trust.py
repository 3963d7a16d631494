"""Attacks by the author of a results folder, a data set or an archive, through the commands that read them.

SECURITY.md states what is promised, and against whom. `test_trust_ray` tests Ray and a run's folders.
"""

import csv
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console

from commands import call
from conftest import altered, tiny
from forms import SECRETS, SHORT
from oddities import at_once
from tune_kd.data import datasets
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.trackers.mlflow import MLflow
from tune_kd.execute.trackers.wandb import WandB
from tune_kd.execute.worker import Task, Workplace
from tune_kd.records import ledger as records, schema, sqlite_file
from tune_kd.records.ledger import Ledger
from tune_kd.records.lock import held
from tune_kd.records.schema import LEDGER, TRIALS
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.study.plan import plan
from tune_kd.study.spec import Confirm
from tune_kd.study.trial import Epoch, digest
from tune_kd.system import files as storage
from tune_kd.system.errors import CorruptFile, UnexpectedFile, UserError
from tune_kd.system.object_store import Mirror

SMOKE = ("ablation", "--scale", "smoke")
CLOSED = "http://127.0.0.1:1"  # no process listens here


pytestmark = pytest.mark.usefixtures("elsewhere")


# Code: `resume` and the file that a study names

EVIL = """
from pathlib import Path
from conftest import tiny

Path({marker!r}).touch()

def study():
    return tiny()
"""
NOT_EXECUTED = "only a study that is installed or in the working directory is executed without --study"


@pytest.fixture
def given(finished: Path, tmp_path: Path) -> Path:
    """The folder of a run with its teachers, as received from somebody else."""
    shutil.copytree(finished.parent, tmp_path / "results")
    return tmp_path / "results" / finished.name


@pytest.fixture
def at_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make commands stop where they would connect to Ray."""

    def connect(*_: object) -> None:
        raise UserError("it would start Ray")

    monkeypatch.setattr("tune_kd.execute.cluster.connect", connect)


def evil(folder: Path, name: str = "evil.py") -> tuple[Path, Path]:
    """Write a study file that creates a marker when it is executed. Returns the paths of both."""
    folder.mkdir(parents=True, exist_ok=True)
    path, marker = folder / name, folder / "executed"
    path.write_text(EVIL.format(marker=str(marker)))
    return path, marker


def name_study_file(run: Path, file: Path, digests: dict[str, str] | None = None) -> None:
    source = {"file": str(file), "scale": "test", "data": None, "settings": [], "digests": digests}
    altered(run / "study.json", lambda record: record.update(source=source))


@pytest.mark.parametrize("more", [(), ("--extend",), ("--extend", "--set", "recipe.epochs=4")])
@pytest.mark.parametrize("place", ["elsewhere", "results", "results/tiny", "/proc/self/cwd/results/tiny", "deep/down"])
def test_resume_does_not_execute_a_study_file_that_only_the_record_names(
    place: str, more: tuple[str, ...], given: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:  # fmt: skip
    file, marker = evil(Path.cwd() / place)
    name_study_file(given, file)
    before = fingerprint(given)
    assert call(monkeypatch, "resume", "tiny", *more) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert NOT_EXECUTED in output and f"--study {file}" in output and "has no digest on record" in output
    assert not marker.exists()
    assert fingerprint(given) == before


def test_an_unchanged_study_file_is_not_executed_and_a_changed_one_is_rejected(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    file, marker = evil(Path.cwd() / "elsewhere")
    digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    name_study_file(given, file, digests)
    assert call(monkeypatch, "resume", "tiny") == 0
    assert "no trial is left to train" in capsys.readouterr().out and not marker.exists()
    file.write_text(file.read_text() + "# and more")
    assert call(monkeypatch, "resume", "tiny") == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "was changed after the run began" in output and not marker.exists()


def test_a_study_file_named_by_the_caller_or_in_the_working_directory_is_executed(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    file, marker = evil(Path.cwd() / "elsewhere")
    name_study_file(given, file)
    assert call(monkeypatch, "resume", "tiny", "--study", str(file)) == 2
    output = capsys.readouterr().err
    assert marker.exists() and "has changed since the run started: confirm.seeds was [1, 2, 3] and is [1, 2]" in output
    for folder in (Path.cwd(), Path.cwd() / "search_spaces"):
        file, marker = evil(folder, "mine.py")
        name_study_file(given, file)
        assert call(monkeypatch, "resume", "tiny") == 2
        assert marker.exists() and "has changed since the run started" in capsys.readouterr().err
    assert call(monkeypatch, "resume", "tiny", "--study", "nowhere.py") == 2
    assert "--study is 'nowhere.py', but there is no such file; allowed" in capsys.readouterr().err


# Uploads and connections


@pytest.fixture
def asked() -> Iterator[tuple[int, list[str]]]:
    """A port on loopback, and the addresses that have connected to it."""
    listener, found = socket.create_server(("127.0.0.1", 0)), []

    def listen() -> None:
        with suppress(OSError):
            while True:
                connection, who = listener.accept()
                found.append(str(who))
                connection.close()

    thread = Thread(target=listen, daemon=True)
    thread.start()
    yield listener.getsockname()[1], found
    listener.close()


@pytest.mark.parametrize(
    "command", [("status", "tiny"), ("status", "tiny", "--verify"), ("report", "tiny", "--format", "md"),
                ("resume", "tiny"), ("list",), ("plan", *SMOKE)], ids=" ".join)  # fmt: skip
def test_a_store_url_in_a_results_folder_is_not_contacted(
    command: tuple[str, ...], given: Path, monkeypatch: pytest.MonkeyPatch, at_ray: None,
    asked: tuple[int, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    port, found = asked
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("XDG_DATA_HOME", str(Path.cwd() / "mine"))
    url = f"s3://bucket/kd?region=x&endpoint_override=127.0.0.1:{port}&scheme=http"
    for folder in (given, given / "checkpoints", *given.parents):
        if folder.is_relative_to(Path.cwd()):
            folder.mkdir(exist_ok=True)
            for name in (".mirror.json", "url.json"):
                (folder / name).write_text(json.dumps({"url": url}))
    code = call(monkeypatch, *command)
    assert code == 0, capsys.readouterr().err
    assert found == []


def test_a_mirror_in_a_folder_writable_by_others_is_ignored(
    given: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[int, list[str]]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(Path.cwd() / "shared"))
    home = Path.cwd() / "shared" / "tune_kd"
    (home / "key").mkdir(parents=True)
    shutil.copytree(given.parent, home / "key" / "results")
    (home / "key" / "url.json").write_text(
        json.dumps({"url": f"s3://bucket/kd?endpoint_override=127.0.0.1:{asked[0]}"})
    )
    assert Mirror.of(home / "key" / "results" / "tiny").url is not None
    home.chmod(0o777)
    assert Mirror.of(home / "key" / "results" / "tiny").url is None


def test_a_remote_dashboard_named_in_results_is_rejected_without_address(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(given) as tell_dashboard:
        tell_dashboard("http://192.0.2.1:8265")
        assert call(monkeypatch, "dashboard", "--write", "boards") == 2
        output = capsys.readouterr().err
        assert "on another machine, http://192.0.2.1:8265" in output and "--address" in output
        assert not Path("boards").exists()
        assert call(monkeypatch, "dashboard", "--write", "boards", "--address", "http://192.0.2.1:8265") == 0
        tell_dashboard("http://127.0.0.1:1")
        assert call(monkeypatch, "dashboard", "--write", "boards") == 0


def test_recorded_trackers_that_send_data_are_used_only_on_request(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://192.0.2.1")
    altered(given / "study.json", lambda record: record["settings"].update(track=["tensorboard", "wandb", "mlflow"]))
    used: list[tuple[str, ...]] = []
    monkeypatch.setattr("tune_kd.execute.options.check_trackers", used.append)
    assert call(monkeypatch, "resume", "tiny") == 2
    assert used == [("tensorboard",)]
    assert "recorded trackers that are not used now: wandb, mlflow. A tracker that sends" in " ".join(
        capsys.readouterr().out.split()
    )
    assert call(monkeypatch, "resume", "tiny", "--track", "wandb") == 2
    assert used[1:] == [("wandb",)]


def test_unknown_and_empty_recorded_settings_are_ignored(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    altered(given / "study.json", lambda record: record["settings"].update(more={"a": 1}, track=None))
    assert call(monkeypatch, "resume", "tiny") == 0
    assert "no trial is left to train" in capsys.readouterr().out


def test_nothing_is_downloaded_to_a_folder_that_a_record_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        UserError, match=r"CIFAR-10 is missing, and nothing is downloaded to a folder that a record names"
    ):
        datasets.load("cifar10", tmp_path / "mine", cache=tmp_path / "cache", download=False)
    assert list((tmp_path / "mine").iterdir()) == []


# Links


def teacher_of(run: Path) -> Path:
    return next(path.parent for path in (run.parent / "teachers").glob("*/answers"))


PLACES: dict[str, Callable[[Path], Path]] = {
    "the table of a teacher's answers": lambda run: next(teacher_of(run).glob("answers/*/*/logits.f32")),
    "the digests of a teacher's answers": lambda run: next(teacher_of(run).glob("answers/*/*/digests.sha256")),
    "a teacher's weights": lambda run: teacher_of(run) / "weights.safetensors",
    "a teacher's lock": lambda run: teacher_of(run) / ".lock",
    "the commit count": lambda run: run / "ledger.commits",
    "the ledger": lambda run: run / LEDGER,
    "the lock of the run": lambda run: run / ".lock",
    "a table": lambda run: run / "trials.parquet",
    "an unknown file": lambda run: run / "notes.txt",
}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "all teachers": lambda run: run.parent / "teachers",
    "a teacher": teacher_of,
    "a teacher's answers": lambda run: teacher_of(run) / "answers",
    "checkpoints": lambda run: run / "checkpoints",
    "the report": lambda run: run / "report",
    "the run itself": lambda run: run,
}


@pytest.mark.parametrize("what", [*PLACES, *FOLDERS])
def test_resume_does_not_write_through_links(
    what: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    at_ray: None
) -> None:  # fmt: skip
    path, precious = (PLACES | FOLDERS)[what](given), tmp_path / "precious"
    if path.exists():
        path.rename(precious)
    elif what in FOLDERS:
        precious.mkdir()
    else:
        precious.write_text("precious")
    path.symlink_to(precious)
    before = fingerprint(precious)
    assert call(monkeypatch, "resume", "tiny") == 2
    output = " ".join(capsys.readouterr().err.split())
    assert f"a run does not write through links, such as {path.relative_to(tmp_path)} (to {precious})" in output
    assert fingerprint(precious) == before
    assert call(monkeypatch, "status", "tiny", "--verify") == 3
    assert "a run does not write through links" in " ".join(capsys.readouterr().out.split())
    assert fingerprint(precious) == before


def fingerprint(path: Path) -> dict[Path, tuple[int, bytes]]:
    files = [
        each
        for each in (path, *path.rglob("*"))
        if each.is_file() and not each.name.endswith(("-shm", "-wal", ".lock"))
    ]
    return {each: (each.stat().st_mtime_ns, each.read_bytes()) for each in files}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("report", "RUN is results/tiny, whose report is a link; links are not written to"),
        ("report/tables", "a report does not write through links, such as results/tiny/report/tables"),
        ("report/figures", "a report does not write through links, such as results/tiny/report/figures"),
    ],
)
def test_a_report_is_not_written_through_a_link(
    name: str,
    why: str,
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "arms.csv").write_text("precious")
    (given / name).parent.mkdir(exist_ok=True)
    (given / name).symlink_to(tmp_path / "precious")
    assert call(monkeypatch, "report", "tiny", "--format", "csv") == 2
    assert why in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "precious").iterdir()] == ["precious"]


def test_files_with_several_hard_links_are_not_written_in_place(given: Path, tmp_path: Path) -> None:
    """Hard links come from archives that were unpacked carelessly, or from copies that share files."""
    table = next(teacher_of(given).glob("answers/*/*/logits.f32"))
    os.link(table, tmp_path / "precious")
    with pytest.raises(
        UnexpectedFile, match=r"logits.f32 has 2 hard links; expected a regular file with a single link"
    ):
        storage.write_at(table, 0, b"other")
    os.link(given / LEDGER, tmp_path / "ledger")
    with pytest.raises(UnexpectedFile, match="has 2 hard links"):
        Ledger(given / LEDGER)
    with records.reading(given / LEDGER) as ledger:  # reading is harmless
        assert ledger.rows(TRIALS)
    shared = given / f"{LEDGER}-shm"  # except that a reader writes to this file
    shared.write_bytes(b"")
    os.link(shared, tmp_path / "shared")
    with pytest.raises(UnexpectedFile, match="has 2 hard links"), records.reading(given / LEDGER):
        pass


def test_publish_does_not_write_through_a_link_at_its_temporary_path(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / f".table.{os.getpid()}").symlink_to(precious)
    storage.publish(tmp_path / "table", b"new")
    assert (precious.read_text(), (tmp_path / "table").read_bytes()) == ("precious", b"new")


# Secrets

REFUSED = "holds what looks like a secret ("


@pytest.mark.parametrize("form", SECRETS)
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["run", *SMOKE, "--set", "question=Is it {} ?"], "--set[0]"),
        (["run", *SMOKE, "--data-dir", "/data/{}"], "--data-dir"),
        (["resume", "r", "--extend", "--set", "confirm.seeds=[1]", "--set", "question={}"], "--set[1]"),
        (["submit", *SMOKE, "--address", CLOSED, "--set", "question={}"], "--set[0]"),
        (["submit", *SMOKE, "--address", CLOSED, "--data-dir", "/data/{}"], "--data-dir"),
        (["resume", "r", "--address", CLOSED, "--set", "question={}"], "--set[0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_secret_on_the_command_line_is_rejected_before_anything_is_written_or_sent(
    form: str,
    arguments: list[str],
    field: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    text, hidden = SECRETS[form]
    monkeypatch.setattr("tune_kd.execute.session.load_data", None)
    assert call(monkeypatch, *(argument.replace("{}", text) for argument in arguments)) == 2
    output = capsys.readouterr()
    assert f"{field} {REFUSED}" in output.err and "at character" in output.err and hidden not in output.err + output.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", SECRETS)
def test_a_secret_in_a_study_file_is_rejected_before_data_are_read(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text, hidden = SECRETS[form]
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom search_spaces.ablation import smoke as base\n"
        f"def study():\n    return replace(base(), scale='own', question={text!r})\n"
    )
    monkeypatch.setattr("tune_kd.execute.session.load_data", None)
    assert call(monkeypatch, "run", "mine.py") == 2
    output = capsys.readouterr()
    assert f"study.question {REFUSED}" in output.err and hidden not in output.err + output.out
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("form", SECRETS)
def test_a_secret_in_a_trials_error_is_masked_in_ledger_log_and_terminal(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, hidden = SECRETS[form]

    def failing(task: Task, place: Workplace) -> Generator[Epoch]:
        raise RuntimeError(f"cannot log in with {text} to epochs")
        yield

    log, place = tmp_path / "log", Workplace(None, None, tmp_path / "teachers", tmp_path / "checkpoints")
    ledger = Ledger(tmp_path / LEDGER)
    with ProgressDisplay(Console(width=10_000), "r", log) as view:
        small = replace(tiny(), confirm=Confirm(seeds=(1, 2)))
        driver = Driver(plan(small, "0" * 64), "r", tmp_path, ledger, place, cpus=1.0, gpus=0.0, say=view.say)
        run_in_process(driver, place, failing)
    errors = [row["error"] for row in ledger.rows(TRIALS) if row["status"] == "failed"]
    ledger.close()
    assert errors and all("RuntimeError: cannot log in with" in each and "***" in each for each in errors)
    output = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "cannot log in with" in log.read_text() and "***" in output.out
    for part in hidden.splitlines():
        assert part not in output.out + output.err and part.encode() not in written


@pytest.mark.parametrize("form", SECRETS)
def test_a_secret_in_a_runs_message_is_masked_in_terminal_and_log(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, hidden = SECRETS[form]
    log = tmp_path / "log"
    with ProgressDisplay(Console(width=10_000), "r", log) as view:
        view.say(f"warning: {text} was not taken")
    shown, logged = capsys.readouterr().out, log.read_text()
    assert "s  warning: " in shown and "***" in shown and "***" in logged
    assert not any(part in shown + logged for part in hidden.splitlines())


@pytest.mark.parametrize(("error", "word"), [(OSError, "OSError"), (RuntimeError, "this is a bug in tune_kd")])
def test_a_secret_in_a_commands_error_is_masked(
    error: type[Exception], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error(f"no answer from https://me:{SHORT}@example.org/")

    monkeypatch.setattr("tune_kd.execute.session.load_data", fail)
    assert call(monkeypatch, "run", *SMOKE) == 3
    output = capsys.readouterr().err
    assert word in output and "https://me:***@example.org/" in output and SHORT not in output


def test_a_store_url_with_a_secret_is_rejected_and_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for form in ("access token", "signed URL of Azure", "GitHub"):
        text, hidden = SECRETS[form]
        url = f"s3://bucket/kd?region=eu-west-1&note={text.partition('?')[2] or text}"
        assert call(monkeypatch, "run", *SMOKE, "--out", url) == 2
        output = capsys.readouterr().err
        assert "--out is s3://..., with a secret in it" in output and hidden not in output
    assert not (tmp_path / "data").exists()


# Archives and images


def extended(kind: bytes, content: bytes) -> bytes:
    """An extended tar header, which describes the members after it."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, len(content)
    return member.tobuf() + content + bytes(-len(content) % 512)


def record(keyword: str, value: str) -> bytes:
    """A record of a PAX header. It begins with its own length."""
    rest = f" {keyword}={value}\n"
    length = len(rest) + len(str(len(rest)))
    return f"{length + len(str(length)) - len(str(len(rest)))}{rest}".encode()


ARCHIVES = {
    "digits": (extended(b"x", b"1" * 2**20), "an extended header has no record at its byte 0"),
    "keywords": (extended(b"x", b"2 " * 2**18 + b"="), "an extended header has no record at its byte 0"),
    "a map of sparse parts": (
        extended(b"x", record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"))
        + extended(b"0", b"90000000\n" + b"1\n" * 2**18),
        "is a link, a device or a sparse file",
    ),
    "headers of all": (
        extended(b"g", b"".join(record(f"key{i}", "value") for i in range(40_000))) * 100, "bytes of extended headers",
    ),
    "long names": (extended(b"L", b"a" * 2**20) * 70, "bytes of extended headers"),
    "a claim": (tarfile.TarInfo("x").tobuf()[:124] + b"\x80" + b"\xff" * 11, "truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_small_archive_that_is_expensive_to_read_is_rejected(kind: str, tmp_path: Path) -> None:
    """`tarfile.open` takes 10 minutes for the first archive, and 60 GB for the second."""
    content, says = ARCHIVES[kind]
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(content + bytes(1024), 1))
    assert (tmp_path / "x.tar.gz").stat().st_size < 2**24
    code = (
        "import resource, sys; from pathlib import Path; from tune_kd.data.image_folder import read_archive; "
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32)); "
        "read_archive(Path(sys.argv[1]), progress=False)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.tar.gz")], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert says in done.stderr.splitlines()[-1]


def write_images(folder: Path) -> Path:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in (1, 2):
                Image.new("RGB", (32, 32)).save(folder / part / name / f"{number}.png")
    return folder


def add_large_metadata(path: Path) -> None:
    """Add metadata that unpacks to a gigabyte to a PNG."""
    content, notes = path.read_bytes(), b"a\0\0" + zlib.compress(bytes(2**20), 9)
    chunk = len(notes).to_bytes(4, "big") + b"iCCP" + notes + zlib.crc32(b"iCCP" + notes).to_bytes(4, "big")
    path.write_bytes(content[:33] + chunk * 900 + content[33:])


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_large_metadata, "'train/cat/1.png' cannot be read as PNG or JPEG (ValueError)"),
        (link_to("/dev/zero"), "1.png is a device; expected a regular file"),
        (link_to("/dev/urandom"), "1.png is a device; expected a regular file"),
        (link_to("/proc/self/pagemap"), "1.png has 0 bytes; expected a regular file of at most 1,048,576 bytes"),
    ],
    ids=["notes", "zero", "urandom", "pagemap"],
)
def test_an_endless_or_decompression_bomb_image_is_rejected(
    change: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    change(write_images(tmp_path / "images") / "train" / "cat" / "1.png")
    done = command(tmp_path, "run", "ablation", "--scale", "smoke", "--data", "cifar10", "--data-dir", "images")
    assert done.returncode == 2 and says in " ".join(done.stderr.split()), done.stderr


def test_a_damaged_archive_is_rejected_before_the_run_starts(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(ARCHIVES["digits"][0] + bytes(1024))
    done = command(tmp_path, "run", "ablation", "--scale", "smoke", "--data", "cifar10", "--data-dir", "x.tar")
    assert done.returncode == 2 and "the archive is truncated or damaged" in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "results").exists()


# Numbers, depths and sizes


def many(value: str, times: int) -> Any:
    """A column that repeats one value, at one byte per row."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int8)), pa.array([value]))


TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "rows": (lambda: pa.table({"trial_id": many("a", 2 * 10**8)}), "it has 200,000,000 rows; at most"),
    "texts": (lambda: pa.table({"trial_id": many("a" * 2**20, 10**6)}), "1,048,576,000,000 bytes of values; at most"),
    "columns": (lambda: pa.table({f"c{number}": [1] for number in range(5000)}), "it has 5,000 columns; at most"),
    "notes": (
        lambda: pa.table({"trial_id": ["a"]}).replace_schema_metadata({"pandas": "[" * 200_000}),
        "pandas' metadata on its index is damaged",
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_small_table_that_is_expensive_to_read_is_rejected(kind: str, tmp_path: Path) -> None:
    make, says = TABLES[kind]
    pq.write_table(make(), tmp_path / "trials.parquet", compression="zstd")
    assert (tmp_path / "trials.parquet").stat().st_size < 3_000_000
    done = command(tmp_path, "report", ".")
    assert done.returncode == 2 and says in " ".join(done.stderr.split()), done.stderr


JSON = {
    "study.json": ("status", "report", "resume", "list", "plan"),
    "tables.json": ("status", "report", "resume", "list", "plan"),
    "audit.json": ("plan",),
    "holder.json": ("status", "resume"),
    "teachers/card.json": ("status", "resume"),
}
"""JSON files of a results folder, and the commands that read them."""


@pytest.mark.long
@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000 + "1" + "}" * 200_000, "[" * 900 + "]" * 900])
def test_deeply_nested_json_does_not_crash_commands(
    name: str, deep: str, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    path = given / name if "/" not in name else teacher_of(given) / "card.json"
    path.write_text(deep)
    for command in (("status", "tiny"), ("status", "tiny", "--verify"), ("report", "tiny", "--format", "md"),
                    ("resume", "tiny"), ("list",), ("plan", *SMOKE)):  # fmt: skip
        if command[0] not in JSON[name]:
            continue
        assert call(monkeypatch, *command) in (0, 2, 3), command
        output = capsys.readouterr()
        assert "Traceback" not in output.err and "bug in tune_kd" not in output.err, command


def set_field(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A function that sets a field of a study's record and updates its digest."""

    def change(record: dict[str, Any]) -> None:
        *way, last = path.split(".")
        inner = record["study"]
        for name in way:
            inner = inner[int(name) if name.isdigit() else name]
        inner[int(last) if last.isdigit() else last] = value
        record["study_sha256"] = digest(record["study"])

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe.epochs", 10**9), ("teacher_recipe.epochs", 10**12), ("recipe.batch_size", 10**12),
        ("confirm.looks", [2, 10**9]), ("confirm.seeds", list(range(100_000))), ("cell.width", 1e6),
        ("factors.0.levels", ["cifar"] * 100_000), ("contrasts", [{"factor": "method", "treated": "logit",
         "against": "none"}] * 100_000), ("question", "x" * 10**6), ("deviation", 1e-320 * 0), ("rate", 1e-300),
        ("factors", [{"name": name, "levels": [float(each) for each in range(1, 101)]}
                     for name in ("width", "temperature", "alpha", "beta")]),
        ("tuning", {"ranges": [{"name": "temperature", "over": {"kind": "integer", "low": 1, "high": 10**12},
                                "methods": None}]}),
        ("tuning", {"ranges": [{"name": "lr", "over": {"kind": "uniform", "low": 0.01, "high": 1.0},
                                "methods": None}], "budget": 10**9}),
    ],
)  # fmt: skip
def test_out_of_range_study_values_are_rejected_when_read(
    field: str, value: object, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    altered(given / "study.json", set_field(field, value))
    for command, code in ((("status", "tiny", "--verify"), 3), (("report", "tiny"), 2), (("resume", "tiny"), 2)):
        assert call(monkeypatch, *command) == code
        output = capsys.readouterr()
        assert "study.json" in output.out + output.err and "allowed" in output.out + output.err


def test_an_undeclared_look_is_rejected(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    altered(given / "study.json", lambda record: record.update(look=1_000_000_000))
    for command, code in ((("status", "tiny", "--verify"), 3), (("report", "tiny"), 2), (("resume", "tiny"), 2)):
        assert call(monkeypatch, *command) == code
        output = capsys.readouterr()
        assert "look is 1000000000; allowed: 0 to 0" in " ".join((output.out + output.err).split())


# How other programs interpret our output

NAMES = (
    "=HYPERLINK(\"http://x.org\",\"x\")", "-1+1", "+1", "@SUM(1)", "x;=1+1", "<script>alert(1)</script>", "<img src=x>",
    "[a](javascript:alert(1))", "![a](http://x.org/y.png)", "a|b", "`a`", "# a", "\\input{/etc/passwd}", "$\\frac$",
    "_a_", "*[x]", "&lt;", "\" onclick=\"alert(1)",
)  # fmt: skip
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp.exe\u2069\x7f"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
ROOT = Path(__file__).parents[2]


def command(here: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m tune_kd` with these arguments in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "tune_kd", *arguments], cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def write_foreign_table(folder: Path, names: tuple[str, ...], **more: Any) -> Path:
    """Write a trials table from other software, with one arm per name."""
    folder.mkdir()
    trials = [
        {"trial_id": f"{number} {seed}", "seed": seed, "test_accuracy_best": number / 100, "train_seconds": 1.0}
        | dict.fromkeys(("arm", "method", "stem", "student", "teacher", "device", "host", "dataset"), name) | more
        for number, name in enumerate(names) for seed in (1, 2)
    ]  # fmt: skip
    pd.DataFrame(trials).to_parquet(folder / "trials.parquet")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a table whose names attack spreadsheets, browsers, Markdown and LaTeX."""
    here = tmp_path_factory.mktemp("written")
    write_foreign_table(here / "theirs", NAMES)
    done = command(here, "report", "theirs")
    assert done.returncode == 0, done.stderr
    return here / "theirs" / "report"


def test_no_csv_cell_is_a_formula(written: Path) -> None:
    with (written / "tables" / "arms.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"].replace("'", "") for row in rows] == list(NAMES)
    for path in (written / "tables").glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        numbers = re.compile(r"-?[0-9.]+(e-?[0-9]+)?")
        assert [each for each in cells if re.match("[=+@-]", each) and not numbers.fullmatch(each)] == []
        assert [each for each in cells if re.search("[;\t][=+@-]", each)] == []


def test_names_are_not_markup_in_a_markdown_report(written: Path) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = [
        each for token in parser.parse((written / "report.md").read_text()) for each in (token, *(token.children or ()))
    ]
    kinds = {each.type.removesuffix("_open").removesuffix("_close") for each in tokens}
    assert kinds == {*("heading", "paragraph", "bullet_list", "list_item", "table", "thead", "tbody", "tr", "th", "td"),
                     "inline", "text"}  # fmt: skip
    assert set(NAMES) <= {each.content for each in tokens if each.type == "text"}


class Parts(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.texts: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attributes}

    def handle_data(self, data: str) -> None:
        self.texts.add(data)


def test_names_are_neither_markup_nor_addresses_in_the_html_page(written: Path) -> None:
    parts = Parts()
    parts.feed((written / "report.html").read_text())
    assert set(NAMES) <= parts.texts
    text = (written / "report.html").read_text()
    assert text.count("<script") == text.count("<style") == 1
    assert not parts.tags & {"a", "iframe", "object", "embed", "form", "base", "b"}
    assert not [name for name, _ in parts.attributes if name.startswith("on")]
    addresses = {value for name, value in parts.attributes if name in ("href", "src", "action", "style")}
    assert {each.partition(",")[0] for each in addresses} == {"data:", "data:image/svg+xml;base64"}
    policy = next(value for name, value in parts.attributes if value.startswith("default-src 'none'"))
    assert "unsafe" not in policy and "http" not in policy


def test_names_are_not_latex_commands_and_figures_have_no_scripts_or_links(written: Path) -> None:
    text = (written / "tables" / "arms.tex").read_text()
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    assert set(re.findall(r"\\[a-z]+", text)) <= {
        *(r"\begin", r"\end", r"\toprule", r"\midrule", r"\bottomrule", r"\textbackslash", r"\usepackage")
    }
    pictures = list((written / "figures").glob("*.svg"))
    assert len(pictures) >= 1
    for path in pictures:
        tags = {each.tag.rpartition("}")[2] for each in ElementTree.parse(path).iter()}
        assert not tags & {"script", "a", "foreignObject"}, path


def test_a_name_with_control_characters_is_rejected_with_its_row(tmp_path: Path) -> None:
    write_foreign_table(tmp_path / "theirs", ("a", f"b{ESCAPES}"), error=ESCAPES)
    done = command(tmp_path, "report", "theirs")
    assert (done.returncode, done.stdout) == (2, "")
    arm = next(line for line in done.stderr.splitlines() if "trials.parquet: arm: " in line)
    assert f"2 of 4 rows break a rule; got {f'b{ESCAPES}'!r} in row 2" in arm
    assert "expected text without control characters" in arm
    assert "trials.parquet: error: " not in done.stderr
    assert not CONTROL.search(done.stderr)


def test_control_characters_in_errors_of_a_table_do_not_prevent_its_report(tmp_path: Path) -> None:
    write_foreign_table(tmp_path / "theirs", ("a", "b"), error=f"Traceback\n  {ESCAPES}")
    done = command(tmp_path, "report", "theirs", "--format", "md,csv")
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)


@pytest.mark.long
@pytest.mark.parametrize("reporting", ["report", pytest.param("resume", marks=pytest.mark.slow)])
def test_control_characters_in_a_study_are_neither_printed_nor_reported(
    finished: Path, tmp_path: Path, reporting: str
) -> None:
    def add_control_characters(record: dict[str, Any]) -> None:
        for contrast in record["contrasts"]:
            contrast["name"] += f"{ESCAPES}<b>"
        record["contrasts_sha256"] = digest(record["contrasts"])
        record["versions"] |= {f"torch{ESCAPES}": ESCAPES}
        record["machine"] = {"host": ESCAPES}
        record["git_commit"] = ESCAPES

    shutil.copytree(finished, tmp_path / "results" / "tiny")
    altered(tmp_path / "results" / "tiny" / "study.json", add_control_characters)
    for arguments in (("status", "tiny"), ("status", "tiny", "--verify"), (reporting, "tiny")):
        done = command(tmp_path, *arguments)
        assert "Traceback" not in done.stderr and done.returncode in (0, 2, 3), done.stderr
        assert not CONTROL.search(done.stdout + done.stderr), arguments
    report = tmp_path / "results" / "tiny" / "report"
    texts = [path for path in report.rglob("*") if path.suffix in (".html", ".md", ".csv", ".tex", ".svg")]
    assert len(texts) > 10
    for path in texts:
        assert not CONTROL.search(path.read_text()), path
    assert "\u241b[2J" in (report / "report.html").read_text()
    assert "\u241b\\[2J" in (report / "report.md").read_text()


def test_control_characters_in_a_ledger_are_not_printed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results" / "tiny"
    shutil.copytree(finished, folder)
    ledger = records.Ledger(folder / schema.LEDGER)
    row, other = ledger.rows(schema.TRIALS)[-2:]
    ended = dict.fromkeys(schema.TRIALS.only_completed) | {"status": "failed", "error": f"{ESCAPES}\nred"}
    monkeypatch.setattr(schema.Schema, "broken", lambda *_: None)  # a stranger can write rows that `put` rejects
    ledger.put(schema.TRIALS, row | ended)
    for refused in (False, True):
        if refused:
            ledger.put(schema.TRIALS, other | ended | {"arm": f"arm{ESCAPES}"})
        for arguments in (("status", "tiny"), ("status", "tiny", "--json"), ("status", "tiny", "--verify")):
            done = command(tmp_path, *arguments)
            expected = 3 if refused or "--verify" in arguments else 0
            assert "Traceback" not in done.stderr and done.returncode == expected, done.stderr
            assert not CONTROL.search(done.stdout + done.stderr), arguments
            if not refused and "--verify" not in arguments:
                assert "title" in done.stdout  # the error is shown
    ledger.close()


def test_an_argument_with_control_characters_is_rejected(tmp_path: Path) -> None:
    """For example, the shell expands `report *` to such arguments."""
    write_foreign_table(tmp_path / f"x{ESCAPES}", ("a",))
    for arguments in (("report", f"x{ESCAPES}"), ("report", f"--{ESCAPES}"), (ESCAPES,)):
        done = command(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "allowed: text without control characters" in done.stderr
        assert not CONTROL.search(done.stderr)


def test_an_unsafe_run_name_in_a_table_is_rejected_and_nothing_is_written(tmp_path: Path) -> None:
    for name in ("../../x", "/etc/x", ".hidden", "a\n"):
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        write_foreign_table(tmp_path / "theirs", ("a",), run=name)
        done = command(tmp_path, "report", "theirs", "--to", "here", "--format", "svg,csv")
        assert (done.returncode, done.stdout) == (2, ""), name
        assert f"RUN holds a run named {name!r}" in done.stderr or f"got {name!r}" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


# Ledgers that contain code


def statements(path: Path, *sql: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema=ON")
        for each in sql:
            connection.execute(each)


ENDLESS = (
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT * FROM real WHERE (SELECT max(x) FROM n)"
)
PROGRAMS = {
    "an endless view": ("ALTER TABLE trials RENAME TO real", f"CREATE VIEW trials AS {ENDLESS}"),
    "a trigger": ("CREATE TRIGGER t AFTER UPDATE ON trials BEGIN DELETE FROM epochs; END",),
    "a trigger with a name reserved for SQLite": (
        "CREATE TRIGGER t AFTER UPDATE ON trials BEGIN DELETE FROM epochs; END",
        "UPDATE sqlite_master SET name = 'sqlite_t', sql = replace(sql, ' t ', ' sqlite_t ') WHERE name = 't'",
    ),
    "an index over an expression": ("CREATE INDEX i ON trials (abs(seed))",),
    "an additional table": ("CREATE TABLE more (x)",),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_ledger_with_an_unexpected_schema_is_rejected(
    what: str, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statements(given / LEDGER, *PROGRAMS[what])
    assert at_once(lambda: call(monkeypatch, "status", "tiny"), within=30) == 3
    assert "its tables are not those that a run creates" in capsys.readouterr().err
    assert at_once(lambda: call(monkeypatch, "status", "tiny", "--verify"), within=30) == 3
    assert "its tables are not those that a run creates" in " ".join(capsys.readouterr().out.split())


def change_cell(ledger: Path, column: str, value: object) -> None:
    """Change a cell of a trial's row, and update the row's checksum."""
    with records.reading(ledger) as before:
        row = before.rows(TRIALS)[0]
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        change = f"UPDATE trials SET {column} = ?, crc = ? WHERE trial_id = ?"
        connection.execute(change, (value, records._crc(row | {column: value}), row["trial_id"]))


@pytest.mark.parametrize(
    ("column", "value"),
    [("epochs_run", "many"), ("val_accuracy", float("inf")), ("val_accuracy", 5.0), ("status", "won"), ("seed", None),
     ("attempts", 2.5)],
)  # fmt: skip
def test_an_invalid_row_with_a_matching_checksum_is_rejected(
    column: str, value: object, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_cell(given / LEDGER, column, value)
    assert call(monkeypatch, "status", "tiny") == 3
    assert "has an invalid row: " in capsys.readouterr().err
    assert call(monkeypatch, "status", "tiny", "--verify") == 3


def test_a_huge_epoch_count_is_reported_without_hanging(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_cell(given / LEDGER, "epochs_run", 2**62)
    assert at_once(lambda: call(monkeypatch, "status", "tiny", "--verify")) == 3
    assert f"says {2**62} epochs and has" in " ".join(capsys.readouterr().out.split())


def make_circular(path: Path) -> None:
    """Make the page tree of the trials refer to the same page 400 times at each of four levels."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'trials'").fetchone()
        ((size,), (count,)) = (connection.execute(f"PRAGMA page_{what}").fetchone() for what in ("size", "count"))
    data = bytearray(path.read_bytes())

    def leading_to(child: int) -> bytes:
        page, at = bytearray(size), size
        for number in range(400):
            at -= 6
            page[at : at + 6] = struct.pack(">IBB", child, 0x80 | (number + 1) >> 7, (number + 1) & 127)
            page[12 + 2 * number : 14 + 2 * number] = struct.pack(">H", at)
        page[:12] = struct.pack(">BHHHBI", 5, 0, 400, at, 0, child)
        return bytes(page)

    first = data[(root - 1) * size : root * size]
    pages, child = [first], count + 1
    for _ in range(3):
        pages.append(leading_to(child))
        child += 1
    for page in pages:
        data += page
    data[(root - 1) * size : root * size] = leading_to(child)
    data[28:32] = struct.pack(">I", count + len(pages))
    path.write_bytes(data)


def test_circular_pages_of_a_ledger_do_not_hang_commands(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    make_circular(given / LEDGER)
    for command, expected in ((("status",), (2, 3)), (("status", "--verify"), (2, 3)), (("resume",), (0,))):
        code = at_once(lambda command=command: call(monkeypatch, *command, "tiny"), within=60)
        assert code in expected, command  # resume rebuilds the ledger from the tables
        output = capsys.readouterr()
        assert "damaged" in output.out + output.err


def test_sqlite_is_interrupted_after_its_maximum_of_steps(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it reads the schema, before any row is requested."""
    monkeypatch.setattr(Ledger, "_room", lambda self: 0)
    monkeypatch.setattr(records, "STEPS", 1)
    for options in ({}, {"read_only": True}):
        with pytest.raises((CorruptFile, sqlite3.OperationalError), match="interrupted") as caught:
            Ledger(given / LEDGER, **options)
        assert records.damage(caught.value)


def write_journal(path: Path, named: Path) -> None:
    """Write the journal of a transaction over several databases. It names a super-journal, which SQLite removes."""
    name = str(named).encode()
    end = struct.pack(">I", 1) + name + struct.pack(">II", len(name), sum(name)) + sqlite_file.SUPER
    header = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + struct.pack(">IIIII", 0, 0, 1, 512, 4096)
    path.write_bytes(header.ljust(512, b"\0") + end)


def test_a_journal_cannot_make_sqlite_remove_another_file(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    write_journal(given / f"{LEDGER}-journal", precious)
    for command in (("status", "tiny"), ("status", "tiny", "--verify")):
        assert call(monkeypatch, *command) == 3
        output = capsys.readouterr()
        assert "-journal exists, but no run leaves such a file" in " ".join((output.out + output.err).split())
    sqlite3.connect(given / "mlflow.db").close()
    write_journal(given / "mlflow.db-journal", precious)
    with pytest.raises(CorruptFile, match=r"mlflow.db-journal names another file"):
        MLflow("s", "tiny", given)
    assert precious.read_text() == "precious"


def test_wandb_settings_in_results_are_rejected(given: Path) -> None:
    """The library reads settings from its working folder. They could send runs, and the user's key, elsewhere."""
    (given / "wandb" / "trial" / ".wandb").mkdir(parents=True)
    (given / "wandb" / "trial" / ".wandb" / "settings").write_text("[default]\nbase_url = http://192.0.2.1\n")
    with pytest.raises(
        ValueError, match="settings has settings for Weights & Biases, which are unsafe in results; remove it"
    ):
        WandB("s", "tiny", given)


@pytest.mark.parametrize("file", ["evil.py", "notes.txt", "/x/notes.txt", "/x/evil.py\n"])
def test_an_invalid_study_file_in_the_record_is_rejected(
    file: str, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, marker = evil(Path.cwd())
    shutil.copy(path, "notes.txt")
    name_study_file(given, Path("placeholder.py"))
    altered(given / "study.json", lambda record: record["source"].update(file=file))
    assert call(monkeypatch, "resume", "tiny") == 2
    assert "source.file is" in capsys.readouterr().err and not marker.exists()


def test_a_new_run_does_not_write_through_links(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_ray: None
) -> None:
    (given.parent / "teachers").rename(tmp_path / "precious")
    (given.parent / "teachers").symlink_to(tmp_path / "precious")
    before = fingerprint(tmp_path / "precious")
    assert call(monkeypatch, "run", *SMOKE, "--name", "new") == 2
    assert "a run does not write through links, such as results/teachers" in " ".join(capsys.readouterr().err.split())
    assert fingerprint(tmp_path / "precious") == before and not (given.parent / "new").exists()


def test_padding_of_an_old_table_is_dropped_when_the_table_is_rewritten(given: Path) -> None:
    """A table is written over pages of the old one, for current readers, but only up to the usual size of a table."""
    path = given / "trials.parquet"
    found, sink = pq.read_table(path), pa.BufferOutputStream()
    with pq.ParquetWriter(sink, found.schema) as writer:
        sink.write(bytes(2**24))
        writer.write_table(found)
    path.write_bytes(padded := bytes(sink.getvalue()))
    altered(given / "tables.json", lambda record: record.update({path.name: [hashlib.sha256(padded).hexdigest()]}))
    ledger = Ledger(given / LEDGER)
    ledger.write_tables(given)
    ledger.close()
    assert path.stat().st_size < 2**18 and pq.read_table(path).num_rows == found.num_rows
