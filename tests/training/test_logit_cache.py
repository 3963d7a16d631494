"""The logit cache: each chunk is computed once for all requests, and a damaged chunk is never returned."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tune_kd.training import logit_cache
from tune_kd.training.logit_cache import LogitCache, damaged

ROWS, CLASSES = 40, 3
KINDS = {torch.float32: ("logits.f32", 4), torch.bfloat16: ("logits.bf16", 2)}  # file, and bytes per number


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_cache, "CHUNK", 16)


def logits(rows: range) -> Tensor:
    return torch.arange(rows.start, rows.stop, dtype=torch.float32)[:, None] + torch.tensor([0.1, 0.2, 0.3])


class Counted:
    """Computes `logits` in a type, and records the requested rows."""

    def __init__(self, seconds: float = 0.0, kind: torch.dtype = torch.float32) -> None:
        self.asked: list[range] = []
        self.seconds = seconds
        self.kind = kind

    def __call__(self, rows: range) -> Tensor:
        self.asked.append(rows)
        time.sleep(self.seconds)  # so that others ask meanwhile
        return logits(rows).to(self.kind)


def test_rows_are_returned_in_the_requested_order_and_only_their_chunks_are_computed(tmp_path: Path) -> None:
    compute = Counted()
    table = LogitCache(tmp_path, ROWS, CLASSES, compute)
    found, computed = table.take(torch.tensor([39, 2, 2]))
    assert torch.equal(found, logits(range(40))[[39, 2, 2]])
    assert computed == 16 + 8
    assert compute.asked == [range(16), range(32, 40)]
    assert table.take(torch.tensor([38, 0]))[1] == 0


def test_concurrent_requests_share_the_chunks_and_compute_each_once(tmp_path: Path) -> None:
    workers = [Counted(0.05) for _ in range(3)]
    found: list[tuple[Tensor, int]] = []
    threads = [
        threading.Thread(
            target=lambda w=w: found.append(LogitCache(tmp_path, ROWS, CLASSES, w).take(torch.arange(ROWS)))
        )
        for w in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, logits(range(ROWS))) for each, _ in found)
    assert sum(computed for _, computed in found) == ROWS
    assert sorted(rows.start for worker in workers for rows in worker.asked) == [0, 16, 32]
    assert all(worker.asked for worker in workers)  # no thread waited while a chunk was free


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["a flipped bit", "another digest", "no logits", "files cut short"])
def test_only_damaged_chunks_are_recomputed_and_give_the_same_bits(
    tmp_path: Path, what: str, kind: torch.dtype
) -> None:
    name, size = KINDS[kind]
    compute = Counted(kind=kind)
    expected, _ = LogitCache(tmp_path, ROWS, CLASSES, compute, kind).take(torch.arange(ROWS))
    table, digests = tmp_path / name, tmp_path / "digests.sha256"
    whole = table.read_bytes(), digests.read_bytes()
    assert len(whole[0]) == ROWS * CLASSES * size and damaged(tmp_path, CLASSES, ROWS) == []
    position = 20 * CLASSES * size  # in the second chunk
    if what == "a flipped bit":
        table.write_bytes(whole[0][:position] + bytes([whole[0][position] ^ 1]) + whole[0][position + 1 :])
    elif what == "another digest":
        digests.write_bytes(whole[1][:32] + bytes([whole[1][32] ^ 1]) + whole[1][33:])
    elif what == "no logits":
        chunk = 16 * CLASSES * size
        table.write_bytes(whole[0][:chunk] + bytes(chunk) + whole[0][2 * chunk :])
    else:
        table.write_bytes(whole[0][: 16 * CLASSES * size])
        digests.write_bytes(whole[1][:32])
    assert damaged(tmp_path, CLASSES, ROWS) == ([] if what == "files cut short" else [1])
    found, computed = LogitCache(tmp_path, ROWS, CLASSES, compute, kind).take(torch.arange(ROWS))
    assert torch.equal(found, expected)
    assert computed == (24 if what == "files cut short" else 16)
    assert (table.read_bytes(), digests.read_bytes()) == whole


def _answer_and_die(folder: str) -> None:
    """Computes one chunk, and is killed during the next."""
    logit_cache.CHUNK = 16

    def compute(rows: range) -> Tensor:
        if rows.start:
            os.kill(os.getpid(), signal.SIGKILL)
        return logits(rows)

    LogitCache(Path(folder), ROWS, CLASSES, compute).take(torch.arange(ROWS))


def test_a_kill_loses_only_the_chunk_in_flight(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_answer_and_die, args=[str(tmp_path)])
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    compute = Counted()
    found, computed = LogitCache(tmp_path, ROWS, CLASSES, compute).take(torch.arange(ROWS))
    assert torch.equal(found, logits(range(ROWS)))
    assert compute.asked == [range(16, 32), range(32, 40)]
    assert computed == 24


def test_the_table_is_memory_mapped(tmp_path: Path) -> None:
    table = LogitCache(tmp_path, ROWS, CLASSES, logits)
    assert isinstance(table._bits, np.memmap)
    assert (tmp_path / "logits.f32").stat().st_size == ROWS * CLASSES * 4


def test_a_full_disk_raises_and_the_chunks_are_recomputed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, offset: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(logit_cache, "write_at", full)
        with pytest.raises(OSError, match="No space left"):
            LogitCache(tmp_path, ROWS, CLASSES, logits).take(torch.arange(ROWS))
    assert LogitCache(tmp_path, ROWS, CLASSES, logits).take(torch.arange(ROWS))[1] == ROWS


def test_every_finite_bfloat16_number_round_trips_and_float16_would_lose_some(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = every[every.isfinite()].view(-1, 16)
    count = len(values)
    cache = LogitCache(tmp_path, count, 16, lambda rows: values[rows.start : rows.stop], torch.bfloat16)
    found, _ = cache.take(torch.arange(count))
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), values.float().view(torch.int32))  # including the signs of zeros
    lost = found != found.half().float()
    size = found.abs()
    assert bool(lost[size > 65504].all()) and not lost[(size >= 2**-14) & (size <= 65504)].any()
    assert bool(lost[(size > 0) & (size < 2**-25)].all())


def test_storing_float32_logits_as_bfloat16_raises(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"torch\.float32 would be rounded"):
        LogitCache(tmp_path, ROWS, CLASSES, logits, torch.bfloat16).take(torch.arange(ROWS))
