"""Named places at which a test may kill the process that passes them, to see that nothing is lost there.

TUNE_KD_CRASH=NAME kills at the first pass of NAME, and NAME:N at the N-th. Without the variable a place costs a
comparison. Ray's workers inherit the variable.
"""

import os
import signal
import sys

POINTS = {
    "study.published": "the plan is on disk; Ray has not been started",
    "ledger.begun": "a transaction is open",
    "ledger.written": "its rows are written, not yet committed",
    "ledger.committed": "it is committed, and the count of commits does not say so yet",
    "trial.started": "a start is committed; the trial's process does not know",
    "epoch.committed": "an epoch is committed, and nobody was told",
    "trial.ended": "an end is committed; its checkpoints are still there",
    "tables.announced": "the digest of a table is on record, and the table is still the old one",
    "tables.published": "one table is new; the others are not",
    "drain.begun": "a signal has come; trials end their epoch",
    "extension.recorded": "what was added is on record, and nothing of it has run",
    "rebuild.set_aside": "a damaged ledger was set aside; there is none at its place",
    "publish.written": "a file is written aside and synced, not yet in its place",
    "checkpoint.published": "a checkpoint is in its place; its epoch was not reported",
    "teacher.weights": "a teacher's weights are published; its card is not",
    "answers.written": "a chunk of answers is written; its digest is not",
}

_name, _, _count = os.environ.get("TUNE_KD_CRASH", "").partition(":")
if _name and (_name not in POINTS or not (_count or "1").isdecimal()):
    sys.stderr.write(
        f"tune_kd: TUNE_KD_CRASH is {os.environ['TUNE_KD_CRASH']!r}; allowed: {', '.join(POINTS)}, with `:N` for the "
        "N-th pass\n"
    )
    raise SystemExit(2)
_left = int(_count or 1)


def point(name: str) -> None:
    """A place of this name is passed."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
