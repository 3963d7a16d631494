"""Arms: the cells of the factors that a study compares, and their names."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from tune_kd.study.spec import APPLIES, CELL_FIELDS, NUMERIC, Cell, Level, Study
from tune_kd.study.trial import ArmRole
from tune_kd.study.tuning import number

SYMBOLS = {"temperature": "T"}


@dataclass(frozen=True)
class Arm:
    """A cell of the factors. Raw cells that differ only in settings that do not apply are one arm."""

    name: str
    cell: Cell
    merged: int  # number of raw cells
    role: ArmRole

    @property
    def immune(self) -> bool:
        """Whether early stopping must not stop this arm, because contrasts refer to it."""
        return self.role != ArmRole.COMPARED


def raw_cells(study: Study) -> list[Cell]:
    """Every combination of levels, or those that vary `swept` factors one at a time. Equal cells occur repeatedly."""
    crossed = (_cell(study, levels) for levels in itertools.product(*(factor.levels for factor in study.factors)))
    swept = [(name, level) for name, level in study.reference if name in study.swept]
    return [cell for cell in crossed if sum(getattr(cell, name) not in (None, level) for name, level in swept) <= 1]


def _cell(study: Study, levels: tuple[Level, ...]) -> Cell:
    """One raw cell, with None for settings that do not apply to its method, so that equal arms have equal cells."""
    chosen: dict[str, Any] = {
        factor.name: float(level) if factor.name in NUMERIC else level
        for factor, level in zip(study.factors, levels, strict=True)
    }
    cell = replace(study.cell, **chosen)
    inert: dict[str, Any] = dict.fromkeys(name for name, where in APPLIES.items() if cell.method not in where)
    return replace(cell, **inert)


def level_name(factor: str, level: Level) -> str:
    """A level as the name of an arm has it: `cifar`, `T=4`."""
    return level if isinstance(level, str) else f"{SYMBOLS.get(factor, factor)}={number(level)}"


def arm_name(study: Study, cell: Cell) -> str:
    """The levels that apply, in the order of the study's factors: `cifar/logit/T=4`. Without any, the method."""
    return levels_name(study, cell, CELL_FIELDS) or cell.method


def levels_name(study: Study, cell: Cell, among: tuple[str, ...]) -> str:
    """As `arm_name`, from the factors `among` alone. Empty where the study has none of them."""
    varied = [factor.name for factor in study.factors if factor.name in among]
    levels = [level_name(name, getattr(cell, name)) for name in varied if getattr(cell, name) is not None]
    return "/".join(levels) or (cell.method if varied else "")
