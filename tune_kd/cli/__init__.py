"""The command line: commands, errors and exit statuses.

Commands import slow modules (torch, Ray, pandas) and the modules of a run's folder only if they need them. `plan` needs
none of these.
"""

import errno
import sys
import traceback
from collections.abc import Callable

import typer

from tune_kd.cli import planning, reading, remote, running, watching, writing
from tune_kd.cli.options import Unread
from tune_kd.records.ledger import FAILURES, damage
from tune_kd.system import environment, signals
from tune_kd.system.characters import visible
from tune_kd.system.errors import UserError
from tune_kd.system.files import NAME_BYTES
from tune_kd.system.secrets import masked

app = typer.Typer(
    help="Controlled ablation studies of knowledge distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[Callable[..., None], tuple[str, str]] = {
    running.run: ("run", "ablation --scale smoke --name first"),
    running.resume: ("resume", "first"),
    planning.plan: ("plan", "ablation --scale smoke"),
    writing.new: ("new", "my_study.py"),
    reading.status: ("status", "first"),
    reading.report: ("report", "first --format md"),
    planning.simulate: ("simulate", "ablation --scale smoke --curves first --orders 100"),
    planning.calibrate: ("calibrate", "ablation --scale smoke --studies 20"),
    watching.dashboard: ("dashboard", "--write monitoring"),
    remote.submit: ("submit", "ablation --address http://HEAD:8265 --out /shared/results"),
    reading.list_: ("list", ""),
}
"""The function of each command, with the command's name and the arguments of the example in its `--help`."""
for function, (name, example) in COMMANDS.items():
    app.command(name, epilog=f"Example: python -m tune_kd {name} {example}".rstrip())(function)


def main() -> None:
    """Run the command in `sys.argv` and exit: 0 success, 1 failed trials, 2 user error, 3 another failure, 128 plus the
    number of a signal."""
    with signals.left_by_signals():  # a signal's status overrides that of an error during shutdown
        _command()


def _command() -> None:
    try:
        environment.check_text(sys.argv[1:])
        app()
    except (UserError, Unread) as mistake:
        for problem in mistake.problems:
            _complain(problem)
        sys.exit(2)
    except FAILURES as error:  # failures of the machine
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # the user's error
            _complain(f"the file name {error.filename} is too long; allowed: at most {NAME_BYTES} bytes")
            sys.exit(2)
        _complain(f"{type(error).__name__}: {error}")
        if advice := _advice(error):
            _complain(advice)
        sys.exit(3)
    except Exception:  # a bug in tune_kd; status 1 would mean failed trials
        print(visible(masked(traceback.format_exc())), end="", file=sys.stderr)
        _complain("this is a bug in tune_kd; please report it. The records are intact")
        sys.exit(3)


def _complain(sentence: str) -> None:
    """Print an error to standard error. Mask secrets, and show control characters, which imported records may have."""
    print(f"tune_kd: {visible(masked(sentence))}", file=sys.stderr)


def _advice(error: Exception) -> str:
    """Return advice for the user about a failure of the machine."""
    if damage(error):
        return "`tune_kd status RUN --verify` lists the damaged files, and which of them `tune_kd resume RUN` rebuilds"
    if isinstance(error, OSError) and error.errno is None:  # raised by us, with advice in its message
        return ""
    return "the records are intact; check that the disk has free space and is writable, then run `tune_kd resume RUN`"
