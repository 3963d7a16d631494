"""The training step: the images it sees, its reuse by the next trial, and how it runs on a GPU."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from trials import CPU, distilling, exact, run, trial
from tune_kd.data.datasets import DataSet
from tune_kd.study.spec import Recipe
from tune_kd.study.trial import Trial
from tune_kd.training import step as stepping
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import Diverged, train
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher

pytestmark = pytest.mark.usefixtures("one_thread")


def test_arms_at_the_same_seed_see_the_same_images(
    pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    prepare = stepping.prepare

    def watched(images: torch.Tensor, data: DataSet) -> torch.Tensor:
        seen.setdefault(name, []).append(images.clone())
        return prepare(images, data)

    monkeypatch.setattr(stepping, "prepare", watched)
    for name, each in {"none": trial("none"), "feature": distilling("feature", teacher)}.items():
        torch.manual_seed(len(name))  # the state of the global generator must not matter
        run(each, pixels, teacher if each.teacher_id else None, tmp_path / name)
    assert len(seen["none"]) == len(seen["feature"])
    assert all(torch.equal(one, other) for one, other in zip(seen["none"], seen["feature"], strict=True))


def test_a_trial_does_not_depend_on_what_its_process_did_before(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    first = run(distilling("logit", teacher), pixels, teacher, tmp_path / "first")
    run(replace(trial("none"), recipe=replace(trial("none").recipe, precision="tf32")), pixels, None, tmp_path / "tf32")
    run(distilling("feature", teacher), pixels, teacher, tmp_path / "feature")
    again = run(distilling("logit", teacher), pixels, teacher, tmp_path / "again")
    assert [exact(epoch) for epoch in again] == [exact(epoch) for epoch in first]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Keep every step, as on a GPU. Lists the steps that were created."""
    made: list[Step] = []
    make = Step.__init__

    def watched(self: Step, *arguments: Any) -> None:
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(Step, "worth_keeping", True)
    monkeypatch.setattr(Step, "__init__", watched)
    monkeypatch.setattr(stepping, "_idle", {})
    return made


def others(method: str, teacher: Teacher) -> tuple[Trial, Trial]:
    """Two trials that can share a step, and differ in everything else."""
    one = trial(method) if method == "none" else distilling(method, teacher)
    numbers = {"none": {}, "logit": {"temperature": 2.0, "alpha": 0.3}, "feature": {"beta": 0.1, "alpha": 0.3}}
    cell = replace(one.cell, **numbers[method])
    return one, replace(one, seed=2, arm="other", cell=cell, recipe=replace(one.recipe, lr=0.02, lr_min=0.01))


@pytest.mark.parametrize("method", ["none", "logit", "feature"])
def test_a_trial_with_a_reused_step_equals_one_with_a_new_step_bit_for_bit(
    method: str, pixels: DataSet, teacher: Teacher, tmp_path: Path, kept: list[Step]
) -> None:
    with_teacher = None if method == "none" else teacher
    one, other = others(method, teacher)
    alone = run(other, pixels, with_teacher, tmp_path / "alone")
    stepping._idle.clear()
    run(one, pixels, with_teacher, tmp_path / "before")
    after = run(other, pixels, with_teacher, tmp_path / "after")
    assert len(kept) == 2
    assert [exact(epoch) for epoch in after] == [exact(epoch) for epoch in alone]


def test_a_resumed_trial_reuses_the_step_of_one_that_ended_early(
    pixels: DataSet, teacher: Teacher, tmp_path: Path, kept: list[Step]
) -> None:
    one, other = others("logit", teacher)
    whole = run(other, pixels, teacher, tmp_path / "whole")
    for each, epochs in ((other, 1), (one, 2)):
        begun = train(
            each, pixels, teacher, device=CPU, checkpoints=Checkpoints(tmp_path / each.arm), checkpoint_every=0
        )
        assert len(list(islice(begun, epochs))) == epochs
        begun.close()
    resumed = run(other, pixels, teacher, tmp_path / other.arm, acknowledged=1)
    assert len(kept) == 1
    assert [exact(epoch) for epoch in resumed] == [exact(epoch) for epoch in whole[1:]]


def test_interleaved_trials_do_not_share_a_step(pixels: DataSet, tmp_path: Path, kept: list[Step]) -> None:
    alone = [exact(epoch) for epoch in run(trial("none"), pixels, None, tmp_path / "alone")]
    one, other = (
        train(trial("none"), pixels, None, device=CPU, checkpoints=Checkpoints(tmp_path / name)) for name in "ab"
    )
    assert [(exact(first), exact(second)) for first, second in zip(one, other, strict=True)] == [
        (row, row) for row in alone
    ]
    assert len(kept) == 2


@pytest.mark.parametrize(
    "change", [{"batch_size": 8}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"clip": 0.1}, {"precision": "bfloat16"}]
)
def test_a_trial_with_other_values_of_a_steps_fixed_settings_gets_a_new_step(
    change: dict[str, Any], pixels: DataSet, tmp_path: Path, kept: list[Step]
) -> None:
    one = trial("none")
    run(one, pixels, None, tmp_path / "one")
    run(replace(one, recipe=replace(one.recipe, **change)), pixels, None, tmp_path / "other")
    assert len(kept) == 2
    assert list(stepping._idle.values()) == kept[1:]  # the memory of the first was freed


def test_the_step_of_a_failed_trial_is_discarded(pixels: DataSet, tmp_path: Path, kept: list[Step]) -> None:
    hot = replace(trial("none"), recipe=Recipe(epochs=4, batch_size=16, lr=1e30, clip=1e30))
    with pytest.raises(Diverged):
        run(hot, pixels, None, tmp_path)
    assert len(kept) == 1
    assert not stepping._idle


def test_all_images_are_evaluated_batch_by_batch_in_eval_mode(pixels: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels.train.images
    step = Step(trial("none"), pixels, None, CPU)
    step.train()
    whole = step.logits(images)
    monkeypatch.setattr(stepping, "evaluation_batch", lambda device: 7)
    parts = Step(trial("none"), pixels, None, CPU).logits(images)
    assert whole.shape == (len(images), len(pixels.classes)) and whole.dtype == torch.float32
    torch.testing.assert_close(parts, whole)


def test_evaluation_batches_have_512_images_on_a_cpu_and_1000_on_a_gpu() -> None:
    assert [stepping.evaluation_batch(torch.device(name)) for name in ("cpu", "cuda")] == [512, 1000]
