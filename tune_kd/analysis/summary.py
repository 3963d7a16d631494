"""A study's answer in a few sentences, generated from its verdicts."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tune_kd.analysis import accuracy, contrasts, evidence, fidelity, verdicts
from tune_kd.analysis.statistics import MARGIN
from tune_kd.records.reader import Records
from tune_kd.study.methods import built_in
from tune_kd.study.spec import Family

CONTEXTS_SHOWN = 3  # contexts of a comparison in one sentence
NAMED = 3  # secondary contrasts with a finding that are named
SENTENCES = 4  # sentences on the primary family
FINDINGS = ("better", "worse")
RULES = {
    evidence.BY_MODEL: "Contrasts within a stratum are judged by the block model, with seeds as blocks and a "
    "spread that is estimated from all arms of the stratum.",
    evidence.BY_PAIRS: "Contrasts across strata are judged by their pairs.",
    evidence.OVER_TEACHERS: "In contrasts of arms with several teachers, the teacher is a random effect.",
}
UNTAUGHT = [name for name, method in built_in().items() if not method.is_taught]
Row = Mapping[Any, Any]


@dataclass(frozen=True)
class Summary:
    """The sentences of a report above and below the table of verdicts. Empty without a study."""

    sentences: list[str]  # three to six on each run, if it declared contrasts
    method: list[str]  # how the contrasts were judged
    holds_for: list[str]  # the images and teachers for which the verdicts hold


def summary(records: Records, margin: float = MARGIN) -> Summary:
    """Put the verdicts of each run into words: the primary family first, then the other results."""
    table, tests = contrasts.contrasts(records, margin), contrasts.factors(records)
    sentences, holds = [], []
    for run in records.runs:
        theirs = table[table["run"] == run]
        if theirs.empty:
            continue
        before = f"{run}: " if len(records.runs) > 1 else ""
        said = _sentences(records.of(run), theirs, tests[tests["run"] == run], margin)
        sentences += [f"{before}{each}" for each in said if each]
        if theirs["planned"].max() > 1:
            holds.append(f"{before}These verdicts hold for this test set, which all arms and seeds share, and for "
                         f"{_teachers(records, run)}.")  # fmt: skip
    looks = any(study["study"]["confirm"].get("looks") for study in records.studies.values())
    judged = table[table["planned"] > 1]
    return Summary(sentences, _method(set(judged["rule"]), set(judged["family"]), looks), holds)


def _sentences(records: Records, table: pd.DataFrame, tests: pd.DataFrame, margin: float) -> list[str]:
    rows, words = table.to_dict("records"), _Words(records.study["study"], records.study["contrasts"], margin)
    if max(row["planned"] for row in rows) == 1:
        return ["One confirmation seed gives no estimate of spread, so no difference is judged."]
    return [*_primary(words, rows), _secondary(words, rows, tests), fidelity.sentence(records, table) or ""]


def _teachers(records: Records, run: str) -> str:
    if len(records.studies[run]["study"]["teacher_seeds"]) == 1:
        return "one teacher of each kind"
    return "teachers of their kind" if accuracy.random_teachers(records, run) else "these teachers"


def _method(rules: set[str], families: set[str], looks: bool) -> list[str]:
    """How the contrasts were judged. Only the rules and families that occur are explained."""
    said = []
    if rules - {evidence.DECLARED_EARLIER}:
        said.append(
            "p values are adjusted for several contrasts (by Holm, within a family); the 95 % t intervals are not. "
            f"{'Both account for the declared looks. ' if looks else ''}An interval may therefore exclude 0 although p "
            "is 0.05 or more; that contrast is inconclusive. An inconclusive contrast rules out what is outside its "
            f"interval.{''.join(f' {how}' for rule, how in RULES.items() if rule in rules)}"
        )
    if families >= {Family.PRIMARY, Family.SECONDARY}:
        said.append("Primary contrasts answer the study's question; secondary contrasts help to explain the answer.")
    if rules - {evidence.DECLARED_EARLIER}:
        said.append(
            "In each family, the chance of any false finding is at most about 5 %, unless the spread differs widely "
            "between arms or their accuracies are strongly correlated (docs/statistics.md)."
        )
    if evidence.DECLARED_EARLIER in rules:
        said.append(
            "Contrasts declared by a version before 0.7 keep that version's rule: they are judged by their pairs, with "
            "p adjusted by Holm over all contrasts of the run."
        )
    return said


class _Words:
    """Names of arms and contexts for sentences."""

    def __init__(self, study: Mapping[str, Any], declared: Sequence[Any], margin: float) -> None:
        named = Counter(str(level) for each in study["factors"] for level in each["levels"])
        self._factors = {str(level): each["name"] for each in study["factors"] for level in each["levels"]
                         if named[str(level)] == 1}  # only levels that belong to a single factor  # fmt: skip
        self._names = {str(each["name"]) for each in study["factors"]}
        self.margin = margin
        self._arms = {each["name"]: each["weights"] for each in declared}

    def level(self, name: str) -> str:
        """`stem cifar`, `logit`, `no distillation`; a level that contains its factor stays as it is: `T=4`."""
        factor = self._factors.get(name)
        if factor == "method":
            return "no distillation" if name in UNTAUGHT else name
        return name if factor is None else f"{factor} {name}"

    def capital(self, text: str) -> str:
        """A level as the start of a sentence: `Stem cifar`; a level without its factor stays as it is: `logit`."""
        return text[:1].upper() + text[1:] if text.partition(" ")[0] in self._names else text

    def context(self, contrast: str) -> str:
        """` with stem cifar`, ` without distillation`; empty where the study has no context."""
        levels = contrast.rpartition(": ")[0].split("/")
        named = [self.level(level) for level in levels if level]
        bare = "without distillation" if "no distillation" in named else ""
        held = ", ".join(each for each in named if each != "no distillation")
        return "".join(f" {each}" for each in (held and f"with {held}", bare) if each)

    def sides(self, contrast: str) -> tuple[str, str]:
        """The two levels that an effect compares, each with the other settings of its arm: `logit (T=4)`."""
        levels, comma, tuned = contrast.rpartition(": ")[2].partition(", ")  # `logit - none, tuned`
        treated, _, against = levels.partition(" - ")
        return self.with_settings(treated, contrast, 1), f"{self.with_settings(against, contrast, -1)}{comma}{tuned}"

    def with_settings(self, level: str, contrast: str, sign: int) -> str:
        named = re.split(r": | - |, |[(/)]", contrast)
        named += [each.rpartition(" ")[2] for each in named]  # `teacher resnet34`, where a student has this level, too
        arm = next(arm for arm, weight in self._arms[contrast] if sign * weight > 0)
        more = ", ".join(each for each in arm.split("/") if each not in named)
        return f"{self.level(level)} ({more})" if more else self.level(level)


def _primary(words: _Words, rows: Sequence[Row]) -> list[str]:
    """A sentence for each comparison over its contexts, and for each moderation."""
    primary = [row for row in rows if row["family"] != Family.SECONDARY]
    effects: dict[str, list[Row]] = {}
    for row in primary:
        if row["kind"] == "effect":
            effects.setdefault(row["contrast"].rpartition(": ")[2], []).append(row)
    said = [(group, _effect(words, group)) for group in effects.values()]
    said += [([row], _moderation(words, row)) for row in primary if row["kind"] == "moderation"]
    if len(said) <= SENTENCES:
        return _in_order(said)
    telling = [each for each in said if any(row["verdict"] in (*FINDINGS, "equivalent") for row in each[0])]
    shown = telling[:SENTENCES]
    told = [group for group, _ in shown]
    rest = [row for group, _ in said for row in group if group not in told]
    found = sum(row["verdict"] in FINDINGS for row in rest)
    declared = any(row["family"] == Family.PRIMARY for row in primary)  # records before 0.7 have no families
    which = f"{'other ' if shown else ''}{'primary ' if declared else ''}contrast"
    last = f"{_counted(found, len(rest), which)}." if rest else ""
    return [*_in_order(shown), last]


def _in_order(said: Sequence[tuple[list[Row], str]]) -> list[str]:
    """The sentences, those on methods first: a study of distillation says first whether it helps."""
    return [sentence for _, sentence in sorted(said, key=lambda each: each[0][0]["factor"] != "method")]


def _effect(words: _Words, rows: Sequence[Row]) -> str:
    treated, against = words.sides(rows[0]["contrast"])
    clauses = [
        f"{_finding(row, words.margin)}{words.context(row['contrast'])}{_figures(row)}{_not_found(row)}"
        for row in rows[:CONTEXTS_SHOWN]
    ]
    if len(rows) > CONTEXTS_SHOWN:
        better, worse = (sum(row["verdict"] == each for row in rows) for each in FINDINGS)
        clauses.append(f"over all {len(rows)} contexts, better in {better} and worse in {worse}")
    return f"{words.capital(treated)} vs. {against}: {'; '.join(clauses)}."


def _moderation(words: _Words, row: Row) -> str:
    context, _, levels = row["contrast"].rpartition(": ")
    treated, _, against = context.rpartition(": ")[2].strip("()").partition(" - ")
    treated = words.with_settings(treated, row["contrast"], 1)
    at, first = (words.level(level) for level in levels.split(" - ", 1))
    context = words.context(context.rpartition(": ")[0] + ": ")
    effect = f"effect of {treated} vs. {words.level(against)}{context}"
    if row["verdict"] in FINDINGS:
        return f"The {effect} is {_by(row)} with {at} than with {first}{_figures(row)}."
    finding = _finding(row, words.margin)
    if row["verdict"] == "equivalent":
        return f"The {effect} is {finding} with {at} and with {first}{_figures(row)}."
    return f"Whether the {effect} differs between {first} and {at} is {finding}{_figures(row)}{_not_found(row)}."


def _finding(row: Row, margin: float) -> str:
    """The verdict as a clause."""
    if row["verdict"] in FINDINGS:
        return _by(row)
    if row["verdict"] == "equivalent":
        return f"the same within {100 * margin:g} points"
    if row["verdict"] == "not judged" or not verdicts.has_interval(row):
        return f"not judged ({row['note'] or 'no estimate of its spread'})"
    return str(row["verdict"])


def _not_found(row: Row) -> str:
    """What an inconclusive contrast rules out; if its interval excludes 0, why it is inconclusive."""
    gains = verdicts.gains_ruled_out(row)
    if gains and not row["low"] <= 0 <= row["high"]:
        return f", not significant after adjustment ({_p(row['p_holm'])})"
    return f", {gains} ruled out" if gains else ""


def _by(row: Row) -> str:
    """`better by 0.31 points`; for a moderation `higher by 0.31 points`, since the effect may be negative."""
    words = {"better": "higher", "worse": "lower"} if row["kind"] == "moderation" else {}
    return f"{words.get(row['verdict'], row['verdict'])} by {100 * abs(row['estimate']):.2f} points"


def _figures(row: Row) -> str:
    """` (+0.31 points, 95 % interval +0.02 to +0.60, 5 seeds)`; without the difference if the finding states it."""
    if row["verdict"] == "not judged":
        return ""
    said = [] if row["verdict"] in FINDINGS else [f"{verdicts.points(row['estimate'])} points"]
    if verdicts.has_interval(row):
        said.append(f"95 % interval {verdicts.points(row['low'])} to {verdicts.points(row['high'])}")
    said.append(verdicts.seeds(row))
    return f" ({', '.join([*said, verdicts.EARLIER] if verdicts.EARLIER in row['note'] else said)})"


def _secondary(words: _Words, rows: Sequence[Row], tests: pd.DataFrame) -> str:
    """The findings of the secondary family by name, and F tests of factors that the primary family does not cover."""
    secondary = [row for row in rows if row["family"] == Family.SECONDARY]
    if not secondary:
        return ""
    found = [row for row in secondary if row["verdict"] in FINDINGS]
    shown = _counted(len(found), len(secondary), "secondary contrast")
    if found:
        named = "; ".join(f"{row['contrast']} ({_by(row)})" for row in found[:NAMED])
        shown += f": {named}{f'; {len(found) - NAMED} more' if len(found) > NAMED else ''}"
    asked = {row["factor"] for row in rows if row["family"] != Family.SECONDARY}
    said = [f"{shown}."]
    for factor, theirs in tests[~tests["factor"].isin(asked)].groupby("factor", sort=False):
        each = "; ".join(f"{_p(test['p'])}{words.context(test['context'] + ': ')}"
                         for test in theirs.head(NAMED).to_dict("records"))  # fmt: skip
        said.append(f"F test of any effect of {factor}: {each}.")
    return " ".join(said)


def _counted(found: int, count: int, what: str) -> str:
    """`None of the 5 contrasts is significant`, `2 of the 5 contrasts are significant`."""
    if count == 1:
        return f"The {what} is {'' if found else 'not '}significant"
    return f"{found or 'None'} of the {count} {what}s {'are' if found > 1 else 'is'} significant"


def _p(p: float) -> str:
    if pd.isna(p):
        return "not tested"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
