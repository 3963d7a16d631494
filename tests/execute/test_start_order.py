"""Which ready trial starts first: on a GPU, no student waits for cached logits while another trial could train."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

from bench import HERE, Bench, epoch
from trials import trial
from tune_kd.execute.start_order import first_to_start
from tune_kd.execute.worker import Failure, Task
from tune_kd.records.schema import TrialRow
from tune_kd.study.spec import Study
from tune_kd.study.trial import Trial

KINDS = (("none", None), ("logit", "A"), ("logit", "B"), ("feature", "A"))
ONE_SEED: dict[tuple[str, str | None], Trial] = {
    (method, teacher): trial(method, teacher_id=teacher) for method, teacher in KINDS
}
waiting = st.lists(st.sampled_from(KINDS), max_size=6) | st.lists(st.just(KINDS[1]), min_size=2, max_size=4)
admitted = st.tuples(st.sampled_from(KINDS), st.booleans(), st.sampled_from((0.0, 0.25)))


@given(waiting, st.lists(admitted, max_size=4))
def test_a_ready_trial_always_starts_and_waits_for_logits_only_if_all_would(
    kinds: list[tuple[str, str | None]], running: list[tuple[tuple[str, str | None], bool, float]]
) -> None:
    ready = [replace(ONE_SEED[kind], seed=seed) for seed, kind in enumerate(kinds)]
    tasks = [Task(replace(ONE_SEED[kind], seed=100 + number), 1, 3, 1.0, gpus)
             for number, (kind, _, gpus) in enumerate(running)]  # fmt: skip
    rows = {task.trial.trial_id: cast(TrialRow, {"epochs_run": 3 + reported})
            for task, (_, reported, _) in zip(tasks, running, strict=True)}  # fmt: skip

    def waits(each: Trial) -> bool:
        return each.cell.method == "logit" and any(
            (kind, reported, gpus > 0) == (("logit", each.teacher_id), False, True) for kind, reported, gpus in running
        )

    found = first_to_start(iter(ready), tasks, rows)
    freely = [each for each in ready if not waits(each)]
    assert found == next(iter(freely or ready), None)


def with_trained_teachers(study: Study, folder: Path, **options: Any) -> Bench:
    """A bench of a run that has trained its teachers and nothing else."""
    before = Bench(study, folder)
    for task in [each for each in iter(before.driver.next, None) if each.trial.role == "teacher"]:
        before.driver.on_start(task)
        before.finish(task)
    before.ledger.close()
    return Bench(study, folder, **options)


def need_logits(tasks: Iterable[Task]) -> list[str]:
    """The stems of the tasks that need cached logits. Each stem has its own teacher."""
    return [str(task.trial.cell.stem) for task in tasks if task.trial.method.uses_cached_logits]


def test_one_student_per_teacher_caches_logits_while_other_trials_train(study: Study, tmp_path: Path) -> None:
    bench = with_trained_teachers(study, tmp_path, gpus=0.25)
    first = [bench.start() for _ in range(9)]
    assert sorted(need_logits(first)) == ["cifar", "imagenet"]
    first_student = next(task for task in first if need_logits([task]) == ["cifar"])
    bench.driver.on_epoch(first_student.trial.trial_id, epoch(1), HERE)
    assert need_logits([bench.start()]) == ["cifar"]  # the logits of one epoch are now cached


def test_a_student_that_would_wait_starts_if_nothing_else_is_ready(study: Study, tmp_path: Path) -> None:
    bench = with_trained_teachers(study, tmp_path, gpus=0.25)
    tasks = list(iter(bench.driver.next, None))
    free = [task for task in tasks if not need_logits([task])]
    assert len(tasks) > len(free) + 2
    assert need_logits(tasks[: len(free) + 2]) == ["cifar", "imagenet"]  # after all trials that need no logits
    places = [bench.driver.plan.trials.index(task.trial) for task in tasks[len(free) + 2 :]]
    assert places == sorted(places)
    on_cpus = iter(Bench(study, tmp_path, gpus=0.0).driver.next, None)
    assert {task.trial.trial_id for task in tasks} == {task.trial.trial_id for task in on_cpus}


def test_a_restarted_student_counts_as_caching_logits_again(study: Study, tmp_path: Path) -> None:
    """Only an epoch of the current attempt counts, not those before."""
    bench = with_trained_teachers(study, tmp_path, gpus=0.25)
    first = next(task for task in iter(bench.start, None) if need_logits([task]))
    bench.driver.on_epoch(first.trial.trial_id, epoch(1), HERE)
    bench.driver.on_end(first.trial.trial_id, Failure("lost", "its worker died"))
    again = bench.start()
    assert (again.trial, again.acknowledged) == (first.trial, 1)
    assert first.trial.cell.stem not in need_logits(bench.start() for _ in range(5))


@pytest.mark.parametrize("options", [{"gpus": 0.25, "max_concurrent": 1}, {"gpus": 0.0}])
def test_trials_start_in_the_order_of_the_plan_one_at_a_time_and_on_cpus(
    study: Study, tmp_path: Path, options: dict[str, Any]
) -> None:
    driver = (bench := with_trained_teachers(study, tmp_path, **options)).driver
    while (expected := next(filter(driver._ready, driver._waiting), None)) is not None:
        task = bench.start()
        assert task.trial == expected
        if "max_concurrent" in options:
            bench.finish(task)
