"""Declaration of a study: factors, control, seeds, recipe, early stopping and contrasts.

A study is a value. Building one checks nothing, so that a search space can refine it with `dataclasses.replace`.
`validate.check` checks the rules in the annotations and the rules across fields, and reports all problems at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum, auto
from functools import cached_property
from typing import Annotated, Any, Literal

from tune_kd.study import rules
from tune_kd.study.methods import Method, built_in
from tune_kd.study.rules import MOST_EPOCHS, MOST_SEEDS, at_least, length, most, one_of
from tune_kd.study.tuning import Range, Tuning

Level = str | int | float

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
STEMS = ("imagenet", "cifar")
WEIGHTS = ("none", "imagenet")
DATA_SETS = ("digits", "cifar10", "cifar100")
PRECISIONS = ("float32", "tf32", "bfloat16")

RECIPE_FACTORS = ("epochs", "batch_size", "lr", "lr_min", "momentum", "weight_decay", "clip", "precision")
"""The fields of `Recipe` in which arms can differ."""


@dataclass(frozen=True)
class Cell:
    """The settings in which arms can differ. A study's `cell` has the value of each setting that no factor varies.

    In an arm's cell, a setting that does not apply to the arm's method is None. In a study's `cell`, None stands for
    the method's own default.
    """

    student: Annotated[str, one_of(ARCHITECTURES)] = "resnet18"  # architecture of the student
    # Architecture of the teacher. None for a method without a teacher.
    teacher: Annotated[str | None, one_of(ARCHITECTURES)] = "resnet50"
    # First layers of both networks. imagenet: a 7x7 convolution of stride 2, then a pooling; cifar: a 3x3 convolution.
    stem: Annotated[str, one_of(STEMS)] = "cifar"
    weights: Annotated[str, one_of(WEIGHTS)] = "none"  # initial weights: none (random), or torchvision's for ImageNet
    width: Annotated[float, rules.WIDTH_RANGE] = 1.0  # factor for the channel counts of student and teacher
    method: str = "none"  # name of the distillation method; none trains on labels alone
    temperature: Annotated[float | None, rules.ABOVE_0] = None  # softmax temperature in the method's loss
    alpha: Annotated[float | None, rules.SHARE] = 0.5  # weight of the method's loss; cross-entropy has weight 1 - alpha
    beta: Annotated[float | None, rules.FROM_0] = None  # weight of the cosine part of the feature loss
    # Weight of cross-entropy. ce_weight and kd_weight replace alpha; if only one of them is set, the other is 1.
    ce_weight: Annotated[float | None, rules.FROM_0] = None
    # Weight of the method's loss. ce_weight and kd_weight replace alpha; if only one of them is set, the other is 1.
    kd_weight: Annotated[float | None, rules.FROM_0] = None
    settings: tuple[tuple[str, float], ...] | Mapping[str, float] = ()  # values of further settings of methods, by name
    recipe: tuple[tuple[str, Level], ...] = ()  # values of the Recipe fields that factors vary; empty in a Study's cell

    def __post_init__(self) -> None:
        if isinstance(self.settings, Mapping):
            object.__setattr__(self, "settings", tuple(self.settings.items()))

    @cached_property
    def levels(self) -> dict[str, Level]:
        """The levels of the factors that apply, by name."""
        known = {name: getattr(self, name) for name in CELL_FIELDS} | dict((*self.settings, *self.recipe))
        return {name: level for name, level in known.items() if level is not None}

    def level(self, name: str) -> Level | None:
        """The level of a factor, or None if the factor does not apply."""
        return self.levels.get(name)

    def at(self, name: str, level: Level) -> "Cell":
        """The same cell with another level of a factor."""
        if name in CELL_FIELDS:
            changed: dict[str, Any] = {name: level}
        elif name in RECIPE_FACTORS:
            changed = {"recipe": _with(self.recipe, name, level)}
        else:
            changed = {"settings": _with(tuple(dict(self.settings).items()), name, level)}
        return replace(self, **changed)


def _with(pairs: tuple[tuple[str, Any], ...], name: str, level: Level) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((dict(pairs) | {name: level}).items()))


CELL_FIELDS = tuple(field.name for field in fields(Cell) if field.name not in ("settings", "recipe"))
WEIGHTED = ("alpha", "ce_weight", "kd_weight")  # weights of the two losses
TEXTS = ("student", "teacher", "stem", "weights", "method", "precision")  # factors whose levels are text
COUNTS = ("epochs", "batch_size")  # factors whose levels are whole numbers; levels of all other factors are numbers


@dataclass(frozen=True)
class Factor:
    """A setting that varies between arms, with its levels."""

    name: str  # a field of Cell, a setting of a method, or a field of Recipe
    levels: tuple[Level, ...]  # the values that the study compares


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum and a cosine schedule over all epochs."""

    epochs: Annotated[int, at_least(1), most(MOST_EPOCHS)] = 100  # passes over the training images
    batch_size: Annotated[int, at_least(2), most(2**24)] = 128  # images per step
    lr: Annotated[float, rules.ABOVE_0] = 0.1  # learning rate at the first step
    lr_min: float = 1e-4  # learning rate at the last step
    momentum: Annotated[float, rules.MOMENTUM] = 0.9  # Nesterov momentum
    weight_decay: Annotated[float, rules.FROM_0] = 5e-4  # weight decay of SGD
    # Maximum norm of the gradient over all parameters: those of the network and of the method's loss.
    clip: Annotated[float, rules.ABOVE_0] = 1.0
    # Precision of matrix products and convolutions. Weights and their updates are always float32.
    precision: Annotated[str, one_of(PRECISIONS)] = "float32"
    compile: bool = False  # whether to use torch.compile, which slows down the first epoch
    # Epochs between evaluations on the validation images. The last epoch is always evaluated.
    validate_every: Annotated[int, at_least(1), most(MOST_EPOCHS)] = 1

    def validates(self, epoch: int) -> bool:
        """Whether the network is evaluated on the validation images after this epoch (from 1)."""
        return epoch % self.validate_every == 0 or epoch == self.epochs

    @property
    def validations(self) -> int:
        """The number of epochs after which the network is evaluated on the validation images."""
        return -(-self.epochs // self.validate_every)


@dataclass(frozen=True)
class Data:
    """A data set, and the number of images to use from each part of its split."""

    name: Annotated[str, one_of(DATA_SETS)] = "cifar10"  # digits, cifar10 or cifar100
    train: Annotated[int | None, rules.SIZE] = None  # number of training images; None: all
    validation: Annotated[int | None, rules.SIZE] = None  # number of validation images; None: all
    test: Annotated[int | None, rules.SIZE] = None  # number of test images; None: all
    split_seed: Annotated[int, rules.SEED] = 0  # seed of the split, independent of the trials' seeds


@dataclass(frozen=True)
class Screen:
    """The screen: all arms on one seed, with early stopping of clear losers."""

    seed: Annotated[int, rules.SEED] = 0  # seed of the screen; not one of the confirmation seeds
    grace: Annotated[int, at_least(1, " epoch")] = 10  # epochs before the first comparison
    # A rung keeps the best 1/reduction of the trials. The next rung is at reduction times its epoch.
    reduction: Annotated[int, at_least(2)] = 3
    # Distance in accuracy behind the cutoff that counts as noise: one number, or one for each rung.
    margin: Annotated[float | tuple[float, ...], rules.MARGIN_RANGE, length(100)] = 0.005
    min_peers: Annotated[int, at_least(1)] = 2  # trials of the stratum that must have reported at the rung before
    # Fields in which the arms of a stratum are equal; an arm competes only within its stratum. None: one stratum.
    strata: Annotated[tuple[str, ...] | None, length(2 * len(CELL_FIELDS))] = ("stem", "method")
    order_seed: Annotated[int, rules.SEED] = 0  # seed of the order in which arms start

    def rungs(self, epochs: int) -> list[int]:
        """The epochs at which arms are compared: grace * reduction**k, below the number of epochs."""
        found = []
        epoch = self.grace
        while epoch < epochs:
            found.append(epoch)
            epoch *= self.reduction
        return found

    def margin_at(self, rung: int) -> float:
        """The margin at a rung (from 0)."""
        return self.margin[rung] if isinstance(self.margin, tuple) else self.margin


@dataclass(frozen=True)
class Confirm:
    """The confirmation: fresh seeds, trained to the end. Only these trials support claims.

    `looks` are the numbers of seeds at which the study is analysed. They are fixed before it begins. A run ends at the
    first look; `resume --extend` continues to the next. The level of 0.05 is spent over all looks. Seeds beyond the
    listed ones count up from the largest.

    If a study has several `teacher_seeds`, the students of each seed learn from every teacher. To save cost, they can
    learn from `teachers_per_seed` of them, in a cyclic layout in which every teacher has equally many seeds. With 1,
    the teachers take turns.
    """

    seeds: Annotated[tuple[int, ...], length(MOST_SEEDS)] = (1, 2, 3, 4, 5)  # confirmation seeds, at least one
    # Numbers of seeds at which the study is analysed. None: one look, at all seeds.
    looks: Annotated[tuple[int, ...] | None, length(100)] = None
    # Number of teachers from which the students of each seed learn. None: all.
    teachers_per_seed: Annotated[int | None, rules.SIZE] = None

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of every look, in order."""
        missing = (self.looks[-1] if self.looks else 0) - len(self.seeds)
        return (*self.seeds, *(max(self.seeds) + number for number in range(1, missing + 1)))

    def seeds_at(self, look: int) -> tuple[int, ...]:
        """The seeds up to a look (from 0)."""
        return self.all_seeds[: self.looks[look]] if self.looks else self.seeds


class Family(StrEnum):
    """A family of contrasts, whose p values are adjusted together (Holm)."""

    PRIMARY = auto()  # contrasts that answer the study's question
    SECONDARY = auto()


@dataclass(frozen=True)
class Compare:
    """Contrasts of a factor: `treated` minus `against`, in every context of the study or only in the contexts of
    `where`."""

    factor: str  # the factor that is compared
    treated: Level  # its level in the treated arms
    against: Level  # its level in the arms with which they are compared
    # Factors that are held at a level in both arms; may be given as a dictionary.
    where: tuple[tuple[str, Level], ...] | Mapping[str, Level] = ()
    family: Literal["primary", "secondary"] = "primary"  # family of these contrasts
    # Family of the contrasts that measure how these change with the study's moderator. None: leave them out.
    moderation: Literal["primary", "secondary"] | None = "secondary"

    @property
    def held(self) -> dict[str, Level]:
        """`where` as a dictionary."""
        return dict(self.where)

    def __post_init__(self) -> None:
        if isinstance(self.where, Mapping):
            object.__setattr__(self, "where", tuple(self.where.items()))


@dataclass(frozen=True)
class Study:
    """A whole study. `tune_kd.study.validate.check` checks it."""

    name: Annotated[str, rules.ENCODABLE, rules.LINE, length(200, "characters")]  # start of the names of its runs
    question: Annotated[str, rules.ENCODABLE, rules.LINES, length(10_000, "characters")]  # shown in the report
    factors: Annotated[tuple[Factor, ...], length(len(CELL_FIELDS))]  # settings that vary between arms
    contrasts: Annotated[tuple[Compare, ...], rules.LEVELS_LIMIT]  # comparisons between arms, fixed before the run
    moderator: str | None = None  # a factor that may change the effects; adds differences of differences
    # Fields that define the strata of the analysis: arms with equal levels share a model of seeds and variance.
    strata: Annotated[tuple[str, ...], length(2 * len(CELL_FIELDS))] = ("stem",)
    cell: Cell = Cell()  # values of the settings that no factor varies
    methods: Annotated[tuple[Method, ...], length(1000)] = ()  # own methods, in addition to the built-in ones
    control: str | None = "none"  # the method with which the others are compared; None: no contrasts, no claims
    # For each factor, the level at which contrasts of other factors are held.
    reference: Annotated[tuple[tuple[str, Level], ...], length(2 * len(CELL_FIELDS))] = (("temperature", 4.0),)
    # Factors varied one at a time: an arm differs from the reference in at most one of them.
    swept: Annotated[tuple[str, ...], length(2 * len(CELL_FIELDS))] = ()
    # Name of the study's scale, such as paper or smoke.
    scale: Annotated[str, rules.ENCODABLE, rules.LINE, length(200, "characters")] = "paper"
    data: Data = Data()  # the data set
    recipe: Recipe = Recipe()  # recipe of the students
    teacher_recipe: Recipe = Recipe(epochs=200)  # recipe of the teachers
    teacher_seeds: Annotated[tuple[int, ...], length(100)] = (1000,)  # one teacher is trained for each
    screen: Screen = Screen()  # the first phase: all arms on one seed
    confirm: Confirm = Confirm()  # the second phase: fresh seeds
    tuning: Tuning | None = None  # search ranges and budget; None: nothing is tuned
    deviation: Annotated[float, rules.DEVIATION] = 0.0015  # expected standard deviation of accuracy between seeds
    rate: Annotated[float, rules.RATE] = 5e13  # assumed floating-point operations per second of a slot, for the cost

    @property
    def teachers_per_seed(self) -> int:
        """The number of teachers from which the students of a confirmation seed learn."""
        return min(self.confirm.teachers_per_seed or len(self.teacher_seeds), len(self.teacher_seeds))

    def teachers_of(self, replicate: int) -> tuple[int, ...]:
        """The seeds of the teachers from which the students of the `replicate`-th confirmation seed (from 0) learn."""
        count = len(self.teacher_seeds)
        return tuple(self.teacher_seeds[(replicate + place) % count] for place in range(self.teachers_per_seed))

    @cached_property
    def known(self) -> dict[str, Method]:
        """All methods by name: the built-in ones and the study's own."""
        return built_in() | {method.name: method for method in self.methods}

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """The settings of the study's methods that are not fields of `Cell`. Only the built-in methods that the study
        uses count."""
        names = {*map(str, self.levels("method")), *(method.name for method in self.methods)}
        found = (name for method in self.known.values() if method.name in names for name in method.defaults)
        return tuple(dict.fromkeys(name for name in found if name not in CELL_FIELDS))

    @cached_property
    def factor_names(self) -> tuple[str, ...]:
        """All names that a factor can have: fields of `Cell`, settings of methods, fields of `Recipe`."""
        return (*CELL_FIELDS, *self.settings, *RECIPE_FACTORS)

    @cached_property
    def most_epochs(self) -> int:
        """The largest number of epochs of an arm."""
        return max((each for each in self.levels("epochs") if isinstance(each, int)), default=self.recipe.epochs)

    @cached_property
    def weighing(self) -> tuple[str, ...]:
        """The fields that weight the two losses: `alpha`, or `ce_weight` and `kd_weight` if one of them is set."""
        return WEIGHTED[1:] if any(self.levels(name) for name in WEIGHTED[1:]) else WEIGHTED[:1]

    def applies(self, factor: str) -> tuple[str, ...]:
        """The methods to which a factor applies."""
        if factor in WEIGHTED and factor not in self.weighing:
            return ()
        if factor in WEIGHTED:
            return tuple(name for name, method in self.known.items() if method.loss)
        if factor == "teacher":
            return tuple(name for name, method in self.known.items() if method.is_taught)
        if factor in ("temperature", "beta", *self.settings):
            return tuple(name for name, method in self.known.items() if factor in method.defaults)
        return tuple(self.known)

    def levels(self, factor: str) -> tuple[Level, ...]:
        """The levels of a factor. If no factor varies the setting, the one value that the study sets, if any."""
        for each in self.factors:
            if each.name == factor:
                return each.levels
        value = getattr(self.recipe, factor) if factor in RECIPE_FACTORS else self.cell.level(factor)
        return () if value is None else (value,)

    def ranges(self, method: str) -> tuple[Range, ...]:
        """The ranges that are tuned for the arms of a method."""
        return tuple(
            each
            for each in (self.tuning.ranges if self.tuning else ())
            if method in self.applies(each.name) and method in (each.methods or tuple(self.known))
        )

    def value(self, name: str, method: str) -> Level | None:
        """The value of a setting that no factor varies: the study's value, or the method's default."""
        value = getattr(self.recipe, name) if name in RECIPE_FACTORS else self.cell.level(name)
        if value is None and name in self.weighing and name != "alpha":
            return 1.0
        return self.known[method].defaults.get(name) if value is None else value
