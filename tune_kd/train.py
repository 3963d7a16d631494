"""Training one trial: a loop that yields one epoch after another.

Common random numbers: what is shown in an epoch depends on (seed, epoch) alone, and the student's first weights on
the seed alone, so arms at one seed differ in their loss and in nothing else.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from tune_kd import losses, models
from tune_kd.checkpoints import Checkpoints, pack
from tune_kd.data import DataSet, Split, Views, draw_views, prepare, show
from tune_kd.kernels import Captured, autocast, float32_as
from tune_kd.memory import peak_memory
from tune_kd.study import Recipe
from tune_kd.teachers import Teacher
from tune_kd.trial import Epoch, Outcome, Trial

EVALUATION_BATCH = 512


class Diverged(RuntimeError):
    """The loss of an epoch is not finite."""


@dataclass
class _State:
    """What a checkpoint holds: all that the next epoch depends on."""

    student: nn.Module
    projections: nn.ModuleList  # empty unless the method is `feature`
    optimizer: torch.optim.SGD
    best: dict[str, Tensor]  # weights of the best validation accuracy so far
    rows: list[Epoch]

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # on a GPU, where a captured step reads it from its place
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @property
    def best_row(self) -> Epoch:
        """The epoch of the highest validation accuracy; of several, the one of the lowest validation loss.

        Ties are common where validation images are few, and the first of them would often be an early epoch.
        """
        return max(self.rows, key=lambda row: (row.val_accuracy, -row.val_loss))

    def tensors(self) -> dict[str, Tensor]:
        momentum = {
            f"momentum.{number}": entry["momentum_buffer"]
            for number, entry in self.optimizer.state_dict()["state"].items()
        }
        # Where the best epoch is the last one, its weights are the student's, and are not written twice.
        best = {} if self.best_row is self.rows[-1] else self.best
        return {
            **{f"student.{name}": tensor for name, tensor in self.student.state_dict().items()},
            **{f"best.{name}": tensor for name, tensor in best.items()},
            **{f"projections.{name}": tensor for name, tensor in self.projections.state_dict().items()},
            **momentum,
        }

    def restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        self.student.load_state_dict(_part("student.", tensors))
        self.projections.load_state_dict(_part("projections.", tensors))
        self.best = _best(tensors)
        state = self.optimizer.state_dict()
        momentum_of = _part("momentum.", tensors)
        state["state"] = {int(number): {"momentum_buffer": each} for number, each in momentum_of.items()}
        self.optimizer.load_state_dict(state)
        # A checkpoint keeps values, not layouts; fused steps walk through memory and need the parameter's own.
        for parameter, entry in self.optimizer.state.items():
            momentum = torch.empty_like(parameter, requires_grad=False)
            entry["momentum_buffer"] = momentum.copy_(entry["momentum_buffer"])
        self.rows = TypeAdapter(list[Epoch]).validate_python(notes["rows"])


def train(
    trial: Trial,
    data: DataSet,
    teacher: Teacher | None,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    checkpoint_every: float = 30.0,
    acknowledged: int = 0,
) -> Iterator[Epoch]:
    """Train a trial from its checkpoint, or from the start, and yield its epochs; the last has the outcome.

    A checkpoint is written before an epoch is yielded, when `checkpoint_every` seconds have passed since the last
    one, and at the end. Epochs that the checkpoint holds are yielded again if they come after `acknowledged`.
    Raises `Diverged` when the loss of an epoch is not finite.
    """
    assert (teacher is not None) == (trial.teacher_id is not None)
    data = _to_device(data, device)
    state = _start(trial, data, teacher, device)
    saved = checkpoints.load()
    if saved is not None:
        state.restore(*saved)
    yield from (row for row in state.rows if row.epoch > acknowledged)

    step = _Step(trial, state, data, teacher)
    saved_at = time.monotonic()
    for epoch in range(len(state.rows) + 1, trial.recipe.epochs + 1):
        last = epoch == trial.recipe.epochs
        with float32_as(trial.recipe.precision):
            row = _epoch(trial, epoch, state, data, teacher, step)
            state.rows.append(row)
            if state.best_row.epoch == epoch:
                state.best = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
            if last:
                outcome = _outcome(trial, state, data, teacher, device)
                state.rows[-1] = row = replace(row, outcome=outcome)
        if last or time.monotonic() - saved_at >= checkpoint_every:
            checkpoints.save(epoch, state.tensors(), {"rows": [asdict(each) for each in state.rows]})
            saved_at = time.monotonic()
        yield row


def best_weights(checkpoints: Checkpoints) -> dict[str, Tensor]:
    """The best-validation weights in a trial's newest checkpoint."""
    saved = checkpoints.load()
    assert saved is not None
    return _best(saved[0])


def _best(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _part("best.", tensors) or _part("student.", tensors)


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Cosine from `lr` at step 0 to `lr_min` at the last of `steps` (Loshchilov and Hutter 2017, no restarts)."""
    part = step / max(1, steps - 1)
    return recipe.lr_min + 0.5 * (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * part))


def batches(count: int, size: int) -> list[slice]:
    """Slices of `size` over `count` images. A last batch of one image joins the one before: normalising over a
    single value is undefined."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _to_device(data: DataSet, device: torch.device) -> DataSet:
    def move(split: Split) -> Split:
        return Split(split.images.to(device), split.labels.to(device))

    return replace(data, train=move(data.train), validation=move(data.validation), test=move(data.test))


def _start(trial: Trial, data: DataSet, teacher: Teacher | None, device: torch.device) -> _State:
    cell, recipe = trial.cell, trial.recipe
    student = models.build(
        trial.architecture,
        stem=cell.stem,
        classes=len(data.classes),
        width=cell.width,
        weights=cell.weights,
        seed=trial.seed,
    )
    projections = nn.ModuleList()
    if teacher is not None and cell.method == "feature":
        channels = models.feature_channels(student), models.feature_channels(teacher.net)
        projections = models.projections(*channels, seed=trial.seed)
    models.to_device(student, device)
    models.to_device(projections, device)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *projections.parameters()],
        lr=recipe.lr if device.type == "cpu" else torch.tensor(recipe.lr, device=device),
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
        fused=True,
    )
    return _State(student, projections, optimizer, best={}, rows=[])


class _Step:
    """One step of training on a batch of views. Nothing in it waits for the device: sums over images stay there."""

    def __init__(self, trial: Trial, state: _State, data: DataSet, teacher: Teacher | None) -> None:
        self._trial, self._state, self._data, self._teacher = trial, state, data, teacher
        self._device = data.train.images.device
        self._parameters = [each for group in state.optimizer.param_groups for each in group["params"]]
        forward = models.forward_with_features if trial.cell.method == "feature" else _forward
        self._forward = torch.compile(forward, dynamic=False) if trial.recipe.compile else forward
        self._run = Captured(self._train, self._device) if self._device.type == "cuda" else self._train
        self.sums = torch.zeros(5, device=self._device, dtype=torch.float64)  # loss, ce, kd, right; gradient norms

    def __call__(self, views: Views, answers: Tensor | None) -> None:
        """Train on one batch, with the teacher's logits [B, K] for its views if the method wants them."""
        self._run(views.order, views.top, views.left, views.flip, *([] if answers is None else [answers]))

    def _train(self, order: Tensor, top: Tensor, left: Tensor, flip: Tensor, answers: Tensor | None = None) -> None:
        cell, recipe, state, teacher = self._trial.cell, self._trial.recipe, self._state, self._teacher
        shown = prepare(show(Views(order, top, left, flip), self._data), self._data)
        shown = models.in_layout_of(state.student, shown)
        targets = self._data.train.labels[order]
        with autocast(recipe.precision, self._device):
            logits, features = self._forward(state.student, shown)
            loss_ce = loss = F.cross_entropy(logits, targets)
            loss_kd = torch.zeros_like(loss_ce)
            if teacher is not None:
                assert cell.alpha is not None
                if answers is not None:
                    assert cell.temperature is not None
                    loss_kd = losses.kd(logits, answers, cell.temperature)
                else:
                    assert cell.beta is not None
                    loss_kd = losses.feature(features, teacher.features(shown), state.projections, cell.beta)
                loss = cell.alpha * loss_kd + (1 - cell.alpha) * loss_ce
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters, recipe.clip)
        state.optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(1) == targets).double().mean()
            means = torch.stack([loss.double(), loss_ce.double(), loss_kd.double(), right])
            self.sums[:4] += means * len(targets)
            self.sums[4] += norm


def _forward(net: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return net(images), ()


def _epoch(trial: Trial, epoch: int, state: _State, data: DataSet, teacher: Teacher | None, step: _Step) -> Epoch:
    """Train one epoch and evaluate on the validation images."""
    recipe = trial.recipe
    count, device = len(data.train.labels), data.train.images.device
    views = draw_views(trial.seed, epoch, count, pad=data.pad, flip=data.flip)
    answers = answer_seconds = views_answered = None
    if teacher is not None and trial.cell.method == "logit":
        asked = time.perf_counter()
        answers, views_answered = teacher.answers(trial.seed, epoch, views)
        answer_seconds = time.perf_counter() - asked

    started = time.perf_counter()
    views = views.to(device)
    answers = None if answers is None else answers.to(device)
    slices = batches(count, recipe.batch_size)
    lr = recipe.lr
    state.student.train()
    step.sums.zero_()
    for number, each in enumerate(slices):
        lr = learning_rate(recipe, (epoch - 1) * len(slices) + number, recipe.epochs * len(slices))
        state.set_learning_rate(lr)
        step(views[each], None if answers is None else answers[each])
    *sums, norms = step.sums.tolist()  # here alone the host waits for the device
    train_loss, train_ce, train_kd, train_accuracy = (each / count for each in sums)
    trained = time.perf_counter() - started
    if not math.isfinite(train_loss):
        raise Diverged(f"the training loss of epoch {epoch} is {train_loss}")

    val_logits = _evaluate(state.student, data.validation, data, recipe)
    val_loss = float(F.cross_entropy(val_logits, data.validation.labels))
    if not math.isfinite(val_loss):  # the last step can spoil weights that every loss before it was fine with
        raise Diverged(f"the validation loss of epoch {epoch} is {val_loss}")
    return Epoch(
        epoch=epoch,
        val_accuracy=_accuracy(val_logits, data.validation.labels),
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


@torch.no_grad()
def _evaluate(net: nn.Module, split: Split, data: DataSet, recipe: Recipe) -> Tensor:
    """Logits float32 [N, K] of a split in eval mode."""
    net.eval()
    with autocast(recipe.precision, split.images.device):
        logits = [net(prepare(images, data)) for images in torch.split(split.images, EVALUATION_BATCH)]
    return torch.cat(logits).float()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def _outcome(trial: Trial, state: _State, data: DataSet, teacher: Teacher | None, device: torch.device) -> Outcome:
    """What is reported once: the test images, with the last and with the best-validation weights."""
    labels = data.test.labels
    last = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
    logits = _evaluate(state.student, data.test, data, trial.recipe)
    state.student.load_state_dict(state.best)
    best_logits = _evaluate(state.student, data.test, data, trial.recipe)
    state.student.load_state_dict(last)
    answers = None if teacher is None else teacher.test_answers().to(best_logits.device)
    weights = {f"last.{name}": each for name, each in last.items()}
    weights |= {f"best.{name}": each for name, each in state.best.items()}
    return Outcome(
        best_epoch=state.best_row.epoch,
        val_accuracy_best=state.best_row.val_accuracy,
        test_accuracy=_accuracy(logits, labels),
        test_accuracy_best=_accuracy(best_logits, labels),
        agreement=None if answers is None else float(losses.agreement(best_logits, answers)),
        kl_t1=None if answers is None else float(losses.kl(best_logits, answers, 1.0)),
        kl_t4=None if answers is None else float(losses.kl(best_logits, answers, 4.0)),
        ece=float(losses.expected_calibration_error(best_logits, labels)),
        params=models.parameter_count(state.student),
        weights_digest=hashlib.sha256(pack(weights, {})).hexdigest(),
        teacher_digest=None if teacher is None else teacher.digest,
        peak_memory_bytes=peak_memory(device),
    )
