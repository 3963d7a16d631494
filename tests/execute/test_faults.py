"""The checker detects each violated invariant, and runs survive random kills. `python tests/faults` runs the long
versions."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from faults import kills, leaving, processes, study
from faults.checker import Reader, lines, read, violations
from faults.life import Life
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import TRIALS

TAG = "a mark of these tests"
UNMEASURED = {"test_accuracy": None, "test_accuracy_best": None}  # as in the row of an incomplete trial


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run and of its teachers, for a test to damage."""
    shutil.copytree(finished.parent, tmp_path / "results")
    return tmp_path / "results" / finished.name


def broken(run: Path, **what: Any) -> set[str]:
    """Return the names of the invariants that a run breaks."""
    return {each.partition(":")[0] for each in violations(run, **what)}


def execute(run: Path, *statements: str) -> None:
    """Change a ledger directly with SQL, without its checksums."""
    with closing(sqlite3.connect(run / "ledger.sqlite", isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def witnessed(run: Path, log: Path) -> Path:
    """Write the log that a witness would have written of a run's epochs. Returns its path."""
    free = ("number", "crc", "run", "trial_id")
    with log.open("w") as sink:
        for row in read(run).ledger.epochs or ():
            epoch = {name: value for name, value in row.items() if name not in free} | {"outcome": None}
            sink.write(json.dumps({"at": 0.0, "trial_id": row["trial_id"], "epoch": epoch}) + "\n")
    return log


def test_an_intact_run_breaks_no_invariant(run: Path, finished: Path, tmp_path: Path) -> None:
    log = witnessed(run, tmp_path / "log")
    shm = processes.shared_memory()
    whole = {"witness": [log], "reference": finished, "exit_status": 0, "tag": TAG, "shm_before": shm}
    assert violations(run, **whole) == []


FIRST = "(SELECT min(number) FROM epochs)"
DOUBLED = (  # creates the table without the key that prevents duplicate rows
    "CREATE TABLE copied AS SELECT * FROM epochs",
    f"INSERT INTO copied SELECT * FROM epochs WHERE number = {FIRST}",
    "DROP TABLE epochs",
    "ALTER TABLE copied RENAME TO epochs",
)


@pytest.mark.parametrize("statements", [(f"DELETE FROM epochs WHERE number = {FIRST}",), DOUBLED])
def test_an_epoch_that_is_missing_or_doubled_breaks_the_first_invariant(run: Path, statements: tuple[str, ...]) -> None:
    execute(run, *statements)
    rejected = {"I7"} if statements == DOUBLED else set()  # `status` rejects a changed table definition
    assert broken(run) == {"I1"} | rejected


def test_an_epoch_that_is_doubled_in_a_table_breaks_the_first_invariant(run: Path) -> None:
    table = pd.read_parquet(run / "epochs.parquet")
    pd.concat([table, table.head(1)]).to_parquet(run / "epochs.parquet")
    assert broken(run) == {"I1"}


def test_a_lost_acknowledged_epoch_breaks_the_second_invariant(run: Path, tmp_path: Path) -> None:
    log = witnessed(run, tmp_path / "log")
    trial = lines(log)[0]["trial_id"]
    execute(
        run,
        f"DELETE FROM epochs WHERE trial_id = '{trial}' AND epoch = 2",
        f"UPDATE trials SET epochs_run = 1 WHERE trial_id = '{trial}'",
    )
    found = violations(run, witness=[log])
    assert f"I2: {trial} epoch 2 was acknowledged and is lost" in found


def test_a_changed_value_breaks_the_second_and_the_third_invariant(run: Path, finished: Path, tmp_path: Path) -> None:
    log = witnessed(run, tmp_path / "log")
    execute(run, f"UPDATE epochs SET val_loss = val_loss + 1e-12 WHERE number = {FIRST}")
    assert broken(run, witness=[log]) == {"I2"}
    assert broken(run, reference=finished) == {"I3"}


def test_a_lost_acknowledged_outcome_breaks_the_second_invariant(run: Path, tmp_path: Path) -> None:
    log = witnessed(run, tmp_path / "log")
    line = lines(log)[-1]
    line["epoch"]["outcome"] = {"test_accuracy": 2.0}
    log.write_text(json.dumps(line) + "\n")
    assert broken(run, witness=[log]) == {"I2"}


def test_a_truncated_line_of_a_killed_witness_is_ignored(run: Path, tmp_path: Path) -> None:
    log = witnessed(run, tmp_path / "log")
    log.write_text(log.read_text() + '{"at": 0, "trial_id": "lost", "epo')
    assert broken(run, witness=[log]) == set()


def test_a_difference_that_the_driver_recorded_breaks_the_third_invariant(run: Path) -> None:
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        row = ledger.rows(TRIALS)[0]
        ledger.put(TRIALS, {**row, "error": "attempt 1: epoch 2 computed again differs from its record"})
    assert broken(run) == {"I3"}


def test_a_phantom_and_a_missing_trial_break_the_fourth_invariant(run: Path) -> None:
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        ledger.put(
            TRIALS,
            {**ledger.rows(TRIALS)[-1], **UNMEASURED, "trial_id": "phantom", "epochs_run": 0, "status": "stopped"},
        )
    assert violations(run) == ["I4: ledger: trial phantom is a phantom"]
    table = pd.read_parquet(run / "trials.parquet")
    table[table["trial_id"] != table["trial_id"].iloc[-1]].to_parquet(run / "trials.parquet")
    assert f"I4: tables: trial {table['trial_id'].iloc[-1]} is missing" in violations(run)


def test_changed_weights_of_a_teacher_break_the_fifth_invariant(run: Path) -> None:
    weights = next((run.parent / "teachers").glob("*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert broken(run) == {"I5"}


def test_a_student_that_began_before_its_teacher_had_ended_breaks_the_fifth_invariant(run: Path) -> None:
    first = "(SELECT min(number) FROM epochs WHERE trial_id IN (SELECT trial_id FROM trials WHERE teacher = 'resnet50' "
    execute(run, f"UPDATE epochs SET number = -1 WHERE number = {first} AND role = 'student'))")
    assert broken(run) == {"I5"}


@pytest.mark.parametrize("name", ["trials", "epochs", "decisions"])
def test_a_truncated_table_breaks_the_sixth_invariant(run: Path, name: str) -> None:
    path = run / f"{name}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert broken(run) == {"I6"}


def test_a_reader_counts_successful_and_failed_reads(run: Path) -> None:
    with Reader(run, every=0.01) as reader:
        time.sleep(0.3)
        (run / "epochs.parquet").unlink()
        time.sleep(0.3)
    assert reader.reads
    assert reader.errors and all("epochs.parquet" in error for error in reader.errors)


@pytest.mark.parametrize("status", [1, 2, 3])
def test_an_exit_status_that_contradicts_the_ledger_breaks_the_seventh_invariant(run: Path, status: int) -> None:
    assert broken(run, exit_status=status) == {"I7"}


@pytest.mark.parametrize(("status", "exit_status"), [("pending", 0), ("failed", 0), ("running", 143)])
def test_a_trial_whose_status_contradicts_the_exit_status_breaks_the_seventh_invariant(
    run: Path, status: str, exit_status: int
) -> None:
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        ledger.put(TRIALS, {**ledger.rows(TRIALS)[-1], **UNMEASURED, "status": status})
    assert any(each.startswith(f"I7: exit status {exit_status}") for each in violations(run, exit_status=exit_status))


def test_a_status_command_that_fails_breaks_the_seventh_invariant(run: Path) -> None:
    execute(run, "UPDATE trials SET host = 'elsewhere'")  # the checksums no longer match
    (found,) = violations(run)
    assert found.startswith("I7: status fails")


def test_unexplained_attempts_break_the_seventh_invariant(run: Path, tmp_path: Path) -> None:
    with closing(Ledger(run / "ledger.sqlite")) as ledger:
        row = ledger.rows(TRIALS)[-1]
        ledger.put(TRIALS, {**row, "attempts": 3, "error": "attempt 1: its worker died"})
    logs = [tmp_path / "first", tmp_path / "second"]
    assert broken(run, witness=logs) == set()  # explained by a lost worker and a lost driver
    assert broken(run, witness=logs[:1]) == {"I7"}


def test_a_process_that_is_left_behind_breaks_the_eighth_invariant(run: Path, tmp_path: Path) -> None:
    code = "import time; time.sleep(60)"
    orphan = subprocess.Popen([sys.executable, "-c", code], env=processes.environment(TAG, tmp_path))
    try:
        assert broken(run, tag=TAG) == {"I8"}
    finally:
        orphan.kill()
        orphan.wait()
    assert broken(run, tag=TAG) == set()


def test_shared_memory_that_is_left_behind_breaks_the_eighth_invariant(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faults.checker.shared_memory", lambda: {"before", "after"})
    assert broken(run, shm_before={"before"}) == {"I8"}


def test_a_run_without_a_study_or_with_an_invalid_ledger_is_not_taken_for_intact(run: Path) -> None:
    (run / "ledger.sqlite").write_bytes(b"no database" * 100)
    assert broken(run) == {"I2"}
    (run / "study.json").unlink()
    assert broken(run) == {"I2"}


def test_the_study_for_fault_injection_completes_without_violations(tmp_path: Path) -> None:
    whole = study.reference(study.write(tmp_path), tmp_path, study.settings(seeds=1, epochs=2))
    assert violations(whole) == []
    assert {row["status"] for row in read(whole).ledger.trials or ()} == {"completed"}


@pytest.mark.slow
def test_a_run_survives_kills_of_its_workers_and_its_drivers_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long version also kills raylets. After that, a driver may wait for a minute before it counts as hung."""
    messages: list[str] = []
    score = kills.rounds(tmp_path, 5, 0, study.settings(seeds=1, epochs=4), 60.0, messages.append)
    assert score.found == [], "\n".join(messages)
    assert score.kills.total() == 5
    assert score.acknowledged >= 36
    assert score.reads


def test_a_life_leaves_no_process_behind(tmp_path: Path) -> None:
    with Life(tmp_path, tmp_path, ()) as life:
        env = processes.environment(life.tag, life.home)
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=env)
        while not processes.tagged(life.tag):
            time.sleep(0.01)
    assert left.wait(5) == -9
    assert not life.home.exists()


TRAINING = (signal.SIGTERM, "descendants", "training")
STARTING = (signal.SIGINT, "group", "starting")


@pytest.mark.slow  # short version: `test_an_interrupted_run_ends_correctly_and_its_records_are_intact`
@pytest.mark.parametrize(("number", "target", "moment"), [TRAINING, STARTING])
def test_a_signal_to_a_whole_job_drains_its_trials_and_resume_completes_the_run(
    number: signal.Signals, target: str, moment: str, tmp_path: Path
) -> None:
    """Two of the 54 cases of `python tests/faults leaving`."""
    messages: list[str] = []
    case = leaving.signalled(number, target, moment, 36)
    found = leaving.rounds(tmp_path, [case], study.settings(seeds=1, epochs=4), messages.append)
    assert found == [], "\n".join(messages)
    assert ("drained" if moment == "training" else "nothing to drain") in messages[0]


LONGER = study.settings(seeds=1, epochs=12)  # more epochs than a run can complete after Ray has died
KILLED = ("the agent", lambda life: leaving.kill(life, "agent"))


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [leaving.signalled(*TRAINING, 108), leaving.signalled(*STARTING, 108), KILLED], ids=lambda case: case[0]
)
def test_an_interrupted_run_ends_correctly_and_its_records_are_intact(case: leaving.Case, tmp_path: Path) -> None:
    """The run whose agent is killed has its own process namespace, if possible. Without precautions, Ray's core would
    end the driver there with status 1 and no message."""
    with Life(tmp_path / "life", study.write(tmp_path), LONGER) as life:
        left = case[1](life)
        assert left.found == [] and life.check_between() == []
        assert left.drained is (True if "training" in case[0] else None)


@pytest.mark.slow
def test_resume_completes_a_run_whose_ray_agent_was_killed(tmp_path: Path) -> None:
    messages: list[str] = []
    assert leaving.rounds(tmp_path, [KILLED], LONGER, messages.append) == [], "\n".join(messages)


def test_the_driver_is_the_child_of_the_process_that_was_started() -> None:
    """A soak that samples the memory of the guard instead shows no growth."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as guard:
        deadline = time.monotonic() + 30
        while not processes.psutil.Process(guard.pid).children() and time.monotonic() < deadline:
            time.sleep(0.05)
        found = processes.driver_of(guard)
        assert found.pid != guard.pid and found.cmdline()[-1] == "input()"
        guard.communicate(b"\n")
