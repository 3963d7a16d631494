"""`python -m tune_kd`, and the command `tune-kd`."""

import sys

from tune_kd.system.streams import made_safe

# A run starts a dozen processes that import torch and Ray. Where the environment forbids bytecode, each would compile
# them from source again: ten seconds a process, and a plan that does not answer at once.
sys.dont_write_bytecode = False

GUARDED = ("run", "resume")  # the commands that train


def main() -> None:
    """The entry point."""
    made_safe()
    if sys.argv[1:2] and sys.argv[1] in GUARDED:
        from tune_kd.system.guard import guarded

        guarded(_command)
    else:
        _command()


def _command() -> None:
    from tune_kd.cli import main  # here: the process around a driver needs none of it

    main()


if __name__ == "__main__":
    main()
