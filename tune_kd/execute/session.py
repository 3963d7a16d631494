"""Starting a run: what has to be there before, and Ray around the plan. What takes long to import is imported late, so
that a mistake is answered at once."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tune_kd.execute.monitoring import GUARDED, OPEN
from tune_kd.records.adaptive_plan import to_come, with_those_to_come
from tune_kd.study.spec import Study
from tune_kd.system import environment, signals
from tune_kd.system.errors import UserError
from tune_kd.system.guard import WITHIN
from tune_kd.system.object_store import Mirror

if TYPE_CHECKING:
    from tune_kd.data.datasets import DataSet
    from tune_kd.records.run_folder import Run


IDLE = 60.0  # seconds in which nothing runs, after which that is said


@dataclass(frozen=True)
class Ended:
    """What became of a run."""

    signal: int | None  # that interrupted it
    failed: int  # trials that failed or were blocked


def execute(
    run: "Run",
    data: "DataSet",
    console: Console,
    address: str | None,
    connected: Callable[[], None] = lambda: None,
) -> Ended:
    """Connect to Ray and run the plan of a run that this process holds.

    `connected` is called when Ray is there and the shares fit into it.
    """
    from tune_kd.execute import cluster as connection
    from tune_kd.execute import preflight, ray_tune, resources, trackers
    from tune_kd.execute.driver import Driver
    from tune_kd.execute.worker import Workplace
    from tune_kd.records import lock, rebuild, sync
    from tune_kd.records.schema import TRIALS
    from tune_kd.reporting.progress import ProgressDisplay
    from tune_kd.training import teachers

    advice = f"go on with: python -m tune_kd resume {quote(str(run.folder))}"
    with ExitStack() as around:
        if console.stderr:  # standard output is for the answer alone, and Ray tells there of nodes that were lost
            around.enter_context(redirect_stdout(sys.stderr))
        ledger = rebuild.opened(run, lambda sentence: _say(console, sentence))
        around.callback(ledger.close)
        for teacher in run.plan.teachers:
            teachers.fetch_teacher(run.teachers, teacher.trial_id)
        preflight.check(run, ledger.rows(TRIALS), run.settings["max_concurrent"] or os.cpu_count() or 1)
        signals.check()
        metadata = {"job_name": run.name, "study": run.study.name, "scale": run.study.scale}
        cluster = connection.connect(address, metadata)
        # The watch comes first, so that it ends last: to leave a Ray that died may hang.
        check_ray = around.enter_context(connection.watched(cluster, advice))
        around.callback(connection.disconnect, cluster)
        around.enter_context(connection.told(advice))
        signals.check()
        asked = run.settings["gpus_per_trial"]
        resources.check_cluster(run.settings["cpus_per_trial"], asked or 0.0, cluster.cpus, cluster.gpus)
        url = Mirror.of(run.folder).url
        connection.check_nodes(run.folder if url is None else None)
        share = resources.gpu_share(asked, cluster.gpus, connection.served_by_mps)
        tracked = run.settings.get("track") or []
        connected()
        lock.tell_dashboard(run.folder, cluster.dashboard)
        _print_start(run, console, cluster, share.words)
        place = Workplace(
            data_dir=None if run.data_dir is None else run.data_dir.absolute(),
            cache=None,
            teachers=run.teachers.absolute(),
            checkpoints=run.checkpoints.absolute(),
            url=url,
            umask=environment.umask(),
        )
        view = around.enter_context(ProgressDisplay(console, run.name, cluster.logs / f"tune_kd-{run.name}.log"))
        driver = Driver(
            run.plan,
            run.name,
            run.folder,
            ledger,
            place,
            cpus=run.settings["cpus_per_trial"],
            gpus=share.gpus,
            max_concurrent=run.settings["max_concurrent"],
            keep_checkpoints=run.settings["keep_checkpoints"],
            say=view.say,
        )
        shown = trackers.made(tracked, run.study.name, run.name, run.folder, view.say)
        told: list[str] = []
        busy_at = time.monotonic()

        def once(sentence: str) -> None:
            if sentence not in told:
                told.append(sentence)
                view.say(sentence)

        def beat() -> None:
            nonlocal busy_at
            check_ray()
            if driver.running:
                busy_at = time.monotonic()
            elif time.monotonic() - busy_at > IDLE and (task := driver.placeless) is not None:
                needed = f"{task.cpus:g} CPU and {task.gpus:g} GPU"
                once(f"nothing has run for {IDLE:.0f} s: a trial needs {needed}, and Ray waits for a node with them")
            if driver.stopping:
                why = driver.broken or f"interrupted, to leave within {WITHIN:.0f} s"
                once(f"{why}: running trials end their epoch; interrupt again to leave at once")
            view.show(with_those_to_come(driver.plan, run.name, list(driver.rows.values())), driver.decisions)

        slots = connection.slots(cluster, run.settings["cpus_per_trial"], share.gpus)
        with signals.handled(lambda _: driver.drain()):
            signals.check()
            ray_tune.run_on_ray(driver, place, slots, beat, data=data, trackers=shown)
        if tracked:
            try:
                sync.send(run.folder, *trackers.FILES)
            except OSError as error:
                view.say(f"warning: the store does not take what trackers wrote ({error}); it is in {run.folder}")
    return Ended(signals.asked(), sum(row["status"] in ("failed", "blocked") for row in driver.rows.values()))


def _print_start(run: "Run", console: Console, cluster: Any, share: str) -> None:
    planned = run.plan
    trials = len(planned.trials) + len(to_come(planned))
    lines = [
        f"{len(planned.arms)} arms, {trials} trials, {len(planned.teachers)} teachers on "
        f"{run.study.data.name}; records in {Mirror.of(run.folder).place(run.folder)}",
    ]
    if cluster.gpus:
        lines.append(share)
    if cluster.dashboard:
        lines.append(f"Ray dashboard: {cluster.dashboard}" + (f" ({GUARDED})" if cluster.guarded else ""))
    if not cluster.guarded:
        lines.append(OPEN)
    for line in lines:
        _say(console, line)


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, soft_wrap=True)


def load_data(study: Study, folder: Path | None, console: Console, *, download: bool = True) -> "DataSet":
    """Load the data once, before Ray starts: what is wrong with them is told now."""
    from tune_kd.data.datasets import load_declared

    return load_declared(study.data, folder, say=lambda sentence: _say(console, sentence), download=download)


def check_trackers(names: list[str] | None) -> None:
    """Raise `UserError` for trackers that this machine has not."""
    if names:
        environment.home()  # which Ray's own parts need to be imported
        from tune_kd.execute import trackers

        trackers.check(names)


def trackers_unasked(recorded: list[str]) -> list[str]:
    """Of the trackers that a run began with, those that send nothing anywhere, and so are used unasked when it is
    resumed: its record may be anybody's."""
    sends = {
        "mlflow": bool(os.environ.get("MLFLOW_TRACKING_URI")),
        "wandb": os.environ.get("WANDB_MODE") not in ("offline", "disabled"),
    }
    return [name for name in recorded if not sends.get(name, False)]


def check_compiler(study: Study | None) -> None:
    """torch.compile without a compiler would fail in every trial."""
    if study is None or not (study.recipe.compile or study.teacher_recipe.compile):
        return
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        raise UserError("recipe.compile is true, and there is no C++ compiler here; install one, such as g++, or leave "
                        "recipe.compile false")  # fmt: skip


def measured_share(study: Study, data: "DataSet", console: Console) -> float:
    """The share of this machine's GPU that a probe of the study's heaviest trial proposes; 0 where there is none."""
    import torch

    from tune_kd.execute.gpu_probe import probe
    from tune_kd.study.plan import plan

    if not torch.cuda.is_available():
        _say(console, "--gpus-per-trial auto: there is no GPU here, so trials run on CPUs")
        return 0.0
    return probe(plan(study, data.digest), data, torch.device("cuda"), lambda sentence: _say(console, sentence))


def fetch_weights(study: Study) -> None:
    """Have torchvision's weights here, where a study starts from them, before anything trains."""
    if "imagenet" in study.levels("weights"):
        from tune_kd.training.networks import fetch_imagenet

        for architecture in {*study.levels("student"), *study.levels("teacher")}:
            fetch_imagenet(str(architecture))
