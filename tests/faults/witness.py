"""`python tests/faults/witness.py LOG -- ARGUMENTS`: run tune_kd with an independent witness.

The witness writes each epoch that the driver acknowledges to LOG, one per line. It shares no code and no file with the
ledger. A line is written after `Driver.on_epoch` has returned: from then on, the row must never be lost.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def watch(log: Path) -> None:
    """Wrap the driver, so that each acknowledged epoch is logged and synced before the next one."""
    from tune_kd.execute.driver import Driver
    from tune_kd.execute.worker import Where
    from tune_kd.study.trial import Epoch

    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    on_epoch = Driver.on_epoch

    def witnessed(self: Driver, trial_id: str, epoch: Epoch, where: Where) -> bool:
        counts = self.rows[trial_id]["status"] == "running"  # a late report is neither recorded nor acknowledged
        continues = on_epoch(self, trial_id, epoch, where)
        if counts:
            line: dict[str, Any] = {"at": time.time(), "trial_id": trial_id, "epoch": asdict(epoch)}
            os.write(sink, json.dumps(line).encode() + b"\n")
            os.fsync(sink)
        return continues

    Driver.on_epoch = witnessed  # type: ignore[method-assign]


def checkpoint_every(seconds: float) -> None:
    """Set the default interval of checkpoints. No command has an option for it, and these trials end within 30 s."""
    from tune_kd.execute.worker import Workplace

    _, *others = Workplace.__init__.__defaults__ or ()
    Workplace.__init__.__defaults__ = (seconds, *others)


def main(
    log: Path,
    arguments: list[str],
    every: Annotated[float, typer.Option("--checkpoint-every", help="Seconds between a trial's checkpoints.")] = 30.0,
) -> None:
    """Run tune_kd with these arguments, and write what it acknowledges to LOG."""
    from tune_kd.system.guard import guarded

    def tune_kd() -> None:
        from tune_kd.cli import main

        faulthandler.register(signal.SIGUSR2)  # prints the stack of a hung driver
        watch(log)
        checkpoint_every(every)
        sys.argv = ["tune_kd", *arguments]
        main()

    guarded(tune_kd)


if __name__ == "__main__":
    sys.dont_write_bytecode = False  # as in `tune_kd.__main__`
    typer.run(main)
