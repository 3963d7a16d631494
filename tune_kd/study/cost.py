"""What trials cost, counted without torch: multiplications of the networks times the images they see."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tune_kd.study.trial import Answering, Trial

BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = ("resnet50", "resnet101")


@dataclass(frozen=True)
class Images:
    """A data set as the networks see it: image size in pixels, classes, images of each part."""

    size: int
    classes: int
    train: int
    validation: int
    test: int
    views: int  # ways of showing a training image: crops, and their mirror images where it is flipped


IMAGES = {
    "digits": Images(size=16, classes=10, train=1079, validation=359, test=359, views=9),
    "cifar10": Images(size=32, classes=10, train=45_000, validation=5_000, test=10_000, views=162),
    "cifar100": Images(size=32, classes=100, train=45_000, validation=5_000, test=10_000, views=162),
}
ROW_BYTES = 1500  # of an epoch in the ledger with its log and index, and in a table that is written beside the old one
WORTH = 1.05  # all views ahead may cost this much more than the drawn ones: later seeds and studies find them there


@dataclass(frozen=True)
class Price:
    """Floating-point operations, the time of one slot that they take at an assumed rate, and how this was made."""

    flop: float
    slot_seconds: float
    how: str


@dataclass(frozen=True)
class Layer:
    """A convolution, or the classifier: its weights, at how many positions of an image, and its outputs' channels."""

    weights: int
    positions: int
    out: int


def layers(architecture: str, *, stem: str, width: float, size: int, classes: int) -> Iterator[Layer]:
    """What multiplies in a ResNet, for images of `size` pixels (He et al. 2016)."""
    expansion = 4 if architecture in BOTTLENECK else 1
    channels = [max(1, round(planes * width)) for planes in (64, 128, 256, 512)]
    if stem == "cifar":
        yield Layer(9 * 3 * channels[0], size * size, channels[0])
    else:
        size = -(-size // 2)
        yield Layer(49 * 3 * channels[0], size * size, channels[0])
        size = -(-size // 2)
    into = channels[0]
    for stage, (blocks, inner) in enumerate(zip(BLOCKS[architecture], channels, strict=True)):
        for block in range(blocks):
            before = size
            if stage > 0 and block == 0:
                size = -(-size // 2)
            out = inner * expansion
            if architecture in BOTTLENECK:
                yield Layer(into * inner, before * before, inner)
                yield Layer(9 * inner * inner, size * size, inner)
                yield Layer(inner * out, size * size, out)
            else:
                yield Layer(9 * into * inner, size * size, inner)
                yield Layer(9 * inner * inner, size * size, inner)
            if size != before or into != out:
                yield Layer(into * out, size * size, out)
            into = out
    yield Layer(into * classes, 1, classes)


def macs(architecture: str, *, stem: str, width: float, size: int, classes: int) -> int:
    """Multiply-accumulates of one image's forward pass: convolutions and classifier."""
    found = layers(architecture, stem=stem, width=width, size=size, classes=classes)
    return sum(layer.weights * layer.positions for layer in found)


def state_bytes(trial: Trial) -> int:
    """Bytes of a network's float32 weights with its normalisations' four values a channel, running ones included."""
    cell, images = trial.cell, images_of(trial)
    found = layers(trial.architecture, stem=cell.stem, width=cell.width, size=images.size, classes=images.classes)
    return sum(4 * (layer.weights + 4 * layer.out) for layer in found)


def disk_bytes(trials: Iterable[Trial], answering: Mapping[str, Answering], slots: int, keep: bool) -> int:
    """What a plan writes at most at a time: checkpoints of as many trials as run (of all with `keep`), teachers, their
    answers, a ledger and tables.

    A checkpoint has weights, momentum and the best weights; there are two, and a third while it is written.
    """
    trials = tuple(trials)
    states = sorted((state_bytes(trial) for trial in trials), reverse=True)
    checkpoints = 3 * 3 * sum(states[:slots]) + (3 * sum(states) if keep else 0)
    teachers = sum(state_bytes(trial) for trial in trials if trial.role == "teacher")
    students = {trial.teacher_id: trial for trial in trials if trial.teacher_id in answering}
    answers = sum(4 * images_of(each).classes * views_answered(answering[str(teacher)], each)
                  for teacher, each in students.items())  # fmt: skip
    rows = len(trials) + sum(trial.recipe.epochs for trial in trials)
    return int(checkpoints + teachers + answers + ROW_BYTES * rows)


def price(trials: Iterable[Trial], answering: Mapping[str, Answering], rate: float) -> Price:
    """The price of a plan at `rate` operations a second in a slot, before early stopping saves any of it."""
    trials = tuple(trials)
    students = {trial.teacher_id: trial for trial in trials if trial.cell.method == "logit"}
    answers = sum(
        _forward(student, _teacher(student)) * views_answered(answering[teacher_id], student)
        for teacher_id, student in students.items()
        if teacher_id is not None
    )
    total = sum(flop(trial) for trial in trials) + answers
    how = (
        "3 forward passes' operations a training image, 1 an evaluated one; a teacher answers each view once for all "
        f"logit arms and runs beside each feature arm; assumes {rate:.0e} operations a second in a slot, "
        "nothing saved by early stopping, teachers not there yet"
    )
    return Price(total, total / rate, how)


def flop(trial: Trial) -> float:
    """Floating-point operations of a trial: training, evaluation, and the teacher where it runs beside it."""
    images, epochs = images_of(trial), trial.recipe.epochs
    total = _forward(trial, trial.architecture) * (epochs * (3 * images.train + images.validation) + 2 * images.test)
    if trial.cell.method == "feature":
        total += _forward(trial, _teacher(trial)) * epochs * images.train
    return total


def answering(students: Iterable[Trial]) -> Answering:
    """What one teacher answers for its logit students: the cheaper of all views ahead and the views they will draw."""
    students = tuple(students)
    draws = tuple(dict.fromkeys((student.seed, student.recipe.epochs) for student in students))
    drawn, all_ = (views_answered(Answering(ahead, draws), students[0]) for ahead in (False, True))
    return Answering(all_ <= WORTH * drawn, draws)


def views_answered(answering: Answering, student: Trial) -> float:
    """How many views a teacher answers: those that there are, or the expected number of different ones drawn.

    A view stays undrawn by `epochs` uniform draws with a probability of (1 - 1/views)^epochs.
    """
    images = images_of(student)
    epochs = sum(epochs for _, epochs in answering.draws)
    undrawn = 0.0 if answering.ahead else (1 - 1 / images.views) ** epochs
    return images.train * images.views * (1 - undrawn)


def draws(answering: Answering, student: Trial) -> int:
    """How many views the students look at, the same ones counted again."""
    return images_of(student).train * sum(epochs for _, epochs in answering.draws)


def _teacher(student: Trial) -> str:
    assert student.cell.teacher is not None
    return student.cell.teacher


def images_of(trial: Trial) -> Images:
    """The data set as this trial sees it: as many images of each part as it declares."""
    whole, data = IMAGES[trial.data.name], trial.data
    return Images(
        size=whole.size,
        classes=whole.classes,
        train=whole.train if data.train is None else data.train,
        validation=whole.validation if data.validation is None else data.validation,
        test=whole.test if data.test is None else data.test,
        views=whole.views,
    )


def _forward(trial: Trial, architecture: str) -> int:
    images, cell = images_of(trial), trial.cell
    return 2 * macs(architecture, stem=cell.stem, width=cell.width, size=images.size, classes=images.classes)
