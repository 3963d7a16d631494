"""What Prometheus and Grafana need in order to watch runs: where Ray's metrics are, and a board for them."""

from pathlib import Path
from urllib.parse import urlsplit

import yaml

from tune_kd.environment import token_file
from tune_kd.storage import publish
from tune_kd.study import Mistake

BOARD = Path(__file__).parent / "grafana" / "ablation.json"
DASHBOARD = "http://127.0.0.1:8265"  # where Ray's is, unless that port is taken
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_url(address: str | None) -> bool:
    """Whether an address is that of a dashboard, to which one sends commands, and not of a cluster, which one joins."""
    parts = urlsplit(address or "")
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def scrape_settings(dashboard: str, token: Path) -> str:
    """Settings of Prometheus (YAML) that find the metrics of all nodes of a Ray through its dashboard."""
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
    """Write `prometheus.yml` and the board `ablation.json` into a folder; returns them. Raises `Mistake`."""
    if not is_url(dashboard):
        raise Mistake(f"--address is {dashboard}; allowed: the URL of Ray's dashboard, such as {DASHBOARD}")
    found = {"prometheus.yml": scrape_settings(dashboard, token_file()).encode(), BOARD.name: BOARD.read_bytes()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            publish(folder / name, data)
    except OSError as error:
        raise Mistake(f"--write is {folder}, which cannot be written to ({error.strerror}); choose another") from error
    return [folder / name for name in found]
