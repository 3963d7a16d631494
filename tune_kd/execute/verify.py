"""Verify that the files in a run's folder are what was written, from the plan to the teachers' logits. Read-only."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from tune_kd.records import rebuild, run_folder
from tune_kd.records.adaptive_plan import grown
from tune_kd.records.ledger import commits, reading
from tune_kd.records.reader import load, without_advice
from tune_kd.records.schema import COMMITS, LEDGER, SCHEMAS, TRIALS, TrialRow
from tune_kd.study.cost import IMAGES
from tune_kd.study.trial import Role
from tune_kd.system.errors import UnexpectedFile, UserError
from tune_kd.training import logit_cache, teachers
from tune_kd.training.checkpoints import Checkpoints


@dataclass(frozen=True)
class Finding:
    """A problem with a file or folder of a run."""

    part: str  # plan, links, ledger, tables, checkpoints, teachers or answers
    what: str
    remedy: str


def verify(folder: Path) -> list[Finding]:
    """Return the problems of a run, from the plan downwards; empty if there are none."""
    try:
        opened = run_folder.reopen(folder)
    except UserError as mistake:
        return [Finding("plan", problem, "nothing else can be judged before") for problem in mistake.problems]
    wrong = rebuild.wrong_with(folder)
    rows: list[TrialRow] = []
    if wrong is None and (folder / LEDGER).is_file():
        with reading(folder / LEDGER) as ledger:
            rows = ledger.rows(TRIALS)
    return [
        *_links(opened),
        *_ledger(opened, wrong, rows),
        *_tables(folder, wrong),
        *_checkpoints(opened),
        *_teachers(opened, rows),
    ]


def _links(opened: run_folder.Run) -> Iterator[Finding]:
    try:
        run_folder.check_links(opened)
    except UserError as mistake:
        for problem in mistake.problems:
            yield Finding("links", problem, "`tune_kd resume` writes nothing while they are there")


def _ledger(opened: run_folder.Run, wrong: str | None, rows: list[TrialRow]) -> Iterator[Finding]:
    folder = opened.folder
    if wrong is not None:
        try:
            load(folder)
            remedy = f"`tune_kd resume {quote(str(folder))}` makes it again from the tables, which are whole"
        except UserError:
            remedy = "the tables are not whole either: put one of them back from a copy, or start a new run"
        yield Finding("ledger", wrong, remedy)
        return
    if (folder / LEDGER).is_file() and commits(folder) is None:
        yield Finding("ledger", f"{folder / COMMITS} is missing or damaged, so that a loss of the last rows would not "
                      "be seen", f"`tune_kd resume {quote(str(folder))}` makes it again")  # fmt: skip
    strange = {row["trial_id"] for row in rows} - {trial.trial_id for trial in grown(opened.plan, rows).trials}
    if strange:  # trials that it lacks are no problem: a driver adds them
        what = f"it holds trials that are not in the plan: {', '.join(sorted(strange))}"
        yield Finding("ledger", what, "put the study.json or the ledger back that belongs to the other")


def _tables(folder: Path, wrong: str | None) -> Iterator[Finding]:
    if not commits(folder) and not any((folder / f"{schema.name}.parquet").is_file() for schema in SCHEMAS):
        return  # the run has not begun
    again = "it is made again from the ledger" if wrong is None else "put it back from a copy"
    try:
        load(folder)
    except UserError as mistake:
        for problem in mistake.problems:
            yield Finding("tables", without_advice(problem), f"`tune_kd resume {quote(str(folder))}`: {again}")


def _checkpoints(opened: run_folder.Run) -> Iterator[Finding]:
    for folder in sorted(each for each in opened.checkpoints.glob("*") if each.is_dir()):
        for path in Checkpoints(folder).damaged():
            yield Finding("checkpoints", f"{path} was altered since it was written",
                          "the one before is used; where there is none, the trial starts again")  # fmt: skip


def _teachers(opened: run_folder.Run, rows: list[TrialRow]) -> Iterator[Finding]:
    home, images = opened.teachers, IMAGES[opened.study.data.name]
    most = max(images.train * images.views, images.test)  # rows of a table: one for each view
    for teacher in opened.plan.teachers:
        teachers.fetch_teacher(home, teacher.trial_id)
        taught = next((row["weights_digest"] for row in rows if row["trial_id"] == teacher.trial_id), None)
        wrong = teachers.wrong_with(home, teacher.trial_id, taught)
        if wrong is not None:
            yield Finding("teachers", wrong, "put it back from a copy, or remove its folder and start a new run")
        theirs = teachers.weights_digest(home, teacher.trial_id)
        others = [row for row in rows if row["teacher_id"] == teacher.trial_id and row["role"] == Role.STUDENT
                  and row["teacher_digest"] not in (None, theirs)]  # fmt: skip
        if others and theirs is not None:
            yield Finding("teachers", f"{len(others)} students learned from another {teacher.label} than the one of "
                          f"the digest {theirs[:16]}", "put the one back that they learned from")  # fmt: skip
        for table in sorted(path.parent for path in (home / teacher.trial_id).glob("answers/*/*/digests.sha256")):
            try:
                chunks = logit_cache.damaged(table, images.classes, most)
            except UnexpectedFile as error:
                yield Finding("answers", str(error), f"remove {table}; its answers are computed again")
                continue
            if chunks:
                what = f"{len(chunks)} chunks of {table} are not what {teacher.label} answered"
                yield Finding("answers", what, "they are computed again where they are needed")
