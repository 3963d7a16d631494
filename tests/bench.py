"""A test bench for the driver: tests simulate the workers, and nothing is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune_kd.execute.driver import Driver
from tune_kd.execute.worker import Task, Where, Workplace
from tune_kd.records.ledger import Ledger
from tune_kd.records.schema import TRIALS
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study
from tune_kd.study.trial import Epoch, Outcome

HERE = Where("host", "cpu")


def epoch(number: int, accuracy: float = 0.5, *, last: bool = False) -> Epoch:
    outcome = Outcome(
        best_epoch=number,
        val_accuracy_best=accuracy,
        test_accuracy=accuracy,
        test_accuracy_best=accuracy,
        agreement=None,
        kl_t1=None,
        kl_t4=None,
        ece=0.1,
        params=10,
        weights_digest="w",
        teacher_digest=None,
        peak_memory_bytes=None,
    )
    return Epoch(
        epoch=number,
        val_accuracy=accuracy,
        val_loss=1.0,
        train_loss=1.0,
        train_accuracy=0.5,
        loss_ce=1.0,
        loss_kd=None,
        lr=0.1,
        grad_norm=1.0,
        seconds=1.0,
        images_per_second=1.0,
        outcome=outcome if last else None,
    )


class Bench:
    """A driver whose workers the test simulates."""

    def __init__(self, study: Study, folder: Path, **options: Any) -> None:
        place = Workplace(None, None, folder / "teachers", folder / "checkpoints")
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.messages: list[str] = []
        self.driver = Driver(
            plan(study, "0" * 64), "r", folder, self.ledger, place,
            **{"cpus": 1.0, "gpus": 0.0, "say": self.messages.append, **options},
        )  # fmt: skip
        self.folder = folder

    def start(self) -> Task:
        task = self.driver.next()
        assert task is not None
        self.driver.on_start(task)
        return task

    def finish(self, task: Task, accuracy: float = 0.5) -> None:
        """Report the remaining epochs of a task until its end or until the driver stops it."""
        for number in range(task.acknowledged + 1, task.trial.recipe.epochs + 1):
            last = number == task.trial.recipe.epochs
            if not self.driver.on_epoch(task.trial.trial_id, epoch(number, accuracy, last=last), HERE):
                break
        self.driver.on_end(task.trial.trial_id, None)

    def run(self, accuracy: Callable[[Task], float] = lambda _: 0.5) -> list[Task]:
        """Run one trial after another until none is ready."""
        done = []
        while (task := self.driver.next()) is not None:
            self.driver.on_start(task)
            self.finish(task, accuracy(task))
            done.append(task)
        return done

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        """Return the ledger's rows of trials, read as another process would read them."""
        found = Ledger(self.folder / "ledger.sqlite", read_only=True).rows(TRIALS)
        return [row for row in found if all(row[key] == value for key, value in where.items())]
