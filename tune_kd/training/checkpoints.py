"""Checkpoints of unfinished trials: atomic, verified, without pickle.

A checkpoint is one safetensors file, named after the epoch and the digest of its bytes, so that one rename publishes
both. The newest KEPT checkpoints are kept. A file whose digest does not match its name is renamed to `.damaged`, and
the previous checkpoint is used.
"""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UnexpectedFile
from tune_kd.system.files import parsed, read, sha256
from tune_kd.system.object_store import Mirror
from tune_kd.system.overhead import spending

KEPT = 2  # checkpoints
MOST_STATE_BYTES = 2**32  # limit for weights or a checkpoint: twenty times torchvision's largest ResNet
FILE_NAME = re.compile(r"[0-9]{6,12}-[0-9a-f]{64}\.safetensors")
_NOTES = "notes"


def pack(tensors: dict[str, Tensor], notes: dict[str, Any]) -> bytes:
    """Serialize tensors and JSON notes as one safetensors file."""
    plain = {name: tensor.detach().to("cpu", memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return save_tensors(plain, metadata={_NOTES: json.dumps(notes)})


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `pack`. Raises `CorruptFile` for other bytes."""
    try:
        header = parsed(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load_tensors(data), parsed(header["__metadata__"][_NOTES])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"it does not contain tensors with notes ({error})") from error


class Checkpoints:
    """The checkpoints of one trial, in a folder of its own, and in the object store if the folder is mirrored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mirror = Mirror.of(folder)

    def save(self, epoch: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Publish a checkpoint. After a kill at any moment, either it or the previous one is intact."""
        with spending("checkpoint"):
            data = pack(tensors, notes)
            digest = hashlib.sha256(data).hexdigest()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{epoch:06d}-{digest}.safetensors"
            self._mirror.publish(path, data)
            point("checkpoint.published")
            for old in self._published()[KEPT:]:
                old.unlink(missing_ok=True)
                self._mirror.forget(old)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact checkpoint. Returns None if there is none."""
        with spending("checkpoint"):
            self._fetch()
            for path in self._published():
                data = _whole(path)
                if data is not None:
                    return unpack(data)
                path.rename(path.with_suffix(".damaged"))
        return None

    def damaged(self) -> list[Path]:
        """The damaged checkpoints, including those that were already renamed. Changes no file."""
        altered = []
        for path in self._published():
            with suppress(FileNotFoundError):  # removed by a running trial
                if not _is_whole(path):
                    altered.append(path)
        return [*altered, *sorted(self._folder.glob("*.damaged"))]

    def remove(self) -> None:
        """Remove all checkpoints. Errors are ignored: checkpoints of an ended trial do no harm."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._mirror.forget(self._folder)

    def _fetch(self) -> None:
        """Download the checkpoints in the store: the trial may have run on another machine."""
        here = {path.name for path in self._folder.glob("*")}  # including `.damaged`
        for name in filter(FILE_NAME.fullmatch, self._mirror.names(self._folder)):
            if name not in here and Path(name).with_suffix(".damaged").name not in here:
                self._mirror.fetch(self._folder / name, MOST_STATE_BYTES)

    def _published(self) -> list[Path]:
        """Checkpoint files, newest first: by epoch, not by time."""
        return sorted((path for path in self._folder.glob("*") if FILE_NAME.fullmatch(path.name)), reverse=True)


def _whole(path: Path) -> bytes | None:
    """The bytes of a checkpoint. Returns None if it is damaged."""
    return read(path, MOST_STATE_BYTES) if _is_whole(path) else None


def _is_whole(path: Path) -> bool:
    """Whether a file's digest matches its name. Does not load the file into memory."""
    try:
        return sha256(path, MOST_STATE_BYTES) == path.stem.partition("-")[2]
    except UnexpectedFile:
        return False
