"""Load Parquet tables of one or several runs, or of other tools, and validate them against the schema."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, cast

import numpy as np
import pandas as pd

from tune_kd.records import parquet
from tune_kd.records.importer import Adapter
from tune_kd.records.ledger import digests
from tune_kd.records.schema import (
    DIGESTS,
    LAYOUT,
    MOST_FURTHER,
    MOST_TABLE_BYTES,
    PANDAS,
    RUN_NAME,
    SCHEMAS,
    TRIALS,
    R,
    Schema,
    as_further,
)
from tune_kd.records.sync import pull
from tune_kd.study import record
from tune_kd.study.trial import FURTHER, Role, Status
from tune_kd.system.characters import CONTROL, visible
from tune_kd.system.errors import CorruptFile, UserError, raise_problems
from tune_kd.system.files import MOST_RECORD_BYTES, check_names, read, unsealed
from tune_kd.system.object_store import path_of

EXAMPLES = 3  # example rows in an error message
RESUME = "`tune_kd resume"  # start of the advice in errors about a run's tables
READS = 5  # attempts to read a table whose digest matches


@dataclass(frozen=True)
class Records:
    """The tables of runs as DataFrames, and each run's `study.json`.

    Text is `string`, counts are `Int64`, measures `float64`. A value that does not apply is null. Treat records as
    immutable, since results that are computed from them are cached. For other records, use `dataclasses.replace`.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    decisions: pd.DataFrame
    studies: dict[str, dict[str, Any]]  # by run; empty for tables of other tools

    def kept(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return a copy of a table that is computed once and cached by name: a report needs some a hundred times."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name].copy()

    @cached_property
    def _kept(self) -> dict[str, pd.DataFrame]:
        return {}

    @cached_property
    def runs(self) -> list[str]:
        """The names of the runs, in the order of loading."""
        return list(dict.fromkeys(self.trials["run"]))

    def of(self, run: str) -> "Records":
        """Return the records of one run."""
        if self.runs == [run] and {*self.studies} <= {run}:
            return self
        trials, epochs, decisions = (each[each["run"] == run] for each in (self.trials, self.epochs, self.decisions))
        return Records(trials, epochs, decisions, {name: of for name, of in self.studies.items() if name == run})

    @property
    def study(self) -> dict[str, Any]:
        """The run's `study.json`. Raises `ValueError` if there is not exactly one."""
        if len(self.studies) != 1:
            raise ValueError(f"these are the records of {len(self.studies)} studies; select one with `of(run)`")
        return next(iter(self.studies.values()))


def load(*runs: Path | str, out: Path | str = "results", adapt: Adapter | None = None) -> Records:
    """Load runs: folders, names under `out`, or the common prefix of the files `PREFIX_trials.parquet` and
    `PREFIX_epochs.parquet`. `adapt` maps the columns of other tools' tables.

    Raises `UserError` for tables that are missing or cannot be read, and for rows that break the schema. The message
    has their number and examples.
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
    problems += [f"RUN holds a run named {name!r}; allowed: letters, digits, '.', '_' and '-', as in file names"
                 for name in dict.fromkeys(names) if not RUN_NAME.fullmatch(name)]  # fmt: skip
    problems += [f"RUN {name!r} is given more than once; allowed: runs of different names"
                 for name in sorted({name for name in names if names.count(name) > 1})]  # fmt: skip
    raise_problems(problems)
    if len(found) == 1:
        return found[0]
    joined = {each.name: pd.concat([getattr(one, each.name) for one in found], ignore_index=True) for each in SCHEMAS}
    return Records(**joined, studies={name: of for one in found for name, of in one.studies.items()})


def place(run: Path | str, out: Path | str = "results") -> Path:
    """Return the folder, or the prefix of files, that a user means. Raises `UserError` if there is none."""
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
    """Return the text of a problem with a run's table without its advice, for callers that give other advice."""
    return problem.partition(f"; {RESUME}")[0]


def _file(place: Path, table: str, whole: bool) -> Path:
    """Return a table's file: inside the folder `place` if `whole`, otherwise a file that has `place` as its prefix."""
    return place / f"{table}.parquet" if whole else place.parent / f"{place.name}_{table}.parquet"


def _load(place: Path, adapt: Adapter | None) -> Records:
    ours = os.path.lexists(place / "study.json")  # a run's folder, even if this is a broken link
    whole = ours or os.path.exists(place / "trials.parquet")
    tables = _read(place, ours, whole)
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
        problems.append(f"{_file(place, 'trials', whole)} has no rows; expected one row per trial")
    raise_problems(problems)
    study = _study(place / "study.json", typed["trials"]) if ours else None
    return Records(**typed, studies={study["run"]: study} if study else {})


def _read(place: Path, ours: bool, whole: bool) -> dict[str, pd.DataFrame]:
    """Return the tables by name. For other tools, all tables but the trials may be missing."""
    digested = ours and _digested(place / "study.json")
    again = f"{RESUME} {quote(str(place))}` rewrites the tables from the ledger" if ours else "restore the file"
    tables: dict[str, pd.DataFrame] = {}
    for schema in reversed(SCHEMAS):
        path = _file(place, schema.name, whole)
        if not os.path.exists(path):
            if ours or schema is TRIALS:
                raise UserError(f"{path} is missing; {again}")
            tables[schema.name] = pd.DataFrame({name: [] for name in schema.columns})
            continue
        try:
            tables[schema.name] = parquet.table(_whole(path, digested))
        except CorruptFile as error:
            raise UserError(f"{error}; {again}") from error
        except (OSError, ValueError, TypeError, NotImplementedError) as error:  # pyarrow's errors derive from these
            raise UserError(f"{path} cannot be read ({error}); {again}") from error
    return tables


def _whole(path: Path, digested: bool) -> bytes:
    """Return a table's bytes. Raises `CorruptFile` if a run's table does not match its digest.

    The checksums inside a Parquet file do not cover its footer.
    """
    for _ in range(READS):  # a driver may replace the table before the digests are read
        data = read(path, MOST_TABLE_BYTES)
        if not digested or hashlib.sha256(data).hexdigest() in (digests(path.parent) or {}).get(path.name, []):
            return data
    if digests(path.parent) is None:
        raise CorruptFile(f"{path.parent / DIGESTS}, which holds the tables' digests, is missing or damaged")
    raise CorruptFile(f"{path} was changed after it was written: its digest is not on record")


def _digested(study: Path) -> bool:
    """Return whether the run of a `study.json` has digests of its tables; all runs have them from `LAYOUT` on."""
    try:
        return int(unsealed(read(study, MOST_RECORD_BYTES), study).get("layout", 1)) >= LAYOUT
    except (CorruptFile, OSError, OverflowError, TypeError, ValueError):
        return True


def _study(path: Path, trials: pd.DataFrame) -> dict[str, Any]:
    """Load `study.json`. Raises `UserError` if it is damaged, was changed, or does not match these trials."""
    study = record.load(path)
    problems = []
    other = trials.loc[trials["run"] != study["run"], "run"]
    if len(other):
        problems.append(f"{path}: {_told('run', other, len(trials), repr(study['run']))}")
    declared = study.get("extended") or study
    names = [each["name"] for each in (*declared["arms"], *declared.get("searches", ()))]
    strange = trials.loc[(trials["role"] == Role.STUDENT) & ~trials["arm"].isin(names), "arm"]
    if len(strange):
        problems.append(f"{path}: {_told('arm', strange, len(trials), 'one of the arms of the study')}")
    raise_problems(problems)
    return cast(dict[str, Any], _visible(study))


def _visible(value: Any) -> Any:
    """Return a JSON value with its control characters escaped, since a terminal would interpret them."""
    if isinstance(value, dict):
        return {visible(name): _visible(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def check(schema: Schema[Any], table: pd.DataFrame, *, lenient: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Return the table with the schema's columns and types, and a sentence for each broken rule.

    Missing columns become null if they are optional; in a `lenient` table, all columns that may be null can be missing.
    Use the table only if no rule is broken.
    """
    if not table.columns.is_unique:
        twice = ", ".join(map(str, table.columns[table.columns.duplicated()]))
        return table, [f"has more than one column with the name: {twice}"]
    required = (*schema.key, *schema.needed) if lenient else {*schema.columns} - {*schema.optional}
    if refused := [name for name in schema.columns if name in required and name not in table]:
        return table, [f"lacks the columns {', '.join(refused)}; has {', '.join(map(str, table.columns))}"]
    columns = schema.in_parquet
    if not lenient and FURTHER in schema.columns:  # each further setting is a column
        strange = [str(name) for name in table if not str(name).isidentifier()]
        if strange or len(table.columns) > len(schema.columns) + MOST_FURTHER:
            return table, [f"has the columns {', '.join(map(repr, [*strange, *table.columns][:EXAMPLES]))} and others; "
                           f"expected names of settings, {MOST_FURTHER} at most"]  # fmt: skip
        columns |= {str(name): str if pd.api.types.is_string_dtype(table[name].dropna()) else float
                    for name in table if name not in schema.columns}  # fmt: skip
    there = {name: kind for name, kind in columns.items() if name in table}
    if problems := [problem for name, kind in there.items() if (problem := _type_problem(name, table[name], kind))]:
        return table, problems
    nulls = pd.Series([None] * len(table), index=table.index)
    typed = {name: table[name] if name in there and table[name].notna().any() else nulls for name in columns}
    checked = pd.DataFrame(typed).astype({name: PANDAS[kind] for name, kind in columns.items()})
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
    if pd.api.types.is_integer_dtype(column):  # float64 rounds numbers from 2**53 on
        wrong = (there >= 2**63).to_numpy(dtype="bool")
    else:
        values = there.to_numpy(dtype="float64")
        wrong = ~np.isfinite(values) | (((values % 1 != 0) | (np.abs(values) >= 2**63)) if kind is int else False)
    if wrong.any():
        return _told(name, there[wrong], len(column), "whole numbers" if kind is int else "finite numbers")
    return None


def _told(name: str, wrong: "pd.Series[Any]", total: int, expected: str, count: int | None = None) -> str:
    """Return a sentence with examples and the number of rows that break a rule (default: the length of `wrong`)."""
    examples = ", ".join(f"{_plain(value)!r} in row {row}" for row, value in wrong.head(EXAMPLES).items())
    count = len(wrong) if count is None else count
    return f"{name}: {count:,} of {total:,} rows break a rule; got {examples}; expected {expected}"


def _plain(value: Any) -> Any:
    """Return a value as a plain Python object, for messages."""
    return value.item() if isinstance(value, np.generic) else value


def _broken(schema: Schema[Any], table: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence for each rule of the schema that some rows break."""
    for name in dict.fromkeys((*schema.key, *schema.needed)):
        if (null := table[name].isna()).any():
            yield _told(name, table.loc[null, name], len(table), "a value in every row")
    for name, levels in schema.levels.items():
        if (wrong := table[name].notna() & ~table[name].isin(levels)).any():
            yield _told(name, table.loc[wrong, name], len(table), f"one of {', '.join(levels)}")
    for name in (str(name) for name in table if name not in schema.free and table[name].dtype == PANDAS[str]):
        strange = [text for text in table[name].dropna().unique() if CONTROL.search(text)]
        if strange:
            wrong = table[name].isin(strange)
            yield _told(name, table.loc[wrong, name], len(table), "text without control characters")
    for name in schema.fractions:
        if (wrong := ~(table[name].between(0, 1) | table[name].isna())).any():
            yield _told(name, table.loc[wrong, name], len(table), "a fraction from 0 to 1")
    for name in schema.only_completed:
        if (wrong := table[name].notna() & (table["status"] != Status.COMPLETED)).any():
            yield _told(name, table.loc[wrong, name], len(table), "null unless status is completed")
    if "epochs_planned" in table:
        short = (table["status"] == Status.COMPLETED) & (table["epochs_run"] < table["epochs_planned"])
        if (short := short.fillna(False)).any():
            expected = "completed only if all planned epochs ran"
            yield _told("epochs_run", table.loc[short, "epochs_run"], len(table), expected)
    if (twice := table.duplicated(list(schema.key))).any():
        keys = table.loc[twice, list(schema.key)].head(EXAMPLES).apply(tuple, axis=1)
        yield _told(", ".join(schema.key), keys, len(table), "unique values", int(twice.sum()))


def _strays(trials: pd.DataFrame, epochs: pd.DataFrame) -> Iterator[str]:
    """Yield sentences about epochs without a trial, and about trials whose epochs do not count up from 1."""
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


def rows(schema: Schema[R], table: pd.DataFrame) -> list[R]:
    """Return a table's rows in the ledger's form: plain values, and None for null."""
    plain = table.astype(object).where(table.notna(), None)
    if FURTHER in schema.columns:
        more = plain[[name for name in plain if name not in schema.columns]].to_dict("records")
        texts = [as_further({str(name): each for name, each in row.items() if each is not None}) for row in more]
        plain = plain.assign(**{FURTHER: pd.Series(texts, index=plain.index, dtype=object)})
    return cast(list[R], plain[list(schema.columns)].to_dict("records"))
