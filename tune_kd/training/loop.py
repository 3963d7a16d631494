"""The training loop of one trial, a generator of epochs.

Common random numbers: the images of an epoch depend on (seed, epoch) alone, and the student's initial weights on the
seed alone. Arms with the same seed therefore differ only in their loss.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_kd.data.augment import Views, draw_views
from tune_kd.data.datasets import DataSet
from tune_kd.study.spec import Recipe
from tune_kd.study.trial import Epoch, Outcome, Trial
from tune_kd.system.adapters import adapter
from tune_kd.system.errors import CorruptFile
from tune_kd.training import metrics, networks
from tune_kd.training.checkpoints import Checkpoints, pack
from tune_kd.training.device import float32_as, peak_memory, start_measuring
from tune_kd.training.step import Step, batches, part, stepping
from tune_kd.training.teachers import Teacher, TeacherChanged


class Diverged(RuntimeError):
    """The loss of an epoch is not finite."""


@dataclass
class _Progress:
    """The epochs of a trial so far."""

    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the best validation accuracy so far
    rows: list[Epoch] = field(default_factory=list)

    @property
    def best_row(self) -> Epoch | None:
        """The best epoch so far, by its `quality`. None before the first validated epoch."""
        best = max(self.rows, key=lambda row: row.quality)
        return None if best.val_accuracy is None else best

    def tensors(self) -> dict[str, Tensor]:
        """The best weights by name. Empty if there are none yet, and if they are the last weights, which a checkpoint
        has anyway."""
        best = {} if self.best_row in (None, self.rows[-1]) else self.best
        return {f"best.{name}": tensor for name, tensor in best.items()}


def train(
    trial: Trial,
    data: DataSet,
    teacher: Teacher | None,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    checkpoint_every: float = 30.0,
    acknowledged: int = 0,
    leaving: Callable[[], bool] = lambda: False,
) -> Iterator[Epoch]:
    """Train a trial from its checkpoint, or from the start, and yield its epochs. The last one has the outcome.

    A checkpoint is written before an epoch is yielded if `checkpoint_every` seconds have passed since the last one, if
    `leaving()` is true, and at the end. Epochs of the checkpoint after number `acknowledged` are yielded again.
    Raises `Diverged` if the loss of an epoch is not finite, and `TeacherChanged` if the checkpoint was trained with
    another teacher.
    """
    assert (teacher is not None) == (trial.teacher_id is not None)
    whose = {"trial_id": trial.trial_id, "teacher_digest": None if teacher is None else teacher.digest}
    with stepping(trial, data, teacher, device) as step:
        start_measuring(device)
        progress = _Progress()
        saved = checkpoints.load()
        if saved is not None:
            _check_whose(saved[1], whose)
            step.restore(saved[0])
            progress = _Progress(_best(saved[0]), adapter(list[Epoch]).validate_python(saved[1]["rows"]))
        yield from (row for row in progress.rows if row.epoch > acknowledged)

        saved_at = time.monotonic()
        for epoch in range(len(progress.rows) + 1, trial.recipe.epochs + 1):
            last = epoch == trial.recipe.epochs
            with float32_as(trial.recipe.precision):
                row = _epoch(trial, epoch, teacher, step)
                progress.rows.append(row)
                if progress.best_row is row:
                    progress.best = {name: tensor.clone() for name, tensor in step.student.state_dict().items()}
                if last:
                    outcome = _outcome(trial, progress, teacher, step, device)
                    progress.rows[-1] = row = replace(row, outcome=outcome)
            if last or leaving() or time.monotonic() - saved_at >= checkpoint_every:
                rows = [asdict(each) for each in progress.rows]
                checkpoints.save(epoch, step.tensors() | progress.tensors(), {**whose, "rows": rows})
                saved_at = time.monotonic()
            yield row


def best_weights(checkpoints: Checkpoints) -> dict[str, Tensor]:
    """The best-validation weights of an ended trial. Raises `CorruptFile` if its last checkpoint is damaged."""
    saved = checkpoints.load()
    if saved is None or saved[1]["rows"][-1]["outcome"] is None:  # an earlier checkpoint has other weights
        raise CorruptFile("the last checkpoint is missing or damaged")
    return _best(saved[0])


def _check_whose(notes: dict[str, Any], whose: dict[str, Any]) -> None:
    """Raise if a checkpoint belongs to another trial or was trained with another teacher."""
    if notes["trial_id"] != whose["trial_id"]:
        raise CorruptFile(f"the checkpoint belongs to trial {notes['trial_id']}; remove it")
    if notes["teacher_digest"] != whose["teacher_digest"]:
        raise TeacherChanged(
            f"the checkpoint was trained with a teacher with digest {str(notes['teacher_digest'])[:16]}, but the "
            f"teacher now has {str(whose['teacher_digest'])[:16]}; restore the teacher, or start a new run"
        )


def _best(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return part("best.", tensors) or part("student.", tensors)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Cosine from `lr` at step 0 to `lr_min` at the last of `steps` (Loshchilov and Hutter 2017, no restarts)."""
    part = step / max(1, steps - 1)
    return recipe.lr_min + 0.5 * (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * part))


def _epoch(trial: Trial, epoch: int, teacher: Teacher | None, step: Step) -> Epoch:
    """Train one epoch. Evaluate on the validation images if the recipe validates this epoch."""
    recipe, data = trial.recipe, step.data
    count, device = len(data.train.labels), data.train.images.device
    method = trial.method
    views, *others = (
        draw_views(trial.seed, epoch, count, pad=data.pad, flip=data.flip, view=view) for view in range(method.views)
    )
    logits = answer_seconds = views_answered = None
    if teacher is not None and method.uses_cached_logits:
        asked = time.perf_counter()
        logits, views_answered = teacher.logits(views)
        answer_seconds = time.perf_counter() - asked

    started = time.perf_counter()
    views, others = views.to(device), [each.to(device) for each in others]
    logits = None if logits is None else logits.to(device)
    slices = batches(count, recipe.batch_size)
    # The random draws of the loss, too, depend on (seed, epoch) alone.
    with networks.stream("loss", trial.seed, epoch, device=device) if method.loss else nullcontext():
        lr = _train_epoch(recipe, epoch, step, slices, logits, views, *others)
    *sums, norms = step.sums.tolist()  # the only synchronization of an epoch
    train_loss, train_ce, train_kd, train_accuracy = (each / count for each in sums)
    trained = time.perf_counter() - started
    if not math.isfinite(train_loss):
        raise Diverged(f"the training loss of epoch {epoch} is {train_loss}")

    val_accuracy, val_loss = _validate(epoch, step) if recipe.validates(epoch) else (None, None)
    return Epoch(
        epoch=epoch,
        val_accuracy=val_accuracy,
        val_loss=val_loss,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        loss_ce=train_ce,
        loss_kd=None if teacher is None else train_kd,
        lr=lr,
        grad_norm=norms / len(slices),
        seconds=time.perf_counter() - started,
        images_per_second=count / trained,
        answer_seconds=answer_seconds,
        views_answered=views_answered,
    )


def _train_epoch(
    recipe: Recipe, epoch: int, step: Step, slices: list[slice], logits: Tensor | None, views: Views, *others: Views
) -> float:
    """Train on each slice of the views, and return the last learning rate."""
    lr = recipe.lr
    step.train()
    for number, each in enumerate(slices):
        done, steps = (epoch - 1) * len(slices) + number, recipe.epochs * len(slices)
        lr = learning_rate(recipe, done, steps)
        step.at(lr, epoch, done / max(1, steps - 1))
        step(views[each], None if logits is None else logits[each], *(other[each] for other in others))
    return lr


def _validate(epoch: int, step: Step) -> tuple[float, float]:
    """Accuracy and loss on the validation images."""
    split = step.data.validation
    logits = step.logits(split.images)
    loss = float(F.cross_entropy(logits, split.labels))
    if not math.isfinite(loss):  # the last step can spoil the weights even if all training losses are finite
        raise Diverged(f"the validation loss of epoch {epoch} is {loss}")
    return _accuracy(logits, split.labels), loss


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def _outcome(trial: Trial, progress: _Progress, teacher: Teacher | None, step: Step, device: torch.device) -> Outcome:
    """Evaluate on the test images, with the last and with the best-validation weights."""
    student, data, best = step.student, step.data, progress.best_row
    assert best is not None and best.val_accuracy is not None, "the last epoch is always validated"
    labels = data.test.labels
    last = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    logits = step.logits(data.test.images)
    student.load_state_dict(progress.best)
    best_logits = step.logits(data.test.images)
    student.load_state_dict(last)
    theirs = None if teacher is None else teacher.test_logits().to(best_logits.device)
    weights = {f"last.{name}": each for name, each in last.items()}
    weights |= {f"best.{name}": each for name, each in progress.best.items()}
    return Outcome(
        best_epoch=best.epoch,
        val_accuracy_best=best.val_accuracy,
        test_accuracy=_accuracy(logits, labels),
        test_accuracy_best=_accuracy(best_logits, labels),
        agreement=None if theirs is None else float(metrics.agreement(best_logits, theirs)),
        kl_t1=None if theirs is None else float(metrics.kl(best_logits, theirs, 1.0)),
        kl_t4=None if theirs is None else float(metrics.kl(best_logits, theirs, 4.0)),
        ece=float(metrics.expected_calibration_error(best_logits, labels)),
        params=networks.parameter_count(student),
        weights_digest=hashlib.sha256(pack(weights, {})).hexdigest(),
        teacher_digest=None if teacher is None else teacher.digest,
        peak_memory_bytes=peak_memory(device),
        fast_paths=step.fast_paths,
    )
