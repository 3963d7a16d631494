"""Arms: the combinations of levels that a study compares, and their names."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_kd.study.spec import CELL_FIELDS, COUNTS, RECIPE_FACTORS, TEXTS, Cell, Level, Study
from tune_kd.study.trial import ArmRole
from tune_kd.study.tuning import number

SYMBOLS = {"temperature": "T"}


@dataclass(frozen=True)
class Arm:
    """A combination of levels. Raw cells that differ only in settings that do not apply are merged into one arm."""

    name: str
    cell: Cell
    merged: int  # number of raw cells in this arm
    role: ArmRole

    @property
    def immune(self) -> bool:
        """Whether early stopping must not stop this arm, because contrasts refer to it."""
        return self.role != ArmRole.COMPARED


def raw_cells(study: Study) -> list[Cell]:
    """All combinations of levels; of `swept` factors, only those that vary one at a time. Equal cells are repeated."""
    applying = {name: frozenset(study.applies(name)) for name in study.factor_names}
    names = [factor.name for factor in study.factors]
    chosen = (dict(zip(names, levels, strict=True)) for levels in itertools.product(*(f.levels for f in study.factors)))
    crossed = (_cell(study, applying, levels) for levels in chosen)
    swept = [(name, level) for name, level in study.reference if name in study.swept]
    return [cell for cell in crossed if sum(cell.level(name) not in (None, level) for name, level in swept) <= 1]


def _cell(study: Study, applying: Mapping[str, frozenset[str]], chosen: Mapping[str, Level]) -> Cell:
    """One raw cell. Settings that do not apply to its method are None, so that equal arms have equal cells."""
    method = str(chosen.get("method", study.cell.method))

    def level(name: str) -> Any:
        value = chosen.get(name, study.value(name, method)) if method in applying[name] else None
        return value if value is None or name in (*TEXTS, *COUNTS) else float(value)

    settings = {name: value for name in study.settings if (value := level(name)) is not None}
    varied = {name: level(name) for name in chosen if name in RECIPE_FACTORS}
    found = {name: level(name) for name in CELL_FIELDS}
    return Cell(**found, settings=tuple(sorted(settings.items())), recipe=tuple(sorted(varied.items())))


def level_name(factor: str, level: Level) -> str:
    """A level as in the name of an arm: `cifar`, `T=4`."""
    return level if isinstance(level, str) else f"{SYMBOLS.get(factor, factor)}={number(level)}"


def arm_name(study: Study, cell: Cell) -> str:
    """The levels that apply, in the order of the study's factors: `cifar/logit/T=4`. If none applies, the method."""
    return levels_name(study, cell, study.factor_names) or cell.method


def levels_name(study: Study, cell: Cell, among: Sequence[str]) -> str:
    """Like `arm_name`, but only with the factors `among`. Empty if the study has none of them."""
    varied = [factor.name for factor in study.factors if factor.name in among]
    levels = [level_name(name, level) for name in varied if (level := cell.level(name)) is not None]
    return "/".join(levels) or (cell.method if varied else "")
