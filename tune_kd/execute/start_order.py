"""The order in which ready trials start."""

from collections.abc import Iterable, Mapping

from tune_kd.execute.worker import Task
from tune_kd.records.schema import TrialRow
from tune_kd.study.trial import Trial


def first_to_start(ready: Iterable[Trial], admitted: Iterable[Task], rows: Mapping[str, TrialRow]) -> Trial | None:
    """Return the first ready trial that would not wait for a teacher's logits, or the first ready trial if all would.

    A student trains an epoch once the teacher's logits for the epoch's views are cached. Students of one teacher that
    start at the same time wait for the same logits, and on a shared GPU several students compute them no faster than
    one. So a student on cached logits is skipped while another student of the same teacher has not yet reported an
    epoch in its attempt. If nothing else is ready, it starts anyway, since an idle slot is worse. On CPUs, each trial
    computes logits on its own cores, so no trial is skipped.

    Returns None only if no trial is ready.
    """
    answering = {
        task.trial.teacher_id
        for task in admitted
        if task.gpus and task.trial.method.uses_cached_logits
        and rows[task.trial.trial_id]["epochs_run"] == task.acknowledged
    }  # fmt: skip
    first = None
    for trial in ready:
        if not (trial.method.uses_cached_logits and trial.teacher_id in answering):
            return trial
        first = first or trial
    return first
