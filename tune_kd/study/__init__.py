"""Declaration of a study, and its plan: arms, trials, teachers, cost. Imports neither torch nor Ray."""

from tune_kd.study.methods import Method
from tune_kd.study.spec import Cell, Compare, Confirm, Data, Factor, Recipe, Screen, Study
from tune_kd.study.tuning import Choice, Integer, LogUniform, Range, Tuning, Uniform

__all__ = [
    "Cell",
    "Choice",
    "Compare",
    "Confirm",
    "Data",
    "Factor",
    "Integer",
    "LogUniform",
    "Method",
    "Range",
    "Recipe",
    "Screen",
    "Study",
    "Tuning",
    "Uniform",
]
