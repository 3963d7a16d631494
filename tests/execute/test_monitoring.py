"""Monitoring of a run: Ray's metrics in a real Prometheus, the queries of the Grafana board, and Ray's dashboard in a
real browser."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import yaml

from commands import command, epochs_on_record, kill_a_worker, token, wait_for
from conftest import free_port
from docs.dashboard import Page, until
from tune_kd.cli import remote
from tune_kd.execute import monitoring
from tune_kd.execute.metrics import METRICS, samples
from tune_kd.execute.resources import Shares
from tune_kd.records.schema import Row, first_row
from tune_kd.study.plan import plan
from tune_kd.study.spec import Study
from tune_kd.system.errors import UserError

PROMETHEUS = shutil.which("prometheus")
ROOT = Path(__file__).parents[2]
BOARD = json.loads(monitoring.BOARD.read_text())


def ended(row: Row, **values: Any) -> Row:
    return row | {"status": "completed", "epochs_run": row["epochs_planned"]} | values


def test_the_gauges_of_a_run_follow_from_its_rows(one_stem: Study) -> None:
    planned = plan(one_stem)  # a teacher, and a screen and two seeds for none, logit (T = 2 and 4) and feature
    rows = [first_row("r", trial) for trial in planned.trials]
    before = {(each.name, each.labels): each.value for each in samples(planned, rows, [], Shares.equal(0.5))}
    assert before["tune_kd_trials", (("phase", "confirm"), ("status", "pending"))] == 8
    assert before["tune_kd_trials", (("phase", "teacher"), ("status", "failed"))] == 0
    assert before["tune_kd_confirm_pairs", ()] == 0
    assert before["tune_kd_confirm_pairs_planned", ()] == 3 * 2  # three effects, two seeds
    assert not any(name.endswith("seconds_planned") for name, _ in before)  # no trial has run to estimate it from
    assert not any(name == "tune_kd_val_accuracy" for name, _ in before)

    by_arm = {(row["arm"], row["phase"], row["seed"]): place for place, row in enumerate(rows)}
    control, feature = by_arm["cifar/none", "confirm", 1], by_arm["cifar/feature", "confirm", 1]
    rows[control] = ended(rows[control], train_seconds=6.0, wall_seconds=10.0, gpu_fraction=0.25)
    rows[feature] |= {"status": "running", "epochs_run": 1, "val_accuracy": 0.5, "train_seconds": 4.0,
                      "gpu_fraction": 0.5}  # fmt: skip
    other = by_arm["cifar/feature", "confirm", 2]
    rows[other] |= {"status": "running", "epochs_run": 1, "val_accuracy": 0.7, "train_seconds": 4.0,
                    "gpu_fraction": 0.5}  # fmt: skip
    now = {(each.name, each.labels): each.value for each in samples(planned, rows, ["a", "b", "a"], Shares.equal(0.5))}
    assert now["tune_kd_arms_stopped", ()] == 2
    assert now["tune_kd_val_accuracy", (("arm", "cifar/feature"),)] == pytest.approx(0.6)
    assert now["tune_kd_confirm_pairs", ()] == 0
    assert now["tune_kd_trial_seconds", ()] == 18
    assert now["tune_kd_gpu_seconds", ()] == 10 * 0.25 + 2 * 4 * 0.5
    # Each trial has two epochs, of 3 s for controls, 4 s for features, and 11 / 3 s (the mean of the three) for others.
    rest = len(rows) - 3 - 3  # all but three controls and three features
    planned_seconds = 10 + 2 * 6 + 3 * 8 + rest * 2 * 11 / 3
    assert now["tune_kd_trial_seconds_planned", ()] == pytest.approx(planned_seconds)
    assert now["tune_kd_gpu_seconds_planned", ()] == pytest.approx((planned_seconds - 10) * 0.5 + 10 * 0.25)
    rows[feature] = ended(rows[feature])
    after = {(each.name, each.labels): each.value for each in samples(planned, rows, [], Shares.equal(0.5))}
    assert after["tune_kd_confirm_pairs", ()] == 1
    kinds = Shares(light=0.125, heavy=0.5, teacher=1.0, methods=("feature",))
    (planned_gpu_seconds,) = (
        each.value for each in samples(planned, rows, [], kinds) if each.name == "tune_kd_gpu_seconds_planned"
    )
    assert planned_gpu_seconds < after["tune_kd_gpu_seconds_planned", ()], "each kind has its own share"
    assert after["tune_kd_val_accuracy", (("arm", "cifar/feature"),)] == pytest.approx(0.7)


def test_non_ascii_names_become_labels_that_ray_accepts(one_stem: Study) -> None:
    planned = plan(one_stem)
    row = first_row("r", planned.trials[-1]) | {"arm": "cifar/n\u043ene", "status": "running", "val_accuracy": 0.5}
    labels = [
        each.labels for each in samples(planned, [row], [], Shares.equal(0.5)) if each.name == "tune_kd_val_accuracy"
    ]
    assert labels == [(("arm", "cifar/n\\u043ene"),)]


def test_the_documentation_lists_all_metrics_as_they_are_declared() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    shown = re.findall(r"^\| `(ray_tune_kd_\w+)` \| (\w+) \| ([\w ]+) \| ([\w, `]*) \| (.+) \|$", text, re.MULTILINE)
    labels = (", ".join(f"`{label}`" for label in ("run", *each.labels)) for each in METRICS)
    listed = [
        (each.exported, each.kind, each.unit, names, each.what) for each, names in zip(METRICS, labels, strict=True)
    ]
    assert shown == listed
    assert not any(":" in each.name for each in METRICS)


def test_the_board_queries_every_metric_and_no_unknown_ones() -> None:
    queried = set(re.findall(r"ray_tune_kd_\w+", " ".join(queries("$run"))))
    assert queried == {each.exported for each in METRICS}


def test_the_files_for_prometheus_and_grafana_are_valid_and_bad_arguments_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    settings, board = monitoring.write(tmp_path / "new" / "folder", "http://head:8265/")
    (job,) = yaml.safe_load(settings.read_text())["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"] == "http://head:8265/api/prometheus/sd"
    assert discovery["authorization"] == {"type": "Bearer", "credentials_file": str(tmp_path / "token")}
    assert json.loads(board.read_text()) == BOARD
    with pytest.raises(UserError, match="--address is head:8265; allowed: the URL of Ray's dashboard"):
        monitoring.write(tmp_path, "head:8265")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--write is .*file, which cannot be written to"):
        monitoring.write(tmp_path / "file", monitoring.DASHBOARD)


class FakeDashboard(BaseHTTPRequestHandler):
    """A dashboard that only responds whether it requires a token. The first part of the path is its HTTP status."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log no requests."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeDashboard) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_rays_dashboard_tells_whether_a_token_is_required_else_the_environment_does(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # a dead proxy, which must not be used
    no_answer = [None, f"http://127.0.0.1:{free_port()}", f"{url}/500", f"{url}/302", "http://a:b:c", "file:///etc"]
    for mode, expected in (("disabled", False), ("Token", True)):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert [monitoring.asks_for_token(f"{url}/{status}/") for status in (200, 401, 403)] == [False, True, True]
        assert [monitoring.asks_for_token(where) for where in no_answer] == [expected] * len(no_answer)
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert monitoring.asks_for_token(None) and not monitoring.asks_for_token(None, unset="disabled")


@pytest.mark.parametrize(("status", "warned"), [(200, True), (401, False)])
def test_submitting_a_run_to_a_cluster_without_a_token_is_a_warning(
    status: int, warned: bool, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        remote._follow(None, "job", "r", f"{url}/{status}", detach=True)
    assert (monitoring.OPEN in capsys.readouterr().err.replace("\n", " ")) is warned


def queries(run: str) -> list[str]:
    """Return the queries of the board to Prometheus, for one run."""
    return [
        target["expr"].replace("$__rate_interval", "10s").replace("$run", run)
        for panel in BOARD["panels"]
        for target in panel["targets"]
    ]


class Prometheus:
    """A real Prometheus, set up by `tune_kd dashboard --write`, with a tenth of the scrape interval for a short run."""

    def __init__(self, folder: Path, dashboard: str) -> None:
        written = command(folder, "dashboard", "--write", str(folder / "watch"), "--address", dashboard)
        answer, errors = written.communicate(timeout=60)
        assert written.returncode == 0 and "prometheus --config.file=" in answer, errors
        settings = folder / "watch" / "prometheus.yml"
        settings.write_text(settings.read_text().replace("10s", "1s"))
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            [str(PROMETHEUS), f"--config.file={settings}", f"--storage.tsdb.path={folder / 'tsdb'}",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def get(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def values(self, query: str, since: float) -> list[float]:
        """Return all values of a query since a time, from all series."""
        found = self.get("query_range", query=query, start=since, end=time.time(), step=1)["result"]
        values = [float(value) for series in found for _, value in series["values"]]
        return [value for value in values if value == value]

    def targets(self) -> int:
        try:
            return len(self.get("targets")["activeTargets"])
        except OSError:
            return 0

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def watched(ray_session: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Prometheus, float]]:
    """A smoke run on a cluster that Prometheus scrapes. One worker was killed. Yields the run's folder, the Prometheus
    and the start time."""
    if PROMETHEUS is None:
        pytest.skip("needs Debian's package prometheus")
    folder = tmp_path_factory.mktemp("watched")
    run = folder / "results" / "watched"
    prometheus = Prometheus(folder, ray_session)
    try:
        wait_for(lambda: prometheus.targets() > 0)
        since = time.time()
        os.environ["RAY_AUTH_MODE"] = "token"
        watch = ("--set", "recipe.epochs=16", "--address", ray.get_runtime_context().gcs_address)
        begun = command(folder, "run", "ablation", "--scale", "smoke", "--name", "watched", *watch)
        wait_for(lambda: begun.poll() is not None or epochs_on_record(run) >= 4)
        assert begun.poll() is None, begun.communicate()[1]
        wait_for(lambda: kill_a_worker() is not None)
        _, errors = begun.communicate(timeout=200)
        assert begun.returncode == 0, errors
        yield run, prometheus, since
    finally:
        prometheus.stop()


def test_prometheus_has_every_metric_and_an_answer_to_every_query_of_the_board(
    watched: tuple[Path, Prometheus, float],
) -> None:
    _, prometheus, since = watched
    seen = {name for name in prometheus.get("label/__name__/values") if name.startswith("ray_tune_kd")}
    assert seen == {each.exported for each in METRICS}
    for metric in METRICS:
        name = f'{metric.exported}{{run="watched"}}'
        series = prometheus.get("series", **{"match[]": name, "start": since})
        assert series and all(set(metric.labels) <= set(each) for each in series)
        unit = max(prometheus.values(name, since))
        assert unit <= 1 if metric.unit == "fraction" else unit >= 0
    empty = [query for query in queries("watched") if not prometheus.values(query, since)]
    assert empty == []


def test_prometheus_agrees_with_the_records(watched: tuple[Path, Prometheus, float]) -> None:
    run, prometheus, since = watched
    trials, epochs = (pd.read_parquet(run / f"{name}.parquet") for name in ("trials", "epochs"))
    assert max(prometheus.values('sum(ray_tune_kd_trials{run="watched"})', since)) == len(trials)
    lost = trials["error"].dropna().tolist()
    assert lost == ["attempt 1: its worker died"]
    assert max(prometheus.values('ray_tune_kd_retries_total{run="watched", reason="lost"}', since)) == 1
    # Epochs that a retried trial reports again are counted again. The last seconds of the run are not scraped.
    counted = max(prometheus.values('ray_tune_kd_epochs_total{run="watched"}', since))
    assert 0.5 * len(epochs) <= counted <= len(epochs) + 20
    images = max(prometheus.values('ray_tune_kd_images_total{run="watched"}', since))
    assert images == pytest.approx(200 * counted, abs=400)  # 200 per epoch; both are exported at about the same time
    assert max(prometheus.values('ray_tune_kd_checkpoint_seconds_total{run="watched"}', since)) > 0


def test_a_run_is_a_job_with_its_trials_and_its_log_in_rays_dashboard(
    ray_session: str, watched: tuple[Path, Prometheus, float], browser: Any
) -> None:
    run, _, _ = watched
    page = Page(browser, ray_session)
    browser.get(f"{ray_session}/#/jobs")
    until(lambda: page.says("Authentication Token Required"))
    assert not page.says("watched")  # nothing is shown without the token
    page.sign_in(token())
    until(lambda: page.says("watched", "SUCCEEDED"))
    request = urllib.request.Request(f"{ray_session}/api/jobs/", headers={"Authorization": f"Bearer {token()}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        (job,) = (each for each in json.loads(answer.read()) if each["metadata"].get("job_name") == "watched")
    assert job["metadata"] == {"job_name": "watched", "study": "ablation", "scale": "smoke"}

    browser.get(f"{ray_session}/#/jobs/{job['job_id']}")
    page.show_trials()
    shown = set(re.findall(r"\S+ seed \d+", browser.find_element("tag name", "body").text))
    rows = pd.read_parquet(run / "trials.parquet").to_dict("records")
    assert shown and shown <= {f"{row['arm']} seed {row['seed']}" for row in rows}

    browser.get(f"{ray_session}/#/logs")
    page.press("//a[contains(., 'Node ID')]")
    page.press("//a[contains(., 'tune_kd-watched.log')]")
    until(lambda: page.says("completed: test accuracy"))
