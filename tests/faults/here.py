"""Run a study in this process, for tests that Ray would only make slower."""

from collections.abc import Callable

import torch

from tune_kd.execute import preflight
from tune_kd.execute.driver import Driver
from tune_kd.execute.in_process import run_in_process
from tune_kd.execute.worker import Workplace
from tune_kd.records import rebuild
from tune_kd.records.run_folder import Run
from tune_kd.records.schema import TRIALS


def go_on(run: Run, setup: Callable[[Driver], None] = lambda _: None) -> Driver:
    """Do what `session.execute` does, in this process instead of on Ray. `setup` gets the driver before it starts."""
    threads = torch.get_num_threads()
    ledger = rebuild.opened(run, lambda _: None)
    try:
        preflight.check(run, ledger.rows(TRIALS), 1)
        place = Workplace(None, run.folder.parent / "cache", run.teachers, run.checkpoints, checkpoint_every=0.0)
        driver = Driver(run.plan, run.name, run.folder, ledger, place, cpus=1.0, gpus=0.0)
        setup(driver)
        run_in_process(driver, place)
        return driver
    finally:
        torch.set_num_threads(threads)
        ledger.close()
