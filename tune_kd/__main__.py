"""`python -m tune_kd`, and the command `tune-kd`."""

import sys

from tune_kd.system.streams import made_safe

# A run starts a dozen processes that import torch and Ray. If the environment forbids bytecode, each process compiles
# them from source again, which takes ten seconds and also delays `plan`.
sys.dont_write_bytecode = False

GUARDED = ("run", "resume")  # the commands that train


def main() -> None:
    """Entry point of the command line."""
    made_safe()
    if sys.argv[1:2] and sys.argv[1] in GUARDED:
        from tune_kd.system.guard import guarded  # late: the other commands do not need it

        guarded(_command)
    else:
        _command()


def _command() -> None:
    try:
        from tune_kd.cli import main  # late: the process that guards a driver does not need it
    except ModuleNotFoundError as error:
        if (error.name or "tune_kd").partition(".")[0] == "tune_kd":
            raise
        sys.stderr.write(
            f"tune_kd: {sys.executable} has no module {error.name}; use the Python in which tune_kd is installed, "
            "with uv: uv run python -m tune_kd ...\n"
        )
        sys.exit(2)
    main()


if __name__ == "__main__":
    main()
