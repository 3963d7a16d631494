"""Named points at which a test can kill the process, to check that no record is lost.

TUNE_KD_CRASH=NAME kills the process when it first reaches NAME; NAME:N kills it when it reaches NAME for the N-th time.
Without the variable, a point costs one comparison. Ray's workers inherit the variable.
"""

import os
import signal
import sys

POINTS = {
    "study.published": "the plan is on disk; Ray has not started yet",
    "ledger.begun": "a transaction is open",
    "ledger.written": "its rows are written, not yet committed",
    "ledger.committed": "it is committed; the count of commits is not updated yet",
    "trial.started": "the start of a trial is committed; the trial's process has not been told yet",
    "epoch.committed": "an epoch is committed; no other process has been told yet",
    "trial.ended": "the end of a trial is committed; its checkpoints still exist",
    "tables.announced": "the digest of the new table is recorded; the table is still the old one",
    "tables.published": "one table is new; the others are still old",
    "drain.begun": "a signal arrived; trials finish their epoch",
    "extension.recorded": "the extension is recorded; none of its trials has run",
    "rebuild.set_aside": "a corrupt ledger is backed up; no new ledger is in its place yet",
    "publish.written": "the temporary file is written and synced, but not renamed",
    "checkpoint.published": "a checkpoint is published; its epoch is not reported yet",
    "teacher.weights": "a teacher's weights are published; its card is not yet",
    "answers.written": "a chunk of teacher logits is written; its digest is not yet",
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
    """Kill this process if TUNE_KD_CRASH names this point and its count is reached."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
