"""`python -m docs.dashboard`: take the pictures of Ray's dashboard that docs/monitoring.md shows, of a real smoke run.
Needs chromium and chromedriver."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tune_kd.monitoring import token_file

DOCS = Path(__file__).parent
PORT = 8299
URL = f"http://127.0.0.1:{PORT}"
RUN = "stem-study"


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A cluster of two CPUs with a study submitted to it."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    options = f"--head --block --num-cpus=2 --port=0 --dashboard-host=127.0.0.1 --dashboard-port={PORT}"
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
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen in time")
        time.sleep(1.0)


def refreshed(browser: Any) -> bool:
    """The page anew: it reads a log once."""
    browser.refresh()
    time.sleep(3.0)
    return True


def pictures(browser: Any) -> None:
    """Sign in as people do, and take the pictures."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    def said(text: str) -> bool:
        return text in browser.find_element(By.TAG_NAME, "body").text

    def click(tag: str, text: str) -> None:
        until(lambda: said(text))
        next(each for each in browser.find_elements(By.TAG_NAME, tag) if text in each.text).click()

    def picture(name: str, height: int) -> None:
        browser.set_window_size(1400, height)
        time.sleep(2.0)
        browser.save_screenshot(str(DOCS / f"dashboard-{name}.png"))

    browser.get(f"{URL}/#/jobs")
    until(lambda: said("Authentication Token Required"))
    browser.find_element(By.CSS_SELECTOR, "input[type=password]").send_keys(token_file().read_text().strip())
    click("button", "SUBMIT")
    until(lambda: said(RUN) and said("02000000"))
    picture("jobs", 700)
    browser.find_element(By.CSS_SELECTOR, "a[href*='#/jobs/']").click()
    until(lambda: refreshed(browser) and said("seed 0 (screen) completed"))
    picture("log", 1350)
    for fold in (
        "(//*[contains(text(),'Ray Core Overview')]/following::*[name()='svg'][@height='1em'])[1]",
        "//*[contains(text(),'TrialRunner')]/preceding::*[name()='svg'][1]",
    ):
        until(lambda fold=fold: bool(browser.find_elements(By.XPATH, fold)))
        ActionChains(browser).click(browser.find_element(By.XPATH, fold)).perform()
    picture("tasks", 1350)


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
