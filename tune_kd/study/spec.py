"""What a study declares: its factors, control, seeds, recipe, early stopping and contrasts.

A study is a value. Building one checks nothing, so that a search space can refine it with
`dataclasses.replace`; `validate.check` reads the whole and names every problem at once.
"""

from dataclasses import dataclass, fields

from tune_kd.study.tuning import Range, Tuning

Level = str | int | float

METHODS = ("none", "logit", "feature")
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
STEMS = ("imagenet", "cifar")
WEIGHTS = ("none", "imagenet")
DATA_SETS = ("digits", "cifar10", "cifar100")
PRECISIONS = ("float32", "tf32", "bfloat16")
MOST_SEEDS = 10_000
MOST_TRIALS = 100_000
MOST_EPOCHS = 1_000_000  # of a trial; patient teachers take thousands (Beyer et al. 2022)
MOST_LEVELS = 1_000  # of a factor
MOST_WIDTH = 16.0

APPLIES: dict[str, tuple[str, ...]] = {
    "teacher": ("logit", "feature"),
    "alpha": ("logit", "feature"),
    "temperature": ("logit",),
    "beta": ("feature",),
}
"""The methods that a factor has a meaning for. A factor that is not named here applies to all."""


TUNABLE = ("temperature", "alpha", "beta", "lr", "weight_decay")  # of a cell and of the recipe


@dataclass(frozen=True)
class Cell:
    """The settings in which arms can differ. A study's `cell` gives the value of what no factor varies."""

    student: str = "resnet18"
    teacher: str | None = "resnet50"  # null where the method has no teacher
    stem: str = "cifar"
    weights: str = "none"  # "none" starts from scratch, "imagenet" from torchvision's weights
    width: float = 1.0  # multiple of the standard channel counts, of student and teacher
    method: str = "none"
    temperature: float | None = 4.0
    alpha: float | None = 0.5  # share of the distillation loss, in [0, 1]
    beta: float | None = 0.5  # weight of the cosine part of the feature loss


CELL_FIELDS = tuple(field.name for field in fields(Cell))
NUMERIC = ("width", "temperature", "alpha", "beta")


@dataclass(frozen=True)
class Factor:
    """A field of `Cell` and the levels that the study gives it."""

    name: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum under a cosine that ends with the budget."""

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.1  # at the first step
    lr_min: float = 1e-4  # at the last step
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 1.0  # largest norm of the gradient; the projections of `feature` are part of it
    precision: str = "float32"  # of matrix products and convolutions; weights and their updates are always float32
    compile: bool = False  # whether torch.compile makes the forward and backward pass; the first epoch pays for it


@dataclass(frozen=True)
class Data:
    """A data set and how much of it: images after the split, null for all of them."""

    name: str = "cifar10"
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    split_seed: int = 0  # of the split alone; no trial's seed changes it


@dataclass(frozen=True)
class Screen:
    """The whole grid on one seed of its own, under early stopping that culls clear losers."""

    seed: int = 0
    grace: int = 10  # epochs before the first comparison
    reduction: int = 3  # a rung keeps the best 1/reduction; rungs lie at grace * reduction**k
    margin: float | tuple[float, ...] = 0.005  # accuracy behind the cutoff that is noise: one, or one for each rung
    min_peers: int = 2  # arms of the stratum that must have reported at the rung before
    strata: tuple[str, ...] | None = ("stem", "method")  # arms compete inside these; null: all with all
    order_seed: int = 0  # of the order in which arms start

    def rungs(self, epochs: int) -> list[int]:
        """The epochs at which arms are compared: grace * reduction**k, below the budget."""
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
    """What alone makes claims: fresh seeds, run to the end.

    `looks` are the numbers of seeds at which the study may be judged, fixed before it begins: a run ends at the first,
    `resume --extend` goes to the next, and the level of 0.05 is spent over all of them. Seeds that are not listed are
    counted up from the largest that is. Null: one look, at all seeds.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    looks: tuple[int, ...] | None = None

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of every look, in order."""
        missing = (self.looks[-1] if self.looks else 0) - len(self.seeds)
        return (*self.seeds, *(max(self.seeds) + number for number in range(1, missing + 1)))

    def seeds_at(self, look: int) -> tuple[int, ...]:
        """The seeds up to a look (from 0)."""
        return self.all_seeds[: self.looks[look]] if self.looks else self.seeds


@dataclass(frozen=True)
class Compare:
    """Contrasts of one factor: `treated` against `against`, in every context that the study holds."""

    factor: str
    treated: Level
    against: Level


@dataclass(frozen=True)
class Study:
    """A whole study. `tune_kd.study.validate.check` says whether it can be run."""

    name: str
    question: str
    factors: tuple[Factor, ...]
    contrasts: tuple[Compare, ...]
    moderator: str | None = None  # the factor that may change an effect; adds differences of differences
    cell: Cell = Cell()
    control: str | None = "none"  # the method that the others are measured against; null: no claims
    reference: tuple[tuple[str, Level], ...] = (("temperature", 4.0),)  # where a contrast fixes a factor
    swept: tuple[str, ...] = ()  # factors varied one at a time: no arm departs from the reference in two of them
    scale: str = "paper"
    data: Data = Data()
    recipe: Recipe = Recipe()
    teacher_recipe: Recipe = Recipe(epochs=200)
    teacher_seeds: tuple[int, ...] = (1000,)
    screen: Screen = Screen()
    confirm: Confirm = Confirm()
    tuning: Tuning | None = None
    deviation: float = 0.0015  # expected seed-to-seed standard deviation of accuracy, for the plan
    rate: float = 5e13  # floating-point operations a second that one slot is assumed to sustain, for the price

    def levels(self, factor: str) -> tuple[Level, ...]:
        """The levels of a factor; of a field that no factor varies, its one value."""
        for each in self.factors:
            if each.name == factor:
                return each.levels
        value = getattr(self.cell, factor)
        return () if value is None else (value,)

    def ranges(self, method: str) -> tuple[Range, ...]:
        """What is tuned of an arm of this method."""
        return tuple(
            each
            for each in (self.tuning.ranges if self.tuning else ())
            if method in APPLIES.get(each.name, METHODS) and method in (each.methods or METHODS)
        )

    def default(self, name: str) -> float | None:
        """What is published of a setting that can be tuned."""
        value: float | None = getattr(self.cell if name in CELL_FIELDS else self.recipe, name)
        return value
