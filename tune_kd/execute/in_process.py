"""Execution without Ray: one trial after another in this process, for tests and debuggers."""

from tune_kd.execute.driver import Driver
from tune_kd.execute.worker import Failure, Work, Workplace, failure, whereabouts, work
from tune_kd.training import notices


def run_in_process(driver: Driver, place: Workplace, work: Work = work) -> None:
    """Run a plan to its end in this process, with the same records as with Ray. `work` executes a task."""
    while (task := driver.next()) is not None:
        driver.on_start(task)
        problem: Failure | None = None
        epochs = work(task, place)
        while True:
            try:
                epoch = next(epochs)
            except Exception as error:  # a failed trial becomes a row and does not end the run
                problem = failure(error)
                break
            driver.hear(notices.take())
            if not driver.on_epoch(task.trial.trial_id, epoch, whereabouts(task)):
                break
        epochs.close()
        driver.on_end(task.trial.trial_id, problem)
    driver.conclude()
