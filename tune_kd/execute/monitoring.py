"""Files for Prometheus and Grafana: settings that find Ray's metrics, and a dashboard. URLs of Ray's dashboard."""

import os
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit

import yaml

from tune_kd.system.environment import token_file
from tune_kd.system.errors import UserError
from tune_kd.system.files import publish

BOARD = Path(__file__).parent / "grafana" / "ablation.json"
DASHBOARD = "http://127.0.0.1:8265"  # Ray's default
LOOPBACK = ("127.0.0.1", "localhost", "::1")

GUARDED = "it asks for the token that `ray get-auth-token` prints"
OPEN = (
    "warning: Ray does not ask for a token, so anyone who reaches its ports can run code as the user who started it; "
    "start Ray with RAY_AUTH_MODE=token"
)
ANSWER_WITHIN = 5.0  # seconds


def is_url(address: str | None) -> TypeGuard[str]:
    """Whether an address is the URL of a dashboard, which accepts jobs. A driver joins a cluster by HOST:PORT."""
    try:
        parts = urlsplit(address or "")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def is_here(url: str) -> bool:
    """Whether the URL of a dashboard is on this machine. Do not trust other URLs in results, which may be others'."""
    return is_url(url) and urlsplit(url).hostname in LOOPBACK


def asks_for_token(dashboard: str | None, unset: str = "token") -> bool:
    """Whether Ray requires its token. Sends a request without a token to its dashboard.

    If no dashboard responds, returns the mode in RAY_AUTH_MODE, or in `unset` if that variable is not set.
    """
    if is_url(dashboard):
        parts = urlsplit(dashboard)
        connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        with suppress(OSError, HTTPException, ValueError):  # no response, or not HTTP
            asked = connection(parts.netloc.rpartition("@")[2], timeout=ANSWER_WITHIN)
            with closing(asked):
                asked.request("GET", f"{parts.path.rstrip('/')}/api/version")
                status = asked.getresponse().status
            if status in (200, 401, 403):
                return status != 200
    return os.environ.get("RAY_AUTH_MODE", unset).lower() == "token"


def scrape_settings(dashboard: str, token: Path) -> str:
    """Return Prometheus settings (YAML) that discover the metrics of all nodes through Ray's dashboard."""
    discovery = {
        "url": f"{dashboard.rstrip('/')}/api/prometheus/sd",
        "refresh_interval": "10s",
        "authorization": {"type": "Bearer", "credentials_file": str(token.absolute())},
    }
    settings = {
        "global": {"scrape_interval": "10s"},
        "scrape_configs": [{"job_name": "ray", "http_sd_configs": [discovery]}],
    }
    return yaml.safe_dump(settings, sort_keys=False)


def write(folder: Path, dashboard: str) -> list[Path]:
    """Write `prometheus.yml` and the Grafana dashboard `ablation.json`, and return their paths. Raises `UserError`."""
    if not is_url(dashboard):
        raise UserError(f"--address is {dashboard}; allowed: the URL of Ray's dashboard, such as {DASHBOARD}")
    found = {"prometheus.yml": scrape_settings(dashboard, token_file()).encode(), BOARD.name: BOARD.read_bytes()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            publish(folder / name, data)
    except OSError as error:
        raise UserError(
            f"--write is {folder}, which cannot be written to ({error.strerror}); choose another folder"
        ) from error
    return [folder / name for name in found]
