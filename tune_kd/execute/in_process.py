"""Run a plan in this process, one trial after another. For tests and debuggers."""

from collections.abc import Sequence

from tune_kd.execute.driver import Driver
from tune_kd.execute.trackers.background import Background
from tune_kd.execute.worker import Failure, Work, Workplace, failure, whereabouts, work
from tune_kd.training import notices


def run_in_process(driver: Driver, place: Workplace, work: Work = work, trackers: Sequence[Background] = ()) -> None:
    """Run a plan to its end, with the same records as on Ray. Calls `work` for each task."""
    while (task := driver.next()) is not None:
        driver.on_start(task)
        for tracker in trackers:
            tracker.on_start(task)
        problem: Failure | None = None
        epochs = work(task, place)
        while True:
            try:
                epoch = next(epochs)
            except Exception as error:  # a trial's error becomes a row and does not end the run
                problem = failure(error)
                break
            driver.hear(notices.take())
            continues = driver.on_epoch(task.trial.trial_id, epoch, whereabouts(task))
            for tracker in trackers:
                tracker.on_epoch(task, epoch)
            if not continues:
                break
        epochs.close()
        driver.on_end(task.trial.trial_id, problem)
        for tracker in trackers:
            tracker.on_end(task, failed=problem is not None)
    for tracker in trackers:
        tracker.close()
    driver.conclude()
