"""Verify the files in a run's folder, from the plan to the teachers' cached logits. Read-only."""

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
    """Return the problems of a run, in the order plan to cached logits; empty if it has none."""
    try:
        opened = run_folder.reopen(folder)
    except UserError as mistake:
        return [Finding("plan", problem, "fix this first; nothing else can be checked") for problem in mistake.problems]
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
            yield Finding("links", problem, "remove the links; `tune_kd resume` refuses to write to them")


def _ledger(opened: run_folder.Run, wrong: str | None, rows: list[TrialRow]) -> Iterator[Finding]:
    folder = opened.folder
    if wrong is not None:
        try:
            load(folder)
            remedy = f"`tune_kd resume {quote(str(folder))}` rebuilds it from the tables, which are intact"
        except UserError:
            remedy = "the tables are damaged, too: restore the ledger or the tables from a copy, or start a new run"
        yield Finding("ledger", wrong, remedy)
        return
    if (folder / LEDGER).is_file() and commits(folder) is None:
        yield Finding("ledger", f"{folder / COMMITS} is missing or damaged, so a loss of the last rows would go "
                      "unnoticed", f"`tune_kd resume {quote(str(folder))}` rebuilds it")  # fmt: skip
    strange = {row["trial_id"] for row in rows} - {trial.trial_id for trial in grown(opened.plan, rows).trials}
    if strange:  # missing trials are no problem, since a driver adds them
        what = f"it has trials that are not in the plan: {', '.join(sorted(strange))}"
        yield Finding("ledger", what, "study.json and the ledger do not match; restore the matching one from a copy")


def _tables(folder: Path, wrong: str | None) -> Iterator[Finding]:
    if not commits(folder) and not any((folder / f"{schema.name}.parquet").is_file() for schema in SCHEMAS):
        return  # the run has not started
    again = "rebuilds it from the ledger" if wrong is None else "cannot rebuild it; restore it from a copy"
    try:
        load(folder)
    except UserError as mistake:
        for problem in mistake.problems:
            yield Finding("tables", without_advice(problem), f"`tune_kd resume {quote(str(folder))}` {again}")


def _checkpoints(opened: run_folder.Run) -> Iterator[Finding]:
    for folder in sorted(each for each in opened.checkpoints.glob("*") if each.is_dir()):
        for path in Checkpoints(folder).damaged():
            yield Finding("checkpoints", f"{path} was changed after it was written",
                          "the trial continues from the previous checkpoint, or starts again without one")  # fmt: skip


def _teachers(opened: run_folder.Run, rows: list[TrialRow]) -> Iterator[Finding]:
    home, images = opened.teachers, IMAGES[opened.study.data.name]
    most = max(images.train * images.views, images.test)  # maximum rows of a table, one per view
    for teacher in opened.plan.teachers:
        teachers.fetch_teacher(home, teacher.trial_id)
        taught = next((row["weights_digest"] for row in rows if row["trial_id"] == teacher.trial_id), None)
        wrong = teachers.wrong_with(home, teacher.trial_id, taught)
        if wrong is not None:
            yield Finding("teachers", wrong, "restore it from a copy, or remove its folder and start a new run")
        theirs = teachers.weights_digest(home, teacher.trial_id)
        others = [row for row in rows if row["teacher_id"] == teacher.trial_id and row["role"] == Role.STUDENT
                  and row["teacher_digest"] not in (None, theirs)]  # fmt: skip
        if others and theirs is not None:
            yield Finding("teachers", f"{len(others)} students were trained by another {teacher.label} than the one "
                          f"with the digest {theirs[:16]}", "restore the teacher that trained them")  # fmt: skip
        for table in sorted(path.parent for path in (home / teacher.trial_id).glob("answers/*/*/digests.sha256")):
            try:
                chunks = logit_cache.damaged(table, images.classes, most)
            except UnexpectedFile as error:
                yield Finding("answers", str(error), f"remove {table}; its logits are computed again")
                continue
            if chunks:
                what = f"{len(chunks)} chunks of {table} differ from the logits that {teacher.label} computed"
                yield Finding("answers", what, "they are computed again when they are needed")
