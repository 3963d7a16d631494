"""`python -m docs.dashboard`: take the screenshots of Ray's dashboard in docs/monitoring.md, from a real smoke run.
Needs chromium and chromedriver."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from selenium.common.exceptions import StaleElementReferenceException

from tune_kd.system.environment import token_file

DOCS = Path(__file__).parent
PORT = 8299
URL = f"http://127.0.0.1:{PORT}"
RUN = "stem-study"


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A cluster of two CPUs with a study submitted to it."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    ports = f"--port=0 --dashboard-port={PORT} --dashboard-agent-listen-port={PORT + 1}"
    options = f"--head --block --num-cpus=2 --dashboard-host=127.0.0.1 {ports}"
    head = psutil.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", *options.split()],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    submit = [sys.executable, "-m", "tune_kd", "submit", "ablation", "--scale", "smoke", "--name", RUN, "--detach"]
    submit += ["--address", URL, "--out", str(folder), "--set", "recipe.epochs=150"]
    try:
        until(lambda: subprocess.run(submit, stderr=subprocess.DEVNULL).returncode == 0)
        yield
    finally:
        for each in (*head.children(recursive=True), head):
            each.kill()
        head.wait(timeout=60)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(StaleElementReferenceException):  # the page was updated meanwhile
            if condition():
                return
        time.sleep(1.0)
    raise TimeoutError("the condition was not met in time")


class Page:
    """Ray's dashboard in a browser."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url

    def sign_in(self, token: str) -> None:
        """Sign in like a user, on the jobs page."""
        self.browser.get(f"{self.url}/#/jobs")
        until(lambda: self.says("Authentication Token Required"))
        self.browser.find_element("css selector", "input[type=password]").send_keys(token)
        self.press("//button[contains(., 'Submit')]")
        until(lambda: not self.says("Authentication Token Required"))

    def says(self, *words: str) -> bool:
        text = self.browser.find_element("tag name", "body").text
        return all(each in text for each in words)

    def press(self, what: str, seconds: float = 60) -> None:
        """Click the element at an XPath, once it exists."""

        def pressed() -> bool:
            found = self.browser.find_elements("xpath", what)
            click = "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))"
            return bool(found) and self.browser.execute_script(click, found[0]) is None

        until(pressed, seconds)

    def show_trials(self) -> None:
        """Expand the tasks on a job's page. The page updates itself meanwhile, and may collapse them again."""

        def shown() -> bool:
            self.refreshed()
            with suppress(TimeoutError):
                self.press(
                    "(//*[contains(text(),'Ray Core Overview')]/following::*[name()='svg'][@height='1em'])[1]", 10
                )
                self.press("//td[contains(text(),'TrialRunner')]/*[name()='svg'][1]", 10)
                self.press(
                    "(//*[self::a or self::button][contains(., 'TrialRunner')]/preceding::*[name()='svg'][1])[1]", 10
                )
                until(lambda: bool(self.browser.find_elements("xpath", "//td[contains(., ' seed ')]")), 10)
                return True
            return False

        until(shown, 150)

    def refreshed(self) -> bool:
        """Reload the page, which reads a log only once."""
        self.browser.refresh()
        time.sleep(3.0)
        return True


def pictures(browser: Any) -> None:
    def picture(name: str, height: int) -> None:
        browser.set_window_size(1400, height)
        time.sleep(2.0)
        browser.save_screenshot(str(DOCS / f"dashboard-{name}.png"))

    page = Page(browser, URL)
    page.sign_in(token_file().read_text().strip())
    until(lambda: page.says(RUN, "02000000"))
    picture("jobs", 700)
    page.press("//a[contains(@href, '#/jobs/')]")
    until(lambda: page.refreshed() and page.says("seed 0 (screen) completed"))
    picture("log", 1350)
    page.show_trials()
    picture("tasks", 1000)


def main() -> None:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as name, cluster(Path(name)):
        service = webdriver.ChromeService(str(shutil.which("chromedriver")))
        browser = webdriver.Chrome(options=options, service=service)
        try:
            pictures(browser)
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
