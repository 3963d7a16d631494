"""The training step: forward pass, loss, backward pass and update of a student.

Creating a step takes seconds on a GPU, where it is captured, and a minute where it is compiled. A process therefore
keeps the last one for a trial that differs only in seed, learning rate and the settings that the loss takes at each
step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.data.augment import Views, prepare, show
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.study.spec import WEIGHTED
from tune_kd.study.trial import Trial
from tune_kd.training import networks
from tune_kd.training.device import Captured, Compiled, Forward, autocast, compiling_pays
from tune_kd.training.loss import Batch, Context, loss_class, step_settings
from tune_kd.training.teachers import Teacher

_idle: dict[tuple[Any, ...], "Step"] = {}  # at most one: the next trial needs its memory


@contextmanager
def stepping(trial: Trial, data: DataSet, teacher: Teacher | None, device: torch.device) -> Iterator["Step"]:
    """The step of a trial, with a student at its initial weights: the kept one if it fits, else a new one."""
    anew = _settings(trial)
    baked = tuple((name, level) for name, level in trial.cell.levels.items() if name not in anew), trial.method, *anew
    recipe = replace(trial.recipe, lr=0.0, lr_min=0.0)
    fits = (trial.architecture, baked, recipe, data, teacher, device)
    step = _idle.pop(fits, None)
    _idle.clear()  # frees its memory before another step is created
    if step is None:
        step = Step(trial, data, teacher, device)
    else:
        step.begin(trial)
    try:
        yield step
    except GeneratorExit:  # ended early; after any other exception the step is not reusable
        if step.worth_keeping:
            _idle[fits] = step
        raise
    if step.worth_keeping:
        _idle[fits] = step


class Step:
    """One training step on a batch of views. It never synchronizes: the sums of its metrics stay on the device."""

    def __init__(self, trial: Trial, data: DataSet, teacher: Teacher | None, device: torch.device) -> None:
        self.data = on_device(data, device)
        self.sums = torch.zeros(5, device=device, dtype=torch.float64)  # loss, ce, kd, correct; gradient norms
        self.student, self.loss = _networks(trial, data, teacher)
        networks.to_device(self.student, device)
        networks.to_device(self.loss, device)
        self._teacher, self._recipe, self._device = teacher, trial.recipe, device
        self._method = trial.method
        both = dict.fromkeys((*self.student.parameters(), *self.loss.parameters()))  # once, where they share a part
        self._parameters = [each for each in both if each.requires_grad]
        self._optimizer = torch.optim.SGD(
            self._parameters,
            lr=self._number(trial.recipe.lr),
            momentum=trial.recipe.momentum,
            weight_decay=trial.recipe.weight_decay,
            nesterov=True,
            fused=True,
        )
        self._settings = {name: self._number(value) for name, value in _settings(trial).items()}
        self._progress, self._epoch = torch.zeros((), device=device), torch.ones((), device=device)
        self._forward = self._fastest(networks.passing(self.student, self._method.needs), trial)
        self._run = Captured(self._train, device) if device.type == "cuda" else self._train

    @property
    def worth_keeping(self) -> bool:
        """Whether creating another step would take long."""
        return self._device.type == "cuda" or self._recipe.compile

    @property
    def fast_paths(self) -> str | None:
        """What is in use of the fast paths `graph`, `compiled` and `folded`, with commas. None without one."""
        captured = isinstance(self._run, Captured) and self._run.is_used
        compiled = isinstance(self._forward, Compiled) and self._forward.is_used
        used = {
            "graph": captured,
            "compiled": compiled,
            "folded": self._teacher is not None and self._teacher.is_folded,
        }
        return ", ".join(name for name, is_used in used.items() if is_used) or None

    def begin(self, trial: Trial) -> None:
        """Restart for another trial. All tensors keep their addresses, which a captured step reads."""
        student, loss = _networks(trial, self.data, self._teacher)
        self.student.load_state_dict(student.state_dict())
        self.loss.load_state_dict(loss.state_dict())
        for each in self._parameters:
            self._momentum(each).zero_()
        self._settings = {name: self._set(self._settings[name], value) for name, value in _settings(trial).items()}

    def train(self) -> None:
        """Begin an epoch."""
        self.student.train()
        self.loss.train()
        self.sums.zero_()

    def at(self, lr: float, epoch: int, progress: float) -> None:
        """Set what the next step depends on beside its batch: `epoch` from 1, `progress` from 0 to 1."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._set(group["lr"], lr)
        if self._method.loss is not None:
            self._epoch.fill_(epoch)
            self._progress.fill_(progress)

    def __call__(self, views: Views, teacher_logits: Tensor | None, *others: Views) -> None:
        """Train on one batch: its views, other views of the same images where the method has several, and the teacher's
        logits [B, K] for the first where they are cached."""
        logits = [] if teacher_logits is None else [teacher_logits]
        crops = [part for other in others for part in (other.top, other.left, other.flip)]
        self._run(views.order, views.top, views.left, views.flip, *crops, *logits)

    def tensors(self) -> dict[str, Tensor]:
        """The state of the student, the loss and the optimizer, by name. What the first two share is copied for one."""
        student = self.student.state_dict()
        theirs = {tensor.untyped_storage().data_ptr() for tensor in student.values()}
        loss = {
            name: tensor.clone() if tensor.untyped_storage().data_ptr() in theirs else tensor
            for name, tensor in self.loss.state_dict().items()
        }
        return {
            **{f"student.{name}": tensor for name, tensor in student.items()},
            **{f"loss.{name}": tensor for name, tensor in loss.items()},
            **{f"momentum.{number}": self._momentum(each) for number, each in enumerate(self._parameters)},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned; other names are ignored."""
        self.student.load_state_dict(part("student.", tensors))
        self.loss.load_state_dict(part("loss.", tensors))
        for number, each in enumerate(self._parameters):
            self._momentum(each).copy_(tensors[f"momentum.{number}"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The momentum buffer: zeros until the first step, in the parameter's layout, as the fused optimizer needs."""
        state = self._optimizer.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _fastest(self, forward: Forward, trial: Trial) -> Forward:
        """The student's forward pass, compiled where the recipe asks for it or it pays."""
        asked = trial.recipe.compile
        if not asked and not compiling_pays(trial.recipe, len(self.data.train.labels), self._device):
            return forward
        cell = trial.cell
        parts = (trial.architecture, cell.stem, cell.width, len(self.data.classes), trial.recipe.batch_size,
                 trial.recipe.precision, self._method.needs, self.data.train.images.shape[1:])  # fmt: skip
        return Compiled(forward, repr(parts), asked)

    def _number(self, value: float) -> float | Tensor:
        """A number of the step; on a GPU a tensor, which a captured step reads anew."""
        return value if self._device.type == "cpu" else torch.tensor(value, device=self._device)

    def _set(self, number: float | Tensor, value: float) -> float | Tensor:
        return number.fill_(value) if isinstance(number, Tensor) else value

    def _train(self, order: Tensor, *views: Tensor) -> None:
        """One step. `views` are top, left and flip of each view, and the cached logits where there are any."""
        crops = [Views(order, *views[at : at + 3]) for at in range(0, 3 * self._method.views, 3)]
        cached = views[3 * self._method.views :]
        targets = self.data.train.labels[order]
        with autocast(self._recipe.precision, self._device):
            images = [self._shown(crop) for crop in crops]
            passed = [self._forward(self.student, each) for each in images]
            logits = passed[0].logits
            loss_ce = loss = F.cross_entropy(logits, targets)
            loss_kd = torch.zeros_like(loss_ce)
            if self._method.loss is not None:
                theirs = [self._passed_by_teacher(each) for each in images]
                batch = self._batch(order, targets, passed, theirs, *cached)
                loss_kd, loss = self._weighed(batch, loss_ce)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
        self._optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(1) == targets).double().mean()
            means = torch.stack([loss.double(), loss_ce.double(), loss_kd.double(), correct])
            self.sums[:4] += means * len(targets)
            self.sums[4] += norm

    def _weighed(self, batch: Batch, loss_ce: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the method, and its sum with cross-entropy."""
        weights = {name: self._settings[name] for name in WEIGHTED if name in self._settings}
        settings = {name: value for name, value in self._settings.items() if name not in weights}
        loss_kd: Tensor = self.loss(batch, **settings)
        if "alpha" in weights:
            return loss_kd, weights["alpha"] * loss_kd + (1 - weights["alpha"]) * loss_ce
        return loss_kd, weights["kd_weight"] * loss_kd + weights["ce_weight"] * loss_ce

    def _shown(self, views: Views) -> Tensor:
        return networks.in_layout_of(self.student, prepare(show(views, self.data), self.data))

    def _passed_by_teacher(self, images: Tensor) -> networks.Passed | None:
        """What the teacher yields for images, where it runs beside the student."""
        if self._teacher is None or not self._method.runs_teacher:
            return None
        return self._teacher.passed(images, self._recipe.precision, before_relu=self._method.needs == "before_relu")

    def _batch(
        self,
        order: Tensor,
        targets: Tensor,
        passed: Sequence[networks.Passed],
        theirs: Sequence[networks.Passed | None],
        cached: Tensor | None = None,
    ) -> Batch:
        """What the loss sees, with the other view inside."""
        second = self._batch(order, targets, passed[1:], theirs[1:]) if len(passed) > 1 else None
        mine, teacher = passed[0], theirs[0]
        return Batch(
            order,
            targets,
            mine.logits,
            teacher.logits if teacher else cached,
            mine.features,
            teacher.features if teacher else (),
            mine.before_relu,
            teacher.before_relu if teacher else (),
            mine.embedding,
            teacher.embedding if teacher else None,
            self._progress,
            self._epoch,
            second,
        )


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by name without it."""
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def batches(count: int, size: int) -> list[slice]:
    """Slices of `size` over `count` images. A last batch of one image joins the one before, because batch norm is
    undefined for one value."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _settings(trial: Trial) -> dict[str, float]:
    """The numbers of the loss that a step reads anew, by name."""
    method = trial.method
    if method.loss is None:
        return {}
    weights = {name: float(level) for name in WEIGHTED if (level := trial.cell.level(name)) is not None}
    return weights | {name: _level(trial, name) for name in step_settings(loss_class(method))}


def _level(trial: Trial, name: str) -> float:
    """The value of a setting: the cell's, or the default of the method where the cell has none."""
    return float(trial.cell.levels.get(name, trial.method.defaults[name]))


def _networks(trial: Trial, data: DataSet, teacher: Teacher | None) -> tuple[nn.Module, nn.Module]:
    """The student and the loss of its method, on the CPU, as the seed initialises them.

    The loss has a random stream of its own, so a student has the same initial weights whatever its method.
    """
    cell, method = trial.cell, trial.method
    student = networks.build(
        trial.architecture,
        stem=cell.stem,
        classes=len(data.classes),
        width=cell.width,
        weights=cell.weights,
        seed=trial.seed,
    )
    if method.loss is None:
        return student, nn.Identity()
    kind, size = loss_class(method), tuple(side * data.upsample for side in data.train.images.shape[-2:])
    passed = step_settings(kind)
    shapes = partial(networks.shapes, stem=cell.stem, classes=len(data.classes), width=cell.width, size=size)
    context = Context(
        student=shapes(trial.architecture),
        teacher=None if teacher is None else shapes(str(cell.teacher)),
        classes=len(data.classes),
        train_labels=data.train.labels.cpu().clone(),
        epochs=trial.recipe.epochs,
        steps_per_epoch=len(batches(len(data.train.labels), trial.recipe.batch_size)),
        classifier=deepcopy(teacher.net.fc) if teacher is not None and method.runs_teacher else None,
        settings={name: _level(trial, name) for name in method.defaults if name not in passed},
    )
    with networks.stream("projections", trial.seed):
        loss = kind(context)
        wrap = getattr(loss, "student", None)  # a method may change what is evaluated
        return student if wrap is None else wrap(student, context), loss
