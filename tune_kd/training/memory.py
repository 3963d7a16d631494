"""Memory of a process that serves many trials: freed blocks are kept, and the most that one trial held is told."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch


def keep_freed_blocks() -> None:
    """Let the C library keep freed blocks of any size for the next step.

    By default glibc gives blocks of megabytes back to the system, which hands them out again page by page, zeroed:
    thousands of page faults a step. Does nothing with other C libraries.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    if not mallopt(mmap_threshold, 2**30):
        mallopt(mmap_threshold, 2**25)  # the most that glibc took before 2.35
    mallopt(trim_threshold, 2**31 - 1)


def start_measuring(device: torch.device) -> None:
    """Forget the peaks of earlier trials."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # of an older torch, which a capture that failed leaves as if it went on
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory (Linux 4.0)
    except OSError:
        pass  # not allowed in some containers; the peak is then that of the process


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on the GPU, or resident in the process; null where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None
