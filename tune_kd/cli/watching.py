"""The command about Ray's dashboard, Prometheus and Grafana: `dashboard`."""

from pathlib import Path
from typing import Annotated

import typer

from tune_kd.cli.options import DEFAULT_OUT, Out
from tune_kd.execute import monitoring
from tune_kd.reporting.terminal import Terminal
from tune_kd.system.errors import UserError

LOOK_AT = (
    ("Jobs", "the run as a job, with its name and study; `submit`ted ones with their log"),
    ("Actors and Tasks", "a task for each trial that runs, under its name, such as cifar/logit/T=4 seed 1"),
    ("Logs", "tune_kd-RUN.log on the node of the driver: what the run says on the terminal"),
    ("Metrics", "Ray's own graphs, where Prometheus and Grafana are set up for Ray"),
)


def dashboard(
    write: Annotated[
        Path | None,
        typer.Option(help="Folder for a board of Grafana's and the settings of Prometheus.", show_default=False),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="URL of Ray's dashboard; that of the run that goes on, by default.")
    ] = None,
    out: Out = DEFAULT_OUT,
) -> None:
    """Say where Ray's dashboard is and what to look at there; --write sets Prometheus and Grafana up."""
    from tune_kd.records import lock, run_folder

    say = Terminal().say
    held = {folder.name: holder["dashboard"] for folder in run_folder.existing(out)
            if (holder := lock.holder(folder)) is not None and holder.get("dashboard")}  # fmt: skip
    url = address or next(iter(held.values()), monitoring.DASHBOARD)
    if write is not None:
        if address is None and not monitoring.is_here(url):
            raise UserError(f"--address is not given, and a run's results say that its dashboard is at {url}, another "
                            "machine, to which Prometheus would send Ray's token; say --address URL")  # fmt: skip
        settings, board = monitoring.write(write, url)
        say(f"{settings}: start Prometheus with `prometheus --config.file={settings}`; it finds Ray's metrics at {url}")
        say(f"{board}: import it in Grafana under Dashboards, New, Import, and choose that Prometheus")
        return
    for name, where in held.items():
        say(f"{name}: {where}")
    if not held:
        say(f"no run goes on under {out}; while one does, Ray's dashboard is at {url}, unless that port is taken")
    asked = [address] if address else [each for each in (url, *held.values()) if monitoring.is_here(each)]
    guarded = all(map(monitoring.asks_for_token, dict.fromkeys(asked)))
    say("It asks for the token that `ray get-auth-token` prints." if guarded else monitoring.OPEN)
    for name, what in LOOK_AT:
        say(f"  {name}: {what}")
    say("From another machine: ssh -N -L 8265:127.0.0.1:8265 HOST, with the port above, and then http://127.0.0.1:8265")
    say("Prometheus and Grafana: `tune_kd dashboard --write FOLDER`")
