"""A run's folder: where it is, who holds it, and the `study.json` that everything else follows from."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from tune_kd.records.adaptive_plan import grown
from tune_kd.records.ledger import LAYOUT, LEDGER, RUN_NAME, TRIALS, Row, first_row, reading, too_long
from tune_kd.records.sync import HOLDER, STUDY, pull, stamped
from tune_kd.records.sync import runs as in_store
from tune_kd.study import record as study_record
from tune_kd.study.discover import from_json, resolve
from tune_kd.study.plan import Plan, plan
from tune_kd.study.source import digests as known_digests
from tune_kd.study.source import folders
from tune_kd.study.spec import Study
from tune_kd.study.trial import digest
from tune_kd.system import signals
from tune_kd.system.crash_points import point
from tune_kd.system.errors import UserError
from tune_kd.system.files import (
    MOST_RECORD_BYTES,
    check_names,
    links,
    obstacle,
    opened,
    parsed,
    publish,
    read,
    sealed,
    unsealed,
)
from tune_kd.system.object_store import Mirror, path_of
from tune_kd.system.secrets import secrets

PACKAGES = ("tune_kd", "torch", "torchvision", "ray", "numpy", "pandas", "pyarrow", "scipy")
RESERVED = ("teachers",)
UNSEEN = 150.0  # seconds after which a driver elsewhere, which sends every 30, is taken for dead
MOST_SOURCE_BYTES = 2**22  # of a file of a study, to be compared and not executed
PATIENCE = 2.0  # seconds for which another driver may hold a run before this one gives up


@dataclass(frozen=True)
class Source:
    """Where a study came from, so that a change of it is noticed."""

    file: Path
    scale: str
    data: str | None = None
    settings: tuple[str, ...] = ()  # of `--set`
    digests: dict[str, str] | None = None  # SHA-256 of the file and of what it imported from its folder, by path

    def read(self) -> Study:
        """The study as its file declares it now. That executes the file. Raises `UserError`."""
        return resolve(self.file, self.scale, self.data, self.settings)

    @property
    def is_unchanged(self) -> bool:
        """Whether the files of the study hold what they did when the run began. Executes nothing."""
        try:
            return bool(self.digests) and all(
                hashlib.sha256(read(Path(path), MOST_SOURCE_BYTES)).hexdigest() == digest
                for path, digest in (self.digests or {}).items()
            )
        except (OSError, ValueError):
            return False

    def may_be_executed(self, results: Path) -> bool:
        """Whether the file stands where the caller would have his own: among the installed studies, in the working
        directory or its `search_spaces`; and not among results, which may have come from anybody, as the record has
        that names the file."""
        place = self.file.resolve().parent
        near = {folder.resolve() for folder in (*folders(), Path.cwd())}
        return place in near and not place.is_relative_to(results.resolve())


@dataclass(frozen=True)
class Run:
    """A run on disk, and what `resume` needs to go on with it."""

    name: str
    folder: Path
    study: Study
    data_digest: str
    data_dir: Path | None
    settings: dict[str, Any]  # shares and options that do not change results
    source: Source | None = None
    look: int = 0  # up to which of the looks that its study declares
    named: bool = False  # whether the caller has named the study's file, and not only the record

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
    """The name of a new run, given or made from the study and the time. Raises `UserError`; creates nothing."""
    if name is None:
        name = f"{study.name}-{study.scale}-{datetime.now():%Y%m%d-%H%M%S}"
    problems = [*problems_with_name(name), *secrets(asdict(study), "study")]
    if not problems and os.path.exists(out / name) and not _unbegun(out / name):
        problems.append(f"--name is {name!r}, and {out / name} exists; resume that run or choose another name")
    if (there := obstacle(out)) is not None:
        problems.append(f"--out is {out}, and {there} cannot be written to; allowed: a folder that can be made")
    if (why := too_long(out / name / LEDGER)) is not None:
        problems.append(f"--out is {out}, where {why}; choose a folder with a shorter path")
    problems += _in_the_way(out, name)
    if problems:
        raise UserError(*problems)
    return name


def _in_the_way(out: Path, name: str) -> list[str]:
    """What keeps a new run from being begun in a store, as sentences."""
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
            f"--out is {mirror.url}, which cannot be written to ({error}); allowed: a bucket that is there, with "
            "keys for it where the store's own tools have theirs"
        ]
    return []


def problems_with_name(name: str) -> list[str]:
    """What keeps a run from having this name, as sentences."""
    if RUN_NAME.fullmatch(name) and name not in RESERVED:
        return []
    return [
        f"--name is {name!r}; allowed: 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit, "
        f"and not {', '.join(RESERVED)}"
    ]


def check_links(run: Run) -> None:
    """Raise `UserError` for links where the run writes: into its folder, and into those of its teachers. Results may
    come from anybody, who could have made a link to any file of the caller's."""
    folders = [run.folder, run.teachers]
    if not run.teachers.is_symlink():
        folders = [run.folder, *(run.teachers / teacher.trial_id for teacher in run.plan.teachers)]
    found = [path for folder in folders for path in links(folder)]
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"RUN is {run.name}, and nothing is written through links, such as "
            f"{', '.join(f'{path} (to {os.readlink(path)})' for path in found[:5])}{more}; allowed: files and folders; "
            "put there what they link to, or remove them"
        )


@contextmanager
def begun(run: Run) -> Iterator[None]:
    """A new run on disk, held by this process. Nothing stays of one whose plan cannot be written, or that a `UserError`
    ends before a row is written."""
    check_links(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=_unbegun(run.folder))
    except OSError as error:
        raise UserError(f"--out: {run.folder} cannot be made ({error.strerror}); choose another folder") from error
    try:
        with held(run.folder):
            if not _unbegun(run.folder):
                raise UserError(f"--name is {run.name!r}, and {run.folder} was begun meanwhile; choose another name")
            try:
                create(run)
                yield
            except BaseException as error:
                first = run.folder / "trials.parquet"  # of a driver's files
                if not (run.folder / STUDY).exists() or (isinstance(error, UserError) and not first.exists()):
                    shutil.rmtree(run.folder)
                raise
    except OSError:
        if _unbegun(run.folder):  # the disk has not even taken who holds it
            shutil.rmtree(run.folder)
        raise


def _unbegun(folder: Path) -> bool:
    """Whether a folder holds nothing but what a kill leaves before the plan is there."""
    return folder.is_dir() and all(path.name.startswith(".") or path.name == HOLDER for path in folder.iterdir())


def create(run: Run) -> None:
    """Write `study.json` into a run's folder: the study, its hash, the contrasts, and what runs where."""
    run.folder.mkdir(parents=True, exist_ok=True)
    planned = run.plan
    contrasts = [asdict(contrast) for contrast in planned.contrasts]
    resolved = asdict(run.study)
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
        "data": {
            "name": run.study.data.name,
            "digest": run.data_digest,
            "dir": None if run.data_dir is None else str(run.data_dir.absolute()),
        },
        "settings": run.settings,
        "source": _source(run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
    }
    if problems := list(secrets(record)):
        raise UserError(*problems)
    publish(run.folder / STUDY, sealed(record))
    Mirror.of(run.folder).send(run.folder / STUDY)
    point("study.published")


def changes(run: Run) -> list[str]:
    """In what the study's file differs from the study that the run began with, a line a field."""
    now = _declared(run)
    return [] if now is None else _differences(asdict(run.study), asdict(now))


def with_file(run: Run, file: Path) -> Run:
    """The run with its study in a file that the caller names, and so may be executed."""
    source = run.source or Source(file, run.study.scale)
    return replace(run, source=replace(source, file=file, digests=None), named=True)


def _declared(run: Run) -> Study | None:
    """The study as its file declares it now; null where the file is gone, or is not the caller's and holds what it
    did when the run began. Raises `UserError` where it would have to be executed, and only the record names it."""
    source = run.source
    if source is None or not (run.named or os.path.isfile(source.file)):
        return None
    if run.named or source.may_be_executed(run.folder.parent):
        return source.read()
    if source.is_unchanged:
        return None
    how = "is not what it was when the run began" if source.digests else "has no digest on record"
    raise UserError(
        f"RUN is {run.name}, whose study.json says that its study is {source.file}, which {how}; only a study that is "
        "installed, or stands in the working directory, is executed without being named: look at it, and resume with "
        f"--study {quote(str(source.file))}"
    )


def extended(run: Run, settings: Sequence[str] = ()) -> Run:
    """The run with what its study allows to be added: the next of its looks, or, where its file or these settings
    declare them now, seeds after those that it had and levels after those that a factor had.

    Raises `UserError` where nothing was added, or anything else was changed.
    """
    waiting = sum(row["status"] in ("pending", "running") for row in trials(run))
    if waiting:
        raise UserError(f"RUN is {run.name}, where {waiting} trials are still to run; resume it, and then --extend")
    if run.source is not None:
        run = replace(run, source=replace(run.source, settings=(*run.source.settings, *settings)))
    now = _declared(run)
    if now is None and settings:
        raise UserError(
            f"RUN is {run.name}, whose study {_file(run)} is to be --set; name its file with --study, which is executed"
        )
    now = now or run.study
    before, confirm = asdict(run.study), run.study.confirm
    if found := _differences(before, asdict(_without_additions(run.study, now))):
        raise UserError(
            f"RUN is {run.name}, and --extend admits only seeds after those of confirm.seeds (where no looks are "
            f"declared) and levels after those of a factor; its study {_file(run)} differs in: {'; '.join(found)}"
        )
    last = len(confirm.looks or (0,)) - 1
    if now == run.study and run.look == last:
        more = "its last look is done" if confirm.looks else f"{_file(run)} declares the same seeds and levels"
        raise UserError(f"RUN is {run.name}, to which --extend has nothing to add: {more}")
    return replace(run, study=now, look=min(run.look + 1, last) if now == run.study else run.look)


def record_extension(run: Run) -> None:
    """Write into `study.json` what `extended` added. What the study fixed at first, and its hash, stay beside it."""
    record = unsealed(read(run.folder / STUDY, MOST_RECORD_BYTES), run.folder / STUDY)
    resolved, planned = asdict(run.study), run.plan
    record |= {"look": run.look, "trials": [trial.trial_id for trial in planned.trials], "source": _source(run)}
    if digest(resolved) != record["study_sha256"]:
        arms = [{"name": arm.name, "role": arm.role} for arm in planned.arms]
        at = datetime.now(UTC).isoformat(timespec="seconds")
        searches = [asdict(search) for search in planned.searches]
        record["extended"] = {
            "study": resolved, "study_sha256": digest(resolved), "arms": arms, "searches": searches, "at": at
        }  # fmt: skip
    if problems := list(secrets(record)):
        raise UserError(*problems)
    publish(run.folder / STUDY, sealed(record))
    Mirror.of(run.folder).send(run.folder / STUDY)
    point("extension.recorded")


def trials(run: Run) -> list[Row]:
    """The rows of the ledger's trials, and of those that come into it when a driver takes the plan over."""
    rows: list[Row] = []
    if os.path.exists(run.folder / LEDGER):
        with reading(run.folder / LEDGER) as ledger:
            rows = ledger.rows(TRIALS)
    known = {row["trial_id"] for row in rows}
    return rows + [first_row(run.name, trial) for trial in grown(run.plan, rows).trials if trial.trial_id not in known]


def _source(run: Run) -> dict[str, Any] | None:
    """Where the study came from, for the record: with digests of what was executed last, if it was."""
    if run.source is None:
        return None
    file = run.source.file.absolute()
    digests = known_digests(file) or run.source.digests
    return asdict(run.source) | {"file": str(file), "digests": digests}


def _file(run: Run) -> str:
    return "as recorded" if run.source is None else str(run.source.file)


def _without_additions(before: Study, now: Study) -> Study:
    """What is declared now, less what may be added to what was declared before."""
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
    """A line for each field in which two studies, as plain values, differ."""
    if name == "rate":  # which prices are made with, and no result
        return []
    if name == "factors":
        before, now = ({each["name"]: each["levels"] for each in one} for one in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for field in dict.fromkeys((*before, *now)):
            found += _differences(before.get(field), now.get(field), f"{name}.{field}" if name else field)
        return found
    return [] if before == now else [f"{name} was {json.dumps(before)} and is {json.dumps(now)}"]


def find(out: Path, name: str) -> Path:
    """The folder of a run that is named under `out` or given as a path or URL. Raises `UserError` where there is none,
    or its ledger cannot be opened there."""
    for folder in (out / name, path_of(name)):
        check_names(folder)
        if Mirror.of(folder).url is not None:
            pull(folder)
        if os.path.exists(folder / STUDY):  # what it is, its reader says
            if (why := too_long(folder / LEDGER)) is not None:
                raise UserError(f"RUN is {folder}, where {why}; move it to a folder with a shorter path")
            return (
                folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
            )  # its teachers lie beside it
    names = [folder.name for folder in existing(out)]
    raise UserError(f"RUN is {name!r}; allowed: a run under {out} ({', '.join(names) or 'there is none'}) or its path")


def existing(out: Path) -> list[Path]:
    """The folders of all runs under `out`, the newest first."""
    for name in in_store(out):
        if RUN_NAME.fullmatch(name) and name not in RESERVED:
            pull(out / name)
    found = [path.parent for path in out.glob(f"*/{STUDY}") if os.path.exists(path)]
    return sorted(found, key=lambda folder: (folder / STUDY).stat().st_mtime, reverse=True)


def reopen(folder: Path) -> Run:
    """A run as it was begun. Raises `UserError` where its record does not fit itself or this version."""
    try:
        record = study_record.load(folder / STUDY)
    except UserError as mistake:
        raise UserError(
            *(f"{problem.removesuffix('; restore the file')}; restore the file, or start a new run"
              for problem in mistake.problems)
        ) from mistake  # fmt: skip
    try:
        run = Run(
            name=record["run"],
            folder=folder,
            study=from_json((record["extended"] or record)["study"]),
            data_digest=str(record["data"]["digest"]),
            data_dir=None if record["data"]["dir"] is None else Path(record["data"]["dir"]),
            settings=record["settings"],
            source=None if record["source"] is None else TypeAdapter(Source).validate_python(record["source"]),
            look=record["look"],
        )
        begun, here, commit = record["versions"]["tune_kd"], version("tune_kd"), record["git_commit"]
        planned_trials = set(record["trials"])
    except (ValueError, KeyError, TypeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"{folder}/study.json was changed after the run began, or is another version's ({what}); "
            "restore the file, or start a new run"
        ) from error
    if begun != here:
        raise UserError(
            f"RUN is {folder.name}, begun by tune_kd {begun}; this is {here}, whose records differ: finish it with the "
            "version that began it"
        )
    try:
        planned = run.plan
    except UserError as mistake:
        raise UserError(
            f"RUN is {folder.name}, begun by tune_kd {begun} at commit {commit or 'unknown'}, which "
            f"allowed what this one does not ({'; '.join(mistake.problems)}); finish it with that one, or start anew"
        ) from mistake
    if {trial.trial_id for trial in planned.trials} != planned_trials:  # their order is this version's
        raise UserError(
            f"{folder}/study.json was planned by tune_kd {begun}, and this version plans "
            "other trials from it; resume it with that version"
        )
    return run


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other drivers out while this one runs. The system frees the lock with its process."""
    lock = FileLock(folder / ".lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        who = holder(folder) or {}
        raise UserError(
            f"RUN is {folder.name}, which process {who.get('pid', '?')} on {who.get('host', '?')} holds since "
            f"{who.get('since', '?')}; wait for it or stop it (`tune_kd status {folder.name}` shows it)"
        ) from None
    except OSError as error:
        raise UserError(f"RUN is {folder}, which cannot be written to ({error.strerror}); make it writable") from error
    mirror = Mirror.of(folder)
    try:
        _check_unheld(mirror, folder)
        for aside in folder.glob(".*.[0-9]*"):  # of writers that were killed: nobody else writes here now
            aside.unlink(missing_ok=True)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        _put_holder(folder, {"pid": signals.process_id(), "host": platform.node(), "since": since, "dashboard": None})
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        with suppress(OSError):  # else it is seen to be old
            mirror.forget(folder / HOLDER)
        lock.release()


def _check_unheld(mirror: Mirror, folder: Path) -> None:
    """Raise `UserError` where a driver on another machine has this run in a store. It says so again with each sending;
    a store has no lock that dies with its holder."""
    there = mirror.read(folder / HOLDER, MOST_RECORD_BYTES)
    try:
        who = {} if there is None else parsed(there)
        age = time.time() - float(who.get("seen", 0))
    except (ValueError, AttributeError, TypeError):
        return
    if who.get("host", platform.node()) != platform.node() and age < UNSEEN:
        raise UserError(
            f"RUN is {folder.name}, which process {who.get('pid')} on {who['host']} holds since {who.get('since')}, "
            f"seen {age:.0f} s ago; wait for it or stop it; one not seen for {UNSEEN:.0f} s is taken for dead"
        )


def tell_dashboard(folder: Path, url: str | None) -> None:
    """Have whoever looks at a run that this process holds know where Ray's dashboard is."""
    _put_holder(folder, (holder(folder) or {}) | {"dashboard": url})


def _put_holder(folder: Path, who: dict[str, Any]) -> None:
    publish(folder / HOLDER, json.dumps(who).encode())
    Mirror.of(folder).send(folder / HOLDER, stamped(json.dumps(who).encode()))


@dataclass(frozen=True)
class _Holder:
    pid: int
    host: str
    since: str
    dashboard: str | None


def holder(folder: Path) -> dict[str, Any] | None:
    """Who runs a run now: `pid`, `host`, `since`, and the `dashboard` of its Ray, once that is there. Null where nobody
    does, also after a kill."""
    with suppress(OSError, ValueError):  # there is none, it is being written, or just went
        found = asdict(TypeAdapter(_Holder).validate_python(parsed(read(folder / HOLDER, MOST_RECORD_BYTES))))
        # To be read only: whoever looks may have no right to write.
        with opened(folder / ".lock", MOST_RECORD_BYTES) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return found
    return None


def _git_commit() -> str | None:
    """The commit of the project that runs, marked where files were changed since; null outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
