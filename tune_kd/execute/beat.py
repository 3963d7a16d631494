"""What a driver does about once a second while trials run."""

import time
from collections.abc import Callable

from tune_kd.execute.driver import Driver
from tune_kd.records.adaptive_plan import with_those_to_come
from tune_kd.reporting.progress import ProgressDisplay
from tune_kd.system.guard import WITHIN

IDLE = 60.0  # seconds without a running trial before the user gets a message


class Beat:
    """Called about once a second: checks that Ray is alive, updates the progress display, and prints messages."""

    def __init__(self, driver: Driver, view: ProgressDisplay, check_ray: Callable[[], None]) -> None:
        self.view = view
        self._driver = driver
        self._check_ray = check_ray
        self._said: set[str] = set()
        self._busy_at = time.monotonic()

    def __call__(self) -> None:
        self._check_ray()
        driver = self._driver
        if driver.running:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > IDLE and (task := driver.placeless) is not None:
            needed = f"{task.cpus:g} CPU and {task.gpus:g} GPU"
            self._once(f"no trial has run for {IDLE:.0f} s: the next one needs {needed}, and Ray waits for such a node")
        if driver.stopping:
            why = driver.broken or f"interrupted, stopping within {WITHIN:.0f} s"
            self._once(f"{why}: running trials finish their epoch; interrupt again to stop at once")
        self.view.show(with_those_to_come(driver.plan, driver.run, list(driver.rows.values())), driver.decisions)

    def _once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.view.say(sentence)
