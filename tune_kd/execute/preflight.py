"""Preflight checks before training: versions, folder, disk space and teachers. Reports all problems at once, each with
its remedy."""

import fcntl
import shutil
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

from tune_kd.records.adaptive_plan import grown, to_come
from tune_kd.records.run_folder import Run
from tune_kd.records.schema import TrialRow
from tune_kd.study.cost import disk_bytes
from tune_kd.study.trial import ENDED, Status, Trial
from tune_kd.system.errors import raise_problems
from tune_kd.system.files import MOST_RECORD_BYTES, opened, publish, read
from tune_kd.training import teachers

FLOORS = {"torch": "2.10", "ray": "2.54"}
SPARE = 1.2  # required free space, relative to the estimated bytes


def check(run: Run, rows: list[TrialRow], slots: int) -> None:
    """Raise `UserError` if a run cannot start or continue on this machine. This process must hold the run's lock.

    `rows` are the trials in the ledger; `slots` is the approximate number of concurrent trials.
    """
    known = {row["trial_id"]: row for row in rows}
    waiting = [trial for trial in grown(run.plan, rows).trials if _is_to_run(known.get(trial.trial_id))]
    growing = [*waiting, *to_come(run.plan, rows)]
    raise_problems([*_versions(), *_folder(run.folder), *_room(run, growing, slots), *_teachers(run, waiting, known)])


def _is_to_run(row: TrialRow | None) -> bool:
    """Whether a trial with this row will run: it is new, has not ended, or was blocked by a missing teacher."""
    return row is None or row["status"] not in ENDED or (row["status"] == Status.BLOCKED and row["attempts"] > 0)


def _versions() -> list[str]:
    return [
        f"{name} is {version(name)} here; allowed: {floor} or later; run `pip install '{name}>={floor}'`"
        for name, floor in FLOORS.items()
        if Version(version(name)) < Version(floor)
    ]


def _folder(folder: Path) -> list[str]:
    """Check that files in a folder can be written, synced, renamed and locked."""
    probe = folder / ".probe"
    try:
        publish(probe, b"probe")
        with opened(probe, MOST_RECORD_BYTES) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = read(probe, MOST_RECORD_BYTES) == b"probe"
        probe.unlink()
    except OSError as error:
        return [
            f"--out: files in {folder} cannot be written, synced and locked ({error.strerror}); free space, make the "
            "folder writable, or choose a folder on another disk"
        ]
    return [] if same else [f"--out: a file in {folder} differs from what was written; choose a folder on another disk"]


def _room(run: Run, waiting: list[Trial], slots: int) -> list[str]:
    planned = run.plan
    needed = disk_bytes(waiting, planned.answering, slots, bool(run.settings.get("keep_checkpoints")))
    answers = [
        path for each in planned.teachers for path in (run.teachers / each.trial_id).glob("answers/*/*/logits.*")
    ]
    # These are on disk already. Files in bfloat16 take half of the estimate, which counts float32.
    needed -= sum(512 * path.stat().st_blocks * (2 if path.suffix == ".bf16" else 1) for path in answers)
    free = shutil.disk_usage(run.folder).free
    if free >= SPARE * needed:
        return []
    return [
        f"--out: {free / 1e9:.3f} GB are free at {run.folder}, and the rest of the study writes up to about "
        f"{needed / 1e9:.3f} GB; required is a fifth more. Free space, or choose a folder on another disk"
    ]


def _teachers(run: Run, waiting: list[Trial], known: dict[str, TrialRow]) -> list[str]:
    """Check that the remaining students can use the same teachers as earlier students."""
    problems: list[str] = []
    needed = {trial.teacher_id for trial in waiting}
    for teacher in run.plan.teachers:
        taught = known[teacher.trial_id]["weights_digest"] if teacher.trial_id in known else None
        if teacher.trial_id not in needed:
            continue  # all its students have ended
        if taught is None:  # to be trained, or reused from another run
            problems += filter(None, [teachers.unfit(run.teachers, teacher)])
            continue
        wrong = teachers.wrong_with(run.teachers, teacher.trial_id, taught)
        if wrong is not None:
            problems.append(f"{wrong}; restore it from a copy, or start a new run, which trains it again")
    return problems
