"""`python -m tune_kd`, and the command `tune-kd`."""

import sys

# A run starts a dozen processes that import torch and Ray. Where the environment forbids bytecode, each would compile
# them from source again: ten seconds a process, and a plan that does not answer at once.
sys.dont_write_bytecode = False

from tune_kd.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
