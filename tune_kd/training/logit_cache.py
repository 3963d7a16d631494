"""A cache of teacher logits on disk, which processes fill chunk by chunk and share.

FOLDER/logits.f32      float32 [rows, K], memory-mapped, so that processes share it without copies
FOLDER/logits.bf16     in bfloat16 instead, if the teacher computes in bfloat16
FOLDER/digests.sha256  32 bytes per chunk of rows, zero until the chunk is computed
FOLDER/locks/          one lock per chunk, held by the process that computes it

A chunk is valid once its digest is written. A process verifies it at its first read. A chunk that was interrupted by a
kill or damaged on disk is therefore computed again. Chunk borders do not depend on the request, so recomputed logits
are bitwise identical.
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

CHUNK = 4096  # rows computed under one lock: the most work that a kill loses
FILES = {torch.float32: "logits.f32", torch.bfloat16: "logits.bf16"}
_DIGEST = hashlib.sha256().digest_size


class LogitCache:
    """The logits of one teacher for one list of images, stored as `kind`, float32 or bfloat16.

    `compute(rows)` returns the logits [N, K] of a range of rows, in that type, so no precision is lost.
    """

    def __init__(
        self,
        folder: Path,
        rows: int,
        classes: int,
        compute: Callable[[range], Tensor],
        kind: torch.dtype = torch.float32,
    ) -> None:
        self._folder = folder
        self._rows = rows
        self._compute = compute
        self._kind = kind
        chunks = -(-rows // CHUNK)
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        logits = _file_of_size(folder / FILES[kind], rows * classes * kind.itemsize)
        digests = _file_of_size(folder / "digests.sha256", chunks * _DIGEST)
        # As integers of the same bits, since NumPy has no bfloat16.
        self._bits = np.memmap(logits, dtype=f"<i{kind.itemsize}", mode="r", shape=(rows, classes))
        self._digests = np.memmap(digests, dtype=np.uint8, mode="r", shape=(chunks, _DIGEST))
        self._verified: set[int] = set()

    def take(self, rows: Tensor) -> tuple[Tensor, int]:
        """Logits float32 [N, K] on the CPU for rows int64 [N], and the number of rows that this call computed.

        Concurrent callers share the work: each computes free chunks first, then waits for the chunks of the others.
        """
        wanted = [int(chunk) for chunk in torch.unique(rows // CHUNK)]
        missing = [chunk for chunk in wanted if not self._is_whole(chunk)]
        computed = 0
        for patience in (0.0, -1.0):  # first the free chunks, then those of other callers, which may have died
            left = []
            for chunk in missing:
                try:
                    with FileLock(self._folder / "locks" / str(chunk), timeout=patience):
                        if not self._is_whole(chunk):
                            computed += self._fill(chunk)
                except Timeout:
                    left.append(chunk)
            missing = left
        return torch.from_numpy(self._bits[rows.numpy()]).view(self._kind).float(), computed

    def _is_whole(self, chunk: int) -> bool:
        if chunk in self._verified:
            return True
        expected, span = self._digests[chunk].tobytes(), self._span(chunk)
        if any(expected) and hashlib.sha256(self._bits[span.start : span.stop].tobytes()).digest() == expected:
            self._verified.add(chunk)
        return chunk in self._verified

    def _fill(self, chunk: int) -> int:
        """Compute and publish a chunk. Returns its number of rows. Raises OSError if the disk is full."""
        span = self._span(chunk)
        computed = self._compute(span)
        assert computed.dtype == self._kind, f"{computed.dtype} would be rounded"
        bits = computed.view(torch.int16 if self._kind.itemsize == 2 else torch.int32).numpy()
        logits = bits.astype(self._bits.dtype).tobytes()
        # Not through the memory map: there a full disk raises no error, but a signal that kills the process.
        write_at(self._folder / FILES[self._kind], span.start * self._bits.strides[0], logits)
        point("answers.written")
        write_at(self._folder / "digests.sha256", chunk * _DIGEST, hashlib.sha256(logits).digest())
        self._verified.add(chunk)
        return len(span)

    def _span(self, chunk: int) -> range:
        return range(chunk * CHUNK, min(self._rows, (chunk + 1) * CHUNK))


def damaged(folder: Path, classes: int, rows: int) -> list[int]:
    """The damaged chunks of a cache, which are computed again when read.

    Raises `UnexpectedFile` for a cache of more than `rows` rows.
    """
    kind = torch.bfloat16 if (folder / FILES[torch.bfloat16]).exists() else torch.float32
    size, found = CHUNK * classes * kind.itemsize, []
    digests = read(folder / "digests.sha256", _DIGEST * -(-rows // CHUNK))
    count = len(digests) // _DIGEST
    with opened(folder / FILES[kind], count * size) as logits:
        for chunk in range(count):
            expected = digests[chunk * _DIGEST : (chunk + 1) * _DIGEST]
            logits.seek(chunk * size)
            if any(expected) and hashlib.sha256(logits.read(size)).digest() != expected:
                found.append(chunk)
    return found


def _file_of_size(path: Path, size: int) -> Path:
    """Create a file of this size, filled with zeros, or keep an existing one."""

    def grow() -> Path:
        with appended(path) as file:
            file.truncate(size)
        return path

    return patiently(grow)
