"""The most memory that one trial held, although its process may serve many trials."""

from pathlib import Path

import torch


def start_measuring(device: torch.device) -> None:
    """Forget the peaks of earlier trials."""
    if device.type == "cuda":
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
