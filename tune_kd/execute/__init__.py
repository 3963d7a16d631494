"""Run a plan with Ray Tune or in this process: the driver decides and records, workers train."""

import os

# Ray reads these variables once, on import, and only modules of this package import Ray. Workers start in the current
# environment, not through a second `uv run`; no usage statistics are sent; Tune writes no logs of its own.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # Tune imports MLflow if it is installed
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Correctness depends on these, so users cannot override them: an epoch is recorded before its trial continues, Tune
# writes no state and loads no other callbacks, and a worker that does not end is killed after 10 s.
os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(10**9)  # never read, and takes 50 kB of the driver's memory per trial
os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = "10"
os.environ.pop("RAY_TUNE_CALLBACKS", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # see `tune_kd.__main__`
