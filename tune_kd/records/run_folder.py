"""A run's folder: find it, create it with its `study.json`, and reopen it."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tune_kd.records.adaptive_plan import grown
from tune_kd.records.ledger import reading
from tune_kd.records.lock import held
from tune_kd.records.schema import LAYOUT, LEDGER, RUN_NAME, TRIALS, TrialRow, first_row
from tune_kd.records.sqlite_file import too_long
from tune_kd.records.sync import HOLDER, STUDY, pull, runs as in_store
from tune_kd.study import record as study_record
from tune_kd.study.brought import Code, codes, packages
from tune_kd.study.discover import Source, from_json, to_json
from tune_kd.study.plan import Plan, plan
from tune_kd.study.source import digests as known_digests
from tune_kd.study.spec import Study
from tune_kd.study.trial import digest
from tune_kd.system.adapters import adapter
from tune_kd.system.crash_points import point
from tune_kd.system.errors import UserError, raise_problems
from tune_kd.system.files import check_names, links, obstacle, sealed
from tune_kd.system.object_store import Mirror, path_of
from tune_kd.system.secrets import secrets

PACKAGES = ("tune_kd", "torch", "torchvision", "ray", "numpy", "pandas", "pyarrow", "scipy")
RESERVED = ("teachers",)
SOURCE = "source"  # subfolder with the study's own code


@dataclass(frozen=True)
class Run:
    """A run on disk, with everything that `resume` needs."""

    name: str
    folder: Path
    study: Study
    data_digest: str
    data_dir: Path | None
    settings: dict[str, Any]  # resources and options that do not affect results
    source: Source | None = None
    look: int = 0  # index of the last declared look that is planned
    codes: tuple[Code, ...] = ()  # the study's own code; empty for a run that is only read
    named: bool = False  # whether the caller, not only the record, named the study's file

    @property
    def teachers(self) -> Path:
        return self.folder.parent / "teachers"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def plan(self) -> Plan:
        return plan(self.study, self.data_digest, self.look)


def check_new(out: Path, name: str | None, study: Study) -> str:
    """Return the name of a new run; by default it is made from the study and the time. Raises `UserError`.

    Creates nothing.
    """
    if name is None:
        name = f"{study.name}-{study.scale}-{datetime.now():%Y%m%d-%H%M%S}"
    problems = [*problems_with_name(name), *secrets(asdict(study), "study")]
    if not problems and os.path.exists(out / name) and not _unbegun(out / name):
        problems.append(f"--name is {name!r}, and {out / name} exists; resume that run or choose another name")
    if (there := obstacle(out)) is not None:
        problems.append(f"--out is {out}, and {there} cannot be written to; allowed: a folder that can be created")
    if (why := too_long(out / name / LEDGER)) is not None:
        problems.append(f"--out is {out}, where {why}; choose a folder with a shorter path")
    problems += _in_the_way(out, name)
    raise_problems(problems)
    return name


def _in_the_way(out: Path, name: str) -> list[str]:
    """Return sentences about what prevents a new run in a store."""
    mirror, probe = Mirror.of(out), out / f".probe-{os.getpid()}"
    if mirror.url is None:
        return []
    try:
        if name in mirror.names(out):
            return [
                f"--name is {name!r}, and {mirror.place(out / name)} exists; resume that run or choose another name"
            ]
        mirror.send(probe, b"probe")
        mirror.forget(probe)
    except (OSError, ValueError) as error:
        return [
            f"--out is {mirror.url}, which cannot be written to ({error}); allowed: an existing bucket, with "
            "credentials where the store's own tools look for them"
        ]
    return []


def problems_with_name(name: str) -> list[str]:
    """Return sentences about what is wrong with a run's name."""
    if RUN_NAME.fullmatch(name) and name not in RESERVED:
        return []
    return [
        f"--name is {name!r}; allowed: 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit, "
        f"and not {', '.join(RESERVED)}"
    ]


def check_links(run: Run) -> None:
    """Raise `UserError` for links in the folders that a run writes to: its own, and those of its teachers.

    Results may come from a stranger, and a link can point to any of the caller's files.
    """
    folders = [run.folder, run.teachers]
    if not run.teachers.is_symlink():
        folders = [run.folder, *(run.teachers / teacher.trial_id for teacher in run.plan.teachers)]
    found = [path for folder in folders for path in links(folder)]
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"RUN is {run.name}, and a run does not write through links, such as "
            f"{', '.join(f'{path} (to {os.readlink(path)})' for path in found[:5])}{more}; allowed: files and folders; "
            "replace each link with its target, or remove it"
        )


@contextmanager
def begun(run: Run) -> Iterator[Callable[[str | None], None]]:
    """Create a new run and hold its lock. Yields the function that `held` yields.

    Removes the run if its plan cannot be written, or if a `UserError` ends it before the first row.
    """
    check_links(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=_unbegun(run.folder))
    except OSError as error:
        raise UserError(f"--out: {run.folder} cannot be created ({error.strerror}); choose another folder") from error
    try:
        with held(run.folder) as tell_dashboard:
            if not _unbegun(run.folder):
                raise UserError(f"--name is {run.name!r}, and {run.folder} was created meanwhile; choose another name")
            try:
                create(run)
                yield tell_dashboard
            except BaseException as error:
                first = run.folder / "trials.parquet"  # the first file that a driver writes
                if not (run.folder / STUDY).exists() or (isinstance(error, UserError) and not first.exists()):
                    shutil.rmtree(run.folder)
                raise
    except OSError:
        if _unbegun(run.folder):  # even the holder file could not be written
            shutil.rmtree(run.folder)
        raise


def _unbegun(folder: Path) -> bool:
    """Return whether a folder holds only files that a kill leaves before the plan is written, or none."""
    left = (HOLDER, SOURCE)
    return folder.is_dir() and all(path.name.startswith(".") or path.name in left for path in folder.iterdir())


def create(run: Run) -> None:
    """Write `study.json`: the study and its hash, the plan, settings, versions and machine."""
    run.folder.mkdir(parents=True, exist_ok=True)
    planned = run.plan
    contrasts = [asdict(contrast) for contrast in planned.contrasts]
    resolved = to_json(run.study)
    data_dir = None if run.data_dir is None else str(run.data_dir.absolute())
    record = {
        "run": run.name,
        "layout": LAYOUT,
        "study": resolved,
        "study_sha256": digest(resolved),
        "look": run.look,
        "extended": None,
        "contrasts": contrasts,
        "contrasts_sha256": digest(contrasts),
        "arms": [{"name": arm.name, "role": arm.role, "merged": arm.merged} for arm in planned.arms],
        "searches": [asdict(search) for search in planned.searches],
        "trials": [trial.trial_id for trial in planned.trials],
        "data": {"name": run.study.data.name, "digest": run.data_digest, "dir": data_dir},
        "settings": run.settings,
        "source": source_record(run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "code": _code_record(run),
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
    }
    raise_problems(secrets(record))
    for code in run.codes:
        for name, content in code.files:  # for the record: this copy is never executed
            path = run.folder / SOURCE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Mirror.of(run.folder).publish(path, content)
    Mirror.of(run.folder).publish(run.folder / STUDY, sealed(record))
    point("study.published")


def _code_record(run: Run) -> dict[str, Any] | None:
    """Return the folder of the study's own code, and the versions of the packages that it imports."""
    if not run.codes:
        return None
    folder = Path.cwd() if run.source is None else run.source.file.absolute().parent
    return {"folder": str(folder), "packages": packages(run.codes)}


def with_codes(run: Run) -> Run:
    """Return the run with its study's own code, read from the folder where the run began.

    Raises `UserError` if the code was changed, if a package that it imports has another version, or if only the record
    names its folder: a stranger may have put code there, so it is not executed.
    """
    if not run.study.methods:
        return run
    record = study_record.load(run.folder / STUDY).get("code") or {}
    folder, file = Path(record.get("folder", "an unknown folder")), None
    if run.source is not None:
        folder, file = run.source.file.absolute().parent, run.source.file.absolute()
    gone = "" if file is None or os.path.isfile(file) else f", where {file.name} is gone"
    refused = UserError(
        f"RUN is {run.name}, whose study has its own code in {folder}{gone}; only code in the working "
        "directory is executed without --study: review it, then resume there, or with --study"
    )
    if not (run.named or _is_trusted(run, folder)):
        raise refused
    found = codes(run.study, folder, file, None if run.named else run.folder.parent)
    if run.source is None and any(code.is_installed for code in found):
        raise refused
    here, problems = packages(found), []
    for name, had in record.get("packages", {}).items():
        if here.get(name) != had:
            problems.append(
                f"RUN is {run.name}, whose study's code imports {name}, version {had} when it began and "
                f"{here.get(name) or 'not installed'} now; install that version, or start a new run"
            )
    raise_problems(problems)
    return replace(run, codes=found)


def _is_trusted(run: Run, folder: Path) -> bool:
    """Return whether the code of a study that only the record names belongs to the user.

    If the study's file exists, it was compared with the record. Then only `--set` can make the record name other code.
    """
    if run.source is None:
        return folder == Path.cwd()
    told = any(each.partition("=")[0] == "methods" for each in run.source.settings)
    return not told and os.path.isfile(run.source.file) and run.source.may_be_executed(run.folder.parent)


def trials(run: Run) -> list[TrialRow]:
    """Return the trials in the ledger, and the rows that a driver would add for the rest of the plan."""
    rows: list[TrialRow] = []
    if os.path.exists(run.folder / LEDGER):
        with reading(run.folder / LEDGER) as ledger:
            rows = ledger.rows(TRIALS)
    known = {row["trial_id"] for row in rows}
    return rows + [first_row(run.name, trial) for trial in grown(run.plan, rows).trials if trial.trial_id not in known]


def source_record(run: Run) -> dict[str, Any] | None:
    """Return the source of the study, with the digests of the files that were executed last."""
    if run.source is None:
        return None
    file = run.source.file.absolute()
    digests = known_digests(file) or run.source.digests
    return asdict(run.source) | {"file": str(file), "digests": digests}


def find(out: Path, name: str) -> Path:
    """Return the folder of a run. `name` is its name under `out`, its path, or its URL.

    Raises `UserError` if there is no such run, or if the path of its ledger is too long.
    """
    for folder in (out / name, path_of(name)):
        check_names(folder)
        if Mirror.of(folder).url is not None:
            pull(folder)
        if os.path.exists(folder / STUDY):
            if (why := too_long(folder / LEDGER)) is not None:
                raise UserError(f"RUN is {folder}, where {why}; move it to a folder with a shorter path")
            # The caller needs its name, and its parent, which contains the teachers' folder.
            return folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    names = [folder.name for folder in existing(out)]
    raise UserError(f"RUN is {name!r}; allowed: a run under {out} ({', '.join(names) or 'there is none'}) or its path")


def existing(out: Path) -> list[Path]:
    """Return the folders of all runs under `out`, newest first."""
    for name in in_store(out):
        if not problems_with_name(name):
            pull(out / name)
    found = [path.parent for path in out.glob(f"*/{STUDY}") if os.path.exists(path)]
    return sorted(found, key=lambda folder: (folder / STUDY).stat().st_mtime, reverse=True)


def reopen(folder: Path) -> Run:
    """Load a run. Raises `UserError` if its record was changed, or does not match this version."""
    try:
        record = study_record.load(folder / STUDY)
    except UserError as mistake:
        told = (problem.removesuffix("; restore the file") for problem in mistake.problems)
        raise UserError(*(f"{problem}; restore the file, or start a new run" for problem in told)) from mistake
    try:
        run = _from_record(folder, record)
        begun, here, commit = record["versions"]["tune_kd"], version("tune_kd"), record["git_commit"]
        planned_trials = set(record["trials"])
    except (ValueError, KeyError, TypeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"{folder}/study.json was changed after the run began, or was written by another version ({what}); "
            "restore the file, or start a new run"
        ) from error
    if begun != here:
        raise UserError(
            f"RUN is {folder.name}, started by tune_kd {begun}; this is {here}, whose records differ: finish the run "
            "with the version that started it"
        )
    try:
        planned = run.plan
    except UserError as mistake:
        raise UserError(
            f"RUN is {folder.name}, started by tune_kd {begun} at commit {commit or 'unknown'}; this version does "
            f"not allow its study ({'; '.join(mistake.problems)}); finish it with that version, or start a new run"
        ) from mistake
    if {trial.trial_id for trial in planned.trials} != planned_trials:  # a version may plan them in another order
        raise UserError(
            f"{folder}/study.json was planned by tune_kd {begun}, and this version plans "
            "other trials from it; resume the run with that version"
        )
    return run


def _from_record(folder: Path, record: dict[str, Any]) -> Run:
    """Return the run of a `study.json`. Raises `ValueError`, KeyError or TypeError if the record is malformed."""
    data, source = record["data"], record["source"]
    return Run(
        name=record["run"],
        folder=folder,
        study=from_json((record["extended"] or record)["study"]),
        data_digest=str(data["digest"]),
        data_dir=None if data["dir"] is None else Path(data["dir"]),
        settings=record["settings"],
        source=None if source is None else adapter(Source).validate_python(source),
        look=record["look"],
    )


def _git_commit() -> str | None:
    """Return the commit of this checkout, marked if it has local changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
