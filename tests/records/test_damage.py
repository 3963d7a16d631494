"""Every damaged file of a run is detected. For more cases, run `python tests/faults/damage.py`."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pyarrow.parquet as pq
import pytest

from faults import damage
from faults.damage import VARIANTS, Scratch, judge, make
from tune_kd.execute import verify
from tune_kd.records import ledger, parquet, reader as tables, rebuild
from tune_kd.records.schema import LEDGER
from tune_kd.system import files
from tune_kd.training import checkpoints, logit_cache, teachers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scratch]:
    """A run that finished, and a run whose driver was killed."""
    folder = tmp_path_factory.mktemp("damage")
    for variant in VARIANTS:
        make(folder / variant, variant)
    return {variant: Scratch(folder / variant) for variant in VARIANTS}


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_damage_to_any_file_is_detected_or_harmless(whole: dict[str, Scratch], variant: str) -> None:
    scratch = whole[variant]
    scores = [judge(scratch, target, truncations=2, flips=3) for target in scratch.targets()]
    assert not any(score.broken for score in scores), [example for score in scores for example in score.examples]
    assert sum(score.counts["seen"] for score in scores) > 50


def checksums_of_pages_off(patch: pytest.MonkeyPatch) -> None:
    def without(data: Any, page_checksum_verification: bool = True, **options: Any) -> pq.ParquetFile:
        return pq.ParquetFile(data, **options)

    patch.setattr(parquet, "pq", SimpleNamespace(ParquetFile=without))
    patch.setattr(tables, "_whole", lambda path, digested: path.read_bytes())


def sums_of_rows_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger, "_crc", lambda row: ANY)
    patch.setattr(rebuild, "wrong_with", lambda folder: None)


def count_of_commits_off(patch: pytest.MonkeyPatch) -> None:
    for room in (ledger, rebuild, verify):
        patch.setattr(room, "commits", lambda folder: 0)


def seals_off(patch: pytest.MonkeyPatch) -> None:
    class AnyText(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    patch.setattr(files, "_seal", lambda record: AnyText())


def digests_of_checkpoints_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoints, "_is_whole", lambda path: True)


def digests_of_teachers_off(patch: pytest.MonkeyPatch) -> None:
    any_digest = SimpleNamespace(sha256=lambda data: SimpleNamespace(hexdigest=lambda: ANY))
    patch.setattr(teachers, "hashlib", any_digest)
    patch.setattr(teachers, "_digest", lambda path: ANY)


def digests_of_answers_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logit_cache.LogitCache, "_is_whole", lambda self, chunk: True)
    patch.setattr(logit_cache, "damaged", lambda folder, classes: [])


@pytest.mark.long
@pytest.mark.parametrize(
    ("off", "variant", "target", "reader"),
    [
        (checksums_of_pages_off, "finished", "trials.parquet", damage.read_tables),
        (sums_of_rows_off, "finished", LEDGER, damage.read_resumed),
        (count_of_commits_off, "cut", f"{LEDGER}-wal", damage.read_resumed),
        (seals_off, "finished", "study.json", damage.read_tables),
        (digests_of_checkpoints_off, "cut", "checkpoint, newest", damage.read_states),
        (digests_of_teachers_off, "finished", "teacher's weights", damage.read_teacher),
        (digests_of_answers_off, "finished", "answers", damage.read_answers),
    ],
)
def test_each_detector_is_needed(
    whole: dict[str, Scratch],
    monkeypatch: pytest.MonkeyPatch,
    off: Callable[[pytest.MonkeyPatch], None],
    variant: str,
    target: str,
    reader: Callable[[Scratch], damage.Reading],
) -> None:
    """Without the detector, damage to its file goes unnoticed, and the score shows it."""
    off(monkeypatch)
    score = judge(whole[variant], target, truncations=1, flips=128, used=[reader], until="silent")
    assert score.counts["silent"] > 0


def test_a_sqlite_error_message_that_cannot_be_decoded_counts_as_damage(whole: dict[str, Scratch]) -> None:
    """SQLite's error message quotes the damaged bytes, which Python then fails to decode."""
    scratch = whole["finished"]
    path = scratch.folder / LEDGER
    content = scratch.bytes_of(path)
    try:
        for place in (at.start() for at in re.finditer(b"CREATE TABLE", content)):
            path.write_bytes(content[: place + 20] + b"\x9f" + content[place + 21 :])
            assert rebuild.wrong_with(scratch.folder) is not None
    finally:
        scratch.restore()
