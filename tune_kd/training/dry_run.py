"""Dry run: train two steps with each loss of the study's own, on a few images of noise, before any trial starts."""

import hashlib
import inspect
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tune_kd.data.augment import draw_views
from tune_kd.data.datasets import DataSet, Split
from tune_kd.study.brought import Code
from tune_kd.study.cost import images_of
from tune_kd.study.methods import Method
from tune_kd.study.plan import Plan
from tune_kd.study.source import to_standard_error
from tune_kd.study.trial import Trial
from tune_kd.system import signals
from tune_kd.system.errors import raise_problems
from tune_kd.training import loss as losses, networks
from tune_kd.training.step import Step
from tune_kd.training.teachers import Teacher

IMAGES = 8
STEPS = 2


class _Wrong(Exception):
    """A loss that cannot be used for training."""


def check(planned: Plan, codes: Sequence[Code]) -> None:
    """Try the losses of the study's own. Raises `UserError` with one message for each that fails."""
    trials = {trial.brought.name: trial for trial in planned.trials if trial.brought is not None}
    raise_problems(problem for method, code in zip(planned.study.methods, codes, strict=True)
                   if method.name in trials for problem in _problems(trials[method.name], code))  # fmt: skip


def _problems(trial: Trial, code: Code) -> Iterator[str]:
    method = trial.method
    where = f"the loss {method.loss} of method {method.name!r}"
    try:
        with to_standard_error(), losses.brought([code]):
            _check_arguments(method)
            _try(trial)
    except _Wrong as wrong:
        yield f"{where} {wrong}"
    except BaseException as error:  # a loss may raise SystemExit, too
        signals.check()  # raises if the cause is a signal to this command
        line = _line(error, code)
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        yield f"{where} fails in its dry run{f' at {line}' if line else ''}: {said[:500]}"


def _check_arguments(method: Method) -> None:
    """Raise `_Wrong` unless `forward` takes declared settings only, by keyword."""
    kind = losses.loss_class(method)
    if not issubclass(kind, nn.Module):
        raise _Wrong(f"is {kind.__name__}, which is not an nn.Module; allowed: a subclass of torch.nn.Module")
    declared = ", ".join(method.defaults) or "there is none"
    if unknown := [name for name in losses.step_settings(kind) if name not in method.defaults]:
        raise _Wrong(f"takes {', '.join(unknown)}; allowed: settings that the method declares ({declared})")
    for each in inspect.signature(kind.forward).parameters.values():
        if each.kind is each.VAR_KEYWORD:
            raise _Wrong(f"takes **{each.name}, which stays empty; allowed: settings by name, after * ({declared})")
        if each.kind is not each.KEYWORD_ONLY and each.name in method.defaults:
            raise _Wrong(f"takes the setting {each.name} by position; allowed: settings as keywords, after *")


def _line(error: BaseException, code: Code) -> str | None:
    """The last line of the study's own files that led to an error."""
    names, found = {name for name, _ in code.files}, None
    for frame in traceback.extract_tb(error.__traceback__):
        name = next((name for name in names if Path(frame.filename).as_posix().endswith(f"/{name}")), None)
        found = found if name is None else f"{name}, line {frame.lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    return found


def _try(trial: Trial) -> None:
    """Train two steps. Raises what the loss raises, and `_Wrong`."""
    data, cell = _images(trial), replace(trial.cell, weights="none")
    recipe = replace(trial.recipe, compile=False, precision="float32", epochs=1)
    step = Step(replace(trial, cell=cell, recipe=recipe), data, _teacher(trial, data), torch.device("cpu"))
    step.loss.register_forward_hook(partial(_look, step))
    step.train()
    had = {name: (each.shape, each.dtype) for name, each in step.tensors().items()}
    views = [draw_views(trial.seed, 1, IMAGES, pad=data.pad, flip=data.flip, view=view)
             for view in range(trial.method.views)]  # fmt: skip
    logits = torch.randn(IMAGES, len(data.classes)) if trial.method.uses_cached_logits else None
    with networks.stream("loss", trial.seed, 1):
        for number in range(STEPS):
            step.at(recipe.lr, 1, number / (STEPS - 1))
            step(views[0], logits, *views[1:])
    tensors = step.tensors()
    for name in dict.fromkeys((*had, *tensors)):
        if name not in had or name not in tensors or had[name] != (tensors[name].shape, tensors[name].dtype):
            raise _Wrong(f"creates {name} during a step, so it is not trained, and lost when a trial is interrupted; "
                         "allowed: parameters and buffers that __init__ creates, in their final shape")  # fmt: skip
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _Wrong(f"leads to values that are not finite, in {name}")


def _look(step: Step, module: nn.Module, inputs: Any, found: Any) -> None:
    """Raise `_Wrong` unless a loss returned a finite scalar with a gradient for the student."""
    if not isinstance(found, Tensor):
        raise _Wrong(f"returns {type(found).__name__}; allowed: a 0-dim tensor")
    if found.ndim:
        raise _Wrong(f"returns a tensor of shape {list(found.shape)}; allowed: a 0-dim tensor, such as a mean")
    if not found.isfinite():
        raise _Wrong(f"is {found.item()}; allowed: a finite number")
    student = [each for each in step.student.parameters() if each.requires_grad]
    if not found.requires_grad or all(
        each is None for each in torch.autograd.grad(found, student, retain_graph=True, allow_unused=True)
    ):
        raise _Wrong("has no gradient for the student; allowed: a function of student_logits, features or embedding")


def _images(trial: Trial) -> DataSet:
    """A data set of noise, with images of the study's size."""
    of, generator = images_of(trial), torch.Generator().manual_seed(trial.seed)
    images = torch.randint(0, 256, (IMAGES, 3, of.size, of.size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(IMAGES) % of.classes)
    classes = tuple(map(str, range(of.classes)))
    digest = hashlib.sha256(b"dry run").hexdigest()
    return DataSet("noise", classes, split, split, split, (0.5,) * 3, (0.25,) * 3, 1, True, 1, digest)


def _teacher(trial: Trial, data: DataSet) -> Teacher | None:
    """A teacher with initial weights."""
    if trial.cell.teacher is None:
        return None
    cell, classes = trial.cell, len(data.classes)
    net = networks.build(str(cell.teacher), stem=cell.stem, classes=classes, width=cell.width, seed=0)
    net.eval().requires_grad_(False)

    @torch.no_grad()
    def passed(images: Tensor, precision: str, before_relu: bool = False) -> networks.Passed:
        return networks.forward_with_features(net, images, before_relu)

    return cast(Teacher, SimpleNamespace(net=net, passed=passed))
