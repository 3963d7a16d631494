"""CIFAR as picture files, `train/CLASS/NAME.png` (or jpg, jpeg) and `test/CLASS/NAME`, as one tensor each.

They lie in a folder, or in a tar archive of one, which is read as a stream: nothing is unpacked on disk, so
a hostile archive has nowhere to write. Order is that of the sorted names, however the files lie.

Pillow decodes JPEG with the libjpeg that it was built with; two builds can differ in a pixel's last bit.
"""

import gzip
import io
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from tune_kd.storage import opened, read
from tune_kd.study import Mistake

PARTS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
LAYOUT = "train/CLASS/*.png (or jpg, jpeg) and test/CLASS/*"

# CIFAR-10 as PNG files is about 240 MB in 60,022 members, none over 4 kB.
MOST_MEMBERS = 200_000
MOST_MEMBER_BYTES = 2**20
MOST_ARCHIVE_BYTES = 2**29
MOST_FILE_BYTES = 2 * MOST_ARCHIVE_BYTES  # of an archive as a file: none is twice as large as what it unpacks to

# What tarfile and the decompressors raise, down to what forged headers provoke.
BROKEN = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error, ValueError, RecursionError)

Named = tuple[str, str, str]  # part, class, file name
Listing = list[tuple[Named, int, int]]


@dataclass(frozen=True, eq=False)
class Pixels:
    """All images of a source before any split."""

    classes: tuple[str, ...]
    train_images: Tensor  # uint8 [N, 3, 32, 32]
    train_labels: Tensor  # int64 [N], positions in classes
    test_images: Tensor  # uint8 [M, 3, 32, 32]
    test_labels: Tensor  # int64 [M]


@contextmanager
def bar(what: str, total: int | None, show: bool, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's stderr; calling what it yields moves it to a position out of `total`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    console = Console(stderr=True)
    share = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = ("{task.description}", BarColumn(), share, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda position: progress.update(task, completed=position)


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def listing(folder: Path) -> Listing:
    """(part, class, name), size in bytes and modification time in ns of every picture in `folder`, sorted."""
    found = []
    for part in PARTS:
        if not (folder / part).is_dir():
            raise Mistake(f"--data-dir {folder}: there is no folder {part!r} in it; {LAYOUT} are expected")
        for directory in (folder / part).iterdir():
            if directory.is_dir() and not directory.name.startswith("."):
                for file in directory.iterdir():
                    if _is_picture(file.name):
                        status = file.stat()
                        named = (part, directory.name, file.name)
                        found.append((named, status.st_size, status.st_mtime_ns))
    return sorted(found)


def read_folder(folder: Path, files: Listing, *, progress: bool) -> Pixels:
    """Decode what `listing` found in `folder`. Raises `Mistake` where a picture is not as expected."""
    decoded: dict[Named, np.ndarray[Any, Any]] = {}
    with bar("Decoding images", len(files), progress) as move:
        for named, size, _ in files:
            file = folder.joinpath(*named)
            if size > MOST_MEMBER_BYTES:
                raise Mistake(f"--data-dir {folder}: {file} has {size} bytes, too many for a 32x32 image")
            decoded[named] = _decode(read(file, MOST_MEMBER_BYTES), folder, "/".join(named))
            if len(decoded) % 256 == 0:
                move(len(decoded))
    return _assembled(decoded, folder)


def read_archive(path: Path, *, progress: bool) -> Pixels:
    """Decode every picture of a tar archive, which may hold LAYOUT inside one outer folder.

    Raises `Mistake` for an archive that is cut or damaged, that names anything outside itself, holds links,
    devices or absurdly much, or whose layout or pictures are not as expected.
    """
    decoded: dict[Named, np.ndarray[Any, Any]] = {}
    outer: tuple[str, ...] | None = None
    with opened(path, MOST_FILE_BYTES) as raw, bar("Decoding images", path.stat().st_size, progress) as move:
        for name, content in _pictures(path, raw):
            *prefix, part, directory, file = ("", "", "", *PurePosixPath(name).parts)
            if part not in PARTS or directory.startswith("."):
                continue
            outer = tuple(prefix) if outer is None else outer
            if outer != tuple(prefix):
                raise Mistake(f"--data-dir {path}: the archive has {_short(name)} in a second {part!r} folder")
            if (part, directory, file) in decoded:
                raise Mistake(f"--data-dir {path}: the archive holds {_short(name)} twice")
            decoded[part, directory, file] = _decode(content, path, name)
            if len(decoded) % 256 == 0:
                move(raw.tell())
    return _assembled(decoded, path)


def _pictures(path: Path, raw: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every picture in a tar, in its order. What is not harmless is refused."""
    stream = _Metered(_decompressed(path, raw), path)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
            for count, member in enumerate(archive, start=1):
                _refuse_hostile(member, count, path)
                if member.isreg() and _is_picture(PurePosixPath(member.name).name):
                    yield member.name, _content(archive, member)
            stream.check_end(archive.offset)
    except Mistake:
        raise
    except BROKEN as error:
        raise Mistake(f"--data-dir {path}: the archive is cut or damaged ({error}); get it again") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{_short(member.name)} is cut")
    return content


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    suffix = path.name.lower()
    if suffix.endswith(("gz", "tgz")):
        return gzip.open(raw)  # type: ignore[return-value]
    if suffix.endswith("xz"):
        return lzma.open(raw)
    return raw


class _Metered:
    """A stream for tarfile that stops at MOST_ARCHIVE_BYTES, and knows whether the archive really ended."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.stream, self.path, self.count, self.last = stream, path, 0, b""

    def read(self, size: int) -> bytes:
        # The limit also bounds what a forged header can make tarfile hold in memory.
        self.last = self.stream.read(size)
        self.count += len(self.last)
        if self.count > MOST_ARCHIVE_BYTES:
            raise Mistake(
                f"--data-dir {self.path}: the archive unpacks to more than {MOST_ARCHIVE_BYTES} bytes, "
                "which is too much for 60,000 small images"
            )
        return self.last

    def check_end(self, offset: int) -> None:
        """tarfile takes a cut between members, and a damaged header, for the end: only zeros may follow it.

        Reading on to the very end also lets gzip and xz compare their checksums.
        """
        tail = self.last[max(0, offset - (self.count - len(self.last))) :]
        ended = self.count >= offset + tarfile.BLOCKSIZE and not any(tail)
        while tail := self.read(2**20):
            ended = ended and not any(tail)
        if not ended:
            raise tarfile.ReadError(f"no end of archive at byte {offset}")


def _refuse_hostile(member: tarfile.TarInfo, count: int, path: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise Mistake(f"--data-dir {path}: the archive names {_short(member.name)}, outside itself; not read")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise Mistake(
            f"--data-dir {path}: {_short(member.name)} in the archive is a link, a device or sparse, "
            "not a plain file; not read"
        )
    if not 0 <= member.size <= MOST_MEMBER_BYTES:
        raise Mistake(
            f"--data-dir {path}: {_short(member.name)} in the archive claims {member.size} bytes; "
            f"at most {MOST_MEMBER_BYTES} are read"
        )
    if count > MOST_MEMBERS:
        raise Mistake(f"--data-dir {path}: the archive has more than {MOST_MEMBERS} members; not read")


def _is_picture(name: str) -> bool:
    # A leading dot: macOS archives hold a "._x.png", which is no picture, beside x.png.
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "...")


def _decode(content: bytes, where: Path, name: str) -> np.ndarray[Any, Any]:
    """The picture as uint8 [32, 32, 3]."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if (picture.mode, picture.size) == ("RGB", (32, 32)):  # known from the header, before any decoding
            return np.asarray(picture)
        what = f"is {picture.mode} {picture.width}x{picture.height}, and RGB 32x32 is expected"
    except Exception as error:  # on damaged bytes Pillow raises whatever its decoders happen to
        what = f"cannot be read as PNG or JPEG ({type(error).__name__})"
    raise Mistake(f"--data-dir {where}: {_short(name)} {what}")


def _assembled(decoded: dict[Named, np.ndarray[Any, Any]], where: Path) -> Pixels:
    counts = {part: Counter(named[1] for named in decoded if named[0] == part) for part in PARTS}
    for part in PARTS:
        if not counts[part]:
            raise Mistake(f"--data-dir {where}: it holds no {part} images; {LAYOUT} are expected")
    odd = sorted(counts["train"].keys() ^ counts["test"].keys())
    if odd:
        raise Mistake(
            f"--data-dir {where}: train and test must hold the same classes, "
            f"and {', '.join(map(_short, odd[:5]))} has images in one of them only"
        )
    alone = sorted(name for name, count in counts["train"].items() if count < 2)
    if alone:
        raise Mistake(
            f"--data-dir {where}: class {_short(alone[0])} has one training image, "
            "and at least two are needed, one of them for validation"
        )
    classes = tuple(sorted(counts["train"]))
    label = {name: position for position, name in enumerate(classes)}
    tensors = []
    for part in PARTS:
        names = sorted(named for named in decoded if named[0] == part)
        images = torch.from_numpy(np.stack([decoded[named] for named in names]))
        tensors.append(images.permute(0, 3, 1, 2).contiguous())
        tensors.append(torch.tensor([label[named[1]] for named in names]))
    return Pixels(classes, *tensors)
