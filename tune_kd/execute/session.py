"""A run from start to end: check, open the ledger, connect to Ray, execute the plan, close.

Slow modules (torch, Ray, pandas) are imported late, so that user errors are reported at once.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from tune_kd.execute import resources
from tune_kd.execute.monitoring import GUARDED, OPEN
from tune_kd.execute.options import Options, check, options_of, parse_gpus
from tune_kd.records import extension, lock, run_folder, sync
from tune_kd.records.adaptive_plan import to_come, with_those_to_come
from tune_kd.records.run_folder import Run
from tune_kd.records.schema import TRIALS, TrialRow
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.reporting.terminal import Terminal, plural
from tune_kd.study.brought import Code, codes, with_sources
from tune_kd.study.discover import Source
from tune_kd.study.plan import Plan, plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import ENDED, UNSUCCESSFUL
from tune_kd.system import environment, signals
from tune_kd.system.errors import UserError, collect, raise_problems
from tune_kd.system.object_store import Mirror, local

if TYPE_CHECKING:
    from tune_kd.data.datasets import DataSet
    from tune_kd.execute.beat import Beat
    from tune_kd.execute.cluster import Cluster
    from tune_kd.execute.driver import Driver
    from tune_kd.records.ledger import Ledger
    from tune_kd.records.reader import Records


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    signal: int | None  # the signal that interrupted it
    failed: int  # number of trials that failed or were blocked


# The public interface


def run(
    study: Study,
    *,
    out: Path | str = "results",
    name: str | None = None,
    data_dir: Path | str | None = None,
    address: str | None = None,
    dry_run: bool = True,
    **options: Any,
) -> "Records":
    """Train a study with Ray Tune, and return the records of the run.

    `out` is the folder for all runs, or s3://BUCKET/PATH. If `name` is None, the name has the study and the time.
    `data_dir` is the path of CIFAR. `address` is that of a Ray cluster to join; None starts Ray on this machine. Files
    with the study's own losses are relative to the working directory; the losses are tried first unless `dry_run` is
    False. `options` are the fields of `Options`. Raises `UserError` with all problems, before creating any files, and
    KeyboardInterrupt if a signal interrupted the run; `resume` then continues it.
    """
    chosen, results = Options(**options), local(str(out))
    script = getattr(sys.modules["__main__"], "__file__", None)  # importing a copy of it would run the study again
    study = with_sources(study, Path.cwd(), None if script is None else Path(script))
    problems: list[str] = []
    made = collect(problems, lambda: run_folder.check_new(results, name, study))
    collect(problems, lambda: check(study, chosen, address))
    raise_problems(problems)
    if dry_run and study.methods:
        from tune_kd.training import dry_run as losses

        losses.check(plan(study), codes(study, Path.cwd()))
    folder = None if data_dir is None else Path(data_dir).expanduser().absolute()
    begun, ended = start(study, results / str(made), folder, chosen, address, Terminal())
    return _returned(begun, ended)


def resume(
    run: Path | str, *, out: Path | str = "results", extend: bool = False, address: str | None = None, **options: Any
) -> "Records":
    """Train the remaining trials of a run, and return the records of the run.

    `run` is a name under `out`, or a path. `extend` continues to the study's next look, or adds the seeds and levels
    that were added to its file. `options` are fields of `Options`; the others keep their recorded values. Raises the
    same errors as `run`.
    """
    reopened = run_folder.reopen(run_folder.find(local(str(out)), str(run)))
    problems: list[str] = []
    collect(problems, lambda: run_folder.check_links(reopened))
    chosen = replace(options_of(reopened), **options)
    collect(problems, lambda: check(reopened.study, chosen, address))
    raise_problems(problems)
    return _returned(*go_on(reopened, chosen, address, Terminal(), extend=extend))


def _returned(run: Run, ended: Ended) -> "Records":
    if ended.signal is not None:
        raise KeyboardInterrupt(_advice(run.folder))
    return concluded(run)


# Before a run


def load_data(study: Study, folder: Path | None, console: Terminal, *, download: bool = True) -> "DataSet":
    """Load the data once before Ray starts, so that problems with the data are reported early."""
    from tune_kd.data.datasets import load_declared

    return load_declared(study.data, folder, say=console.say, download=download)


def _settings(
    options: Options, planned: Plan, data: "DataSet", address: str | None, console: Terminal, brought: Sequence[Code]
) -> dict[str, Any]:
    """Return the options to record. If a probe chose GPU shares, they include its result as `packing`."""
    settings = asdict(options) | {"track": list(options.track), "gpus_per_trial": parse_gpus(options.gpus_per_trial)}
    if settings["gpus_per_trial"] != "auto" or address is not None:
        return settings
    import torch

    if not torch.cuda.is_available():
        return settings
    from tune_kd.execute import gpu_probe

    found = gpu_probe.packed(planned, data, options, console.say, brought, gpus=torch.cuda.device_count())
    return settings if found is None else settings | {"packing": asdict(found)}


def _fetch_weights(study: Study) -> None:
    """If a study starts from torchvision's weights, download them before anything trains."""
    if "imagenet" in study.levels("weights"):
        from tune_kd.training.networks import fetch_imagenet

        for architecture in {*study.levels("student"), *study.levels("teacher")}:
            fetch_imagenet(str(architecture))


# A run


def start(
    study: Study,
    folder: Path,
    data_dir: Path | None,
    options: Options,
    address: str | None,
    console: Terminal,
    source: Source | None = None,
) -> tuple[Run, Ended]:
    """Start a run of a checked study in a new folder, and run it to its end."""
    data = load_data(study, data_dir, console)
    brought = codes(study, Path.cwd() if source is None else source.file.absolute().parent)
    _fetch_weights(study)
    settings = _settings(options, plan(study, data.digest), data, address, console, brought)
    begun = Run(folder.name, folder, study, data.digest, data_dir, settings, source, codes=brought)
    with run_folder.begun(begun) as tell_dashboard, _opened(begun, console) as ledger:
        return begun, execute(begun, ledger, data, console, address, tell_dashboard)


def go_on(
    run: Run,
    options: Options,
    address: str | None,
    console: Terminal,
    *,
    file: Path | None = None,
    extend: bool = False,
    settings: tuple[str, ...] = (),
) -> tuple[Run, Ended]:
    """Train the remaining trials of a run. `file` is the study's file, if the user gave one; `settings` are the values
    of `--set`, for an extension."""
    with lock.held(run.folder) as tell_dashboard:  # first, so that nothing is read or changed while another holds it
        again = run_folder.reopen(run.folder)
        again = again if file is None else extension.with_file(again, file)
        if extend:
            again = extension.extended(again, settings)
        elif changes := extension.changes(again):
            raise UserError(
                f"RUN is {again.name}, whose study has changed since the run started: {'; '.join(changes)}. Restore "
                "the study, start a new run, or, if only seeds or levels were added, resume with --extend"
            )
        again = run_folder.with_codes(again)
        # Do not download to a folder that comes from the records, which may be somebody else's.
        data = load_data(again.study, again.data_dir, console, download=again.data_dir is None)
        if data.digest != again.data_digest:
            raise UserError(
                f"RUN is {again.name}, which started on data with the digest {again.data_digest[:16]}; the data now "
                f"have {data.digest[:16]}. Restore the same data at {again.data_dir or 'the default path'}"
            )
        _fetch_weights(again.study)
        again = replace(again, settings=_settings(options, again.plan, data, address, console, again.codes))

        def connected(dashboard: str | None) -> None:
            if extend:
                extension.record_extension(again)
            tell_dashboard(dashboard)

        with _opened(again, console) as ledger:
            return again, execute(again, ledger, data, console, address, connected)


def execute(
    run: Run,
    ledger: "Ledger",
    data: "DataSet",
    console: Terminal,
    address: str | None,
    connected: Callable[[str | None], None],
) -> Ended:
    """Execute the plan of a run whose lock this process holds.

    Calls `connected` with the URL of Ray's dashboard once Ray is connected and the trials' shares fit.
    """
    from tune_kd.execute import cluster as clusters, preflight
    from tune_kd.execute.beat import Beat

    with ExitStack() as around:
        if console.stderr:  # with --json, standard output is for JSON only, but Ray prints lost nodes there
            around.enter_context(redirect_stdout(sys.stderr))
        recorded = ledger.rows(TRIALS)
        preflight.check(run, recorded, run.settings["max_concurrent"] or os.cpu_count() or 1)
        signals.check()
        if recorded and (ended := _resumed(run, recorded, ledger, console, connected)) is not None:
            return ended
        cluster, check_ray = around.enter_context(_joined(run, address))
        _check_fit(run, cluster)
        mps = around.enter_context(_mps(run, cluster))
        shares = _shares(run, cluster, mps, address)
        connected(cluster.dashboard)
        _print_start(run, console, cluster, shares.words)
        log = cluster.logs / f"tune_kd-{run.name}.log"
        view = around.enter_context(ProgressDisplay(console, run.name, log))
        driver = _driver(run, ledger, shares, mps, view.say)
        beat = Beat(driver, view, check_ray)
        slots = clusters.slots(cluster, run.settings["cpus_per_trial"], shares.smallest)
        _drive(run, data, driver, slots, beat)
    return _ended(driver)


def _ended(driver: "Driver") -> Ended:
    return Ended(signals.asked(), sum(row["status"] in UNSUCCESSFUL for row in driver.rows.values()))


def _resumed(
    run: Run, recorded: list[TrialRow], ledger: "Ledger", console: Terminal, connected: Callable[[str | None], None]
) -> Ended | None:
    """Print where a run continues. If no trial is left, conclude it without Ray, unless trackers want its trials."""
    rows = with_those_to_come(run.plan, run.name, recorded)
    missing = len({trial.trial_id for trial in run.plan.trials} - {row["trial_id"] for row in recorded})  # by --extend
    done = sum(row["status"] in ENDED for row in rows)
    if not missing and done == len(rows) and not run.settings["track"]:
        driver = _driver(run, ledger, resources.Shares.equal(0.0), resources.Mps(False), console.say)
        if driver.finished:  # not if it retries students of a teacher that had failed
            console.say(f"all {done} trials have ended; no trial is left to train")
            connected(None)
            driver.conclude()
            return _ended(driver)
    begun = sum(row["status"] not in ENDED and row["epochs_run"] > 0 for row in rows)
    console.say(f"resuming: {done} of {len(rows) + missing} trials have ended, {begun} continue from their checkpoints")
    return None


@contextmanager
def _opened(run: Run, console: Terminal) -> Iterator["Ledger"]:
    """Open the ledger for writing, rebuild it if it is damaged, and fetch the teachers from the object store."""
    from tune_kd.records import rebuild
    from tune_kd.training import teachers

    with closing(rebuild.opened(run, console.say)) as ledger:
        for teacher in run.plan.teachers:
            teachers.fetch_teacher(run.teachers, teacher.trial_id)
        yield ledger


@contextmanager
def _joined(run: Run, address: str | None) -> Iterator[tuple["Cluster", Callable[[], None]]]:
    """Connect to Ray. Yields the cluster and a function that raises `RayDied` if Ray has died."""
    from tune_kd.execute import cluster as clusters

    advice = _advice(run.folder)
    metadata = {"job_name": run.name, "study": run.study.name, "scale": run.study.scale}
    with ExitStack() as around:
        cluster = clusters.connect(address, metadata)
        # Entered first, so that it ends last: disconnecting from a dead Ray may hang.
        check_ray = around.enter_context(clusters.watched(cluster, advice))
        around.callback(clusters.disconnect, cluster)
        around.enter_context(clusters.told(advice))
        signals.check()
        yield cluster, check_ray


def _check_fit(run: Run, cluster: "Cluster") -> None:
    """Raise `UserError` if the shares of trials do not fit into the cluster, or if a node cannot run trials."""
    from tune_kd.execute import cluster as clusters

    settings, asked = run.settings, run.settings["gpus_per_trial"]
    gpus = 0.0 if asked == "auto" else asked
    resources.check_cluster(settings["cpus_per_trial"], gpus, cluster.cpus, cluster.gpus)
    if settings.get("mps") == "on" and not cluster.gpus:
        raise UserError("--mps is on, and Ray has no GPU; allowed: auto or off")
    clusters.check_nodes(run.folder if Mirror.of(run.folder).url is None else None)


def _mps(run: Run, cluster: "Cluster") -> AbstractContextManager[resources.Mps]:
    """Return a context in which MPS serves the GPUs of the cluster, if possible and useful. Yields whether it does."""
    if not cluster.gpus:
        return nullcontext(resources.Mps(False))
    from tune_kd.execute import mps_nodes

    return mps_nodes.serving(run, cluster)


def _shares(run: Run, cluster: "Cluster", mps: resources.Mps, address: str | None) -> resources.Shares:
    packing = run.settings.get("packing")
    found = None if packing is None else resources.Packing(**packing)
    note = "" if address is None else "; shares are not measured on a cluster"
    return resources.gpu_shares(run.settings["gpus_per_trial"], run.plan, cluster.gpus, mps, found, note)


def _driver(
    run: Run, ledger: "Ledger", gpus: resources.Shares, mps: resources.Mps, say: Callable[[str], None]
) -> "Driver":
    from tune_kd.execute.driver import Driver
    from tune_kd.execute.worker import Workplace

    data_dir, url = run.data_dir and run.data_dir.absolute(), Mirror.of(run.folder).url
    folders = (data_dir, None, run.teachers.absolute(), run.checkpoints.absolute())
    place = Workplace(*folders, url=url, codes=run.codes, umask=environment.umask(), variables=mps.variables)
    return Driver(
        run.plan,
        run.name,
        run.folder,
        ledger,
        place,
        cpus=run.settings["cpus_per_trial"],
        gpus=gpus,
        max_concurrent=run.settings["max_concurrent"],
        keep_checkpoints=run.settings["keep_checkpoints"],
        say=say,
    )


def _drive(run: Run, data: "DataSet", driver: "Driver", slots: int, beat: "Beat") -> None:
    """Run the trials to their end, or until a signal stops the run. Then send the trackers' files to the store."""
    from tune_kd.execute import ray_tune, trackers

    shown = trackers.made(run.settings["track"], run.study.name, run.name, run.folder, beat.view.say)
    with signals.handled(lambda _: driver.drain()):
        signals.check()
        ray_tune.run_on_ray(driver, driver.place, slots, beat, data=data, trackers=shown)
    try:
        if shown:
            sync.send(run.folder, *trackers.FILES)
    except OSError as error:
        beat.view.say(f"warning: the trackers' files were not sent to the store ({error}); they are in {run.folder}")


def concluded(run: Run) -> "Records":
    """Return the records of a finished run. Writes its rank correlations to its folder, for later plans."""
    from tune_kd.analysis import early_stopping, grace
    from tune_kd.records.reader import load

    records = load(run.folder)
    grace.record(run.folder, run.name, run.study, early_stopping.rank_correlations(records, everywhere=True))
    return records


def _advice(folder: Path) -> str:
    return f"continue with: python -m tune_kd resume {quote(str(folder))}"


def _print_start(run: Run, console: Terminal, cluster: Any, share: str) -> None:
    planned = run.plan
    trials = len(planned.trials) + len(to_come(planned))
    lines = [
        f"{plural(len(planned.arms), 'arm')}, {trials} trials, {plural(len(planned.teachers), 'teacher')} on "
        f"{run.study.data.name}; records in {Mirror.of(run.folder).place(run.folder)}"
    ]
    if cluster.gpus:
        lines.append(share)
    if cluster.dashboard:
        lines.append(f"Ray dashboard: {cluster.dashboard}" + (f" ({GUARDED})" if cluster.guarded else ""))
    if not cluster.guarded:
        lines.append(OPEN)
    lines.append("starting Ray's workers")
    for line in lines:
        console.say(line)
