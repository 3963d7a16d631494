"""What a study declares: its factors, control, seeds, recipe, early stopping and contrasts.

A study is a value. Building one checks nothing, so that a search space can refine it with `dataclasses.replace`.
`validate.check` checks the rules in the annotations and those across fields, and reports all problems at once.
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
    """The settings in which arms can differ. A study's `cell` has the values of those that no factor varies.

    In an arm's cell, None stands for what does not apply to its method. In a study's, a setting of a method that is
    None has the method's own default.
    """

    student: Annotated[str, one_of(ARCHITECTURES)] = "resnet18"
    teacher: Annotated[str | None, one_of(ARCHITECTURES)] = "resnet50"  # None where the method has no teacher
    stem: Annotated[str, one_of(STEMS)] = "cifar"
    weights: Annotated[str, one_of(WEIGHTS)] = "none"  # initial weights: random, or torchvision's for ImageNet
    width: Annotated[float, rules.WIDTH_RANGE] = 1.0  # multiple of the standard channel counts, of student and teacher
    method: str = "none"
    temperature: Annotated[float | None, rules.ABOVE_0] = None
    alpha: Annotated[float | None, rules.SHARE] = 0.5  # weight of the method's loss; cross-entropy has the rest
    beta: Annotated[float | None, rules.FROM_0] = None  # weight of the cosine part of the feature loss
    ce_weight: Annotated[float | None, rules.FROM_0] = None  # of cross-entropy, and of the method's loss, in place of
    kd_weight: Annotated[float | None, rules.FROM_0] = None  # alpha; 1 where only the other one is set
    settings: tuple[tuple[str, float], ...] | Mapping[str, float] = ()  # of methods, beside those above
    recipe: tuple[tuple[str, Level], ...] = ()  # fields of `Recipe` that factors vary; not of a study's own cell

    def __post_init__(self) -> None:
        if isinstance(self.settings, Mapping):
            object.__setattr__(self, "settings", tuple(self.settings.items()))

    @cached_property
    def levels(self) -> dict[str, Level]:
        """The levels of factors that apply, by name."""
        known = {name: getattr(self, name) for name in CELL_FIELDS} | dict((*self.settings, *self.recipe))
        return {name: level for name, level in known.items() if level is not None}

    def level(self, name: str) -> Level | None:
        """The level of a factor. None where it does not apply."""
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
WEIGHTED = ("alpha", "ce_weight", "kd_weight")  # of the two losses
TEXTS = ("student", "teacher", "stem", "weights", "method", "precision")  # factors whose levels are text
COUNTS = ("epochs", "batch_size")  # and whole numbers; those of all others are numbers


@dataclass(frozen=True)
class Factor:
    """A field of `Cell`, a setting of a method or a field of `Recipe`, and the levels that the study gives it."""

    name: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum and a cosine schedule over all epochs."""

    epochs: Annotated[int, at_least(1), most(MOST_EPOCHS)] = 100
    batch_size: Annotated[int, at_least(2), most(2**24)] = 128
    lr: Annotated[float, rules.ABOVE_0] = 0.1  # at the first step
    lr_min: float = 1e-4  # at the last step
    momentum: Annotated[float, rules.MOMENTUM] = 0.9
    weight_decay: Annotated[float, rules.FROM_0] = 5e-4
    clip: Annotated[float, rules.ABOVE_0] = (
        1.0  # largest norm of the gradient, with the parameters of the method's loss
    )
    # Of matrix products and convolutions. Weights and their updates are always float32.
    precision: Annotated[str, one_of(PRECISIONS)] = "float32"
    compile: bool = False  # with torch.compile, at the cost of a slower first epoch
    # Epochs from one evaluation on the validation images to the next. The last epoch always has one.
    validate_every: Annotated[int, at_least(1), most(MOST_EPOCHS)] = 1

    def validates(self, epoch: int) -> bool:
        """Whether the network is evaluated on the validation images after this epoch (from 1)."""
        return epoch % self.validate_every == 0 or epoch == self.epochs

    @property
    def validations(self) -> int:
        """The number of epochs after which it is."""
        return -(-self.epochs // self.validate_every)


@dataclass(frozen=True)
class Data:
    """A data set, and how many images of each part to use after the split: None for all."""

    name: Annotated[str, one_of(DATA_SETS)] = "cifar10"
    train: Annotated[int | None, rules.SIZE] = None
    validation: Annotated[int | None, rules.SIZE] = None
    test: Annotated[int | None, rules.SIZE] = None
    split_seed: Annotated[int, rules.SEED] = 0  # of the split alone, whatever the trials' seeds


@dataclass(frozen=True)
class Screen:
    """The whole grid on one seed of its own, with early stopping of clear losers."""

    seed: Annotated[int, rules.SEED] = 0
    grace: Annotated[int, at_least(1, " epoch")] = 10  # epochs before the first comparison
    reduction: Annotated[int, at_least(2)] = 3  # a rung keeps the best 1/reduction
    # Accuracy behind the cutoff that counts as noise: one number, or one for each rung.
    margin: Annotated[float | tuple[float, ...], rules.MARGIN_RANGE, length(100)] = 0.005
    min_peers: Annotated[int, at_least(1)] = 2  # arms of the stratum that must have reported at the rung before
    strata: Annotated[tuple[str, ...] | None, length(2 * len(CELL_FIELDS))] = ("stem", "method")  # None: one for all
    order_seed: Annotated[int, rules.SEED] = 0  # of the order in which arms start

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
    """Fresh seeds, trained to the end. Claims rest on them alone.

    `looks` are the numbers of seeds at which the study is judged, fixed before it begins. A run ends at the first;
    `resume --extend` continues to the next; the level of 0.05 is spent over all of them. Seeds beyond those listed
    count up from the largest. None means one look, at all seeds.

    Where `teacher_seeds` are several, students of a seed learn from each teacher. Where that is too dear, they learn
    from `teachers_per_seed` of them, in a cyclic layout in which all teachers meet as many seeds; with 1 they take
    turns.
    """

    seeds: Annotated[tuple[int, ...], length(MOST_SEEDS)] = (1, 2, 3, 4, 5)
    looks: Annotated[tuple[int, ...] | None, length(100)] = None
    teachers_per_seed: Annotated[int | None, rules.SIZE] = None  # None: all

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of every look, in order."""
        missing = (self.looks[-1] if self.looks else 0) - len(self.seeds)
        return (*self.seeds, *(max(self.seeds) + number for number in range(1, missing + 1)))

    def seeds_at(self, look: int) -> tuple[int, ...]:
        """The seeds up to a look (from 0)."""
        return self.all_seeds[: self.looks[look]] if self.looks else self.seeds


class Family(StrEnum):
    """The contrasts over which Holm adjusts p values together."""

    PRIMARY = auto()  # answer the study's question
    SECONDARY = auto()


@dataclass(frozen=True)
class Compare:
    """Contrasts of a factor: `treated` against `against`, in every context of the study, or in those of `where`.

    `where` maps factors to the level at which both arms are held; it may be given as a dictionary. With a moderator,
    how each contrast changes with it is a contrast, too, of the family `moderation`; None: of no interest.
    """

    factor: str
    treated: Level
    against: Level
    where: tuple[tuple[str, Level], ...] | Mapping[str, Level] = ()
    family: Literal["primary", "secondary"] = "primary"
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
    """A whole study. `tune_kd.study.validate.check` says whether it can be run."""

    name: Annotated[str, rules.ENCODABLE, rules.LINE, length(200, "characters")]
    question: Annotated[str, rules.ENCODABLE, rules.LINES, length(10_000, "characters")]
    factors: Annotated[tuple[Factor, ...], length(len(CELL_FIELDS))]
    contrasts: Annotated[tuple[Compare, ...], rules.LEVELS_LIMIT]
    moderator: str | None = None  # a factor that may change the effects: adds differences of differences
    # Arms that are equal in these share a model of the seeds and of the spread, which judges their contrasts.
    strata: Annotated[tuple[str, ...], length(2 * len(CELL_FIELDS))] = ("stem",)
    cell: Cell = Cell()
    methods: Annotated[tuple[Method, ...], length(1000)] = ()  # beside those that come with tune_kd
    control: str | None = "none"  # the method with which the others are compared; None: no claims
    # The level of a factor at which contrasts of other factors are held.
    reference: Annotated[tuple[tuple[str, Level], ...], length(2 * len(CELL_FIELDS))] = (("temperature", 4.0),)
    # Factors varied one at a time: an arm departs from the reference in at most one of them.
    swept: Annotated[tuple[str, ...], length(2 * len(CELL_FIELDS))] = ()
    scale: Annotated[str, rules.ENCODABLE, rules.LINE, length(200, "characters")] = "paper"
    data: Data = Data()
    recipe: Recipe = Recipe()
    teacher_recipe: Recipe = Recipe(epochs=200)
    teacher_seeds: Annotated[tuple[int, ...], length(100)] = (1000,)
    screen: Screen = Screen()
    confirm: Confirm = Confirm()
    tuning: Tuning | None = None
    deviation: Annotated[float, rules.DEVIATION] = 0.0015  # expected, of accuracy between seeds; for the plan
    rate: Annotated[float, rules.RATE] = 5e13  # assumed floating-point operations a second of one slot; for the cost

    @property
    def teachers_per_seed(self) -> int:
        """The number of teachers from which the students of a confirmation seed learn."""
        return min(self.confirm.teachers_per_seed or len(self.teacher_seeds), len(self.teacher_seeds))

    def teachers_of(self, replicate: int) -> tuple[int, ...]:
        """The seeds of the teachers from which students of a confirmation seed learn, by its number (from 0)."""
        count = len(self.teacher_seeds)
        return tuple(self.teacher_seeds[(replicate + place) % count] for place in range(self.teachers_per_seed))

    @cached_property
    def known(self) -> dict[str, Method]:
        """The methods by name: those that come with tune_kd, and its own."""
        return built_in() | {method.name: method for method in self.methods}

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """The settings of its methods that are no fields of `Cell`. Built-in methods count where the study has them."""
        names = {*map(str, self.levels("method")), *(method.name for method in self.methods)}
        found = (name for method in self.known.values() if method.name in names for name in method.defaults)
        return tuple(dict.fromkeys(name for name in found if name not in CELL_FIELDS))

    @cached_property
    def factor_names(self) -> tuple[str, ...]:
        """All in which its arms can differ: fields of `Cell`, settings of its methods, fields of `Recipe`."""
        return (*CELL_FIELDS, *self.settings, *RECIPE_FACTORS)

    @cached_property
    def most_epochs(self) -> int:
        """The epochs of the arms that train for longest."""
        return max((each for each in self.levels("epochs") if isinstance(each, int)), default=self.recipe.epochs)

    @cached_property
    def weighing(self) -> tuple[str, ...]:
        """The fields that weigh the two losses: alpha, or both weights where one of them is set."""
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
        """The levels of a factor, or the one value that the study sets where no factor varies it."""
        for each in self.factors:
            if each.name == factor:
                return each.levels
        value = getattr(self.recipe, factor) if factor in RECIPE_FACTORS else self.cell.level(factor)
        return () if value is None else (value,)

    def ranges(self, method: str) -> tuple[Range, ...]:
        """The ranges that are tuned for arms of this method."""
        return tuple(
            each
            for each in (self.tuning.ranges if self.tuning else ())
            if method in self.applies(each.name) and method in (each.methods or tuple(self.known))
        )

    def value(self, name: str, method: str) -> Level | None:
        """What no factor varies: the study's value, or the method's own default."""
        value = getattr(self.recipe, name) if name in RECIPE_FACTORS else self.cell.level(name)
        if value is None and name in self.weighing and name != "alpha":
            return 1.0
        return self.known[method].defaults.get(name) if value is None else value
