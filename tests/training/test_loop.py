"""The training loop: results that must be bitwise equal, and faults that must not happen."""

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trials import CPU, as_teacher, distilling, exact, run, trial
from tune_kd.data import datasets
from tune_kd.data.augment import prepare
from tune_kd.data.datasets import DataSet
from tune_kd.study.spec import Recipe
from tune_kd.study.trial import Answering, Trial
from tune_kd.system.errors import CorruptFile
from tune_kd.training import loop as training
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.device import autocast
from tune_kd.training.loop import Diverged, batches, best_weights, learning_rate, train
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher, TeacherChanged, load_teacher, publish_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("method", "killed_after", "width"),
    [("none", 1, 0.0625), ("logit", 3, 0.0625), ("feature", 1, 0.0625), ("feature", 4, 0.0625), ("none", 2, 0.125)],
)
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(
    method: str, killed_after: int, width: float, pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    """At width 0.125 the layout is channels last, and a restored checkpoint must keep it."""
    one = trial("none", width=width) if method == "none" else distilling(method, teacher)
    with_teacher = None if method == "none" else teacher
    whole = run(one, pixels, with_teacher, tmp_path / "whole")
    begun = train(
        one, pixels, with_teacher, device=CPU, checkpoints=Checkpoints(tmp_path / "cut"), checkpoint_every=0.0
    )
    before = list(islice(begun, killed_after))
    begun.close()
    after = run(one, pixels, with_teacher, tmp_path / "cut", acknowledged=killed_after - 1)
    # The unacknowledged epoch is yielded again from the checkpoint. The others are computed.
    assert [exact(epoch) for epoch in before[:-1] + after] == [exact(epoch) for epoch in whole]
    assert whole[-1].outcome is not None
    assert whole[-1].outcome.weights_digest == after[-1].outcome.weights_digest  # type: ignore[union-attr]


def seldom(epochs: int, every: int) -> Trial:
    return replace(trial("none"), recipe=replace(trial("none").recipe, epochs=epochs, validate_every=every))


def test_validating_every_kth_epoch_includes_the_last_and_does_not_change_training(
    pixels: DataSet, tmp_path: Path
) -> None:
    whole = run(seldom(7, 1), pixels, None, tmp_path / "whole")
    found = run(seldom(7, 3), pixels, None, tmp_path / "found")
    assert [row.epoch for row in found if row.val_accuracy is not None] == [3, 6, 7]
    for one, other in zip(found, whole, strict=True):
        validated = one.epoch in (3, 6, 7)
        assert (one.val_accuracy, one.val_loss) == ((other.val_accuracy, other.val_loss) if validated else (None, None))
        unlike = ("val_accuracy", "val_loss", *(asdict(outcome) if (outcome := one.outcome) else ()))
        assert exact(one, *unlike) == exact(other, *unlike)
    outcome, theirs = found[-1].outcome, whole[-1].outcome
    assert outcome is not None and theirs is not None
    best = max((found[place - 1] for place in (3, 6, 7)), key=lambda row: row.quality)
    assert (outcome.best_epoch, outcome.val_accuracy_best) == (best.epoch, best.val_accuracy)
    assert outcome.test_accuracy == theirs.test_accuracy
    last = [Checkpoints(tmp_path / name).load() for name in ("found", "whole")]
    weights = [training.part("student.", saved[0]) for saved in last if saved is not None]
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())


@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_trial_resumed_between_validations_equals_an_uninterrupted_one_bit_for_bit(
    killed_after: int, pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third epoch is made the best one. Its weights must survive the later epochs."""
    monkeypatch.setattr(training, "_validate", lambda epoch, *_: (1.0 / epoch, 1.0))
    one = seldom(7, 3)
    whole = run(one, pixels, None, tmp_path / "whole")
    checkpoints = Checkpoints(tmp_path / "cut")
    for until in (killed_after, killed_after + 1):  # a resumed trial saves again, and that must be complete, too
        begun = train(one, pixels, None, device=CPU, checkpoints=checkpoints, checkpoint_every=0.0, acknowledged=0)
        before = list(islice(begun, until))
        begun.close()
        saved = checkpoints.load()
        assert saved is not None
        if until < 7:
            assert any(name.startswith("best.") for name in saved[0]) == (until > 3)
    after = run(one, pixels, None, tmp_path / "cut", acknowledged=len(before))
    assert [exact(epoch) for epoch in before + after] == [exact(epoch) for epoch in whole]
    outcome = whole[-1].outcome
    assert outcome is not None and (outcome.best_epoch, outcome.val_accuracy_best) == (3, 1 / 3)
    assert not all(
        torch.equal(each, best_weights(checkpoints)[name])
        for name, each in training.part("student.", checkpoints.load()[0]).items()  # type: ignore[index]
    )


def test_a_non_finite_validation_loss_raises_diverged_in_the_validated_epoch(
    pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Step.logits
    monkeypatch.setattr(Step, "logits", lambda *given: logits(*given) * float("nan"))
    epochs = train(seldom(4, 2), pixels, None, device=CPU, checkpoints=Checkpoints(tmp_path))
    assert next(epochs).val_loss is None
    with pytest.raises(Diverged, match="the validation loss of epoch 2 is nan"):
        next(epochs)


def test_a_trial_that_has_to_leave_saves_a_checkpoint_first(pixels: DataSet, tmp_path: Path) -> None:
    def begin(leaving: bool) -> None:
        begun = train(
            trial("none"), pixels, None, device=CPU, checkpoints=Checkpoints(tmp_path), leaving=lambda: leaving
        )
        next(begun)
        begun.close()

    begin(leaving=False)
    assert Checkpoints(tmp_path).load() is None
    begin(leaving=True)
    saved = Checkpoints(tmp_path).load()
    assert saved is not None and [row["epoch"] for row in saved[1]["rows"]] == [1]


@pytest.mark.parametrize(
    ("note", "error", "says"),
    [
        ("teacher_digest", TeacherChanged, "was trained with a teacher with digest 0{16}"),
        ("trial_id", CorruptFile, "the checkpoint belongs to trial 0{64}"),
    ],
)
def test_a_checkpoint_of_another_teacher_or_trial_is_rejected(
    note: str, error: type[Exception], says: str, pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    one, checkpoints = distilling("logit", teacher), Checkpoints(tmp_path / "cut")
    begun = train(one, pixels, teacher, device=CPU, checkpoints=checkpoints, checkpoint_every=0.0)
    next(begun)
    begun.close()
    saved = checkpoints.load()
    assert saved is not None
    checkpoints.save(2, saved[0], {**saved[1], note: "0" * 64})
    with pytest.raises(error, match=says):
        next(train(one, pixels, teacher, device=CPU, checkpoints=checkpoints))


def test_best_weights_raises_if_the_newest_checkpoint_is_damaged(pixels: DataSet, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    list(train(as_teacher(trial("none"), 3), pixels, None, device=CPU, checkpoints=checkpoints, checkpoint_every=0.0))
    newest = max(tmp_path.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="is missing or damaged"):
        best_weights(checkpoints)


def test_a_trial_without_a_checkpoint_restarts_and_gives_the_same_rows(pixels: DataSet, tmp_path: Path) -> None:
    first = list(
        islice(train(trial("none"), pixels, None, device=CPU, checkpoints=Checkpoints(tmp_path)), 2)
    )  # within 30 s of the start: nothing was saved
    again = run(trial("none"), pixels, None, tmp_path)
    assert [exact(epoch) for epoch in again[:2]] == [exact(epoch) for epoch in first]


def test_a_logit_arm_with_alpha_0_trains_bit_for_bit_like_the_control(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    control = run(trial("none"), pixels, None, tmp_path / "control")
    logit = run(distilling("logit", teacher, alpha=0.0), pixels, teacher, tmp_path / "logit")
    of_teacher = ("loss_kd", "agreement", "kl_t1", "kl_t4", "teacher_digest")
    assert [exact(epoch, *of_teacher) for epoch in logit] == [exact(epoch, *of_teacher) for epoch in control]


def test_a_feature_arm_with_alpha_0_trains_like_the_control_to_rounding(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    control = run(trial("none"), pixels, None, tmp_path / "control")
    feature = run(distilling("feature", teacher, alpha=0.0), pixels, teacher, tmp_path / "feature")
    for one, other in zip(feature, control, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-2)


@pytest.mark.parametrize("method", ["logit", "feature"])
def test_distillation_changes_what_the_student_learns(
    method: str, pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    control = run(trial("none"), pixels, None, tmp_path / "control")
    student = run(distilling(method, teacher), pixels, teacher, tmp_path / "student")
    assert student[0].loss_kd is not None
    assert student[0].loss_kd > 0
    assert control[0].loss_kd is None
    assert exact(student[-1])["weights_digest"] != exact(control[-1])["weights_digest"]


def test_the_teacher_stays_in_eval_mode_with_unchanged_weights(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    before = {name: each.clone() for name, each in teacher.net.state_dict().items()}
    run(distilling("feature", teacher), pixels, teacher, tmp_path / "feature")
    run(distilling("logit", teacher), pixels, teacher, tmp_path / "logit")
    assert not any(module.training for module in teacher.net.modules())
    assert all(torch.equal(each, before[name]) for name, each in teacher.net.state_dict().items())


def test_the_student_is_in_train_mode_in_every_epoch(
    pixels: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    step = torch.optim.SGD.step
    built: list[nn.Module] = []
    build = training.networks.build

    def watched_build(*args: Any, **options: Any) -> nn.Module:
        built.append(build(*args, **options))
        return built[-1]

    def watched_step(self: torch.optim.SGD, *args: Any) -> Any:
        modes.append(all(module.training for module in built[-1].modules()))
        return step(self, *args)

    monkeypatch.setattr(training.networks, "build", watched_build)
    monkeypatch.setattr(torch.optim.SGD, "step", watched_step)
    run(trial("none"), pixels, None, tmp_path)
    assert modes == [True] * 4 * 3  # four epochs of three steps


def test_projections_are_trained_clipped_and_saved_with_the_student(
    pixels: DataSet, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[int] = []
    clip = nn.utils.clip_grad_norm_

    def watched(parameters: list[nn.Parameter], norm: float) -> torch.Tensor:
        clipped.append(len(parameters))
        return clip(parameters, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    checkpoints = Checkpoints(tmp_path / "feature")
    each = distilling("feature", teacher)
    epochs = train(each, pixels, teacher, device=CPU, checkpoints=checkpoints, checkpoint_every=0.0)
    next(epochs)
    first = checkpoints.load()
    list(epochs)
    last = checkpoints.load()
    assert first is not None
    assert last is not None
    names = [name for name in last[0] if name.startswith("loss.")]
    assert len(names) == 4
    assert all(not torch.equal(first[0][name], last[0][name]) for name in names)
    students = len([name for name in last[0] if name.startswith("momentum.")])
    assert set(clipped) == {students}  # all parameters of the optimizer, including projections
    assert students == len(list(training.networks.build("resnet18", stem="cifar", classes=2, seed=0).parameters())) + 4


def test_a_non_finite_loss_raises_diverged(pixels: DataSet, tmp_path: Path) -> None:
    hot = replace(trial("none"), recipe=Recipe(epochs=4, batch_size=16, lr=1e30, clip=1e30))
    epochs = train(hot, pixels, None, device=CPU, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(Diverged, match="epoch 1"):
        list(epochs)


def test_the_outcome_covers_the_best_validated_and_the_last_weights(
    pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    epochs = run(distilling("logit", teacher), pixels, teacher, tmp_path)
    outcome = epochs[-1].outcome
    assert outcome is not None
    assert all(epoch.outcome is None for epoch in epochs[:-1])
    accuracies = [epoch.val_accuracy for epoch in epochs]
    assert outcome.val_accuracy_best == max(accuracies)
    best = min((epoch for epoch in epochs if epoch.val_accuracy == max(accuracies)), key=lambda epoch: epoch.val_loss)
    assert outcome.best_epoch == best.epoch
    saved = Checkpoints(tmp_path).load()
    assert saved is not None
    last = {key.removeprefix("student."): each for key, each in saved[0].items() if key.startswith("student.")}
    for weights, reported in (
        (last, outcome.test_accuracy),
        (best_weights(Checkpoints(tmp_path)), outcome.test_accuracy_best),
    ):
        net = training.networks.build("resnet18", stem="cifar", classes=2, width=0.0625, seed=0).eval()
        net.load_state_dict(weights)
        logits = net(prepare(pixels.test.images, pixels))
        assert float((logits.argmax(1) == pixels.test.labels).double().mean()) == reported
    assert outcome.params == training.networks.parameter_count(net)
    assert outcome.teacher_digest == teacher.digest


def test_the_learning_rate_is_a_cosine_that_ends_with_the_budget() -> None:
    recipe = Recipe(lr=0.1, lr_min=1e-4)
    rates = [learning_rate(recipe, step, 101) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx((0.1 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-4)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("count", "size"), [(40, 16), (33, 16), (32, 16), (1, 16), (17, 16), (5, 2)])
def test_batches_cover_every_image_once_and_avoid_batches_of_one_image(count: int, size: int) -> None:
    slices = batches(count, size)
    assert [index for each in slices for index in range(count)[each]] == list(range(count))
    assert all(each.stop - each.start > 1 for each in slices) or count == 1


CURVES = {
    "none": [2.383244, 2.353533, 2.319723, 2.296571],
    "logit": [7.513437, 6.819581, 6.260706, 6.026689],
    "feature": [34.910326, 34.885734, 34.587718, 34.676872],
}
"""Training losses of four epochs at seed 1, from the first version of the loop."""


@pytest.mark.parametrize("method", CURVES)
def test_seeded_loss_curves_match_their_recorded_values(method: str, tmp_path: Path) -> None:
    """A small learning rate and 8 channels keep rounding errors small: SSE4.1, AVX2 and AVX-512 (to be set with
    ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY) differ by at most 1.4e-4."""
    digits, width = datasets.load("digits", train=256, validation=50, test=50), 0.125
    taught = as_teacher(trial("none", width=width))
    net = training.networks.build("resnet50", stem="cifar", classes=10, width=width, seed=9)
    publish_teacher(tmp_path, taught, net.state_dict(), [])
    teacher = load_teacher(tmp_path, taught.trial_id, digits, CPU, Answering(True, ()))
    one = trial("none", width=width) if method == "none" else distilling(method, teacher, width=width)
    slow = replace(one, recipe=Recipe(epochs=4, batch_size=64, lr=0.01))
    curve = [row.train_loss for row in run(slow, digits, None if method == "none" else teacher, tmp_path / method)]
    assert curve == pytest.approx(CURVES[method], rel=4e-4)


def test_bfloat16_changes_logits_and_gradients_only_by_rounding() -> None:
    """bfloat16 keeps 8 bits: a product is accurate to 0.4 %, and twenty layers to a few per cent."""
    digits = datasets.load("digits")
    images, labels = prepare(digits.train.images[:64], digits), digits.train.labels[:64]

    def step(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        net = training.networks.build("resnet18", stem="cifar", classes=10, width=0.125, seed=1)
        with autocast(precision, CPU):
            logits = net(images)
            nn.functional.cross_entropy(logits, labels).backward()
        return logits.detach().float(), torch.cat([each.grad.flatten() for each in net.parameters()])

    (exact_logits, exact_gradient), (logits, gradient) = step("float32"), step("bfloat16")
    assert 0 < (logits - exact_logits).norm() < 0.05 * exact_logits.norm()
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.9
    assert float(gradient.norm()) == pytest.approx(float(exact_gradient.norm()), rel=0.1)


@pytest.mark.parametrize("method", ["none", "logit", "feature"])
def test_a_bfloat16_trial_keeps_float32_weights_and_has_a_similar_loss(
    method: str, pixels: DataSet, teacher: Teacher, tmp_path: Path
) -> None:
    one = trial("none") if method == "none" else distilling(method, teacher)
    rounded = replace(one, recipe=replace(one.recipe, precision="bfloat16"))
    with_teacher = None if method == "none" else teacher
    exactly = run(one, pixels, with_teacher, tmp_path / "float32")
    roughly = run(rounded, pixels, with_teacher, tmp_path / "bfloat16")
    assert roughly[0].train_loss != exactly[0].train_loss
    assert roughly[0].train_loss == pytest.approx(exactly[0].train_loss, rel=0.1)
    saved = Checkpoints(tmp_path / "bfloat16").load()
    assert saved is not None
    assert {tensor.dtype for name, tensor in saved[0].items() if "num_batches" not in name} == {torch.float32}
