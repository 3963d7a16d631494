"""Whether NVIDIA's MPS, which lets processes compute on a GPU at the same time and not by turns, serves a machine."""

import ctypes
from collections.abc import Callable
from typing import Any

MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED of cuda.h: contexts made on this device are shared through MPS


def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def serves(driver: Callable[[], Any] = _driver) -> bool:
    """Whether MPS serves every GPU that this process sees. False where there is none, or the driver cannot tell.

    It starts CUDA in this process, which from then on sees the GPUs that it sees now.
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
    unknown = cuda.cuDeviceGetAttribute(ctypes.byref(value), MPS_ENABLED, device)  # to drivers before CUDA 12
    return not unknown and value.value == 1
