"""Cost of trials: multiply-accumulates of the networks times the number of images.

A formula computes the counts from the architecture, for any width and image size and without torch. A test compares
them with torch's `FlopCounterMode`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from tune_kd.study.trial import Answering, Role, Trial

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECK = ("resnet50", "resnet101")


@dataclass(frozen=True)
class Images:
    """Size of the images of a data set at the networks' input, and the number of images of each part."""

    size: int  # pixels
    classes: int
    train: int
    validation: int
    test: int
    views: int  # views per training image: crops, and their mirror images if images are flipped


IMAGES = {
    "digits": Images(size=16, classes=10, train=1079, validation=359, test=359, views=9),
    "cifar10": Images(size=32, classes=10, train=45_000, validation=5_000, test=10_000, views=162),
    "cifar100": Images(size=32, classes=100, train=45_000, validation=5_000, test=10_000, views=162),
}
ROW_BYTES = 1500  # per epoch: in the ledger with its log and index, and in the old and the new table
# All views may cost this factor more than the drawn ones, since later seeds and studies use them too.
WORTH_ANSWERING_ALL = 1.05


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, the time that they take in one slot, and the assumptions in words."""

    flop: float
    slot_seconds: float
    how: str


@dataclass(frozen=True)
class Layer:
    """A square convolution, or the classifier as a 1x1 convolution: kernel and output size in pixels, channels."""

    kernel: int
    into: int
    out: int
    size: int

    @property
    def weights(self) -> int:
        return self.kernel**2 * self.into * self.out


def layers(architecture: str, *, stem: str, width: float, size: int, classes: int) -> Iterator[Layer]:
    """The convolutions and the classifier of a ResNet, for images of `size` pixels (He et al. 2016)."""
    bottleneck = architecture in BOTTLENECK
    channels = [max(1, round(planes * width)) for planes in (64, 128, 256, 512)]
    into = channels[0]
    if stem == "cifar":
        yield Layer(3, 3, into, size)
    else:
        yield Layer(7, 3, into, _half(size))
        size = _half(_half(size))  # a pooling follows
    for stage, (blocks, inner) in enumerate(zip(BLOCKS[architecture], channels, strict=True)):
        for block in range(blocks):
            before, out = size, 4 * inner if bottleneck else inner
            if stage > 0 and block == 0:
                size = _half(size)
            if bottleneck:
                yield from (Layer(1, into, inner, before), Layer(3, inner, inner, size), Layer(1, inner, out, size))
            else:
                yield from (Layer(3, into, inner, size), Layer(3, inner, inner, size))
            if size != before or into != out:
                yield Layer(1, into, out, size)
            into = out
    yield Layer(1, into, classes, 1)


def _half(size: int) -> int:
    """The size after a stride of 2."""
    return -(-size // 2)


@cache
def macs(architecture: str, *, stem: str, width: float, size: int, classes: int) -> int:
    """Multiply-accumulates of one image's forward pass: convolutions and classifier."""
    found = layers(architecture, stem=stem, width=width, size=size, classes=classes)
    return sum(layer.weights * layer.size**2 for layer in found)


def state_bytes(trial: Trial) -> int:
    """Bytes of a network's float32 state: weights, and four values per channel for batch normalisation."""
    cell, images = trial.cell, images_of(trial)
    found = layers(trial.architecture, stem=cell.stem, width=cell.width, size=images.size, classes=images.classes)
    return sum(4 * (layer.weights + 4 * layer.out) for layer in found)


def disk_bytes(trials: Iterable[Trial], answering: Mapping[str, Answering], slots: int, keep: bool) -> int:
    """Peak disk usage of a plan in bytes: checkpoints of `slots` trials (with `keep`, of all trials), teachers, their
    logits, ledger and tables.

    A checkpoint has weights, momentum and the best weights. A trial has two checkpoints, and a third while it is being
    written.
    """
    trials = tuple(trials)
    states = sorted((state_bytes(trial) for trial in trials), reverse=True)
    checkpoints = 3 * 3 * sum(states[:slots]) + (3 * sum(states) if keep else 0)
    teachers = sum(state_bytes(trial) for trial in trials if trial.role == Role.TEACHER)
    students = {trial.teacher_id: trial for trial in trials if trial.teacher_id in answering}
    answers = sum(4 * images_of(each).classes * views_answered(answering[str(teacher)], each)
                  for teacher, each in students.items())  # fmt: skip
    rows = len(trials) + sum(trial.recipe.epochs for trial in trials)
    return int(checkpoints + teachers + answers + ROW_BYTES * rows)


def estimate(trials: Iterable[Trial], answering: Mapping[str, Answering], rate: float) -> Cost:
    """Estimate the cost of a plan at `rate` operations per second in a slot, without the savings of early stopping."""
    trials = tuple(trials)
    students = {trial.teacher_id: trial for trial in trials if trial.method.uses_cached_logits}
    answers = sum(
        _forward(student, _teacher(student)) * views_answered(answering[teacher_id], student)
        for teacher_id, student in students.items()
        if teacher_id is not None
    )
    total = sum(flop(trial) for trial in trials) + answers
    how = (
        "a training image counts as 3 forward passes, an evaluated one as 1; a teacher's logits of a view are computed "
        "once for all arms that need only logits, and the teacher runs in every step of other arms; assumes "
        f"{rate:.0e} operations per second in a slot, nothing saved by early stopping, and no teachers trained before"
    )
    return Cost(total, total / rate, how)


def flop(trial: Trial) -> float:
    """Floating-point operations of a trial: training, evaluation, and the teacher if it runs in every step."""
    images, epochs = images_of(trial), trial.recipe.epochs
    passes = 3 * epochs * images.train * trial.method.views + trial.recipe.validations * images.validation
    total = _forward(trial, trial.architecture) * (passes + 2 * images.test)
    if trial.method.runs_teacher:
        total += _forward(trial, _teacher(trial)) * epochs * images.train * trial.method.views
    return total


def answering(students: Iterable[Trial]) -> Answering:
    """The views for which a teacher's logits are computed: all, or only those that its students draw if that is
    cheaper."""
    students = tuple(students)
    draws = tuple(dict.fromkeys((student.seed, student.recipe.epochs) for student in students))
    drawn, all_ = (views_answered(Answering(ahead, draws), students[0]) for ahead in (False, True))
    return Answering(all_ <= WORTH_ANSWERING_ALL * drawn, draws)


def views_answered(answering: Answering, student: Trial) -> float:
    """The number of views for which a teacher's logits are computed: all, or the expected number of distinct draws.

    The probability that `epochs` uniform draws miss a view is (1 - 1/views)^epochs.
    """
    images = images_of(student)
    epochs = sum(epochs for _, epochs in answering.draws)
    undrawn = 0.0 if answering.ahead else (1 - 1 / images.views) ** epochs
    return images.train * images.views * (1 - undrawn)


def draws(answering: Answering, student: Trial) -> int:
    """The number of views on which the students train, counting repeats."""
    return images_of(student).train * sum(epochs for _, epochs in answering.draws)


def _teacher(student: Trial) -> str:
    assert student.cell.teacher is not None
    return student.cell.teacher


def images_of(trial: Trial) -> Images:
    """The data set of a trial, with the sizes that the trial declares."""
    declared = {part: getattr(trial.data, part) for part in ("train", "validation", "test")}
    return replace(IMAGES[trial.data.name], **{part: size for part, size in declared.items() if size is not None})


def _forward(trial: Trial, architecture: str) -> int:
    images, cell = images_of(trial), trial.cell
    return 2 * macs(architecture, stem=cell.stem, width=cell.width, size=images.size, classes=images.classes)
