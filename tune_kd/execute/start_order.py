"""Which of the trials that are ready starts first."""

from collections.abc import Iterable, Mapping

from tune_kd.execute.worker import Task
from tune_kd.records.schema import TrialRow
from tune_kd.study.trial import Trial


def first_to_start(ready: Iterable[Trial], admitted: Iterable[Task], rows: Mapping[str, TrialRow]) -> Trial | None:
    """The first of the `ready` trials that would not wait for a teacher's logits; the first of all if each would wait.

    A student trains once its teacher has answered the views of an epoch. Students of one teacher that begin at the same
    time wait for the same answers, which several of them compute no faster on a shared GPU than one. So a student of
    cached logits is passed over while another one of its teacher has not reported an epoch in its attempt. It starts
    nevertheless if there is nothing else to start, since an idle slot is worse. On CPUs each trial answers with cores
    of its own: nobody is passed over.

    Returns None only if nothing is ready.
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
