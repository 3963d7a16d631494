"""Atomic writes, retries after transient errors, and crash points, at which a test can kill the process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tune_kd.system import crash_points, files
from tune_kd.system.errors import CorruptFile
from tune_kd.system.files import MOST_DEPTH, links, parsed, patiently, publish, sealed, unsealed, write_at


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


class Disk:
    """Fails a given number of times, then succeeds."""

    def __init__(self, refusals: int, error: type[OSError] = OSError) -> None:
        self.refusals, self.error, self.asked = refusals, error, 0

    def __call__(self) -> str:
        self.asked += 1
        if self.asked <= self.refusals:
            raise self.error(5, "Input/output error")
        return "done"


def test_transient_errors_are_retried_and_persistent_ones_raise() -> None:
    assert patiently(Disk(2)) == "done"
    lasting = Disk(3)
    with pytest.raises(OSError, match="Input/output"):
        patiently(lasting)
    assert lasting.asked == 3


def test_a_missing_file_is_not_retried() -> None:
    disk = Disk(1, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        patiently(disk)
    assert disk.asked == 1


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_unchanged(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    publish(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            publish(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_short_writes_continue_until_all_bytes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: whole(file, bytes(data)[:3], offset))
    write_at(tmp_path / "file", 4, b"0123456789")
    assert (tmp_path / "file").read_bytes() == bytes(4) + b"0123456789"


def test_publish_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        sync(file)

    def replaced(one: Path, other: Path) -> None:
        order.append("rename")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    publish(tmp_path / "file", b"data")
    assert order == ["file", "rename", "folder"]


def test_sealed_records_round_trip_and_altered_ones_raise(tmp_path: Path) -> None:
    record = {"a": [1, 2.5, None], "b": {"c": "d"}}
    assert unsealed(sealed(record), tmp_path) == record
    for data in (sealed(record).replace(b"2.5", b"2.6"), sealed(record)[:-1], b"[]", b"\xff"):
        with pytest.raises(CorruptFile):
            unsealed(data, tmp_path)


def test_a_crash_point_kills_the_process_at_the_requested_pass() -> None:
    loop = "for n in range(5):\n    print(n, flush=True)\n    point('trial.started')"
    code = f"from tune_kd.system.crash_points import point\n{loop}"

    def passes(crash: str | None) -> tuple[int, int]:
        environment = {name: value for name, value in os.environ.items() if name != "TUNE_KD_CRASH"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env=environment | ({} if crash is None else {"TUNE_KD_CRASH": crash}))  # fmt: skip
        return done.returncode, len(done.stdout.split())

    assert passes(None) == (0, 5)
    assert passes("trial.started") == (-9, 1)
    assert passes("trial.started:3") == (-9, 3)
    assert passes("trial.ended") == (0, 5)
    assert passes("nowhere")[0] == passes("trial.ended:x")[0] == 2


def test_every_crash_point_occurs_once_in_the_source() -> None:
    source = "".join(path.read_text() for path in Path(crash_points.__file__).parents[1].rglob("*.py"))
    assert all(source.count(f'point("{name}")') == 1 for name in crash_points.POINTS)


@given(st.integers(0, 2 * MOST_DEPTH), st.lists(st.booleans(), min_size=2 * MOST_DEPTH, max_size=2 * MOST_DEPTH))
def test_json_is_parsed_up_to_the_maximum_depth(depth: int, lists: list[bool]) -> None:
    value: Any = 1
    for is_list in lists[:depth]:
        value = [value, 2] if is_list else {"a": value, "b": 2}
    if depth < MOST_DEPTH:
        assert parsed(json.dumps(value)) == value
    else:
        with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} levels deep"):
            parsed(json.dumps(value))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 5000 + "]" * 5000, b"\xff", "", "{"])
def test_invalid_json_raises_value_error_or_corrupt_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parsed(text)
    with pytest.raises(CorruptFile, match="name cannot be read"):
        unsealed(text if isinstance(text, bytes) else text.encode(), Path("name"))


def test_links_are_found_at_any_depth_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "a" / "file").write_text("")
    assert sorted(links(tmp_path)) == [tmp_path / "a" / "b" / "up", tmp_path / "a" / "nowhere"]
    assert list(links(tmp_path / "a" / "b" / "up")) == [tmp_path / "a" / "b" / "up"]
    assert list(links(tmp_path / "missing")) == []
