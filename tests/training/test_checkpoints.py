"""Checkpoints survive kills, and damage is detected."""

from pathlib import Path

import pytest
import torch

from tune_kd.system import files
from tune_kd.system.errors import CorruptFile
from tune_kd.training.checkpoints import Checkpoints, pack, unpack


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 2), value), "count": torch.tensor(7)}


def loaded(checkpoints: Checkpoints) -> float:
    saved = checkpoints.load()
    assert saved is not None
    return float(saved[0]["weight"][0, 0])


def test_tensors_and_notes_round_trip() -> None:
    tensors, notes = unpack(pack(state(1.5), {"rows": [{"epoch": 1, "loss": 0.1}]}))
    assert torch.equal(tensors["weight"], state(1.5)["weight"])
    assert tensors["count"].dtype == torch.int64
    assert notes == {"rows": [{"epoch": 1, "loss": 0.1}]}


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 16, (2).to_bytes(8, "little") + b"{}", (9).to_bytes(8, "little") + b"[" * 9,
             pack({}, {})[:-1], pack({"a": torch.zeros(9)}, {})[:-1]]
)  # fmt: skip
def test_malformed_states_are_rejected_as_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptFile, match="it does not contain tensors with notes"):
        unpack(data)


def test_files_with_other_names_are_ignored(tmp_path: Path) -> None:
    data = pack(state(1), {})
    for name in ("000001-.safetensors", f"9-{'0' * 64}.safetensors", f"000009-{'0' * 64}.safetensors.part"):
        (tmp_path / name).write_bytes(data)
    assert Checkpoints(tmp_path).load() is None and list(tmp_path.glob("*.damaged")) == []


def test_the_newest_state_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "trial")
    assert checkpoints.load() is None
    for epoch in (1, 2, 10):
        checkpoints.save(epoch, state(epoch), {})
    assert loaded(checkpoints) == 10
    assert [path.name[:6] for path in sorted((tmp_path / "trial").iterdir())] == ["000002", "000010"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:40] + b"\0" + data[41:], lambda _: b""])
def test_a_damaged_state_is_set_aside_and_the_previous_one_is_loaded(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {})
    checkpoints.save(2, state(2), {})
    newest = max(tmp_path.glob("*.safetensors"))
    newest.write_bytes(damage(newest.read_bytes()))
    assert loaded(checkpoints) == 1
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    assert loaded(checkpoints) == 1


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.publish(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        files.publish(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_remove_deletes_the_folder_of_the_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "trial")
    checkpoints.save(1, state(1), {})
    checkpoints.remove()
    assert not (tmp_path / "trial").exists()
