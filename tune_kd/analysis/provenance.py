"""What ran where, in what runs differ, and what their evidence cannot say."""

from dataclasses import asdict
from typing import Any

import pandas as pd

from tune_kd.analysis import statistics
from tune_kd.analysis.contrasts import (
    COMPARABLE,
    HEADLINE,
    arms,
    confirmation,
    confirmed_trials,
    differing,
    exploratory,
    holm,
    judged_look,
)
from tune_kd.analysis.statistics import MARGIN
from tune_kd.records.reader import Records, typed


def provenance(records: Records) -> pd.DataFrame:
    """What ran where: a row a run and fact."""
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
    """What the evidence cannot say, in sentences."""
    said = []
    for run in records.runs:
        of = f"{run}: " if len(records.runs) > 1 else ""
        one, study = records.of(run), records.studies.get(run)
        if study is None:
            said.append(f"{of}No study came with these tables: nothing shows which comparisons were fixed before the "
                        "data were seen, so nothing here is a claim.")  # fmt: skip
            continue
        inner, confirm, look = study["study"], confirmation(study), judged_look(one)
        seeds = len(confirm.seeds_at(look))
        if seeds < 2:
            said.append(f"{of}One seed confirms: no difference can be judged.")
        else:
            deviation = inner["deviation"]
            least = 100 * (statistics.detectable(seeds, deviation) or 0.0)
            family = len(study["contrasts"])
            hardest = 100 * (statistics.detectable(seeds, deviation, alpha=0.05 / max(1, family)) or 0.0)
            said.append(
                f"{of}With {seeds} seeds, at the seed-to-seed deviation that the study expected ({100 * deviation:.2f} "
                f"points), a paired test finds true differences from {least:.2f} points on with 80 % power by itself, "
                f"and from {hardest:.2f} points on where Holm, over {family} contrasts, is hardest; a difference of "
                "differences needs more. The exact sign-flip p cannot fall below "
                f"{statistics.smallest_exact_p(seeds):.4f}."
            )
        if confirm.looks:
            level = statistics.spent(confirm.looks)[look]
            said.append(
                f"{of}Judged at look {look + 1} of the {len(confirm.looks)} that the study declared ({seeds} of "
                f"{confirm.looks[-1]} seeds): each look has its share of the level of 0.05, this one {level:g}. "
                "Adjusted p values and intervals allow for that."
            )
        if study.get("look", 0) > look:
            said.append(
                f"{of}Look {study['look'] + 1} goes on: its seeds are in no contrast until they have all ended."
            )
        if len(inner["teacher_seeds"]) == 1:
            said.append(f"{of}All students of a context have one teacher: another one might teach otherwise. Every "
                        "verdict holds given that teacher.")  # fmt: skip
        where = f"scale {inner['scale']} on {study['data'].get('name')}"
        tuned = inner.get("tuning")
        if tuned is None:
            said.append(f"{of}What was measured is {where}, with one recipe for all arms: a method that needs another "
                        "one is judged by this one.")  # fmt: skip
        else:
            said.append(f"{of}What was measured is {where}. Each arm was tuned with {tuned['budget']} "
                        f"{tuned['budget_unit']} inside the study's ranges, on one seed: a method that needs more, or "
                        "lies outside, is judged by what was found.")  # fmt: skip
        table = arms(one)
        for note, meaning in (("stopped in the screen", "no final accuracy and no verdict"),
                              ("incomplete", "fewer seeds than planned"),
                              ("not finished", "some of its trials wait or run")):  # fmt: skip
            named = table.loc[table["note"] == note, "arm"].tolist()
            if named:
                said.append(f"{of}{', '.join(named)}: {note}; {meaning}.")
        found = exploratory(one)
        added = found.loc[found["what"] == "added seeds", "arm"].tolist()
        if added:
            said.append(f"{of}Seeds that were added without a declared look ({', '.join(added)}) are exploratory: they "
                        "are in no mean and in no contrast.")  # fmt: skip
        arms_added = sorted(set(found.loc[found["what"] != "draws", "arm"]) - {arm["name"] for arm in study["arms"]})
        if arms_added:
            said.append(f"{of}Arms that were added later ({', '.join(arms_added)}) are exploratory: no contrast refers "
                        "to them.")  # fmt: skip
        if (found["what"] == "screen").any():
            said.append(f"{of}The screen tried {int(found['tried'].max())} arms on one seed. Its best is the best of "
                        "them also by luck, so its numbers are exploratory.")  # fmt: skip
        if (found["what"] == "draws").any():
            said.append(f"{of}The best of an arm's draws is the best also by luck: what it reached on the seed that it "
                        "was tuned on is exploratory, and fresh seeds say what it is worth.")  # fmt: skip
    if any(run in records.studies for run in records.runs):
        said.append(f"Equivalent means a difference of less than {100 * margin:g} points of accuracy; whether that "
                    "matters is not for statistics to say.")  # fmt: skip
    return said


def differences(records: Records) -> pd.DataFrame:
    """In what several runs differ: a row a fact, a column a run. Of what all have alike there is no row."""
    facts: dict[str, dict[str, str]] = {}
    for run in records.runs:
        study = records.studies.get(run, {})
        for name in ("study", "data", "versions", "machine", "git_commit"):
            for path, value in _leaves(name, study.get(name)):
                facts.setdefault(path, {})[run] = str(value)
        trials = records.trials[records.trials["run"] == run]
        for name in (*COMPARABLE, "device", "threads"):
            facts.setdefault(name, {})[run] = ", ".join(map(str, trials[name].dropna().unique().tolist()))
    rows = [{"what differs": what, **{run: of.get(run, "") for run in records.runs}} for what, of in facts.items()
            if len({of.get(run, "") for run in records.runs}) > 1]  # fmt: skip
    return pd.DataFrame(rows, columns=["what differs", *records.runs])


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]
    return [(name, value)]


def between_runs(records: Records) -> pd.DataFrame:
    """Each arm of each later run beside the same arm of the first: a row an arm and run, the difference after Welch.

    Exploratory: nobody fixed these comparisons, and runs may differ in more than one thing (`differences` says in
    what). Where an arm's data, planned epochs, scale or recipe differ there are both means and no difference, and
    `note` says in what.
    """
    trials = confirmed_trials(records)
    ended = trials[(trials["status"] == "completed") & trials[HEADLINE].notna()]
    first, *others = records.runs
    rows = []
    for run in others:
        for arm, both in ended[ended["run"].isin([first, run])].groupby("arm", sort=False):
            there, here = (both.loc[both["run"] == name, HEADLINE].tolist() for name in (run, first))
            if not there or not here:
                continue
            note = differing(both)
            welch = asdict(statistics.welch(there, here)) if not note else {"n": len(both)}
            means = {"mean": statistics.summary(there).mean, "control": statistics.summary(here).mean}
            rows.append({"arm": arm, "run": run, "against": first, **means, **welch, "note": note})
    table = typed(rows, "arm run against mean control n n_treated n_control estimate low high p effect_size note")
    table["p_holm"] = holm(table["p"])
    return table.rename(columns={"control": "mean_against"})
