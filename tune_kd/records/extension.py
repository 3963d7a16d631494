"""Extend a run by its next declared look, or by seeds and levels that were added to its study."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

from tune_kd.records.run_folder import Run, source_record, trials
from tune_kd.records.sync import STUDY
from tune_kd.study.discover import Source, to_json
from tune_kd.study.spec import Study
from tune_kd.study.trial import UNENDED, digest
from tune_kd.system.crash_points import point
from tune_kd.system.errors import UserError, raise_problems
from tune_kd.system.files import MOST_RECORD_BYTES, read, sealed, unsealed
from tune_kd.system.object_store import Mirror
from tune_kd.system.secrets import secrets

LONGEST = 80  # characters of a value that is shown in a message


def changes(run: Run) -> list[str]:
    """Return the differences between the study's file and the study that the run began with, one line per field."""
    now = _declared(run)
    return [] if now is None else _differences(asdict(run.study), asdict(now))


def with_file(run: Run, file: Path) -> Run:
    """Return the run with its study read from a file that the caller names. Such a file may be executed."""
    source = run.source or Source(file, run.study.scale)
    return replace(run, source=replace(source, file=file, digests=None), named=True)


def _declared(run: Run) -> Study | None:
    """Return the study as its file declares it now, or None if the file is gone.

    A file that only the record names is executed only if the study is installed or in the working directory. Otherwise
    returns None if the file is unchanged, and raises `UserError` if it was changed.
    """
    source = run.source
    if source is None or not (run.named or os.path.isfile(source.file)):
        return None
    if run.named or source.may_be_executed(run.folder.parent):
        return source.read()
    if source.is_unchanged:
        return None
    how = "was changed after the run began" if source.digests else "has no digest on record"
    raise UserError(
        f"RUN is {run.name}, whose study.json says that its study is {source.file}, which {how}; only a study that is "
        "installed or in the working directory is executed without --study: review it, then resume with "
        f"--study {quote(str(source.file))}"
    )


def extended(run: Run, settings: Sequence[str] = ()) -> Run:
    """Return the run with its next look, or with the seeds and levels that its file or these settings add.

    Raises `UserError` if they add nothing, or change anything else.
    """
    waiting = sum(row["status"] in UNENDED for row in trials(run))
    if waiting:
        raise UserError(f"RUN is {run.name}, where {waiting} trials have not ended; resume it first, then use --extend")
    if run.source is not None:
        run = replace(run, source=replace(run.source, settings=(*run.source.settings, *settings)))
    now = _declared(run)
    if now is None and settings:
        raise UserError(
            f"RUN is {run.name}, and --set needs to execute its study {_file(run)}; name the file with --study"
        )
    now = now or run.study
    before, confirm = asdict(run.study), run.study.confirm
    if found := _differences(before, asdict(_without_additions(run.study, now))):
        raise UserError(
            f"RUN is {run.name}, and --extend allows only seeds appended to confirm.seeds (if no looks are declared) "
            f"and levels appended to a factor; its study {_file(run)} differs in: {'; '.join(found)}"
        )
    last = len(confirm.looks or (0,)) - 1
    if now == run.study and run.look == last:
        more = "its last look is done" if confirm.looks else f"{_file(run)} declares the same seeds and levels"
        raise UserError(f"RUN is {run.name}, and --extend has nothing to add: {more}")
    return replace(run, study=now, look=min(run.look + 1, last) if now == run.study else run.look)


def record_extension(run: Run) -> None:
    """Write the result of `extended` into `study.json`, which keeps the first study and its hash."""
    record = unsealed(read(run.folder / STUDY, MOST_RECORD_BYTES), run.folder / STUDY)
    resolved, planned = to_json(run.study), run.plan
    record |= {"look": run.look, "trials": [trial.trial_id for trial in planned.trials], "source": source_record(run)}
    if digest(resolved) != record["study_sha256"]:
        arms = [{"name": arm.name, "role": arm.role} for arm in planned.arms]
        at = datetime.now(UTC).isoformat(timespec="seconds")
        searches = [asdict(search) for search in planned.searches]
        record["extended"] = {
            "study": resolved, "study_sha256": digest(resolved), "arms": arms, "searches": searches, "at": at
        }  # fmt: skip
    raise_problems(secrets(record))
    Mirror.of(run.folder).publish(run.folder / STUDY, sealed(record))
    point("extension.recorded")


def _file(run: Run) -> str:
    return "as recorded" if run.source is None else str(run.source.file)


def _without_additions(before: Study, now: Study) -> Study:
    """Return the study `now` without the seeds and levels that it adds to `before` where additions are allowed."""
    known = {factor.name: factor for factor in before.factors}
    factors = tuple(
        known[each.name]
        if each.name in known and each.levels[: len(known[each.name].levels)] == known[each.name].levels
        else each
        for each in now.factors
    )
    seeds, had = now.confirm.seeds, before.confirm.seeds
    confirm = replace(now.confirm, seeds=had) if now.confirm.looks is None and seeds[: len(had)] == had else now.confirm
    return replace(now, factors=factors, confirm=confirm)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return one line for each field in which two studies, as plain values, differ."""
    if name == "rate":  # affects prices, not results
        return []
    if name == "factors":
        before, now = ({each["name"]: each["levels"] for each in one} for one in (before, now))
    if name == "methods":
        before, now = ({each["name"]: each for each in one} for one in (before, now))
        changed = [each for each in before.keys() & now.keys() if before[each]["source"] != now[each]["source"]]
        if changed:
            files = sorted({now[each]["loss"].partition(":")[0] for each in changed})
            return [f"{file}, or a file that it imports, was changed" for file in files]
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for field in dict.fromkeys((*before, *now)):
            found += _differences(before.get(field), now.get(field), f"{name}.{field}" if name else field)
        return found
    if before == now:
        return []
    old, new = json.dumps(before), json.dumps(now)
    if max(len(old), len(new)) > LONGEST:
        return [f"{name} was {'added' if before is None else 'removed' if now is None else 'changed'}"]
    return [f"{name} was {old} and is {new}"]
