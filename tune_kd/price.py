"""What a plan will cost, counted without torch: multiplications of the networks times the images they see."""

from dataclasses import dataclass

from tune_kd.plan import Plan
from tune_kd.trial import Trial

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


IMAGES = {
    "digits": Images(size=16, classes=10, train=1079, validation=359, test=359),
    "cifar10": Images(size=32, classes=10, train=45_000, validation=5_000, test=10_000),
}


@dataclass(frozen=True)
class Price:
    """Floating-point operations, the time of one slot that they take at an assumed rate, and how this was made."""

    flop: float
    slot_seconds: float
    how: str


def macs(architecture: str, *, stem: str, width: float, size: int, classes: int) -> int:
    """Multiply-accumulates of one image's forward pass: convolutions and classifier (He et al. 2016)."""
    expansion = 4 if architecture in BOTTLENECK else 1
    channels = [max(1, round(planes * width)) for planes in (64, 128, 256, 512)]
    if stem == "cifar":
        total = 9 * 3 * channels[0] * size * size
    else:
        size = -(-size // 2)
        total = 49 * 3 * channels[0] * size * size
        size = -(-size // 2)
    into = channels[0]
    for stage, (blocks, inner) in enumerate(zip(BLOCKS[architecture], channels, strict=True)):
        for block in range(blocks):
            before = size
            if stage > 0 and block == 0:
                size = -(-size // 2)
            out = inner * expansion
            if architecture in BOTTLENECK:
                total += into * inner * before * before + (9 * inner * inner + inner * out) * size * size
            else:
                total += (9 * into * inner + 9 * inner * inner) * size * size
            if size != before or into != out:
                total += into * out * size * size
            into = out
    return total + into * classes


def price(plan: Plan) -> Price:
    """The price of a whole plan, before early stopping saves any of it."""
    study = plan.study
    flop = sum(_flop(trial) for trial in plan.trials)
    answered = {(trial.teacher_id, trial.seed): trial for trial in plan.trials if trial.cell.method == "logit"}
    flop += sum(_answers(trial) for trial in answered.values())
    how = (
        "3 forward passes' operations a training image, 1 an evaluated one; a teacher answers once for all logit "
        f"arms of a seed and beside each feature arm; assumes {study.rate:.0e} operations a second in a slot, "
        "nothing saved by early stopping, teachers not there yet"
    )
    return Price(flop, flop / study.rate, how)


def _images(trial: Trial) -> Images:
    whole, data = IMAGES[trial.data.name], trial.data
    return Images(
        size=whole.size,
        classes=whole.classes,
        train=whole.train if data.train is None else data.train,
        validation=whole.validation if data.validation is None else data.validation,
        test=whole.test if data.test is None else data.test,
    )


def _forward(trial: Trial, architecture: str) -> int:
    images, cell = _images(trial), trial.cell
    return 2 * macs(architecture, stem=cell.stem, width=cell.width, size=images.size, classes=images.classes)


def _flop(trial: Trial) -> float:
    images, epochs = _images(trial), trial.recipe.epochs
    own = _forward(trial, trial.architecture)
    flop = own * (epochs * (3 * images.train + images.validation) + 2 * images.test)
    if trial.cell.method == "feature" and trial.cell.teacher is not None:
        flop += _forward(trial, trial.cell.teacher) * epochs * images.train
    return flop


def _answers(trial: Trial) -> float:
    assert trial.cell.teacher is not None
    return _forward(trial, trial.cell.teacher) * trial.recipe.epochs * _images(trial).train
