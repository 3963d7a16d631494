"""Starting a run: what has to be there before, and Ray around the plan. What takes long to import is imported late, so
that a mistake is answered at once."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tune_kd.study import Mistake, Study

if TYPE_CHECKING:
    from tune_kd.data import DataSet
    from tune_kd.run import Run


@dataclass(frozen=True)
class Ended:
    """What became of a run."""

    signal: int | None  # that interrupted it
    failed: int  # trials that failed or were blocked


def execute(
    run: "Run", console: Console, address: str | None, opened: Callable[[], AbstractContextManager[None]]
) -> Ended:
    """Connect to Ray and run the plan. `opened` is entered when Ray is there and the shares fit into it; inside it the
    run's folder is there, and held by this process."""
    from tune_kd import shares
    from tune_kd.execute import on_ray
    from tune_kd.execute.driver import Driver
    from tune_kd.execute.worker import Workplace
    from tune_kd.records import LEDGER, Ledger
    from tune_kd.view import View

    advice = f"go on with: python -m tune_kd resume {run.folder}"
    cluster = on_ray.connect(address)
    with ExitStack() as around:
        # The watch comes first, so that it ends last: to leave a Ray that died may hang.
        check_ray = around.enter_context(on_ray.watched(cluster, advice))
        around.callback(on_ray.disconnect, cluster)
        gpus = shares.gpu_share(run.settings["gpus_per_trial"], cluster.gpus)
        shares.check_cluster(run.settings["cpus_per_trial"], gpus, cluster.cpus, cluster.gpus)
        with opened():
            _print_start(run, console, cluster)
            place = Workplace(
                data_dir=None if run.data_dir is None else run.data_dir.absolute(),
                cache=None,
                teachers=run.teachers.absolute(),
                checkpoints=run.checkpoints.absolute(),
            )
            with View(console, run.name) as view:
                driver = Driver(
                    run.plan,
                    run.name,
                    run.folder,
                    Ledger(run.folder / LEDGER),
                    place,
                    cpus=run.settings["cpus_per_trial"],
                    gpus=gpus,
                    max_concurrent=run.settings["max_concurrent"],
                    keep_checkpoints=run.settings["keep_checkpoints"],
                    say=view.say,
                )

                told: list[bool] = []

                def beat() -> None:
                    check_ray()
                    if driver.stopping and not told:
                        view.say("interrupted: running trials end their epoch; interrupt again to leave at once")
                        told.append(True)
                    view.show(list(driver.rows.values()), driver.decisions)

                with on_ray.drained_by_signals(driver, advice) as received:
                    on_ray.run_on_ray(
                        driver,
                        place,
                        on_ray.slots(cluster, run.settings["cpus_per_trial"], gpus),
                        beat=beat,
                    )
                    signal = received()
    return Ended(signal, sum(row["status"] in ("failed", "blocked") for row in driver.rows.values()))


def _print_start(run: "Run", console: Console, cluster: Any) -> None:
    planned = run.plan
    lines = [
        f"{len(planned.arms)} arms, {len(planned.trials)} trials, {len(planned.teachers)} teachers on "
        f"{run.study.data.name}; records in {run.folder}",
    ]
    if cluster.dashboard:
        lines.append(f"Ray dashboard: {cluster.dashboard} (it asks for the token that `ray get-auth-token` prints)")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def load_data(study: Study, folder: Path | None, console: Console) -> "DataSet":
    """Load the data once, before Ray starts: what is wrong with them is told now."""
    from tune_kd.data import load_declared

    return load_declared(
        study.data, folder, say=lambda sentence: console.print(sentence, highlight=False, soft_wrap=True)
    )


def check_compiler(study: Study | None) -> None:
    """torch.compile without a compiler would fail in every trial."""
    if study is None or not (study.recipe.compile or study.teacher_recipe.compile):
        return
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        raise Mistake("recipe.compile is true, and there is no C++ compiler here; install one, such as g++, or leave "
                      "recipe.compile false")  # fmt: skip


def measured_share(study: Study, data: "DataSet", console: Console) -> float:
    """The share of this machine's GPU that a probe of the study's heaviest trial proposes; 0 where there is none."""
    import torch

    from tune_kd.execute.probe import probe
    from tune_kd.plan import plan

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, soft_wrap=True)

    if not torch.cuda.is_available():
        say("--gpus-per-trial auto: there is no GPU here, so trials run on CPUs")
        return 0.0
    return probe(plan(study, data.digest), data, torch.device("cuda"), say)


def fetch_weights(study: Study) -> None:
    """Have torchvision's weights here, where a study starts from them, before anything trains."""
    if "imagenet" in study.levels("weights"):
        from tune_kd.models import fetch_imagenet

        for architecture in {*study.levels("student"), *study.levels("teacher")}:
            fetch_imagenet(str(architecture))
