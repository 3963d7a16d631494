"""Running a plan: the driver decides and records, workers train; with Ray Tune, or in this process."""

import os

# Ray, which only rooms of this package import, reads these once. Workers are started from this environment as it is,
# not through a second `uv run`; nothing is sent anywhere; Tune writes no logs of its own beside our records.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # Tune imports it, where it is installed
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# What is right only so is not the user's to set: an epoch is on record before its trial goes on, signals are ours,
# nothing of Tune's is written, and a worker that does not end is not waited for.
os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)  # 50 kB of the driver's memory a trial, and never read
os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = "10"
os.environ.pop("RAY_TUNE_CALLBACKS", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # why: see `tune_kd.__main__`
