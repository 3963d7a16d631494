"""Somebody else's tables: what their columns mean, and what they leave to be made from the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tune_kd.plan import level_name
from tune_kd.study import Mistake

if TYPE_CHECKING:
    import pandas as pd

PHASES = ("teacher", "screen", "confirm")
LEVELS = ("student", "teacher", "stem", "weights", "width", "method", "temperature", "alpha", "beta")


@dataclass(frozen=True)
class Adapter:
    """How to read tables that no run of ours wrote. A trials table has to have `trial_id` and `seed`, an epochs table
    `trial_id`, `epoch` and `val_accuracy`; what else is there is used, and what is not is null.

    Made where they are missing: `run` (the files' name), `role` (from the phase), `status` (completed),
    `epochs_planned` (the epochs that were run), and `arm` (the levels in which students differ).
    """

    columns: Mapping[str, str] = field(default_factory=dict)  # their name to ours
    phases: Mapping[str, str] = field(default_factory=dict)  # their phase to teacher, screen or confirm

    def apply(self, run: str, tables: "dict[str, pd.DataFrame]") -> "dict[str, pd.DataFrame]":
        """The tables in our names, with what could be made."""
        named = {name: table.rename(columns=dict(self.columns)) for name, table in tables.items()}
        trials = named["trials"]
        if "phase" not in trials:
            trials = trials.assign(phase="confirm")
        elif self.phases:
            trials = trials.assign(phase=trials["phase"].replace(dict(self.phases)))
        if "role" not in trials:
            trials = trials.assign(role=["teacher" if phase == "teacher" else "student" for phase in trials["phase"]])
        for name, value in (("run", run), ("status", "completed")):
            if name not in trials:
                trials = trials.assign(**{name: value})
        if "epochs_planned" not in trials and "epochs_run" in trials:
            trials = trials.assign(epochs_planned=trials["epochs_run"])
        if "arm" not in trials:
            trials = trials.assign(arm=_arms(trials))
        epochs = named["epochs"]
        if "run" not in epochs:
            epochs = epochs.assign(run=run)
        return {**named, "trials": trials, "epochs": epochs}


def parse_phases(settings: Sequence[str]) -> dict[str, str]:
    """What `--phase THEIRS=OURS` says. Raises `Mistake`."""
    problems, found = [], {}
    for setting in settings:
        theirs, sign, ours = setting.partition("=")
        if not theirs or not sign or ours not in PHASES:
            problems.append(f"--phase is {setting!r}; allowed: THEIRS=OURS, where OURS is {', '.join(PHASES)}")
        found[theirs] = ours
    if problems:
        raise Mistake(*problems)
    return found


def _arms(trials: "pd.DataFrame") -> list[str]:
    """The levels that apply to each trial, of the columns that are not alike in all of them: `cifar/logit/T=4`."""
    varied = [name for name in LEVELS if name in trials and trials[name].nunique(dropna=False) > 1]
    arms = []
    for row in trials[varied].to_dict("records"):
        levels = [level_name(str(name), level) for name, level in row.items() if level is not None and level == level]
        arms.append("/".join(levels) or "all")
    return arms
