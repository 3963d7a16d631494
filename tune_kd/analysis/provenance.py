"""Provenance of runs, differences between runs, and limits of the evidence."""

from dataclasses import asdict
from typing import Any

import pandas as pd

from tune_kd.analysis import accuracy, statistics
from tune_kd.analysis.statistics import FEW_TEACHERS, MARGIN
from tune_kd.records.reader import Records
from tune_kd.records.tables import typed


def provenance(records: Records) -> pd.DataFrame:
    """The code, machine, data and study of each run: one row per run and fact."""
    rows = []
    for run in records.runs:
        trials, facts = records.trials[records.trials["run"] == run], {}
        if (study := records.studies.get(run)) is not None:
            facts = {
                "study": f"{study['study']['name']}, scale {study['study']['scale']}",
                "study hash": (study.get("study_sha256") or "")[:16],
                "contrasts hash": (study.get("contrasts_sha256") or "")[:16],
                "created": study.get("created"),
                "commit": study.get("git_commit") or "not from a checkout",
                "versions": ", ".join(f"{name} {value}" for name, value in (study.get("versions") or {}).items()),
                "machine": ", ".join(f"{name} {value}" for name, value in (study.get("machine") or {}).items()),
                "data": study["data"].get("name"),
                "data digest": study["data"].get("digest"),
            }
        facts["trials"] = ", ".join(f"{count} {status}" for status, count in trials["status"].value_counts().items())
        for name in ("host", "device", "threads"):
            levels = trials[name].dropna().unique().tolist()
            if levels:
                facts[f"{name}s".replace("threadss", "threads")] = ", ".join(map(str, levels))
        rows += [{"run": run, "what": what, "value": str(value)} for what, value in facts.items() if value]
    return typed(rows, "run what value")


def limits(records: Records, margin: float = MARGIN) -> list[str]:
    """Limits of the evidence, as sentences."""
    several = len(records.runs) > 1
    said = [f"{run}: {each}" if several else each for run in records.runs for each in _limits_of(records.of(run))]
    if any(run in records.studies for run in records.runs):
        said.append(f"Equivalent means a difference of less than {100 * margin:g} points of accuracy. Whether such a "
                    "difference matters depends on the use.")  # fmt: skip
    return said


def _limits_of(run: Records) -> list[str]:
    if not run.studies:
        return ["These tables have no study, so it is unknown which comparisons were declared in advance. All results "
                "are exploratory."]  # fmt: skip
    look = accuracy.judged_look(run)
    return [
        *_limits_of_seeds(run.study, look),
        *_limits_of_scope(run.study),
        *_limits_of_arms(run),
        *_limits_of_exploration(run),
    ]


def _limits_of_seeds(study: dict[str, Any], look: int) -> list[str]:
    """The power of the judged seeds, and the level of their look."""
    confirm = accuracy.confirmation(study)
    seeds = len(confirm.seeds_at(look))
    said = ["The study confirms on one seed, so no difference is judged."]
    if seeds > 1:
        said = [
            f"With {seeds} seeds, the exact sign-flip test of a contrast cannot give p below "
            f"{statistics.smallest_exact_p(seeds):.4f}. `tune_kd plan` shows which true differences these seeds detect."
        ]
    if confirm.looks:
        said.append(
            f"Judged at look {look + 1} of the {len(confirm.looks)} that the study declared ({seeds} of "
            f"{confirm.looks[-1]} seeds): each look has a share of the level of 0.05, and this look has "
            f"{statistics.spent(confirm.looks)[look]:g}. Adjusted p values and intervals account for that."
        )
    if study.get("look", 0) > look:
        said.append(f"Look {study['look'] + 1} is running: no contrast uses its seeds until all of them have finished.")
    return said


def _limits_of_scope(study: dict[str, Any]) -> list[str]:
    """The teachers, data and recipe for which the verdicts hold."""
    inner, said = study["study"], [_limit_of_teachers(study)]
    where, tuned = f"scale {inner['scale']} on {study['data'].get('name')}", inner.get("tuning")
    if tuned is None:
        said.append(f"The results are for {where}, with one recipe for all arms. A method that needs another recipe is "
                    "at a disadvantage.")  # fmt: skip
    else:
        said.append(f"The results are for {where}. Each arm was tuned with {tuned['budget']} {tuned['budget_unit']} "
                    "inside the study's ranges, on one seed. A method that needs a larger budget or other ranges is at "
                    "a disadvantage.")  # fmt: skip
    return said


def _limit_of_teachers(study: dict[str, Any]) -> str:
    """The teachers for which the verdicts hold."""
    count = len(study["study"]["teacher_seeds"])
    if count == 1:
        return ("All students of a context share one teacher. Verdicts are conditional on it: another teacher could "
                "give other results.")  # fmt: skip
    if not accuracy.is_crossed(study):
        return f"Seeds took turns over {count} teachers. Verdicts are conditional on these teachers."
    few = f" {count} teachers estimate that spread poorly." if count < FEW_TEACHERS else ""
    return ("Verdicts on arms that have a teacher generalise to teachers of this kind: each interval includes the "
            f"spread between the {count} teachers of the study.{few}")  # fmt: skip


def _limits_of_arms(run: Records) -> list[str]:
    """Arms that are not judged, or judged on fewer seeds than planned."""
    table = accuracy.arms(run)
    meanings = {
        "stopped in the screen": "no final accuracy and no verdict",
        "incomplete": "fewer seeds than planned",
        "not finished": "some trials are waiting or running",
    }
    named = {note: table.loc[table["note"] == note, "arm"].tolist() for note in meanings}
    return [f"{', '.join(some)}: {note}; {meanings[note]}." for note, some in named.items() if some]


def _limits_of_exploration(run: Records) -> list[str]:
    """Added seeds and arms, the screen, and draws."""
    found, said = accuracy.exploratory(run), []
    added = found.loc[found["what"] == "added seeds", "arm"].tolist()
    if added:
        said.append(f"Seeds that were added without a declared look ({', '.join(added)}) are exploratory: no mean and "
                    "no contrast uses them.")  # fmt: skip
    planned = {arm["name"] for arm in run.study["arms"]}
    if arms_added := sorted(set(found.loc[found["what"] != "draws", "arm"]) - planned):
        said.append(f"Arms that were added later ({', '.join(arms_added)}) are exploratory: no contrast uses "
                    "them.")  # fmt: skip
    if (found["what"] == "screen").any():
        said.append(f"The screen tried {int(found['tried'].max())} arms on one seed. The best of many is partly lucky, "
                    "so the screen's numbers are exploratory.")  # fmt: skip
    if (found["what"] == "draws").any():
        said.append("The best of an arm's draws is partly lucky: its accuracy on the tuning seed is exploratory, "
                    "and fresh seeds measure it without this bias.")  # fmt: skip
    return said


def differences(records: Records) -> pd.DataFrame:
    """Facts that differ between runs: one row per fact, one column per run."""
    facts: dict[str, dict[str, str]] = {}
    for run in records.runs:
        study = records.studies.get(run, {})
        for name in ("study", "data", "versions", "machine", "git_commit"):
            for path, value in _leaves(name, study.get(name)):
                facts.setdefault(path, {})[run] = str(value)
        trials = records.trials[records.trials["run"] == run]
        for name in (*accuracy.COMPARABLE, "device", "threads"):
            facts.setdefault(name, {})[run] = ", ".join(map(str, trials[name].dropna().unique().tolist()))
    rows = [{"what differs": what, **{run: of.get(run, "") for run in records.runs}} for what, of in facts.items()
            if len({of.get(run, "") for run in records.runs}) > 1]  # fmt: skip
    return pd.DataFrame(rows, columns=["what differs", *records.runs])


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]
    return [(name, value)]


def between_runs(records: Records) -> pd.DataFrame:
    """Compare each arm of each later run with the same arm of the first run by Welch's test: one row per arm and run.

    Exploratory: no study declared these comparisons, and runs may differ in several ways (see `differences`). If the
    data, planned epochs, scale or recipe of an arm differ, the row has both means but no difference, and `note` names
    the columns.
    """
    ended = accuracy.completed_trials(records).dropna(subset=accuracy.HEADLINE)
    first, *others = records.runs
    rows = []
    for run in others:
        for arm, both in ended[ended["run"].isin([first, run])].groupby("arm", sort=False):
            there, here = (accuracy.by_seed(both[both["run"] == name]).tolist() for name in (run, first))
            if not there or not here:
                continue
            note = accuracy.differing(both)
            welch = asdict(statistics.welch(there, here)) if not note else {"n": len(both)}
            means = {"mean": statistics.summary(there).mean, "control": statistics.summary(here).mean}
            rows.append({"arm": arm, "run": run, "against": first, **means, **welch, "note": note})
    table = typed(rows, "arm run against mean control n n_treated n_control estimate low high p effect_size note")
    table["p_holm"] = statistics.holm(table["p"])
    return table.rename(columns={"control": "mean_against"})
