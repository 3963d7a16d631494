"""What a teacher answered: a table of logits on disk that fills chunk by chunk, each chunk once, whoever asks first.

FOLDER/logits.f32      float32 [rows, K], memory-mapped, so that processes share it without copies
FOLDER/digests.sha256  32 bytes a chunk of rows, zero where nobody has answered yet
FOLDER/locks/          held, one a chunk, by who computes it

A chunk counts once its digest stands beside it, and is held against it the first time that a process reads it. So
neither a kill in the middle of a chunk nor a damaged disk gets into an answer: such a chunk is computed again. Chunks
lie where the table says and not where somebody began to ask, so what is computed again is the same to the bit.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from tune_kd.system.crash_points import point
from tune_kd.system.files import appended, opened, patiently, read, write_at

CHUNK = 4096  # rows that one process answers under one lock: what a kill costs at most
_DIGEST = hashlib.sha256().digest_size


class Answers:
    """The table of one teacher and one list of images. `compute(rows)` gives the logits of a range of its rows."""

    def __init__(self, folder: Path, rows: int, classes: int, compute: Callable[[range], Tensor]) -> None:
        self._folder = folder
        self._rows = rows
        self._compute = compute
        chunks = -(-rows // CHUNK)
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        logits = _file_of_size(folder / "logits.f32", rows * classes * 4)
        digests = _file_of_size(folder / "digests.sha256", chunks * _DIGEST)
        self._logits = np.memmap(logits, dtype="<f4", mode="r", shape=(rows, classes))
        self._digests = np.memmap(digests, dtype=np.uint8, mode="r", shape=(chunks, _DIGEST))
        self._verified: set[int] = set()

    def take(self, rows: Tensor) -> tuple[Tensor, int]:
        """Logits [N, K] on the CPU for rows int64 [N], and how many rows had to be computed for that, here and now.

        Several who ask at the same time share the work: each takes chunks that nobody else is at, and waits for
        those of others at the end.
        """
        wanted = [int(chunk) for chunk in torch.unique(rows // CHUNK)]
        missing = [chunk for chunk in wanted if not self._is_whole(chunk)]
        computed = 0
        for patience in (0.0, -1.0):  # first what is free, then what others are at, should they have died
            left = []
            for chunk in missing:
                try:
                    with FileLock(self._folder / "locks" / str(chunk), timeout=patience):
                        if not self._is_whole(chunk):
                            computed += self._answer(chunk)
                except Timeout:
                    left.append(chunk)
            missing = left
        return torch.from_numpy(self._logits[rows.numpy()]), computed

    def _is_whole(self, chunk: int) -> bool:
        if chunk in self._verified:
            return True
        answered = self._digests[chunk].tobytes()
        if any(answered) and hashlib.sha256(self._bytes(chunk)).digest() == answered:
            self._verified.add(chunk)
        return chunk in self._verified

    def _bytes(self, chunk: int) -> bytes:
        span = self._span(chunk)
        return self._logits[span.start : span.stop].tobytes()

    def _answer(self, chunk: int) -> int:
        """Compute a chunk and publish it. Raises OSError where the disk is full."""
        span = self._span(chunk)
        logits = self._compute(span).numpy().astype("<f4").tobytes()
        # Written, not stored through the map: a full disk is then an error and not a signal that kills.
        write_at(self._folder / "logits.f32", span.start * self._logits.strides[0], logits)
        point("answers.written")
        write_at(self._folder / "digests.sha256", chunk * _DIGEST, hashlib.sha256(logits).digest())
        self._verified.add(chunk)
        return len(span)

    def _span(self, chunk: int) -> range:
        return range(chunk * CHUNK, min(self._rows, (chunk + 1) * CHUNK))


def damaged(folder: Path, classes: int, rows: int) -> list[int]:
    """Chunks of a table that are not what was answered. Whoever reads them computes them again. Raises `UnexpectedFile`
    for a table of more than so many rows."""
    size, found = CHUNK * classes * 4, []
    digests = read(folder / "digests.sha256", _DIGEST * -(-rows // CHUNK))
    count = len(digests) // _DIGEST
    with opened(folder / "logits.f32", count * size) as logits:
        for chunk in range(count):
            answered = digests[chunk * _DIGEST : (chunk + 1) * _DIGEST]
            logits.seek(chunk * size)
            if any(answered) and hashlib.sha256(logits.read(size)).digest() != answered:
                found.append(chunk)
    return found


def _file_of_size(path: Path, size: int) -> Path:
    """A file of this size, with zeros where nothing was written. Who comes second finds it as the first left it."""

    def grow() -> Path:
        with appended(path) as file:
            file.truncate(size)
        return path

    return patiently(grow)
