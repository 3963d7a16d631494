"""`status --verify`, preflight checks and rebuilt ledgers: each message says what is wrong and what to do."""

import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections import namedtuple
from contextlib import closing, suppress
from pathlib import Path

import pytest

from commands import call
from conftest import altered
from tune_kd.execute import preflight
from tune_kd.execute.verify import verify
from tune_kd.records import rebuild
from tune_kd.records.ledger import Ledger, reading
from tune_kd.records.lock import held, holder
from tune_kd.records.run_folder import reopen
from tune_kd.records.schema import COMMITS, EPOCHS, LEDGER, TRIALS
from tune_kd.system import files
from tune_kd.system.errors import UserError


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a trained run, with its teachers."""
    shutil.copytree(finished.parent, tmp_path / "results")
    return tmp_path / "results" / finished.name


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_verify_finds_nothing_in_an_intact_run(run: Path) -> None:
    assert verify(run) == []


@pytest.mark.parametrize(
    ("damaged", "part", "remedy"),
    [
        ("study.json", "plan", "nothing else can be checked"),
        ("trials.parquet", "tables", "rebuilds it from the ledger"),
        ("tables.json", "tables", "rebuilds it from the ledger"),
        (COMMITS, "ledger", "rebuilds it"),
        ("../teachers/*/weights.safetensors", "teachers", "restore it from a copy"),
        ("../teachers/*/card.json", "teachers", "restore it from a copy"),
        ("../teachers/*/answers/*/views*/logits.f32", "answers", "computed again when they are needed"),
    ],
)
def test_a_damaged_file_is_named_with_its_remedy(run: Path, damaged: str, part: str, remedy: str) -> None:
    path = next(run.parent.glob(damaged.removeprefix("../") if damaged.startswith("..") else f"{run.name}/{damaged}"))
    flip(path, 0.1 if part == "answers" else 0.5)
    (finding,) = verify(run)
    assert finding.part == part
    assert remedy in finding.remedy
    assert str(path.parent if part == "answers" else path) in finding.what


def test_a_damaged_ledger_is_backed_up_and_rebuilt_from_the_tables(run: Path) -> None:
    with reading(run / LEDGER) as ledger:
        trials, epochs = ledger.rows(TRIALS), ledger.rows(EPOCHS)
    flip(run / LEDGER, 0.6)
    (finding,) = verify(run)
    assert finding.part == "ledger" and "rebuilds it from the tables" in finding.remedy
    messages: list[str] = []
    with closing(rebuild.opened(reopen(run), messages.append)) as ledger:
        assert (ledger.rows(TRIALS), ledger.rows(EPOCHS)) == (trials, epochs)
    assert "The ledger was rebuilt from the tables" in messages[-1]
    assert [path.name for path in rebuild.set_aside(run)] == [f"{LEDGER}.damaged-1"]
    assert verify(run) == []


def test_a_ledger_that_lost_its_end_is_detected_although_it_is_a_valid_database(run: Path) -> None:
    """For example a copy without the write-ahead log."""
    shutil.copy(run / LEDGER, run / "earlier")
    with closing(Ledger(run / LEDGER)) as ledger:
        ledger.put(TRIALS, ledger.rows(TRIALS)[0] | {"attempts": 2})
    (run / "earlier").rename(run / LEDGER)
    (finding,) = verify(run)
    assert "committed transactions" in finding.what and "its end is lost" in finding.what
    (run / LEDGER).unlink()
    (finding,) = verify(run)
    assert "is missing, and" in finding.what


def test_a_missing_ledger_without_its_count_is_rebuilt_and_not_started_anew(run: Path) -> None:
    """For example in a copy of the tables alone. A new ledger would replace them by empty tables."""
    with reading(run / LEDGER) as ledger:
        epochs = ledger.rows(EPOCHS)
    for path in run.glob("ledger*"):
        path.unlink()
    (finding,) = verify(run)
    assert "is missing, and rows were committed to it" in finding.what
    messages: list[str] = []
    with closing(rebuild.opened(reopen(run), messages.append)) as ledger:
        assert ledger.rows(EPOCHS) == epochs
    assert "The ledger was rebuilt" in messages[-1] and "The old one" not in messages[-1]


def test_an_empty_ledger_is_rebuilt(run: Path) -> None:
    """A copy onto a full disk leaves an empty file. Intact tables would be replaced by empty ones."""
    with reading(run / LEDGER) as ledger:
        epochs = ledger.rows(EPOCHS)
    (run / LEDGER).write_bytes(b"")
    (run / COMMITS).unlink()
    (finding,) = verify(run)
    assert finding.part == "ledger" and "rebuilds it from the tables" in finding.remedy
    with closing(rebuild.opened(reopen(run), lambda _: None)) as ledger:
        assert ledger.rows(EPOCHS) == epochs
    assert verify(run) == []


def test_a_ledger_of_another_plan_is_refused(run: Path) -> None:
    """For example after an older study.json was restored, whereas the ledger has the trials of an extension."""
    with closing(Ledger(run / LEDGER)) as ledger:
        row = dict.fromkeys(TRIALS.only_completed) | {"trial_id": "f" * 16, "status": "pending", "epochs_run": 0}
        ledger.put(TRIALS, ledger.rows(TRIALS)[0] | row)
    with pytest.raises(
        UserError, match=r"not in the plan of .*study\.json: f{16}; restore the study\.json or the ledger"
    ):
        rebuild.opened(reopen(run), lambda _: None)
    finding = verify(run)[0]
    assert finding.part == "ledger" and "study.json and the ledger do not match" in finding.remedy


def test_a_trial_that_a_screen_stopped_before_its_start_is_pending_after_a_rebuild(run: Path) -> None:
    opened = reopen(run)
    with closing(Ledger(run / LEDGER)) as ledger:
        waiting = ledger.rows(TRIALS)[-1]
        ledger.put(TRIALS, waiting | {"status": "stopped", "epochs_run": 0, "attempts": 0, "test_accuracy": None,
                                      "test_accuracy_best": None, "error": "not run: stopped"})  # fmt: skip
        ledger._connection.execute("DELETE FROM epochs WHERE trial_id = ?", [waiting["trial_id"]])
        ledger.write_tables(run)
    flip(run / LEDGER, 0.6)
    with closing(rebuild.opened(opened, lambda _: None)) as ledger:
        assert [ledger.rows(TRIALS)[-1][name] for name in ("status", "error")] == ["pending", None]


def test_a_ledger_is_not_rebuilt_from_damaged_tables(run: Path) -> None:
    flip(run / LEDGER, 0.6)
    flip(run / "epochs.parquet")
    ledger, tables = verify(run)
    assert "the tables are damaged, too" in ledger.remedy and tables.part == "tables"
    before = (run / LEDGER).read_bytes()
    with pytest.raises(files.CorruptFile, match="it cannot be rebuilt, since the tables are damaged"):
        rebuild.opened(reopen(run), lambda _: None)
    assert (run / LEDGER).read_bytes() == before


def test_epochs_that_the_tables_lack_run_again(run: Path) -> None:
    """A trial that ended according to one table, but lacks epochs in the other, is pending."""
    opened = reopen(run)
    with reading(run / LEDGER) as ledger:
        trial = next(row["trial_id"] for row in ledger.rows(TRIALS) if row["role"] == "student")
    earlier = run.parent / "earlier"
    earlier.mkdir()
    with closing(Ledger(earlier / LEDGER)) as ledger, reading(run / LEDGER) as whole:
        with ledger.transaction():
            for row in whole.rows(TRIALS):
                ledger.put(TRIALS, row)
            for row in whole.rows(EPOCHS):
                if row["trial_id"] != trial or row["epoch"] == 1:
                    ledger.put(EPOCHS, row)
        ledger.write_tables(run)
    flip(run / LEDGER, 0.6)
    with closing(rebuild.opened(opened, lambda _: None)) as ledger:
        (row,) = [row for row in ledger.rows(TRIALS) if row["trial_id"] == trial]
        (epoch,) = [row for row in ledger.rows(EPOCHS) if row["trial_id"] == trial]
    assert (row["status"], row["epochs_run"], row["test_accuracy_best"]) == ("pending", 1, None)
    assert (row["val_accuracy"], row["best_epoch"]) == (epoch["val_accuracy"], 1)


def test_status_verify_prints_findings_and_exits_with_status_3(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("status", str(run), "--verify")
    assert call(monkeypatch, *command) == 0
    assert "is intact" in capsys.readouterr().out
    flip(run / "trials.parquet")
    assert call(monkeypatch, *command) == 3
    assert "trials.parquet was changed after it was written" in capsys.readouterr().out
    assert call(monkeypatch, *command, "--json") == 3
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["part"] == "tables"


def test_a_full_disk_an_old_package_and_a_changed_teacher_are_reported_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = reopen(run)
    with reading(run / LEDGER) as ledger:
        rows = ledger.rows(TRIALS)
    preflight.check(opened, rows, 2)
    waiting = [row | {"status": "pending"} if row["phase"] == "confirm" else row for row in rows]
    preflight.check(opened, waiting, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(preflight, "version", lambda name: "2.9.1" if name == "torch" else "2.60.0")
    flip(next((run.parent / "teachers").glob("*/weights.safetensors")))
    with pytest.raises(UserError) as caught:
        preflight.check(opened, waiting, 2)
    torch, room, teacher = caught.value.problems
    assert torch.startswith("torch is 2.9.1 here; allowed: 2.10 or later")
    assert "0.000 GB are free" in room and "Free space, or choose a folder on another disk" in room
    assert "weights.safetensors does not match its card; restore it from a copy" in teacher


@pytest.mark.parametrize(("name", "planned"), [("logits.f32", 20), ("logits.bf16", 40)])
def test_logits_on_disk_need_no_more_space(run: Path, monkeypatch: pytest.MonkeyPatch, name: str, planned: int) -> None:
    """The plan counts float32. bfloat16 takes half of that."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    monkeypatch.setattr(preflight, "disk_bytes", lambda *_: 10**9)
    table = next(run.parent.glob("teachers/*/answers/*/views*"))
    (table / name).write_bytes(b"x" * 20_000_000)
    (problem,) = preflight._room(reopen(run), [], 2)
    needed = float(re.search(r"writes up to about ([\d.]+) GB", problem)[1])  # type: ignore[index]
    assert needed == pytest.approx(1 - planned / 1000, abs=0.002)


def test_the_teachers_of_students_that_were_added_or_blocked_are_checked(run: Path) -> None:
    opened = reopen(run)
    with reading(run / LEDGER) as ledger:
        rows = ledger.rows(TRIALS)
    flip(next((run.parent / "teachers").glob("*/weights.safetensors")))
    preflight.check(opened, rows, 2)  # no waiting student needs the teacher
    student = next(row for row in rows if row["role"] == "student" and row["teacher_id"])
    others = [row for row in rows if row is not student]
    for waiting in (others, [*others, student | {"status": "blocked", "attempts": 1}]):
        with pytest.raises(UserError, match=r"weights\.safetensors does not match its card"):
            preflight.check(opened, waiting, 2)
    preflight.check(opened, [*others, student | {"status": "blocked", "attempts": 0}], 2)  # its teacher failed


def test_a_ledger_is_readable_without_write_permission_for_its_folder(finished: Path) -> None:
    """A fork gives up its permission to write, since tests may run as root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as place, held(Path(place)):  # a folder that other users can enter
        ledger = shutil.copy(finished / LEDGER, place)
        Path(place).chmod(0o555)
        child = os.fork()
        if child == 0:
            try:
                with suppress(PermissionError):
                    os.setuid(65534)
                with reading(Path(ledger)) as opened:
                    there = len(opened.rows(EPOCHS))
                who = holder(Path(place)) or {}
                os._exit(0 if there and who.get("pid") == os.getppid() and not os.access(place, os.W_OK) else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        Path(place).chmod(0o755)


def test_a_folder_that_cannot_be_synced_is_refused_before_anything_trains(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(UserError, match=r"cannot be written, synced and locked \(Read-only file system\)"):
        preflight.check(reopen(run), [], 2)


def test_students_do_not_resume_with_a_teacher_that_was_trained_again(run: Path) -> None:
    opened = reopen(run)
    with reading(run / LEDGER) as ledger:
        rows = ledger.rows(TRIALS)
    waiting = [row | {"status": "pending"} if row["role"] == "student" else row for row in rows]
    preflight.check(opened, waiting, 2)
    another = [row | {"weights_digest": "0" * 64} if row["role"] == "teacher" else row for row in waiting]
    with pytest.raises(UserError, match="was trained again, and is not the teacher that this run had"):
        preflight.check(opened, another, 2)


def test_a_copied_teacher_with_too_few_epochs_is_refused_before_anything_trains(run: Path) -> None:
    opened = reopen(run)
    teacher = opened.plan.teachers[0]
    home = opened.teachers / teacher.trial_id
    preflight.check(opened, [], 2)
    altered(home / "card.json", lambda card: card["epochs"].pop(0))
    with pytest.raises(UserError, match=f"has 1 epochs; this study's teacher has 2; remove {home} to have"):
        preflight.check(opened, [], 2)


@pytest.mark.parametrize("lost", ["DELETE FROM trials", "DELETE FROM epochs", "DELETE FROM epochs WHERE epoch = 1"])
def test_a_ledger_whose_tables_do_not_match_is_rebuilt(run: Path, lost: str) -> None:
    """Checksums of rows do not reveal missing rows."""
    with reading(run / LEDGER) as ledger:
        before = ledger.rows(EPOCHS), ledger.rows(TRIALS)
    with closing(sqlite3.connect(run / LEDGER)) as connection, connection:
        connection.execute(lost)
    (finding,) = verify(run)
    assert finding.part == "ledger" and "rebuilds it from the tables" in finding.remedy
    with closing(rebuild.opened(reopen(run), lambda _: None)) as ledger:
        assert (ledger.rows(EPOCHS), ledger.rows(TRIALS)) == before
    assert verify(run) == []
