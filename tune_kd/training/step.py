"""A student in training and the step that moves it.

Making one takes seconds on a GPU, where the step is captured, and a minute where it is compiled. So a process keeps
the last one, and a trial that differs from it in seed, temperature, alpha, beta, budget or learning rate takes it over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.data.augment import Views, prepare, show
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.study.trial import Trial
from tune_kd.training import losses, networks
from tune_kd.training.device import Captured, autocast
from tune_kd.training.teachers import Teacher

_idle: dict[tuple[Any, ...], "Step"] = {}  # at most one: its memory is the next trial's


@contextmanager
def stepping(trial: Trial, data: DataSet, teacher: Teacher | None, device: torch.device) -> Iterator["Step"]:
    """A trial's student with its first weights and its step: the one that this process has kept, if it fits."""
    baked = replace(trial.cell, temperature=None, alpha=None, beta=None)
    recipe = replace(trial.recipe, epochs=0, lr=0.0, lr_min=0.0)
    fits = (trial.architecture, baked, recipe, data, teacher, device)
    step = _idle.pop(fits, None)
    _idle.clear()  # before another one takes its memory
    if step is None:
        step = Step(trial, data, teacher, device)
    else:
        step.begin(trial)
    try:
        yield step
    except GeneratorExit:  # an early end, not a failure, after which nothing would be worth keeping
        if step.worth_keeping:
            _idle[fits] = step
        raise
    if step.worth_keeping:
        _idle[fits] = step


class Step:
    """One step of training on a batch of views. Nothing in it waits for the device: sums over images stay there."""

    def __init__(self, trial: Trial, data: DataSet, teacher: Teacher | None, device: torch.device) -> None:
        self.data = on_device(data, device)
        self.sums = torch.zeros(5, device=device, dtype=torch.float64)  # loss, ce, kd, right; gradient norms
        self.student, self.projections = _networks(trial, data, teacher)  # no projections unless `feature`
        for network in (self.student, self.projections):
            networks.to_device(network, device)
        self._teacher, self._method, self._recipe, self._device = teacher, trial.cell.method, trial.recipe, device
        self._parameters = [*self.student.parameters(), *self.projections.parameters()]
        self._optimizer = torch.optim.SGD(
            self._parameters,
            lr=self._number(trial.recipe.lr),
            momentum=trial.recipe.momentum,
            weight_decay=trial.recipe.weight_decay,
            nesterov=True,
            fused=True,
        )
        self._temperature, self._alpha, self._beta = map(self._number, _numbers(trial))
        forward = networks.forward_with_features if self._method == "feature" else _forward
        self._forward = torch.compile(forward, dynamic=False) if trial.recipe.compile else forward
        self._run = Captured(self._train, device) if device.type == "cuda" else self._train

    @property
    def worth_keeping(self) -> bool:
        """Whether making another one would take long."""
        return self._device.type == "cuda" or self._recipe.compile

    def begin(self, trial: Trial) -> None:
        """Go back to the start for another trial. Everything stays at its place, where a captured step finds it."""
        student, projections = _networks(trial, self.data, self._teacher)
        self.student.load_state_dict(student.state_dict())
        self.projections.load_state_dict(projections.state_dict())
        for each in self._parameters:
            self._momentum(each).zero_()
        mine = self._temperature, self._alpha, self._beta
        self._temperature, self._alpha, self._beta = map(self._set, mine, _numbers(trial))

    def __call__(self, views: Views, answers: Tensor | None, lr: float) -> None:
        """Train on one batch, with the teacher's logits [B, K] for its views if the method wants them."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._set(group["lr"], lr)
        self._run(views.order, views.top, views.left, views.flip, *([] if answers is None else [answers]))

    def tensors(self) -> dict[str, Tensor]:
        """The state of the student, its projections and its optimizer, by name."""
        return {
            **{f"student.{name}": tensor for name, tensor in self.student.state_dict().items()},
            **{f"projections.{name}": tensor for name, tensor in self.projections.state_dict().items()},
            **{f"momentum.{number}": self._momentum(each) for number, each in enumerate(self._parameters)},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave; other names are passed over."""
        self.student.load_state_dict(part("student.", tensors))
        self.projections.load_state_dict(part("projections.", tensors))
        for number, each in enumerate(self._parameters):
            self._momentum(each).copy_(tensors[f"momentum.{number}"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Zeros until the first step. In the parameter's layout, since a fused step walks through memory."""
        state = self._optimizer.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _number(self, value: float) -> float | Tensor:
        """A number of the step: on a GPU at a place of its own, from which a captured step reads it."""
        return value if self._device.type == "cpu" else torch.tensor(value, device=self._device)

    def _set(self, number: float | Tensor, value: float) -> float | Tensor:
        return number.fill_(value) if isinstance(number, Tensor) else value

    def _train(self, order: Tensor, top: Tensor, left: Tensor, flip: Tensor, answers: Tensor | None = None) -> None:
        shown = prepare(show(Views(order, top, left, flip), self.data), self.data)
        shown = networks.in_layout_of(self.student, shown)
        targets = self.data.train.labels[order]
        with autocast(self._recipe.precision, self._device):
            logits, features = self._forward(self.student, shown)
            loss_ce = loss = F.cross_entropy(logits, targets)
            loss_kd = torch.zeros_like(loss_ce)
            if self._teacher is not None:
                if answers is not None:
                    loss_kd = losses.kd(logits, answers, self._temperature)
                else:
                    loss_kd = losses.feature(features, self._teacher.features(shown), self.projections, self._beta)
                loss = self._alpha * loss_kd + (1 - self._alpha) * loss_ce
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
        self._optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(1) == targets).double().mean()
            means = torch.stack([loss.double(), loss_ce.double(), loss_kd.double(), right])
            self.sums[:4] += means * len(targets)
            self.sums[4] += norm


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, named without it."""
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _forward(net: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return net(images), ()


def _numbers(trial: Trial) -> tuple[float, float, float]:
    """Temperature, alpha and beta; a number that does not apply is never read."""
    cell = trial.cell
    return cell.temperature or 0.0, cell.alpha or 0.0, cell.beta or 0.0


def _networks(trial: Trial, data: DataSet, teacher: Teacher | None) -> tuple[nn.Module, nn.ModuleList]:
    """The student and its projections on the CPU, as the seed draws them."""
    cell = trial.cell
    student = networks.build(
        trial.architecture,
        stem=cell.stem,
        classes=len(data.classes),
        width=cell.width,
        weights=cell.weights,
        seed=trial.seed,
    )
    if teacher is None or cell.method != "feature":
        return student, nn.ModuleList()
    channels = networks.feature_channels(student), networks.feature_channels(teacher.net)
    return student, networks.projections(*channels, seed=trial.seed)
