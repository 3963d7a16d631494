"""The training step: forward pass, loss, backward pass and update of a student.

Creating a step takes seconds on a GPU, where it is captured, and a minute where it is compiled. A process therefore
keeps the last one for a trial that differs only in seed, settings of the loss, epochs or learning rate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.data.augment import Views, prepare, show
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.study.trial import Trial
from tune_kd.training import networks
from tune_kd.training.device import Captured, autocast
from tune_kd.training.methods import METHODS, SETTINGS, Batch
from tune_kd.training.teachers import Teacher

_idle: dict[tuple[Any, ...], "Step"] = {}  # at most one: the next trial needs its memory


@contextmanager
def stepping(trial: Trial, data: DataSet, teacher: Teacher | None, device: torch.device) -> Iterator["Step"]:
    """The step of a trial, with a student at its initial weights: the kept one if it fits, else a new one."""
    baked = tuple(value for name, value in asdict(trial.cell).items() if name not in SETTINGS)
    recipe = replace(trial.recipe, epochs=0, lr=0.0, lr_min=0.0)
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
        self.student, self.projections = _networks(trial, data, teacher)
        for network in (self.student, self.projections):
            networks.to_device(network, device)
        self._teacher, self._recipe, self._device = teacher, trial.recipe, device
        self._method = METHODS[trial.cell.method]
        self._parameters = [*self.student.parameters(), *self.projections.parameters()]
        self._optimizer = torch.optim.SGD(
            self._parameters,
            lr=self._number(trial.recipe.lr),
            momentum=trial.recipe.momentum,
            weight_decay=trial.recipe.weight_decay,
            nesterov=True,
            fused=True,
        )
        self._settings = {name: self._number(value) for name, value in _settings(trial).items()}
        forward = networks.forward_with_features if self._method.needs == "features" else _forward
        self._forward = torch.compile(forward, dynamic=False) if trial.recipe.compile else forward
        self._run = Captured(self._train, device) if device.type == "cuda" else self._train

    @property
    def worth_keeping(self) -> bool:
        """Whether creating another step would take long."""
        return self._device.type == "cuda" or self._recipe.compile

    def begin(self, trial: Trial) -> None:
        """Restart for another trial. All tensors keep their addresses, which a captured step reads."""
        student, projections = _networks(trial, self.data, self._teacher)
        self.student.load_state_dict(student.state_dict())
        self.projections.load_state_dict(projections.state_dict())
        for each in self._parameters:
            self._momentum(each).zero_()
        self._settings = {name: self._set(self._settings[name], value) for name, value in _settings(trial).items()}

    def __call__(self, views: Views, teacher_logits: Tensor | None, lr: float) -> None:
        """Train on one batch, with the teacher's logits [B, K] for its views if the method needs them."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._set(group["lr"], lr)
        logits = [] if teacher_logits is None else [teacher_logits]
        self._run(views.order, views.top, views.left, views.flip, *logits)

    def tensors(self) -> dict[str, Tensor]:
        """The state of the student, the projections and the optimizer, by name."""
        return {
            **{f"student.{name}": tensor for name, tensor in self.student.state_dict().items()},
            **{f"projections.{name}": tensor for name, tensor in self.projections.state_dict().items()},
            **{f"momentum.{number}": self._momentum(each) for number, each in enumerate(self._parameters)},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned; other names are ignored."""
        self.student.load_state_dict(part("student.", tensors))
        self.projections.load_state_dict(part("projections.", tensors))
        for number, each in enumerate(self._parameters):
            self._momentum(each).copy_(tensors[f"momentum.{number}"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The momentum buffer: zeros until the first step, in the parameter's layout, as the fused optimizer needs."""
        state = self._optimizer.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _number(self, value: float) -> float | Tensor:
        """A number of the step; on a GPU a tensor, which a captured step reads anew."""
        return value if self._device.type == "cpu" else torch.tensor(value, device=self._device)

    def _set(self, number: float | Tensor, value: float) -> float | Tensor:
        return number.fill_(value) if isinstance(number, Tensor) else value

    def _train(
        self, order: Tensor, top: Tensor, left: Tensor, flip: Tensor, teacher_logits: Tensor | None = None
    ) -> None:
        shown = prepare(show(Views(order, top, left, flip), self.data), self.data)
        shown = networks.in_layout_of(self.student, shown)
        targets = self.data.train.labels[order]
        with autocast(self._recipe.precision, self._device):
            logits, features = self._forward(self.student, shown)
            loss_ce = loss = F.cross_entropy(logits, targets)
            loss_kd = torch.zeros_like(loss_ce)
            if self._teacher is not None and self._method.loss is not None:
                theirs = self._teacher.features(shown) if self._method.needs == "features" else ()
                batch = Batch(logits, teacher_logits, features, theirs, self.projections)
                loss_kd = self._method.loss(batch, **{name: self._settings[name] for name in self._method.settings})
                alpha = self._settings["alpha"]
                loss = alpha * loss_kd + (1 - alpha) * loss_ce
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
        self._optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(1) == targets).double().mean()
            means = torch.stack([loss.double(), loss_ce.double(), loss_kd.double(), correct])
            self.sums[:4] += means * len(targets)
            self.sums[4] += norm


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by name without it."""
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _forward(net: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return net(images), ()


def _settings(trial: Trial) -> dict[str, float]:
    """The settings of the loss by name; one that does not apply is never read."""
    return {name: getattr(trial.cell, name) or 0.0 for name in SETTINGS}


def _networks(trial: Trial, data: DataSet, teacher: Teacher | None) -> tuple[nn.Module, nn.ModuleList]:
    """The student and its projections, on the CPU, as the seed initialises them. Only features need projections."""
    cell = trial.cell
    student = networks.build(
        trial.architecture,
        stem=cell.stem,
        classes=len(data.classes),
        width=cell.width,
        weights=cell.weights,
        seed=trial.seed,
    )
    if teacher is None or METHODS[cell.method].needs != "features":
        return student, nn.ModuleList()
    channels = networks.feature_channels(student), networks.feature_channels(teacher.net)
    return student, networks.projections(*channels, seed=trial.seed)
