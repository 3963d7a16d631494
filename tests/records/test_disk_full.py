"""A full disk ends a run with one clear message and intact records, and `resume` continues from there."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from commands import EPOCH_FREE, FREE, STUDY, command, epochs_on_record, table, wait_for
from conftest import tiny
from faults.here import go_on
from tune_kd import cli
from tune_kd.data import datasets
from tune_kd.execute.verify import verify
from tune_kd.records.ledger import Ledger
from tune_kd.records.lock import held
from tune_kd.records.run_folder import Run, begun, create, reopen
from tune_kd.records.schema import EPOCHS, LEDGER
from tune_kd.study.spec import Confirm, Factor, Study

LIMITS = (0, 30, 120, 500, 4_000, 20_000, 100_000, 150_000, 200_000, 400_000)  # largest size of a file, in bytes


def study() -> Study:
    """A teacher and three arms on two seeds."""
    factors = (Factor("stem", ("cifar",)), tiny().factors[1])
    return replace(tiny(), factors=factors, moderator=None, contrasts=tiny().contrasts[:2], confirm=Confirm(seeds=(1,)))


def planned(folder: Path) -> Run:
    digest = datasets.load("digits", train=60, validation=20, test=20).digest
    return Run("r", folder / "r", study(), digest, None, {"max_concurrent": None, "keep_checkpoints": False})


def start(folder: Path, limit: int | None) -> None:
    """Begin the run with the command line's error handling. Runs in a separate process."""

    def command() -> None:
        run = planned(folder)
        if limit is not None:
            signal.signal(
                signal.SIGXFSZ, signal.SIG_IGN
            )  # so that a write beyond the limit raises an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with begun(run):
            go_on(run)

    cli.app = command  # type: ignore[assignment]
    cli.main()


def started(folder: Path, limit: int | None) -> "subprocess.CompletedProcess[str]":
    code = f"from pathlib import Path; from test_disk_full import start; start(Path({str(folder)!r}), {limit})"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = planned(tmp_path_factory.mktemp("undisturbed"))
    create(run)
    go_on(run)
    return run.folder


def judge(full: Path, ended: "subprocess.CompletedProcess[str]", undisturbed: Path) -> None:
    """Check for a clear message, intact records, and the result of an undisturbed run once there is room."""
    said = ended.stderr.strip().splitlines()
    assert ended.returncode in (2, 3), ended.stderr
    assert said and all(line.startswith("tune_kd: ") for line in said), ended.stderr
    assert len(said) <= 2, ended.stderr
    if not (full / "r" / "study.json").is_file():
        assert not (full / "r").exists(), "a folder that can be neither resumed nor begun again"
        return
    run = reopen(full / "r")
    parts = {finding.part for finding in verify(run.folder)}
    assert parts <= {"tables"}, verify(run.folder)  # the full disk kept the tables from being updated
    acknowledged = []
    if (run.folder / LEDGER).is_file() and (run.folder / LEDGER).stat().st_size:
        acknowledged = Ledger(run.folder / LEDGER, read_only=True).rows(EPOCHS)
    for path in run.folder.glob("*.parquet"):
        pd.read_parquet(path)
    with held(run.folder):
        go_on(run)
    kept = Ledger(run.folder / LEDGER, read_only=True).rows(EPOCHS)
    assert kept[: len(acknowledged)] == acknowledged
    assert verify(run.folder) == []
    for name, free in (("trials", FREE), ("epochs", EPOCH_FREE)):
        pd.testing.assert_frame_equal(table(run.folder, name, free), table(undisturbed, name, free), check_exact=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "limit", [each if each in (500, 100_000) else pytest.param(each, marks=pytest.mark.slow) for each in LIMITS]
)
def test_a_run_ended_by_a_full_disk_reports_it_and_resumes_to_the_same_results(
    limit: int, tmp_path: Path, undisturbed: Path
) -> None:
    judge(tmp_path, started(tmp_path, limit), undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB in memory. Needs root with the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(disk: Path, left: int) -> Path:
    """A file that fills a disk except for some bytes, even while a run writes to the disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while shutil.disk_usage(disk).free > left:
            file.write(bytes(4096))
    return ballast


def test_too_little_free_space_is_reported_before_training_starts(small_disk: Path, undisturbed: Path) -> None:
    ballast = filled(small_disk, 200_000)
    ended = started(small_disk, None)
    assert ended.returncode == 2 and "Free space" in ended.stderr
    ballast.unlink()
    judge(small_disk, ended, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 300_000])
def test_a_command_exits_with_3_when_the_disk_fills_up_and_resumes_once_there_is_space(
    small_disk: Path, left: int
) -> None:
    (small_disk / "own.py").write_text(STUDY)
    run = small_disk / "results" / "full"
    begun = command(small_disk, "run", "own.py", "--scale", "own", "--name", "full")
    wait_for(lambda: epochs_on_record(run) >= 5)
    ballast = filled(small_disk, left)
    _, errors = begun.communicate(timeout=250)
    said = [line for line in errors.splitlines() if line.startswith("tune_kd: ")]
    assert begun.returncode == 3 and said and "Traceback" not in errors, errors
    before = Ledger(run / LEDGER, read_only=True).rows(EPOCHS)
    ballast.unlink()
    resumed = command(small_disk, "resume", "full")
    _, errors = resumed.communicate(timeout=250)
    assert resumed.returncode == 0, errors
    assert Ledger(run / LEDGER, read_only=True).rows(EPOCHS)[: len(before)] == before
    assert verify(run) == []
