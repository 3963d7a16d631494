"""This machine's first GPU according to the CUDA driver, and whether NVIDIA's MPS serves the GPUs. With MPS, processes
compute on a GPU at the same time; without it, they take turns."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tune_kd.system.environment import python_path

MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED of cuda.h: contexts made on this device are shared through MPS
PATIENCE = 60.0  # seconds to wait for the process of `asked`


@dataclass(frozen=True)
class Gpu:
    """The first GPU of a machine."""

    name: str
    memory: int  # bytes
    served: bool  # whether MPS serves all GPUs


def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def serves(driver: Callable[[], Any] = _driver) -> bool:
    """Whether MPS serves every GPU that this process sees. False without a GPU, or if the driver cannot tell.

    Initializes CUDA in this process. Later changes of CUDA_VISIBLE_DEVICES then have no effect.
    """
    try:
        cuda = driver()
    except OSError:  # no driver, so no GPU
        return False
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return False
    return count.value > 0 and all(_serves(cuda, number) for number in range(count.value))


def _serves(cuda: Any, number: int) -> bool:
    device, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), number):
        return False
    unknown = cuda.cuDeviceGetAttribute(ctypes.byref(value), MPS_ENABLED, device)  # an error before CUDA 12
    return not unknown and value.value == 1


def described(driver: Callable[[], Any] = _driver) -> Gpu | None:
    """Return the first GPU that this process sees; None without a GPU. Initializes CUDA, as `serves` does."""
    served = serves(driver)
    try:
        cuda = driver()
    except OSError:
        return None
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(200), ctypes.c_size_t()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), memory.value, served)


ASK = "import json; from tune_kd.execute import mps; found = mps.described(); print(json.dumps(found and vars(found)))"


def asked() -> Gpu | None:
    """Call `described` in a new process. Returns None if that fails, too."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", ASK],
            env=os.environ | python_path(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=True,
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return found and Gpu(**found)
