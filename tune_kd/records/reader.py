"""Tables as DataFrames: read from Parquet and held against their schema, from one run, several, or somebody else's."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, cast

import numpy as np
import pandas as pd

from tune_kd.records import parquet
from tune_kd.records.importer import Adapter
from tune_kd.records.ledger import digests
from tune_kd.records.schema import DIGESTS, LAYOUT, MOST_TABLE_BYTES, PANDAS, RUN_NAME, SCHEMAS, TRIALS, Schema
from tune_kd.records.sync import pull
from tune_kd.study import record
from tune_kd.system.characters import CONTROL, visible
from tune_kd.system.errors import CorruptFile, UserError
from tune_kd.system.files import MOST_RECORD_BYTES, check_names, read, unsealed
from tune_kd.system.object_store import path_of

EXAMPLES = 3  # rows that an error shows
RESUME = "`tune_kd resume"  # with which the advice begins that a run's tables come with
READS = 5  # of a table and its digest, until they fit together
TEXT = (
    *("run", "arm", "role", "note", "what", "contrast", "kind", "verdict", "words", "context", "how", "against"),
    *("setting", "value", "host", "stratum", "phase", "method", "status", "student", "teacher", "stem", "weights"),
)
COUNTS = (
    *(
        "draws",
        "completed",
        "failed",
        "epochs",
        "best_draw",
        "n",
        "planned",
        "tried",
        "trials",
        "stopped",
        "n_treated",
        "n_control",
        "pairs_needed",
        "epoch",
        "slot",
        "seed",
        "rung",
    ),
)
"""Names of columns of results that are text, and counts; the others are measures."""


@dataclass(frozen=True)
class Records:
    """The tables of runs as DataFrames with the schema's types, and what each run's `study.json` says of it.

    Text is `string`, counts are `Int64`, measures `float64`. What does not apply is null.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    decisions: pd.DataFrame
    studies: dict[str, dict[str, Any]]  # by run; tables of others have none

    @property
    def runs(self) -> list[str]:
        """The names of the runs, in the order in which they were asked for."""
        return list(dict.fromkeys(self.trials["run"]))

    def of(self, run: str) -> "Records":
        """One run alone."""
        trials, epochs, decisions = (each[each["run"] == run] for each in (self.trials, self.epochs, self.decisions))
        return Records(trials, epochs, decisions, {name: of for name, of in self.studies.items() if name == run})

    @property
    def study(self) -> dict[str, Any]:
        """What the one run's `study.json` says. Raises `ValueError` where there is not exactly one."""
        if len(self.studies) != 1:
            raise ValueError(f"these are the records of {len(self.studies)} studies; take one with `of(run)`")
        return next(iter(self.studies.values()))


def load(*runs: Path | str, out: Path | str = "results", adapt: Adapter | None = None) -> Records:
    """Read runs: folders, names under `out`, or what two files `..._trials.parquet`, `..._epochs.parquet` have in
    common (`data/published`). `adapt` says what the columns of somebody else's tables mean.

    Raises `UserError` for what is not there or cannot be read, and for rows that break the schema, with their number
    and some of them.
    """
    if not runs:
        raise UserError("RUN is missing; allowed: a run's folder, its name, or the common prefix of two tables")
    found: list[Records] = []
    problems: list[str] = []
    for each in runs:
        try:
            found.append(_load(place(each, out), adapt))
        except UserError as mistake:
            problems += mistake.problems
    names = [name for one in found for name in one.runs]
    problems += [f"RUN holds a run named {name!r}; allowed: letters, digits, '.', '_' and '-', since files are named so"
                 for name in dict.fromkeys(names) if not RUN_NAME.fullmatch(name)]  # fmt: skip
    problems += [f"RUN {name!r} is given more than once; allowed: runs of different names"
                 for name in sorted({name for name in names if names.count(name) > 1})]  # fmt: skip
    if problems:
        raise UserError(*problems)
    if len(found) == 1:
        return found[0]
    # The schema gave all of them the same columns and types, so nothing is dropped.
    joined = {
        schema.name: pd.concat([getattr(one, schema.name) for one in found], ignore_index=True) for schema in SCHEMAS
    }
    return Records(**joined, studies={name: of for one in found for name, of in one.studies.items()})


def place(run: Path | str, out: Path | str = "results") -> Path:
    """The folder, or the prefix of files, that a user means. Raises `UserError` where there is none."""
    if "://" in str(run):
        run = path_of(str(run))
    run, out = Path(run), Path(out)
    if run.name.endswith("trials.parquet"):  # the table itself
        prefix = run.name.removesuffix("trials.parquet").removesuffix("_")
        run = run.with_name(prefix) if prefix else run.parent
    for found in (run, out / run):
        check_names(found)
        pull(found)
        tables = (_file(found, "trials", whole) for whole in (True, False))
        if any(map(os.path.exists, tables)) or os.path.lexists(found / "study.json"):
            return found
    raise UserError(
        f"RUN is {str(run)!r}; allowed: a run's folder or name under {out} (see `tune_kd list`), a folder with "
        "trials.parquet, or PREFIX where PREFIX_trials.parquet is a file"
    )


def without_advice(problem: str) -> str:
    """What is wrong with a run's table, for those who know better what to do about it."""
    return problem.partition(f"; {RESUME}")[0]


def _file(place: Path, table: str, whole: bool) -> Path:
    """A table's file: in a folder that is a `whole` run, or beside others with a common prefix."""
    return place / f"{table}.parquet" if whole else place.parent / f"{place.name}_{table}.parquet"


def _load(place: Path, adapt: Adapter | None) -> Records:
    ours = os.path.lexists(place / "study.json")  # also where that is no file: they are not somebody else's
    whole = ours or os.path.exists(place / "trials.parquet")
    digested = ours and _digested(place / "study.json")
    tables: dict[str, pd.DataFrame] = {}
    for schema in reversed(SCHEMAS):
        path = _file(place, schema.name, whole)
        again = f"{RESUME} {quote(str(place))}` makes the tables again from the ledger" if ours else "restore the file"
        if not os.path.exists(path):
            if ours or schema is TRIALS:
                raise UserError(f"{path} is missing; {again}")
            tables[schema.name] = pd.DataFrame({name: [] for name in schema.columns})
            continue
        try:
            tables[schema.name] = parquet.table(_whole(path, digested))
        except CorruptFile as error:
            raise UserError(f"{error}; {again}") from error
        except (OSError, ValueError, TypeError, NotImplementedError) as error:  # of which pyarrow's own are kinds
            raise UserError(f"{path} cannot be read ({error}); {again}") from error
    if not ours:
        try:
            name = re.sub(r"[^A-Za-z0-9._-]", "-", place.resolve().name).lstrip("._-")[:64] or "tables"
            tables = (adapt or Adapter()).apply(name, tables)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{place}: its columns cannot be adapted ({error})") from error
    typed, problems = {}, []
    for schema in SCHEMAS:
        typed[schema.name], found = check(schema, tables[schema.name], lenient=not ours)
        problems += [f"{_file(place, schema.name, whole)}: {problem}" for problem in found]
    if not problems:
        strays = _strays(typed["trials"], typed["epochs"])
        problems = [f"{_file(place, 'epochs', whole)}: {problem}" for problem in strays]
    if not len(typed["trials"]):
        problems.append(f"{_file(place, 'trials', whole)} has no rows; expected a row a trial")
    if problems:
        raise UserError(*problems)
    studies = {}
    if ours:
        study = _study(place / "study.json", typed["trials"])
        studies[study["run"]] = study
    return Records(**typed, studies=studies)


def _whole(path: Path, digested: bool) -> bytes:
    """A table's bytes. Raises `CorruptFile` where those of a run are not what was written: the checksums inside a
    Parquet file do not cover its footer."""
    for _ in range(READS):  # another table may come while the digests are read
        data = read(path, MOST_TABLE_BYTES)
        if not digested or hashlib.sha256(data).hexdigest() in (digests(path.parent) or {}).get(path.name, []):
            return data
    if digests(path.parent) is None:
        raise CorruptFile(f"{path.parent / DIGESTS}, which has the tables' digests, is missing or damaged")
    raise CorruptFile(f"{path} was altered since it was written: its digest is not on record")


def _digested(study: Path) -> bool:
    """Whether the run of a `study.json` has digests of its tables, as all have since they were introduced."""
    try:
        return int(unsealed(read(study, MOST_RECORD_BYTES), study).get("layout", 1)) >= LAYOUT
    except (CorruptFile, OSError, OverflowError, TypeError, ValueError):
        return True


def _study(path: Path, trials: pd.DataFrame) -> dict[str, Any]:
    """What `study.json` says. Raises `UserError` where it is none, was changed, or is not of these trials."""
    study = record.load(path)
    problems = []
    other = trials.loc[trials["run"] != study["run"], "run"]
    if len(other):
        problems.append(f"{path}: {_told('run', other, len(trials), repr(study['run']))}")
    declared = study.get("extended") or study
    names = [each["name"] for each in (*declared["arms"], *declared.get("searches", ()))]
    strange = trials.loc[(trials["role"] == "student") & ~trials["arm"].isin(names), "arm"]
    if len(strange):
        problems.append(f"{path}: {_told('arm', strange, len(trials), 'one of the arms of the study')}")
    if problems:
        raise UserError(*problems)
    return cast(dict[str, Any], _visible(study))


def _visible(value: Any) -> Any:
    """A value of JSON's without control characters: whoever wrote it could have them obeyed by a terminal."""
    if isinstance(value, dict):
        return {visible(name): _visible(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def check(schema: Schema, table: pd.DataFrame, *, lenient: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """The table in the schema's columns and types, and a sentence for each rule that it breaks.

    Columns that may be missing (of `lenient` tables all that may be null) come as nulls. The table is of use only
    where there is no sentence.
    """
    missing = [name for name in schema.columns if name not in table.columns]
    never_null = (*schema.key, *schema.needed)
    if not table.columns.is_unique:
        return table, [
            f"has columns of the same name: {', '.join(map(str, table.columns[table.columns.duplicated()]))}"
        ]
    refused = [name for name in missing if name not in schema.optional and (not lenient or name in never_null)]
    if refused:
        return table, [f"lacks the columns {', '.join(refused)}; has {', '.join(map(str, table.columns))}"]
    problems: list[str] = []
    typed: dict[str, pd.Series[Any]] = {}
    for name, kind in schema.columns.items():
        column = table[name] if name in table.columns else None
        problem = None if column is None else _type_problem(name, column, kind)
        if problem is not None:
            problems.append(problem)
        elif column is None or column.isna().all():
            typed[name] = pd.Series([None] * len(table), index=table.index, dtype=PANDAS[kind])
        else:
            typed[name] = column.astype(PANDAS[kind])  # type: ignore[call-overload]
    if problems:
        return table, problems
    checked = pd.DataFrame(typed)
    return checked, list(_broken(schema, checked))


def _type_problem(name: str, column: "pd.Series[Any]", kind: type) -> str | None:
    there = column.dropna()
    if kind is str:
        fits = pd.api.types.is_string_dtype(there) or not len(there)
        return None if fits else f"{name} is {column.dtype}, such as {_plain(there.iloc[0])!r}; expected text"
    if not len(there):
        return None
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return f"{name} is {column.dtype}, such as {_plain(there.iloc[0])!r}; expected {PANDAS[kind].lower()}"
    if pd.api.types.is_integer_dtype(column):  # as float64, numbers from 2**53 on would become others
        wrong = (there >= 2**63).to_numpy(dtype="bool")
    else:
        values = there.to_numpy(dtype="float64")
        wrong = ~np.isfinite(values) | (((values % 1 != 0) | (np.abs(values) >= 2**63)) if kind is int else False)
    if wrong.any():
        return _told(name, there[wrong], len(column), "whole numbers" if kind is int else "finite numbers")
    return None


def _told(name: str, wrong: "pd.Series[Any]", total: int, expected: str, count: int | None = None) -> str:
    """A sentence with the number of rows that break a rule (of `wrong`, by default), and some of them."""
    examples = ", ".join(f"{_plain(value)!r} in row {row}" for row, value in wrong.head(EXAMPLES).items())
    count = len(wrong) if count is None else count
    return f"{name}: {count:,} of {total:,} rows break a rule; got {examples}; expected {expected}"


def _plain(value: Any) -> Any:
    """A value without numpy's wrapping, as it is shown to people."""
    return value.item() if isinstance(value, np.generic) else value


def _broken(schema: Schema, table: pd.DataFrame) -> Iterator[str]:
    """A sentence for each rule of the schema that some rows break."""
    for name in dict.fromkeys((*schema.key, *schema.needed)):
        if (null := table[name].isna()).any():
            yield _told(name, table.loc[null, name], len(table), "a value in every row")
    for name, levels in schema.levels.items():
        if (wrong := table[name].notna() & ~table[name].isin(levels)).any():
            yield _told(name, table.loc[wrong, name], len(table), f"one of {', '.join(levels)}")
    for name in schema.names:
        strange = [text for text in table[name].dropna().unique() if CONTROL.search(text)]
        if strange:
            wrong = table[name].isin(strange)
            yield _told(name, table.loc[wrong, name], len(table), "text without control characters")
    for name in schema.fractions:
        if (wrong := ~(table[name].between(0, 1) | table[name].isna())).any():
            yield _told(name, table.loc[wrong, name], len(table), "a fraction from 0 to 1")
    for name in schema.only_completed:
        if (wrong := table[name].notna() & (table["status"] != "completed")).any():
            yield _told(name, table.loc[wrong, name], len(table), "null unless status is completed")
    if "epochs_planned" in table:
        short = (table["status"] == "completed") & (table["epochs_run"] < table["epochs_planned"])
        if (short := short.fillna(False)).any():
            expected = "completed only where all planned epochs ran"
            yield _told("epochs_run", table.loc[short, "epochs_run"], len(table), expected)
    if (twice := table.duplicated(list(schema.key))).any():
        keys = table.loc[twice, list(schema.key)].head(EXAMPLES).apply(tuple, axis=1)
        yield _told(", ".join(schema.key), keys, len(table), "each of them once", int(twice.sum()))


def _strays(trials: pd.DataFrame, epochs: pd.DataFrame) -> Iterator[str]:
    """Epochs without a trial, and trials whose epochs do not count up from 1."""
    if epochs.empty:
        return
    key = ["run", "trial_id"]
    known = pd.MultiIndex.from_frame(trials[key])
    spans = epochs.groupby(key, sort=False)["epoch"].agg(["min", "max", "size"])
    unknown = ~spans.index.isin(known)
    if unknown.any():
        yield _told("trial_id", pd.Series(list(spans.index[unknown])), len(spans), "a trial of the trials table")
    gaps = (spans["min"] != 1) | (spans["max"] != spans["size"])
    if gaps.any():
        first = spans[gaps].head(EXAMPLES).reset_index().to_dict("records")
        examples = ", ".join(f"{row['trial_id']} has {row['size']} from {row['min']} to {row['max']}" for row in first)
        yield f"epoch: {int(gaps.sum()):,} of {len(spans):,} trials do not count up from 1; {examples}"


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as the ledger gives them: plain values, and None for null."""
    plain = table.astype(object).where(table.notna(), None)
    return [dict(zip(plain.columns, values, strict=True)) for values in plain.itertuples(index=False, name=None)]


def typed(rows: Sequence[Mapping[str, Any]], names: str) -> pd.DataFrame:
    """Rows as a table of these columns: text, counts, and measures, also where it is empty or all null."""
    table = pd.DataFrame(rows, columns=names.split())
    types = {name: "string" if name in TEXT else "Int64" if name in COUNTS else "float64" for name in table.columns}
    return table.astype(types)
