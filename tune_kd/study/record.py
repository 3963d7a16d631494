"""Load and validate a run's `study.json`, which is untrusted: types, bounds, hashes and references."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from tune_kd.study.contrasts import Kind
from tune_kd.study.discover import from_json
from tune_kd.study.plan import Search
from tune_kd.study.rules import MOST_TRIALS, MOST_WEIGHTS
from tune_kd.study.spec import Family, Study
from tune_kd.study.trial import ArmRole, digest
from tune_kd.study.validate import check
from tune_kd.system.errors import CorruptFile, UserError, raise_problems
from tune_kd.system.files import MOST_RECORD_BYTES, read, unsealed

T = TypeVar("T")

Name = Annotated[str, Field(max_length=1000)]
Some = Annotated[list[T], Field(max_length=MOST_TRIALS)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", use_enum_values=True)


class _Arm(_Part):
    name: Name
    role: ArmRole


class _Contrast(_Part):
    name: Annotated[str, Field(max_length=10_000)]
    kind: Kind
    weights: Annotated[list[tuple[Name, FiniteFloat]], Field(min_length=1, max_length=100)]
    family: Family | None = None  # None: declared by a version before 0.7
    factor: Name | None = None


class _Data(_Part):
    name: Name | None = None
    digest: Name | None = None
    dir: str | None = None


class _Extended(_Part):
    study: dict[str, Any]
    study_sha256: Name
    arms: Some[_Arm]
    searches: Some[Search] = []


class _Packing(_Part):
    light: Annotated[FiniteFloat, Field(gt=0, le=1)]
    heavy: Annotated[FiniteFloat, Field(gt=0, le=1)]
    mps: bool
    why: Annotated[str, Field(max_length=10_000)]  # it names arms


class _Settings(_Part):
    gpus_per_trial: Annotated[FiniteFloat, Field(ge=0)] | Literal["auto"] | None = None
    cpus_per_trial: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    keep_checkpoints: bool = False
    mps: Annotated[str, Field(pattern="^(auto|on|off)$")] = "auto"
    packing: _Packing | None = None  # chosen by a probe
    track: Annotated[list[Name], Field(max_length=100)] | None = None


class _Source(_Part):
    file: Annotated[str, Field(max_length=10_000, pattern=r"^/.*\.py$")]
    scale: Name
    data: Name | None = None
    settings: Annotated[list[str], Field(max_length=1000)] = []
    digests: Annotated[dict[str, Name], Field(max_length=100)] | None = None


class _Code(_Part):
    folder: Annotated[str, Field(max_length=10_000, pattern="^/")]
    packages: Annotated[dict[Name, Name], Field(max_length=1000)] = {}


class _Record(_Part):
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    study: dict[str, Any]
    contrasts: Some[_Contrast]
    arms: Some[_Arm]
    data: _Data
    layout: int = 1
    study_sha256: Name | None = None
    contrasts_sha256: Name | None = None
    look: Annotated[int, Field(ge=0)] = 0
    extended: _Extended | None = None
    searches: Some[Search] = []
    trials: Some[Name] = []
    settings: _Settings = _Settings()
    source: _Source | None = None
    code: _Code | None = None
    created: Name | None = None
    git_commit: Name | None = None
    versions: dict[Name, Name] | None = None
    machine: dict[Name, str | int | None] | None = None


def load(path: Path) -> dict[str, Any]:
    """The record in a file. Raises `UserError` if a field is missing, was changed after the run began, or has a value
    that no run writes."""
    try:
        record = unsealed(read(path, MOST_RECORD_BYTES), path)
    except (CorruptFile, OSError) as error:
        raise UserError(f"{error}; restore the file") from error
    study = record.get("study")
    lacking = [name for name in ("run", "study", "contrasts", "arms", "data") if name not in record]
    if isinstance(study, dict):
        inner = ("name", "question", "scale", "confirm", "teacher_seeds", "deviation")
        lacking += [f"study.{name}" for name in inner if name not in study]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}; restore the file")
    try:
        found = _Record.model_validate(record).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(
            *(f"{path}: {'.'.join(map(str, each['loc']))} is {_shown(each['input'])}, which is not a valid value "
              f"({each['msg']}); restore the file" for each in error.errors()[:5])
        ) from error  # fmt: skip
    problems = [
        f"{path}: its hash does not match the {name}, so the file was changed after the run began; restore the file"
        for name in ("study", "contrasts")
        if record.get(f"{name}_sha256") not in (None, _digest(record[name]))
    ]
    extended = found.get("extended")
    if extended and extended["study_sha256"] != _digest(record["extended"]["study"]):
        problems.append(f"{path}: its hash does not match the extended study; restore the file")
    raise_problems(problems)
    for part in [found, *([extended] if extended else [])]:
        declared = _study(path, part["study"])
        problems += _unfit(path, part, declared, found)
    raise_problems(problems)
    return found


def _study(path: Path, value: dict[str, Any]) -> Study:
    """The study in a record. Raises `UserError`."""
    try:
        return check(from_json(value))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: study.{where} is {_shown(first['input'])} ({first['msg']}); restore the file"
        ) from error
    except UserError as mistake:
        raise UserError(*(f"{path}: {problem}" for problem in mistake.problems[:5])) from mistake


def _unfit(path: Path, part: dict[str, Any], study: Study, record: dict[str, Any]) -> list[str]:
    """Messages for looks, ranges and arms that the record refers to but the study does not have."""
    problems = []
    last = len(study.confirm.looks or (0,)) - 1
    if (look := record.get("look", 0)) > last:
        problems.append(f"{path}: look is {look}; allowed: 0 to {last}, the looks that the study declares")
    ranges = [asdict(each) for each in study.tuning.ranges] if study.tuning else []
    if any(each not in ranges for search in part.get("searches", ()) for each in search["ranges"]):
        problems.append(f"{path}: searches has a range that the study does not declare; restore the file")
    if (weights := len(part["arms"]) * len(part.get("contrasts", ()))) > MOST_WEIGHTS:
        problems.append(f"{path}: its contrasts and arms need {weights:,} weights; allowed: at most {MOST_WEIGHTS:,}")
    arms = {arm["name"] for arm in part["arms"]}
    if strange := sorted({arm for each in part.get("contrasts", ()) for arm, _ in each["weights"]} - arms):
        problems.append(f"{path}: contrasts refers to {_shown(strange[0])}, which is not an arm of the study")
    return problems


def _digest(value: Any) -> str | None:
    try:
        return digest(value)
    except ValueError:  # a number that is not finite, which no study has
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
