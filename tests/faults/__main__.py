"""`python tests/faults COMMAND`: inject faults into real runs, and check that nothing is lost."""

import signal
import sys
from pathlib import Path

import typer

sys.path[0] = str(Path(__file__).parents[1])  # so that this folder is the package `faults`, as in the tests

from faults import kills, leaving, operations, points, soak  # noqa: E402

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command(name="kills")(kills.kills)
app.command(name="leaving")(leaving.leaving)
app.command(name="operations")(operations.operations)
app.command(name="points")(points.points)
app.command(name="soak")(soak.soak)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that clean-up runs
    app()
