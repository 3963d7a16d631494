"""The command for Ray's dashboard, Prometheus and Grafana: `dashboard`."""

from pathlib import Path
from typing import Annotated

import typer

from tune_kd.cli.options import DEFAULT_OUT, Out
from tune_kd.execute import monitoring
from tune_kd.reporting.terminal import Terminal
from tune_kd.system.errors import UserError

LOOK_AT = (
    ("Jobs", "each run as a job, with its name and study; submitted runs also have their log"),
    ("Actors and Tasks", "a task for each running trial, with the trial's name, such as cifar/logit/T=4 seed 1"),
    ("Logs", "tune_kd-RUN.log on the driver's node: the run's terminal output"),
    ("Metrics", "Ray's own graphs, if Prometheus and Grafana are set up for Ray"),
)


def dashboard(
    write: Annotated[
        Path | None,
        typer.Option(help="Folder for a Grafana dashboard and a Prometheus configuration.", show_default=False),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="URL of Ray's dashboard. Default: that of the active run.")
    ] = None,
    out: Out = DEFAULT_OUT,
) -> None:
    """Print the URL of Ray's dashboard and its useful pages. --write generates files for Prometheus and Grafana."""
    from tune_kd.records import lock, run_folder

    say = Terminal().say
    held = {folder.name: holder["dashboard"] for folder in run_folder.existing(out)
            if (holder := lock.holder(folder)) is not None and holder.get("dashboard")}  # fmt: skip
    url = address or next(iter(held.values()), monitoring.DASHBOARD)
    if write is not None:
        if address is None and not monitoring.is_here(url):
            raise UserError(
                f"--address is not given, and a run's records name a dashboard on another machine, {url}; Prometheus "
                f"would send Ray's token there. If you trust that machine, add --address {url}"
            )
        settings, board = monitoring.write(write, url)
        say(f"{settings}: start Prometheus with `prometheus --config.file={settings}`; it finds Ray's metrics at {url}")
        say(f"{board}: import this file in Grafana under Dashboards, New, Import, and choose that Prometheus")
        return
    for name, where in held.items():
        say(f"{name}: {where}")
    if not held:
        say(f"no run is in progress under {out}; a run's Ray dashboard is at {url}, unless that port is taken")
    asked = [address] if address else [each for each in (url, *held.values()) if monitoring.is_here(each)]
    guarded = all(map(monitoring.asks_for_token, dict.fromkeys(asked)))
    say("The dashboard asks for the token that `ray get-auth-token` prints." if guarded else monitoring.OPEN)
    for name, what in LOOK_AT:
        say(f"  {name}: {what}")
    say("From another machine: ssh -N -L 8265:127.0.0.1:8265 HOST (with the port above), then http://127.0.0.1:8265")
    say("Prometheus and Grafana: `tune_kd dashboard --write FOLDER`")
