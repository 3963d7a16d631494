"""The training step: forward pass, loss, backward pass and update of a student.

Creating a step takes seconds on a GPU, where it is captured, and a minute if it is compiled. A process therefore keeps
the last step, and reuses it for a trial that differs only in seed, learning rate and the settings that the loss takes
at each step.
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
from tune_kd.training.compilation import Compiled, Function, compiled, compiling_pays
from tune_kd.training.device import Captured, autocast
from tune_kd.training.loss import Batch, Context, loss_class, step_settings
from tune_kd.training.teachers import Teacher

STUDENT, TEACHER = "a student", "a teacher"  # names of what is compiled
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


def forget() -> None:
    """Free the step that is kept for the next trial."""
    _idle.clear()


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
        both = dict.fromkeys((*self.student.parameters(), *self.loss.parameters()))  # shared ones once
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
        self._losses, self._taught = self._fastest(trial)
        self._run = Captured(self._train, device) if device.type == "cuda" else self._train
        self._predicted = torch.zeros(evaluation_batch(device), len(data.classes), device=device)
        self._evaluate: Function = self._predict
        if isinstance(self._run, Captured):
            self._evaluate = Captured(self._predict, device, "an evaluation", beside=self._run)

    @property
    def worth_keeping(self) -> bool:
        """Whether creating another step would take long."""
        return self._device.type == "cuda" or self._recipe.compile

    @property
    def fast_paths(self) -> str | None:
        """The fast paths in use, separated by commas (see `Outcome.fast_paths`). None if there are none."""
        student, teacher = (each.used if isinstance(each, Compiled) else None for each in (self._losses, self._taught))
        used = {
            "graph": isinstance(self._run, Captured) and self._run.is_used,
            "compiled": student is not None,
            "compiled loss": student not in (None, STUDENT),
            "compiled teacher": teacher is not None,
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
        """Set the inputs of the next step other than its batch: `epoch` from 1, `progress` from 0 to 1."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._set(group["lr"], lr)
        if self._method.loss is not None:
            self._epoch.fill_(epoch)
            self._progress.fill_(progress)

    def __call__(self, views: Views, teacher_logits: Tensor | None, *others: Views) -> None:
        """Train on one batch of views.

        `teacher_logits` [B, K] are those of `views`, if they are cached. `others` are other views of the same images,
        if the method has several.
        """
        logits = [] if teacher_logits is None else [teacher_logits]
        crops = [part for other in others for part in (other.top, other.left, other.flip)]
        self._run(views.order, views.top, views.left, views.flip, *crops, *logits)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The student's logits, float32 [N, K], for images uint8 [N, 3, H, W], in eval mode."""
        self.student.eval()
        found = []
        for each in torch.split(images, len(self._predicted)):
            self._evaluate(each)
            found.append(self._predicted[: len(each)].clone())
        return torch.cat(found)

    def tensors(self) -> dict[str, Tensor]:
        """The state of the student, the loss and the optimizer, by name. Tensors that student and loss share are copied
        for the loss."""
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
        """Load the result of `tensors`. Ignores other names."""
        self.student.load_state_dict(part("student.", tensors))
        self.loss.load_state_dict(part("loss.", tensors))
        for number, each in enumerate(self._parameters):
            self._momentum(each).copy_(tensors[f"momentum.{number}"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The momentum buffer: zeros until the first step. The fused optimizer needs it in the parameter's layout."""
        state = self._optimizer.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum

    def _fastest(self, trial: Trial) -> tuple[Function, Function]:
        """Return the forward pass with its losses, and the teacher's forward pass. Both are compiled where that pays.
        If the recipe asks for it, the student alone is compiled."""
        forward = networks.passing(self.student, self._method.needs)
        losses, asked = partial(self._pass, forward), trial.recipe.compile
        images = trial.recipe.epochs * len(self.data.train.labels)
        pays = not asked and compiling_pays(images, trial.recipe.precision, self._device)
        taught = self._pass_of_teacher(pays)
        if not asked and not pays:
            return losses, taught
        cell = trial.cell
        parts = (trial.architecture, cell.stem, cell.width, len(self.data.classes), trial.recipe.batch_size,
                 trial.recipe.precision, self._method.needs, self.data.train.images.shape[1:])  # fmt: skip
        forms = {f"a student with the loss {trial.cell.method}": compiled(losses)} if pays and self._method.loss else {}
        forms[STUDENT] = partial(self._pass, compiled(forward))
        return Compiled(losses, forms, repr(parts), (self.student, self.loss), asked), taught

    def _pass_of_teacher(self, pays: bool) -> Function:
        """The teacher's forward pass, for methods that run it at each step."""
        teacher, precision, before_relu = self._teacher, self._recipe.precision, self._method.needs == "before_relu"
        if teacher is None or not self._method.runs_teacher:
            return lambda images: None
        plain = partial(teacher.passed, precision=precision, before_relu=before_relu)
        if not pays:
            return plain
        net = teacher.frozen(precision)

        @torch.no_grad()
        def passed(images: Tensor) -> networks.Passed:
            return networks.forward_with_features(net, images, before_relu)

        name = f"{teacher.teacher_id} {precision} {before_relu} {self._recipe.batch_size}"
        return Compiled(plain, {TEACHER: compiled(passed)}, name)

    def _number(self, value: float) -> float | Tensor:
        """A number of the step. On a GPU it is a tensor, which a captured step reads at each replay."""
        return value if self._device.type == "cpu" else torch.tensor(value, device=self._device)

    def _set(self, number: float | Tensor, value: float) -> float | Tensor:
        return number.fill_(value) if isinstance(number, Tensor) else value

    def _train(self, order: Tensor, *views: Tensor) -> None:
        """One step. `views` are top, left and flip of each view, then the cached logits if there are any."""
        crops = [Views(order, *views[at : at + 3]) for at in range(0, 3 * self._method.views, 3)]
        cached = views[3 * self._method.views :]
        targets = self.data.train.labels[order]
        with autocast(self._recipe.precision, self._device):
            images = [self._shown(crop) for crop in crops]
            theirs = [self._taught(each) for each in images]
            logits, loss_ce, loss_kd, loss = self._losses(images, order, targets, theirs, *cached)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
        self._optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(1) == targets).double().mean()
            means = torch.stack([loss.double(), loss_ce.double(), loss_kd.double(), correct])
            self.sums[:4] += means * len(targets)
            self.sums[4] += norm

    def _predict(self, images: Tensor) -> None:
        """Write the logits of images to `_predicted`."""
        with autocast(self._recipe.precision, self._device):
            self._predicted[: len(images)] = self.student(prepare(images, self.data))

    def _pass(
        self,
        forward: Function,
        images: Sequence[Tensor],
        order: Tensor,
        targets: Tensor,
        theirs: Sequence[networks.Passed | None],
        cached: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the student's logits, the cross-entropy, the method's loss, and the training loss. Only the last
        requires a gradient."""
        passed = [forward(self.student, each) for each in images]
        loss_ce = loss = F.cross_entropy(passed[0].logits, targets)
        loss_kd = torch.zeros_like(loss_ce)
        if self._method.loss is not None:
            loss_kd, loss = self._weighed(self._batch(order, targets, passed, theirs, cached), loss_ce)
        return passed[0].logits.detach(), loss_ce.detach(), loss_kd.detach(), loss

    def _weighed(self, batch: Batch, loss_ce: Tensor) -> tuple[Tensor, Tensor]:
        """Return the method's loss, and its weighted sum with the cross-entropy."""
        weights = {name: self._settings[name] for name in WEIGHTED if name in self._settings}
        settings = {name: value for name, value in self._settings.items() if name not in weights}
        loss_kd: Tensor = self.loss(batch, **settings)
        if "alpha" in weights:
            return loss_kd, weights["alpha"] * loss_kd + (1 - weights["alpha"]) * loss_ce
        return loss_kd, weights["kd_weight"] * loss_kd + weights["ce_weight"] * loss_ce

    def _shown(self, views: Views) -> Tensor:
        return networks.in_layout_of(self.student, prepare(show(views, self.data), self.data))

    def _batch(
        self,
        order: Tensor,
        targets: Tensor,
        passed: Sequence[networks.Passed],
        theirs: Sequence[networks.Passed | None],
        cached: Tensor | None = None,
    ) -> Batch:
        """The batch for the loss. The second view is nested in it."""
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


def evaluation_batch(device: torch.device) -> int:
    """Images per forward pass of an evaluation. On a GPU it divides the usual numbers of images, since only full
    batches are captured. On a CPU it must not change, since results would change in the last bit."""
    return 1000 if device.type == "cuda" else 512


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by name without it."""
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def batches(count: int, size: int) -> list[slice]:
    """Slices of `size` over `count` images. A last batch of one image is merged into the previous batch, because batch
    norm is undefined for one value."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _settings(trial: Trial) -> dict[str, float]:
    """The numbers that the loss reads at each step, by name."""
    method = trial.method
    if method.loss is None:
        return {}
    weights = {name: float(level) for name in WEIGHTED if (level := trial.cell.level(name)) is not None}
    return weights | {name: _level(trial, name) for name in step_settings(loss_class(method))}


def _level(trial: Trial, name: str) -> float:
    """The value of a setting: the cell's, or the method's default if the cell has none."""
    return float(trial.cell.levels.get(name, trial.method.defaults[name]))


def _networks(trial: Trial, data: DataSet, teacher: Teacher | None) -> tuple[nn.Module, nn.Module]:
    """The student and the loss of its method, on the CPU, initialised from the seed.

    The loss has a random stream of its own, so a student's initial weights do not depend on its method.
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
