"""Results folders in an object store: a real S3 server on loopback, with requests that fail, stall or break off, and
with lost disks and drivers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import STUDY, assert_contiguous_epochs, assert_same_records, call, command, without_stops
from conftest import tiny
from stores import KEYS, Store, google, store
from tune_kd.cli import main
from tune_kd.data import datasets
from tune_kd.execute import trackers
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.trackers import mlflow
from tune_kd.execute.verify import verify
from tune_kd.execute.worker import Task, Workplace, work
from tune_kd.records import extension, lock, rebuild, run_folder, sync
from tune_kd.records.ledger import reading
from tune_kd.records.reader import load
from tune_kd.records.run_folder import Run
from tune_kd.records.schema import EPOCHS, MOST_TABLE_BYTES, TRIALS
from tune_kd.study.spec import Factor, Study
from tune_kd.study.trial import Epoch
from tune_kd.system import object_store
from tune_kd.system.errors import UnexpectedFile, UserError
from tune_kd.system.files import MOST_RECORD_BYTES
from tune_kd.system.object_store import Mirror


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """A store, and a folder for its mirrors."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    with store() as found:
        yield found


@pytest.fixture(scope="module")
def calm() -> Study:
    study = tiny()
    return without_stops(replace(study, factors=(Factor("stem", ("cifar",)), *study.factors[1:]), moderator=None))


def begin(study: Study, url: str, name: str = "kept") -> Run:
    """A new run in a store."""
    spec = study.data
    digest = datasets.load(spec.name, train=spec.train, validation=spec.validation, test=spec.test).digest
    out = object_store.local(url)
    begun = Run(name, out / name, study, digest, None, {})
    run_folder.create(begun)
    return begun


def go_on(begun: Run, doing: Any = work) -> Driver:
    """Run the remaining trials in this process, and return the driver."""
    ledger = rebuild.opened(begun, lambda _: None)
    try:
        out = Mirror.of(begun.folder)
        place = Workplace(None, None, begun.teachers, begun.checkpoints, checkpoint_every=0.0, url=out.url)
        driver = Driver(begun.plan, begun.name, begun.folder, ledger, place, cpus=1.0, gpus=0.0)
        run_in_process(driver, place, doing)
        return driver
    finally:
        ledger.close()


class PowerCut(BaseException):
    """An exception that a driver must not catch."""


def cut_after(epochs: int) -> Any:
    left = epochs

    def cut(task: Task, place: Workplace) -> Generator[Epoch]:
        nonlocal left
        for epoch in work(task, place):
            yield epoch
            left -= 1
            if left == 0:
                raise PowerCut

    return cut


@pytest.fixture(scope="module")
def undisturbed(calm: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study without a store."""
    spec = calm.data
    digest = datasets.load(spec.name, train=spec.train, validation=spec.validation, test=spec.test).digest
    begun = Run("here", tmp_path_factory.mktemp("alone") / "here", calm, digest, None, {})
    run_folder.create(begun)
    go_on(begun)
    return begun.folder


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Simulate another machine from here on, which does not see the files of the first."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / name))


READER = """
import sys
from pathlib import Path
from tune_kd import UserError
from tune_kd.records.reader import load

found = None
while not Path(sys.argv[2]).exists():
    try:
        found = len(load(sys.argv[1]).epochs)
        print(found, flush=True)
    except UserError as mistake:
        early = (".parquet is missing", "allowed: a run's folder or name")  # the first tables were not sent yet
        assert found is None and any(words in str(mistake) for words in early), mistake
"""


def slowly(task: Task, place: Workplace) -> Generator[Epoch]:
    for epoch in work(task, place):
        yield epoch
        time.sleep(0.5)


@pytest.mark.long
def test_records_in_the_store_are_consistent_throughout_and_complete_at_the_end(
    s3: Store, calm: Study, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_kd.execute.driver.TABLES_AFTER_END", 0.0)
    monkeypatch.setattr("tune_kd.execute.driver.TABLES_EVERY", 0.0)
    begun = begin(calm, s3.url("kd"))
    stop = tmp_path / "stop"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, s3.url("kd/kept"), str(stop)],
        text=True, stdout=subprocess.PIPE, env={**os.environ, "XDG_DATA_HOME": str(tmp_path / "reader")},
    )  # fmt: skip
    try:
        go_on(begun, slowly)
    finally:
        stop.touch()
        seen, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert len(set(seen.split())) > 3  # the table was read while it grew
    order = [sync.STUDY, *sync.TABLES, "ledger.sqlite", "ledger.commits"]
    assert order[1] == "tables.json"  # a table looks damaged until its digest has arrived
    sent = [name for method, path in s3.requests if method == "PUT" and (name := path.rsplit("/", 1)[1]) in order]
    assert sent[1:] == order * (len(sent) // len(order))  # after the plan, which is sent first
    assert_same_records(begun.folder, undisturbed)
    elsewhere(monkeypatch, tmp_path, "other")
    there = run_folder.find(object_store.local(s3.url("kd")), "kept")
    assert_same_records(there, undisturbed)
    assert there != begun.folder and verify(there) == []
    assert run_folder.existing(object_store.local(s3.url("kd"))) == [there]
    assert len(load(s3.url("kd/kept")).trials) == len(load(there).trials)
    assert Mirror.of(there).names(there / "checkpoints") == []


@pytest.mark.parametrize("size", [3, 5, 7])
def test_an_object_replaced_during_a_read_is_read_again(s3: Store, size: int) -> None:
    """The client asks for the size first, so the bytes that follow may be part of another object."""
    file = object_store.local(s3.url("kd")) / "each"
    held = Mirror.of(file)
    held.send(file, b"older")
    newer = b"newer" + b"!" * (size - 5) if size >= 5 else b"new"

    def replaced(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/each"):
            s3.before = lambda *_: None
            held.send(file, newer)

    s3.before = replaced
    assert held.read(file, 100) == newer


def test_an_object_beyond_its_size_limit_is_rejected_before_download(s3: Store) -> None:
    file = object_store.local(s3.url("kd")) / "each"
    held = Mirror.of(file)
    held.send(file, b"0123456789")
    assert held.read(file, 10) == b"0123456789"
    with pytest.raises(UnexpectedFile, match=r"/each\?.* has 10 bytes; expected at most 9"):
        held.fetch(file, 9)
    assert not file.exists()


@pytest.mark.long
def test_failed_and_slow_store_requests_do_not_change_the_records(s3: Store, calm: Study, undisturbed: Path) -> None:
    every = {"denied": 29, "error": 11, "cut": 41, "slow": 13}
    s3.fault = lambda number: next((kind for kind, each in every.items() if number % each == 0), None)
    begun = begin(calm, s3.url("kd"))
    went = go_on(begun)
    s3.fault = lambda number: None
    assert len(s3.requests) > 3 * 41
    assert {row["attempts"] for row in went.rows.values()} == {1}
    assert_same_records(begun.folder, undisturbed)
    sent = Mirror.of(begun.folder)
    for name in ("trials.parquet", "epochs.parquet", "tables.json", "study.json", "ledger.commits"):
        assert sent.read(begun.folder / name, MOST_TABLE_BYTES) == (begun.folder / name).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("epochs", [1, 9, *(pytest.param(each, marks=pytest.mark.slow) for each in (4, 12))])
def test_a_run_whose_driver_lost_its_disk_is_resumed_on_another_machine(
    s3: Store, calm: Study, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    begun = begin(calm, s3.url("kd"))
    with pytest.raises(PowerCut):
        go_on(begun, cut_after(epochs))
    elsewhere(monkeypatch, tmp_path, "second")
    again = run_folder.reopen(run_folder.find(object_store.local(s3.url("kd")), "kept"))
    assert again.folder != begun.folder
    went = go_on(again)
    assert_same_records(again.folder, undisturbed)
    assert_contiguous_epochs(again.folder)
    assert {row["status"] for row in went.rows.values()} == {"completed"}

    # The first machine returns with an older ledger and fetches the newer records from the store.
    elsewhere(monkeypatch, tmp_path, "home")
    back = run_folder.find(object_store.local(s3.url("kd")), "kept")
    assert back == begun.folder
    assert_same_records(back, undisturbed)
    assert verify(back) == []


def test_a_run_in_google_cloud_storage_is_resumed_on_another_machine(
    calm: Study, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(monkeypatch, tmp_path, "home")
    with google() as url:
        begun = begin(calm, url)
        with pytest.raises(PowerCut):
            go_on(begun, cut_after(4))
        elsewhere(monkeypatch, tmp_path, "second")
        again = run_folder.reopen(run_folder.find(object_store.local(url), "kept"))
        assert again.folder != begun.folder
        go_on(again)
        assert_same_records(again.folder, undisturbed)
        elsewhere(monkeypatch, tmp_path, "third")
        there = run_folder.find(object_store.local(url), "kept")
        assert_same_records(there, undisturbed)
        assert verify(there) == [] and Mirror.of(there).names(there / "checkpoints") == []


def test_mlflows_database_is_fetched_on_another_machine(
    s3: Store, calm: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(calm, s3.url("kd"))
    (begun.folder / trackers.DATABASE).write_bytes(b"of before")
    sync.send(begun.folder, *trackers.FILES)
    elsewhere(monkeypatch, tmp_path, "second")
    there = run_folder.find(object_store.local(s3.url("kd")), "kept")
    assert mlflow.database(there).read_bytes() == b"of before"


def test_an_unavailable_store_leaves_local_records_intact_and_is_updated_on_resume(
    s3: Store, calm: Study, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_kd.system.files.PAUSES", (0.0,))
    begun = begin(calm, s3.url("kd"))

    def gone(number: int) -> str | None:
        with reading(begun.folder / "ledger.sqlite") as ledger:
            ended = {row["status"] for row in ledger.rows(TRIALS)} == {"completed"}
        return "denied" if ended else None

    s3.fault = gone
    with pytest.raises(OSError, match=r"does not take the records .*; all records are in .*`tune_kd resume`"):
        go_on(begun)
    assert_same_records(begun.folder, undisturbed)
    s3.fault = lambda number: None
    go_on(begun)
    sent = Mirror.of(begun.folder).read(begun.folder / "trials.parquet", MOST_TABLE_BYTES)
    assert sent == (begun.folder / "trials.parquet").read_bytes()


def test_a_teacher_is_fetched_once_per_machine(
    s3: Store, calm: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(calm, s3.url("kd"))
    with pytest.raises(PowerCut):
        go_on(begun, cut_after(3))  # the teacher's two epochs, and one epoch of a student
    elsewhere(monkeypatch, tmp_path, "second")
    s3.requests.clear()
    again = run_folder.reopen(run_folder.find(object_store.local(s3.url("kd")), "kept"))
    go_on(again)
    distilled = sum(trial.teacher_id is not None for trial in again.plan.trials)
    assert distilled > 4
    # A download in several parts makes several requests for one fetch.
    (teacher,) = again.plan.teachers
    parts = s3.gets(f"{teacher.trial_id}/weights.safetensors")
    assert 1 <= parts <= 2
    size = (again.teachers / teacher.trial_id / "weights.safetensors").stat().st_size
    assert size > 0


def test_the_lock_of_a_driver_on_another_machine_expires_when_it_is_no_longer_seen(
    s3: Store, calm: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(calm, s3.url("kd"))
    there = {"pid": 7, "host": "another", "since": "today", "dashboard": None}
    holder = begun.folder / "holder.json"
    Mirror.of(holder).send(holder, json.dumps({**there, "seen": time.time() - 20}).encode())
    with (
        pytest.raises(UserError, match=r"process 7 on another has held since today, seen 2\d s ago; wait for it"),
        lock.held(begun.folder),
    ):
        raise AssertionError
    Mirror.of(holder).send(holder, json.dumps({**there, "seen": time.time() - 200}).encode())
    with lock.held(begun.folder):
        told = json.loads(Mirror.of(holder).read(holder, MOST_RECORD_BYTES) or b"")
        assert told["pid"] == os.getpid() and told["seen"] == pytest.approx(time.time(), abs=60)
    assert Mirror.of(holder).read(holder, MOST_RECORD_BYTES) is None


def test_a_worker_sees_the_drivers_drain_request_through_the_store(
    s3: Store, calm: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_kd.execute.worker.ASK_EVERY", 0.0)
    begun = begin(calm, s3.url("kd"))
    place = Workplace(None, None, begun.teachers, begun.checkpoints, url=s3.url("kd"))
    of_driver = Mirror.of(place.drain)
    elsewhere(monkeypatch, tmp_path, "worker")
    there = place.here()
    assert there.checkpoints != place.checkpoints and there.teachers != place.teachers
    asked = there.leaving()
    assert not asked()
    of_driver.send(place.drain, b"")
    assert asked()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("ftp://bucket/kd", ["--out is ftp://bucket/kd", "s3://BUCKET/PATH or gs://BUCKET/PATH"]),
        ("s3:///kd", ["--out is s3:///kd", "allowed"]),
        ("S3://bucket/kd", ["--out is S3://bucket/kd; allowed: a folder, or s3://BUCKET/PATH"]),
        ("s3://bucket/../../kd", ["--out is s3://bucket/../../kd; allowed", "no folder . or .."]),
        ("s3://../kd", ["--out is s3://../kd; allowed", "no folder . or .."]),
        ("s3://bucket/kd#2", ["--out is s3://bucket/kd#2; allowed", "where PATH has no '#'"]),
        ("s3://key:hush@bucket/kd", ["with a secret in it", "AWS_ACCESS_KEY_ID"]),
        ("s3://bucket/kd?secret_key=hush", ["with a secret in it"]),
        ("gs://hush@bucket/kd", ["with a secret in it"]),
        ("s3://bucket/kd?nonsense=1", ["--out is s3://bucket/kd?nonsense=1", "nonsense"]),
    ],
)
def test_an_invalid_location_is_rejected_without_repeating_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, words: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune_kd", "run", "ablation", "--scale", "smoke", "--out", place])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words) and "hush" not in told and told.startswith("tune_kd: ")


def test_each_store_has_its_own_mirror_in_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    url = "s3://bucket/kd?region=x&endpoint_override=..%2F..%2Fhost:9000"
    there = object_store.local(url)
    assert there.parents[1] == tmp_path / "tune_kd" and there.parent.name.startswith("s3-bucket-kd-")
    assert Mirror.of(there / "run") == Mirror(there, url)
    others = (url.replace("/kd", "/kd/more"), url.replace("/bucket", "/other"), url.replace("9000", "9001"),
              "s3://bucket/kd?region=x")  # fmt: skip
    assert len({there, *map(object_store.local, others)}) == 5 and object_store.local(url.replace("=x", "=y")) == there


def test_a_missing_bucket_and_a_taken_name_are_reported_before_anything_starts(
    s3: Store, calm: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    begin(calm, s3.url("kd"))
    elsewhere(monkeypatch, tmp_path, "second")
    for place, words in ((s3.url("kd"), "--name is 'kept', and s3://bucket/kd/kept?"),
                         (s3.url("kd").replace("bucket", "nowhere"), "NO_SUCH_BUCKET")):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["tune_kd", "run", "ablation", "--scale", "smoke", "--name", "kept",
                                         "--out", place, "--cpus-per-trial", "0"])  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert words in told and "--cpus-per-trial is 0" in told


@pytest.mark.long
def test_commands_work_on_a_run_in_a_store_from_any_machine(
    s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line and Ray: run, then show the status and report from another machine."""

    def tune_kd(home: str, *arguments: str) -> str:
        elsewhere(monkeypatch, tmp_path, home)
        assert call(monkeypatch, *arguments, "--out", s3.url("kd")) == 0
        return capsys.readouterr().out

    track = ("--track", "tensorboard", "--track", "mlflow")
    (tmp_path / "own.py").write_text(STUDY)
    short = ("--set", "recipe.epochs=1")
    begun = command(tmp_path, "run", "own.py", "--scale", "own", "--name", "far", *short, *track, "--out", s3.url("kd"))
    told, errors = begun.communicate(timeout=300)
    assert begun.returncode == 0 and "warning" not in told + errors, told + errors
    assert "records in s3://bucket/kd/far?" in told and "also at s3://bucket/kd/far/report/report.html?" in told
    assert "far" in tune_kd("other", "list")
    assert "is intact, from the plan to the teachers' cached logits" in tune_kd("other", "status", "far", "--verify")
    assert "Primary contrasts" in tune_kd("third", "report", "far", "--format", "md")
    here, there = (next((tmp_path / home).glob("tune_kd/s3-bucket-kd-*/results/far")) for home in ("home", "other"))
    assert (here / "trials.parquet").read_bytes() == (there / "trials.parquet").read_bytes()
    elsewhere(monkeypatch, tmp_path, "home")
    assert {sync.STUDY, "tensorboard", "mlflow.db"} <= set(Mirror.of(here).names(here))
    with reading(there / "ledger.sqlite") as ledger, reading(here / "ledger.sqlite") as original:
        assert ledger.rows(EPOCHS) == original.rows(EPOCHS)


def test_an_extension_made_on_another_machine_is_fetched_with_its_tables(
    s3: Store, calm: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(calm, s3.url("kd"))
    go_on(begun)
    elsewhere(monkeypatch, tmp_path, "second")
    again = run_folder.reopen(run_folder.find(object_store.local(s3.url("kd")), "kept"))
    more = replace(again, study=replace(calm, confirm=replace(calm.confirm, seeds=(1, 2, 3))))
    extension.record_extension(more)
    go_on(more)
    elsewhere(monkeypatch, tmp_path, "home")
    assert run_folder.reopen(run_folder.find(object_store.local(s3.url("kd")), "kept")).study.confirm.seeds == (1, 2, 3)
    assert len(load(begun.folder).trials) == len(more.plan.trials)
