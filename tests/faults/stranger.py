"""Can a results folder from a stranger make a command do something forbidden? Alter files of a results folder, with
matching digests, and run every command that reads one.

A file counts as a VIOLATION if a command runs code of the stranger or another program, writes outside of the folder,
makes a connection, takes more than 10 s or 2 GB, or ends with a traceback, by a signal, or with another status than 0,
1, 2 or 3. Training is cut short, and runs in the command's own process instead of on Ray.

    python tests/faults/stranger.py                                     5,000 files; about an hour on two cores
    python tests/faults/stranger.py --files 200 --seed 7 --jobs 1
    python tests/faults/stranger.py --seed 7 --only 123 --keep FOLDER   repeat one file, and keep it in FOLDER
"""

import argparse
import faulthandler
import fcntl
import gc
import hashlib
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a command: import this checkout
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from conftest import trained, tunable
from faults import damage, mutations
from faults.here import go_on
from faults.mutations import ALONE, AUDIT, Chance, Mutation, Stranger, chosen, mutate
from faults.sentry import PACKAGE, Sentry
from tune_kd import cli
from tune_kd.analysis import early_stopping, grace
from tune_kd.execute import cluster as connection, ray_tune
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Task, Workplace, work
from tune_kd.records import ledger, lock, reader, run_folder
from tune_kd.records.schema import SCHEMAS
from tune_kd.records.sync import HOLDER, STUDY
from tune_kd.reporting import report as reporting
from tune_kd.study.trial import Epoch
from tune_kd.study.tuning import LogUniform, Range, Tuning
from tune_kd.system import environment, streams

WITHIN = 10.0  # maximum seconds for a command
IDLE = 3.0  # seconds without work after which a process counts as waiting
MOST_BYTES = 2 * 2**30  # of memory
MOST_EPOCHS = 3  # maximum number of epochs that a resumed run trains here
TEXTS = ("md", "csv", "tex")  # formats of reports
FORMATS = reporting.FORMATS
FIGURES_EVERY = 25  # every 25th file, reports include figures
LAST = 2000  # last characters of a command's output to keep
STATUSES = (0, 1, 2, 3)
BASES = ("finished", "cut", "tuned")
EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("this must not run")
from faults.damage import study
"""


def make_bases(folder: Path) -> None:
    """Create results folders of intact runs: one that has finished, one whose driver was killed, and one that is tuned.
    Each also has tables that no run wrote."""
    torch.set_num_threads(1)
    source = folder / "tiny.py"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text("from faults.damage import study\n")
    for name in BASES:
        results = folder / name
        if name == "tuned":
            ranges = (Range("lr", LogUniform(0.01, 1.0)), Range("temperature", LogUniform(1.0, 16.0)))
            trained(tunable(Tuning(ranges, budget=2, sampler="random")), results / "r")
        else:
            damage.make(results, name)
        _as_by_command(results / "r" / STUDY, source if name == "finished" else None)
        opened = run_folder.reopen(results / "r")
        if name != "cut":
            with lock.held(opened.folder):
                go_on(opened)
            loaded = reader.load(opened.folder)
            grace.record(
                opened.folder, opened.name, opened.study, early_stopping.rank_correlations(loaded, everywhere=True)
            )
            reporting.report(loaded, opened.folder / "report", TEXTS)
        if not (opened.folder / AUDIT).exists():
            shutil.copy(folder / "finished" / "r" / AUDIT, opened.folder / AUDIT)
        who = {"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00 +0000", "dashboard": None}
        (opened.folder / HOLDER).write_text(json.dumps(who))
        (opened.folder / ".lock").touch()
        for schema in SCHEMAS:
            shutil.copy(opened.folder / f"{schema.name}.parquet", results / f"{ALONE}_{schema.name}.parquet")
        shutil.rmtree(results / "cache", ignore_errors=True)


def _as_by_command(path: Path, file: Path | None) -> None:
    """Add to a plan what the command `run` records: resource shares, and the study's file."""
    record = mutations.unsealed(path)
    shares = {"gpus_per_trial": 0.0, "cpus_per_trial": 1.0, "max_concurrent": None, "keep_checkpoints": False}
    record["settings"] = {**shares, "track": []}
    record["source"] = file and {"file": str(file), "scale": "test", "data": None, "settings": []}
    path.write_bytes(mutations.sealed(record))


def forms(number: int, quick: bool) -> tuple[str, ...]:
    """Return the formats of a file's reports. If `quick`, files take turns."""
    if number % FIGURES_EVERY == 0:
        return FORMATS
    return (TEXTS[number % len(TEXTS)],) if quick else TEXTS


def commands(stranger: Stranger, made: Sequence[str], kind: str, study: Path) -> list[list[str]]:
    """Return the commands for a folder, in order, since `resume` may change it. `made` are the formats of reports."""
    folder, out, formats = str(stranger.run), ["--out", str(stranger.results)], ["--format", ",".join(made)]
    if kind == "tables of others":
        return [["report", str(stranger.results / ALONE), "--to", str(stranger.results / "report"), *formats]]
    return [
        ["list", *out],
        ["plan", str(study), *out],
        ["status", folder],
        ["status", folder, "--verify"],
        ["report", folder, *formats],
        ["resume", folder],
        ["status", folder, "--verify"],
    ]


READERS = {
    "tables of others": ("report",),
    **dict.fromkeys(("ledger.sqlite", "ledger.commits"), ("status", "resume")),
    **dict.fromkeys(("tables", "tables.json"), ("status", "report", "resume")),
    **dict.fromkeys(("checkpoint", "teacher's weights", "teacher's card", "answers"), ("status", "resume")),
    "audit.json": ("plan",),
    "holder.json": ("status", "resume"),
}
"""The commands that open a kind of file, if not all of them do."""
LONG = ("report", "resume")  # commands that take most of the time


def run_here(
    driver: Driver,
    place: Workplace,
    slots: int,
    beat: Callable[[], None],
    data: Any = None,
    trackers: Sequence[Any] = (),
) -> None:
    """Replace Ray: run trials in turn in this process, and drain the driver after `MOST_EPOCHS` epochs."""
    left = MOST_EPOCHS

    def some(task: Task, place: Workplace) -> Iterator[Epoch]:
        nonlocal left
        for epoch in work(task, place):
            yield epoch
            left -= 1
            beat()
            if left <= 0:
                driver.drain()

    run_in_process(driver, replace(place, data=data), some)  # type: ignore[arg-type]


def without_ray(tmp: Path) -> None:
    """Replace Ray in this process: commands connect to no cluster, and trials run here."""
    cluster = connection.Cluster(cpus=2.0, gpus=0.0, dashboard=None, ours=False, logs=tmp, parts=(), guarded=True)
    connection.connect = lambda address, metadata=None: cluster
    connection.check_nodes = lambda folder, patience=0.0: None
    ray_tune.run_on_ray = run_here  # type: ignore[assignment]
    ledger.TABLES_APART = 0.0  # no pause for readers
    environment.check_places = lambda address: None  # these folders are Ray's


Made = Callable[[Stranger, Chance, str], Mutation]


@dataclass(frozen=True)
class Violation:
    """A forbidden action of a command. `place` is the line of tune_kd, if known."""

    kind: str  # code, outside, connection, hang, memory, traceback, signal, status; or harness, for a bug here
    command: str
    what: str
    place: str
    stack: str = ""


@dataclass
class Ended:
    """How a command ended: its status, or `killed` or `died`."""

    command: str
    status: int | str
    seconds: float


@dataclass
class Outcome:
    """The results of all commands on a mutated folder."""

    number: int
    kind: str
    base: str
    mutation: Mutation
    ended: list[Ended] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    around: dict[str, str] = field(default_factory=dict)  # files around it before the commands


# In the child


def child(
    stranger: Stranger,
    todo: Sequence[Sequence[str]],
    to: int,
    setup: Callable[[], None],
    before: Callable[[], Mutation] | None,
) -> NoReturn:
    """Run commands like the command line, and report each to the parent through a pipe. `before` mutates the folder,
    `setup` may patch this process."""
    tell = os.fdopen(to, "w")

    def say(**words: Any) -> None:
        tell.write(json.dumps(words) + "\n")
        tell.flush()

    try:
        _isolate(stranger)
        tmp = stranger.root / "tmp"
        without_ray(tmp)
        if before is not None:
            say(begun="mutation")
            mutation = before()
            say(what=mutation.what, fits=mutation.fits, around=fingerprint(stranger))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))
        setup()
        sentry = Sentry(stranger.root, (stranger.results, tmp, stranger.root / "cwd"))
        lock = _locked(stranger.run / ".lock")
        faulthandler.register(signal.SIGUSR2, (tmp / "where").open("w"), all_threads=False)
        sentry.watch()
        for place, arguments in enumerate(todo):
            if arguments[0] == "resume" and lock is not None:
                os.close(lock)
                lock = None
            say(begun=" ".join([arguments[0], *(each for each in arguments if each == "--verify")]), number=place)
            output, began = tmp / "output", time.monotonic()
            status, trace = _command(arguments, output)
            words = output.read_text(errors="replace")
            say(
                status=status,
                seconds=time.monotonic() - began,
                seen=sentry.taken(),
                output=words[-LAST:],
                trace=trace or _traced(words),
            )
    except BaseException:
        say(broken=traceback.format_exc())
    finally:
        os._exit(0)


def _isolate(stranger: Stranger) -> None:
    """Give this process its own session, home and folders, and the warning filters of a command."""
    os.setsid()
    os.chdir(stranger.root / "cwd")
    for name in [name for name in os.environ if name.startswith(("XDG_", "AWS_", "MLFLOW_", "WANDB_", "RAY_"))]:
        del os.environ[name]
    home, tmp = str(stranger.root / "home"), str(stranger.root / "tmp")
    os.environ |= {"HOME": home, "TMPDIR": tmp, "RAY_TMPDIR": "/tmp", "RAY_AUTH_TOKEN": "x", "MPLCONFIGDIR": tmp}
    os.environ |= {"XDG_CACHE_HOME": tmp, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    tempfile.tempdir = tmp
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _locked(path: Path) -> int | None:
    """Hold a run's lock like a driver: only then do commands read who holds it."""
    if not path.is_file() or path.is_symlink():
        return None
    lock = os.open(path, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _command(arguments: Sequence[str], output: Path) -> tuple[Any, str]:
    """Run a command with its output in a file. Returns its exit status, and its traceback if it raised."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["tune_kd", *arguments]
    try:
        streams.made_safe()
        cli.main()
        status: Any = 0
    except SystemExit as left:
        status = 0 if left.code is None else left.code
    except BaseException as error:  # also errors that are no Exception, such as a panic in Rust
        return -1, "".join(traceback.format_exception(error))
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    return status, ""


def _traced(words: str) -> str:
    """Return the traceback that a command printed, if any."""
    mark = "Traceback (most recent call last)"
    if mark in words:
        return words[words.rindex(mark) :]
    return words[-LAST:] if "this is a bug in tune_kd" in words else ""


# In the parent


@dataclass
class Watch:
    """The parent's view of a child that runs commands."""

    pid: int
    pipe: int
    listener: socket.socket
    now: str = "start"
    number: int = -1
    since: float = field(default_factory=time.monotonic)
    before: float = 0.0  # CPU seconds until `since`
    worked: float = 0.0  # CPU seconds until now
    working: float = field(default_factory=time.monotonic)  # last time at which `worked` had grown
    rest: str = ""

    def lines(self, patience: float) -> list[dict[str, Any]] | None:
        """Return what the child has reported since the last call; None once it has exited."""
        if not select.select([self.pipe], [], [], patience)[0]:
            return []
        data = os.read(self.pipe, 2**16)
        if not data:
            return None
        *whole, self.rest = (self.rest + data.decode()).split("\n")
        return [json.loads(line) for line in whole]

    def was_contacted(self) -> bool:
        """Whether something connected to the forbidden port."""
        with suppress(BlockingIOError):
            self.listener.accept()[0].close()
            return True
        return False

    def hangs(self) -> str | None:
        """Return why a command takes too long, else None. A command that works is judged by its CPU time, so that other
        work on the machine does not count; a command that waits, by wall time."""
        now, spent = time.monotonic(), self._worked()
        if spent != self.worked:
            self.worked, self.working = spent, now
        if spent - self.before > WITHIN:
            return f"works for more than {WITHIN:.0f} s"
        if now - self.since > WITHIN and now - self.working > IDLE:
            return f"waits for more than {WITHIN:.0f} s"
        return None

    def begins(self, command: str, number: int) -> None:
        self.now, self.number, self.since, self.before = command, number, time.monotonic(), self._worked()

    def _worked(self) -> float:
        """Return the CPU seconds of the process."""
        with suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return self.worked

    def memory(self) -> int:
        with suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        return 0

    def where(self, dump: Path) -> tuple[str, str]:
        """Return the child's current line of tune_kd and the lines that led there, which it dumps to a file."""
        with suppress(OSError):
            os.kill(self.pid, signal.SIGUSR2)
            time.sleep(0.2)
            return _lines([(file, line, name) for file, line, name in re.findall(FRAME, dump.read_text())][::-1])
        return "", ""

    def end(self) -> None:
        for target in (partial(os.killpg, self.pid), partial(os.kill, self.pid)):
            with suppress(ProcessLookupError, PermissionError):
                target(signal.SIGKILL)


def observed(
    stranger: Stranger,
    outcome: Outcome,
    todo: Sequence[Sequence[str]],
    listener: socket.socket,
    setup: Callable[[], None],
    before: Callable[[], Mutation] | None,
) -> int | None:
    """Run commands in a child and note how they end. Returns the number of the command at which the child was lost;
    None if it survived."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        child(stranger, todo, there, setup, before)
    os.close(there)
    watch = Watch(pid, here, listener)

    def wrong(kind: str, what: str, place: str = "", stack: str = "") -> None:
        outcome.violations.append(Violation(kind, watch.now, what, place, stack))

    lost: tuple[str, str] | None = None
    at = "", ""
    try:
        while (lines := watch.lines(0.05)) is not None:
            for line in lines:
                _note(line, watch, outcome, wrong)
            if watch.was_contacted():
                lost = "connection", f"to port {listener.getsockname()[1]}"
            elif (memory := watch.memory()) > MOST_BYTES:
                lost = "memory", f"{memory / 1e9:.1f} GB"
            elif (why := watch.hangs()) is not None:
                lost = "hang", why
            if lost is not None:
                at = watch.where(stranger.root / "tmp" / "where")
                watch.end()
                break
    finally:
        os.close(here)
        _, how, used = os.wait4(pid, 0)
        watch.end()  # kill remaining processes
    if lost is not None:
        wrong(*lost, *at)
        outcome.ended.append(Ended(watch.now, "killed", time.monotonic() - watch.since))
        return watch.number
    if os.WIFSIGNALED(how):
        wrong("signal", signal.Signals(os.WTERMSIG(how)).name)
        outcome.ended.append(Ended(watch.now, "died", time.monotonic() - watch.since))
        return watch.number
    if used.ru_maxrss * 1024 > MOST_BYTES:
        wrong("memory", f"{used.ru_maxrss * 1024 / 1e9:.1f} GB")
    return None


def _note(line: dict[str, Any], watch: Watch, outcome: Outcome, wrong: Callable[..., None]) -> None:
    if "broken" in line:
        wrong("harness", line["broken"])  # a bug in this file
        return
    if "begun" in line:
        watch.begins(line["begun"], line.get("number", -1))
        return
    if "what" in line:
        outcome.mutation, outcome.around = Mutation(line["what"], line["fits"]), line["around"]
        return
    outcome.ended.append(Ended(watch.now, line["status"], line["seconds"]))
    for sight in line["seen"]:
        wrong(sight["kind"], sight["what"], sight["place"], sight["stack"])
    if line["trace"]:
        place, stack, last = _read_trace(line["trace"])
        wrong("traceback", last, place, stack)
    elif line["status"] not in STATUSES:
        wrong("status", f"{line['status']!r}: {line['output'][-300:]}")


def _read_trace(trace: str) -> tuple[str, str, str]:
    """Return the innermost line of tune_kd in a printed traceback, the lines that led there, and its last line."""
    words = [line for line in trace.splitlines() if line and not line.startswith((" ", "tune_kd: "))]
    return *_lines(re.findall(FRAME, trace)), (words[-1][:300] if words else "")


FRAME = r'File "([^"]+)", line (\d+),? in (\S+)'  # as printed by `traceback` and `faulthandler`


def _lines(frames: list[tuple[str, str, str]]) -> tuple[str, str]:
    """Return the innermost line of tune_kd among frames (outermost first), and its last eight lines on the stack."""
    lines = [
        f"{os.path.relpath(file, PACKAGE)}:{line} {name}" for file, line, name in frames if file.startswith(PACKAGE)
    ]
    inner = [f"{Path(file).name}:{line} {name}" for file, line, name in frames[-1:]]
    return next(iter([*lines[:-2:-1], *inner]), ""), " < ".join([*inner, *lines[:-9:-1]])


def fingerprint(stranger: Stranger) -> dict[str, str]:
    """Return the modes and digests of all files around the folder."""
    found: dict[str, str] = {}
    for path in sorted(stranger.root.rglob("*")):
        top = path.relative_to(stranger.root).parts[0]
        if top in ("results", "tmp", "cwd") and path.name != "ran":
            continue
        at = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and at.st_size < 2**28 else ""
        found[str(path.relative_to(stranger.root))] = f"{at.st_mode} {content}"
    return found


@dataclass(frozen=True)
class Fuzz:
    """The mutations of one seed. `setup` is called in each child before it is watched, and may patch it."""

    bases: Path
    scratch: Path
    seed: int
    setup: Callable[[], None] = lambda: None
    keep: bool = False
    quick: bool = False  # only commands that open the file, one slow command, and one format of reports

    def outcome(
        self, number: int, listener: socket.socket, kind: str | None = None, mutation: Made | None = None
    ) -> Outcome:
        """Mutate a copy of a folder, and run commands on it. Kind and mutation are random unless given."""
        chance = Chance(f"{self.seed}/{number}")
        drawn, base = chosen(chance), chance.choice(BASES)
        kind = kind or drawn
        base = "cut" if kind == "checkpoint" else base
        outcome = Outcome(number, kind, base, Mutation("", False))
        stranger = Stranger(self.scratch / str(number), listener.getsockname()[1])
        try:
            self.copy(stranger, base)
            made, of_file = mutation or mutate, copy(chance)
            todo = commands(stranger, forms(number, self.quick), kind, self.bases / "tiny.py")
            if self.quick:
                used = READERS.get(kind, ("list", "plan", "status", *LONG))
                left_out = chance.choice(LONG) if {*LONG} <= {*used} else None
                todo = [each for each in todo if each[0] in used and each[0] != left_out]
                if todo[-1] in todo[:-1] and not any(each[0] == "resume" for each in todo):
                    todo.pop()  # nothing has changed since the first check
            self._through(stranger, outcome, todo, listener, lambda: made(stranger, of_file, kind))
            before = outcome.around
            after = fingerprint(stranger)
            changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
            if changed and not any(each.kind in ("outside", "code") for each in outcome.violations):
                outcome.violations.append(
                    Violation("outside", "one of the commands", f"changed {', '.join(changed)[:300]}", "")
                )
        finally:
            if not self.keep:
                shutil.rmtree(stranger.root, ignore_errors=True)
        return outcome

    def _through(
        self,
        stranger: Stranger,
        outcome: Outcome,
        todo: list[list[str]],
        listener: socket.socket,
        before: Callable[[], Mutation] | None,
    ) -> None:
        """Mutate the folder and run all commands. If a child is lost, continue in a new one."""

        def setup() -> None:
            reporting.FORMATS = forms(outcome.number, self.quick)  # of the report that `resume` writes
            self.setup()

        while todo:
            lost = observed(stranger, outcome, todo, listener, setup, before)
            if before is not None and lost is not None and lost < 0:
                outcome.violations.clear()  # violations while a file is altered are the harness's own
                outcome.ended.clear()
                outcome.around = fingerprint(stranger)
            else:
                todo = [] if lost is None else todo[max(0, lost) + 1 :]
            before = None

    def copy(self, stranger: Stranger, base: str) -> None:
        """Copy a base to alter, with folders around it that must not change."""
        shutil.rmtree(stranger.root, ignore_errors=True)
        shutil.copytree(self.bases / base, stranger.results, symlinks=True)
        for each in ("home", "tmp", "cwd", "canary"):
            (stranger.root / each).mkdir()
        for each in (stranger.evil, stranger.canary / "evil.py"):
            each.write_text(EVIL)
        (stranger.canary / "file").write_text("canary")


def forbidden_port() -> socket.socket:
    """Open a port on loopback to which nothing may connect."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    return listener


@dataclass
class Score:
    """The outcomes of all files."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def bad(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.violations]

    def distinct(self) -> list[tuple[Violation, list[Outcome]]]:
        """Return one violation per kind and place, with the files that caused it."""
        found: dict[tuple[str, ...], tuple[Violation, list[Outcome]]] = {}
        for outcome in self.outcomes:
            for each in outcome.violations:
                head = re.sub(r"[0-9]+|/\S+|'[^']*'", "#", each.what)[:40]
                where = (each.kind, each.place) if each.place else (each.kind, each.command, head)
                of = found.setdefault(where, (each, []))[1]
                of += [outcome] if outcome not in of else []
        return sorted(found.values(), key=lambda pair: (pair[0].place, pair[0].kind))

    def summary(self) -> str:
        """Return the score as text."""
        lines = [f"{'file':<18} {'mutated':>8} {'digests fit':>12} {'violations':>11}"]
        for kind in [*mutations.KINDS, None]:
            of = [each for each in self.outcomes if kind in (None, each.kind)]
            fits, bad = sum(each.mutation.fits for each in of), sum(bool(each.violations) for each in of)
            if of:
                lines.append(f"{kind or 'total':<18} {len(of):>8} {fits:>12} {bad:>11}")
        ended = [(each, outcome) for outcome in self.outcomes for each in outcome.ended]
        named = [*STATUSES, *sorted({str(each.status) for each, _ in ended} - {str(each) for each in STATUSES})]
        lines.append(f"\n{'command':<18} " + " ".join(f"{f'ended {name}':>12}" for name in named) + f" {'slowest':>10}")
        for command in dict.fromkeys(each.command for each, _ in ended):
            of_it = [(each, outcome) for each, outcome in ended if each.command == command]
            counts = Counter(str(each.status) for each, _ in of_it)
            slowest, outcome = max(of_it, key=lambda pair: pair[0].seconds)
            lines.append(f"{command:<18} " + " ".join(f"{counts[str(name)]:>12}" for name in named)
                         + f" {slowest.seconds:>8.1f} s, file {outcome.number}")  # fmt: skip
        by_kind = Counter(each.kind for outcome in self.outcomes for each in outcome.violations)
        lines.append(f"\n{len(self.bad)} files of {len(self.outcomes)} with violations; {dict(by_kind)}")
        for each, outcomes in self.distinct():
            first = outcomes[0]
            lines.append(f"\n{each.kind}: `{each.command}` {each.what}\n  at {each.place or 'an unknown place'}")
            lines += [f"  by {each.stack}"] if each.stack else []
            lines.append(f"  {first.kind} of the {first.base} run: {first.mutation.what[:300]}")
            lines.append(f"  {len(outcomes)} files: {', '.join(f'--only {each.number}' for each in outcomes[:8])}")
        return "\n".join(lines)


_fuzz: list[tuple[Fuzz, socket.socket]] = []  # of a worker process


def _begin(fuzz: Fuzz) -> None:
    torch.set_num_threads(1)
    _fuzz[:] = [(fuzz, forbidden_port())]


def _one(number: int) -> Outcome:
    fuzz, listener = _fuzz[0]
    return fuzz.outcome(number, listener)


def try_files(fuzz: Fuzz, numbers: Sequence[int], jobs: int, say: Callable[[str], None] = lambda _: None) -> Score:
    """Try files of these numbers in `jobs` processes, which fork from this one after `warm_up`."""
    score, began, shown = Score(), time.monotonic(), time.monotonic()
    with get_context("fork").Pool(jobs, _begin, (fuzz,)) as pool:
        for outcome in pool.imap_unordered(_one, numbers):
            score.outcomes.append(outcome)
            for each in outcome.violations:
                what = f"{each.kind} in `{each.command}`: {each.what[:200]} ({each.place})"
                say(f"file {outcome.number}, {outcome.kind}: {what}")
            if time.monotonic() - shown > 10:
                shown, spent = time.monotonic(), time.monotonic() - began
                done = len(score.outcomes)
                left = spent / done * (len(numbers) - done)
                say(f"{done} of {len(numbers)} files, {len(score.bad)} with violations; {left / 60:.0f} min left")
    score.outcomes.sort(key=lambda outcome: outcome.number)
    return score


def warm_up(fuzz: Fuzz) -> None:
    """Run all commands on intact runs in this process, so that children start with all imports, and disable garbage
    collection."""
    torch.set_num_threads(1)
    tmp = fuzz.scratch / "tmp"
    tmp.mkdir(parents=True, exist_ok=True)
    without_ray(tmp)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for base in BASES:
            stranger = Stranger(fuzz.scratch / base, 0)
            fuzz.copy(stranger, base)
            reporting.FORMATS = FORMATS if base == "cut" else TEXTS
            for arguments in commands(stranger, TEXTS, base, fuzz.bases / "tiny.py"):
                with suppress(SystemExit), patch.object(sys, "argv", ["tune_kd", *arguments]):
                    cli.main()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would copy what children share


def ensure_bases(folder: Path) -> Path:
    """Create the folder of intact runs if it is missing, in another process, so that this one has no threads of
    torch."""
    if not folder.is_dir():
        with get_context("fork").Pool(1) as pool:
            pool.apply(make_bases, (folder,))
    return folder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--files", type=int, default=5000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--only", type=int, action="append", help="only the file of this number; repeatable")
    options.add_argument("--quick", action="store_true", help="run only commands that open the file")
    options.add_argument("--bases", type=Path, help="folder of the intact runs; created if missing")
    options.add_argument("--keep", type=Path, help="folder in which the mutated folders are kept")
    given = options.parse_args()
    memory = Path("/dev/shm")  # syncs are free here
    with tempfile.TemporaryDirectory(prefix="stranger-", dir=memory if memory.is_dir() else None) as folder:
        bases = ensure_bases(given.bases or Path(folder) / "bases")
        scratch = given.keep or Path(folder) / "scratch"
        fuzz = Fuzz(bases.absolute(), scratch.absolute(), given.seed, keep=given.keep is not None, quick=given.quick)
        numbers = given.only or range(given.files)
        warm_up(fuzz)
        score = try_files(fuzz, numbers, given.jobs, lambda line: print(line, file=sys.stderr, flush=True))
    print(score.summary())
    sys.stdout.flush()
    os._exit(1 if score.bad else 0)  # on a normal exit, imported libraries report their own leaks


if __name__ == "__main__":
    main()
