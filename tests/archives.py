"""Build small CIFAR archives in the published format."""

import hashlib
import io
import struct
import tarfile

import numpy as np

from tune_kd.data.cifar_pickles import CIFAR10, Form, Origin


def text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def python2_batch(images: np.ndarray, labels: list[int], *, number: bytes = b"u1") -> bytes:
    """Pickle a batch as Python 2 and NumPy 1 did in 2009: with old module names, and 0 and 1 as flags."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in images.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(number) + b"K\x00K\x01\x87R" + b"(K\x03" + text(b"|") + b"NNN"
    dtype += (b"J" + struct.pack("<i", -1)) * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def images_of(seed: int, count: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def small_files() -> dict[str, bytes]:
    names = ("data_batch_1", "data_batch_2", "test_batch")
    return {n: python2_batch(images_of(i), [(i + j) % 10 for j in range(20)]) for i, n in enumerate(names)}


def small_archive(files: dict[str, bytes], form: Form = CIFAR10) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in ({"readme.html": b"hello"} | files).items():
            member = tarfile.TarInfo(f"{form.folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def small_origin(
    files: dict[str, bytes], archive: bytes = b"", url: str = "http://127.0.0.1:1/", stall: float = 20.0
) -> Origin:
    digests = tuple((name, md5(content)) for name, content in files.items())
    return Origin(url, md5(archive), train=digests[:-1], test=digests[-1:], stall_seconds=stall)
