"""The private parts of Ray Tune that this project uses, as of Ray 2.60.0. No other module uses private names of Tune.

`test_private_parts_of_tune_are_unchanged` fails when one of them changes.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from ray.air.execution._internal import RayActorManager
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError


@contextmanager
def every_ray_error_a_lost_worker(note: Callable[[RayError | None], None]) -> Iterator[None]:
    """Make Tune treat every Ray error about a worker as a lost worker, which costs one attempt.

    Tune treats only `RayActorError` as a lost worker and ends the run at any other Ray error. But a worker that Ray's
    memory monitor kills raises `OutOfMemoryError`, and a dozen other errors are about lost nodes and objects or about
    actors that cannot be placed. An error of the trial itself is a `RayTaskError`, which is left as it is. `note` gets
    the error if Tune does not see it, else None.
    """
    failed = RayActorManager._actor_task_failed

    def as_lost(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        note(None)
        if isinstance(exception, RayError) and not isinstance(exception, RayTaskError):
            if not isinstance(exception, RayActorError):
                note(exception)
            exception = ActorDiedError()
        failed(manager, tracked_actor_task=tracked_actor_task, exception=exception)

    with patch.object(RayActorManager, "_actor_task_failed", as_lost):
        yield


def signals_left_alone() -> AbstractContextManager[object]:
    """Prevent Tune from handling SIGINT and SIGUSR1: it would end on its own and abandon the running trials."""
    return patch.object(sys.modules["ray.tune.tune"], "_setup_signal_catching", threading.Event)


def forget(trial: Any) -> None:
    """Free Tune's metadata of a finished `tune.experiment.Trial`. Otherwise memory grows with the run."""
    trial.update_last_result({"done": True})  # not empty, or Tune would ask the worker for a result
    trial.metric_analysis.clear()
    trial.metric_n_steps.clear()
    trial._default_result_or_future = None  # an object reference, which makes Ray keep the task that returned it
