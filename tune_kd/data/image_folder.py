"""CIFAR as image files in a folder or a tar archive: `train/CLASS/NAME.png` (or jpg, jpeg) and `test/CLASS/NAME`.

An archive is read as a stream. Nothing is unpacked to disk, so a hostile archive cannot write anywhere. Images are
sorted by name.

Pillow decodes JPEG with the libjpeg of its build. Two builds can differ in the last bit of a pixel.
"""

import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tune_kd.system.errors import UserError
from tune_kd.system.files import opened, read

PARTS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
FOLDER_LAYOUT = "train/CLASS/*.png (or jpg, jpeg) and test/CLASS/*"

# CIFAR-10 as PNG files has about 240 MB in 60,022 members, none over 4 kB.
MOST_MEMBERS = 200_000
MOST_MEMBER_BYTES = 2**20
MOST_ARCHIVE_BYTES = 2**29
MOST_EXTENDED_BYTES = 2**26  # limit for all PAX headers and long names: 1 kB for each member of CIFAR-10
MOST_FILE_BYTES = MOST_ARCHIVE_BYTES + 2**24  # limit for an archive file: compression can add a thousandth

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
JPEG = b"\xff\xd8"
JPEG_MARKER = re.compile(rb"\xff+([^\xff])(..)", re.DOTALL)  # its kind, and the length of the segment
JPEG_PIXELS = (*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE0, 0xEE)  # frames, tables, and two markers of the colour space
JPEG_SCAN = 0xDA
MOST_PICTURE_PARTS = 256  # limit per image; CIFAR's have fewer than ten, and a progressive JPEG has about 15

# Errors of tarfile and the decompressors, including those for forged headers.
BROKEN = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error, ValueError)
PLAIN_ENTRIES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE)
EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK)  # headers that describe the member after them  # fmt: skip
RECORD = re.compile(rb"(\d{1,7}) (path=|size=|GNU\.sparse\.)?")  # the start of a PAX record: length, keyword

Named = tuple[str, str, str]  # part, class, file name
Listing = list[tuple[Named, int, int]]


@dataclass(frozen=True, eq=False)
class Pixels:
    """All images of a source, before the split."""

    classes: tuple[str, ...]
    train_images: Tensor  # uint8 [N, 3, 32, 32]
    train_labels: Tensor  # int64 [N], positions in classes
    test_images: Tensor  # uint8 [M, 3, 32, 32]
    test_labels: Tensor  # int64 [M]


@contextmanager
def bar(what: str, total: int | None, show: bool, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if stderr is a terminal. Yields a function that sets the position, from 0 to `total`."""
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
    """(part, class, name), size in bytes and modification time in ns of every image in `folder`, sorted.

    Raises `UserError` if the train or test folder is missing.
    """
    found = []
    for part in PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"--data-dir {folder}: there is no folder {part!r} in it; expected: {FOLDER_LAYOUT}")
        for directory in (folder / part).iterdir():
            if directory.is_dir() and not directory.name.startswith("."):
                for file in directory.iterdir():
                    if _is_image(file.name):
                        status = file.stat()
                        named = (part, directory.name, file.name)
                        found.append((named, status.st_size, status.st_mtime_ns))
    return sorted(found)


def read_folder(folder: Path, files: Listing, *, progress: bool) -> Pixels:
    """Decode the images that `listing` found in `folder`. Raises `UserError` for an invalid image."""
    decoded: dict[Named, np.ndarray[Any, Any]] = {}
    with bar("Decoding images", len(files), progress) as move:
        for named, size, _ in files:
            file = folder.joinpath(*named)
            if size > MOST_MEMBER_BYTES:
                raise UserError(f"--data-dir {folder}: {file} has {size} bytes, too many for a 32x32 image")
            decoded[named] = _decode(read(file, MOST_MEMBER_BYTES), folder, "/".join(named))
            if len(decoded) % 256 == 0:
                move(len(decoded))
    return _assembled(decoded, folder)


def read_archive(path: Path, *, progress: bool) -> Pixels:
    """Decode every image of a tar archive, which may contain FOLDER_LAYOUT inside one outer folder.

    Raises `UserError` for an archive that is truncated or damaged, names paths outside itself, contains links or
    devices, is far too large, or has an unexpected layout or image.
    """
    decoded: dict[Named, np.ndarray[Any, Any]] = {}
    outer: tuple[str, ...] | None = None
    with opened(path, MOST_FILE_BYTES) as raw, bar("Decoding images", path.stat().st_size, progress) as move:
        for name, content in _images(path, raw):
            *prefix, part, directory, file = ("", "", "", *PurePosixPath(name).parts)
            if part not in PARTS or directory.startswith("."):
                continue
            outer = tuple(prefix) if outer is None else outer
            if outer != tuple(prefix):
                raise UserError(f"--data-dir {path}: the archive has {_short(name)} in a second {part!r} folder")
            if (part, directory, file) in decoded:
                raise UserError(f"--data-dir {path}: the archive contains {_short(name)} twice")
            decoded[part, directory, file] = _decode(content, path, name)
            if len(decoded) % 256 == 0:
                move(raw.tell())
    return _assembled(decoded, path)


def _images(path: Path, raw: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every image in a tar, in the order of the tar. Raises `UserError` for a hostile member."""
    stream = _Metered(_decompressed(path, raw), path)
    try:
        for member, content in _members(stream, path):
            if member.isreg() and _is_image(PurePosixPath(member.name).name):
                yield member.name, content
        stream.check_end()
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"--data-dir {path}: the archive is truncated or damaged ({error}); get a new copy") from error


def _members(stream: "_Metered", path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield every file and folder of a tar, with the content of files.

    tarfile parses only the header blocks here. Its parser of extended headers needs time and memory quadratic in their
    size, and keeps their records for every member.
    """
    count, extended, everywhere, own = 0, 0, _Extended(), _Extended()
    while any(block := stream.read(tarfile.BLOCKSIZE)):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type in EXTENDED:
            extended += _bounded(member, path).size
            if extended > MOST_EXTENDED_BYTES:
                raise UserError(
                    f"--data-dir {path}: the archive has more than {MOST_EXTENDED_BYTES} bytes of extended headers; "
                    "not read"
                )
            content = stream.content(member.size)
            if member.type == tarfile.XGLTYPE:
                everywhere = _extended(content, everywhere)
            elif member.type == tarfile.GNUTYPE_LONGNAME:
                own = replace(own, name=content.partition(b"\0")[0])
            elif member.type != tarfile.GNUTYPE_LONGLINK:  # which has the target of a link, and links are refused
                own = _extended(content, own)
            continue
        name, size = own.name or everywhere.name, own.size if own.size is not None else everywhere.size
        if name is not None:
            member.name = name.decode("utf-8", "surrogateescape")
        if size is not None:
            member.size = size
        count += 1
        _check_harmless(member, own.sparse or everywhere.sparse, count, path)
        yield member, b"" if member.isdir() else stream.content(member.size)
        own = _Extended()


@dataclass(frozen=True)
class _Extended:
    """The records of extended headers that are used here. None: not given."""

    name: bytes | None = None
    size: int | None = None  # bytes
    sparse: bool = False


def _extended(content: bytes, before: _Extended) -> _Extended:
    """Parse a PAX header and add its records to `before`. A record is `LENGTH KEYWORD=VALUE` and a newline."""
    found, start = before, 0
    while start < len(content):
        record = RECORD.match(content, start)
        end = start + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(content):
            raise tarfile.ReadError(f"an extended header has no record at its byte {start}")
        value = content[record.end() : end - 1]
        if record[2] == b"path=":
            found = replace(found, name=value)
        elif record[2] == b"size=":
            found = replace(found, size=int(value))
        elif record[2]:
            found = replace(found, sparse=True)
        start = end
    return found


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    suffix = path.name.lower()
    if suffix.endswith(("gz", "tgz")):
        return gzip.open(raw)  # type: ignore[return-value]
    if suffix.endswith("xz"):
        return lzma.open(raw)
    return raw


class _Metered:
    """A stream that raises after MOST_ARCHIVE_BYTES, and for short reads."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.stream, self.path, self.count = stream, path, 0

    def read(self, size: int) -> bytes:
        """Read exactly `size` bytes."""
        if len(data := self._read(size)) < size:
            raise tarfile.ReadError(f"it ends at byte {self.count}")
        return data

    def content(self, size: int) -> bytes:
        """Read `size` bytes and skip the padding of their last block."""
        return self.read(size + -size % tarfile.BLOCKSIZE)[:size]

    def check_end(self) -> None:
        """Raise unless only zeros follow, since a damaged header can look like the end.

        Reading to the very end also makes gzip and xz verify their checksums.
        """
        end = self.count
        while tail := self._read(2**20):
            if tail.count(0) != len(tail):
                raise tarfile.ReadError(f"it continues after its end at byte {end}")

    def _read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.count += len(data)
        if self.count > MOST_ARCHIVE_BYTES:
            raise UserError(
                f"--data-dir {self.path}: the archive unpacks to more than {MOST_ARCHIVE_BYTES} bytes, "
                "too many for 60,000 small images"
            )
        return data


def _check_harmless(member: tarfile.TarInfo, sparse: bool, count: int, path: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"--data-dir {path}: the archive names {_short(member.name)}, outside itself; not read")
    if sparse or member.type not in PLAIN_ENTRIES:
        raise UserError(
            f"--data-dir {path}: {_short(member.name)} in the archive is a link, a device or a sparse file, "
            "not a plain file; not read"
        )
    _bounded(member, path)
    if count > MOST_MEMBERS:
        raise UserError(f"--data-dir {path}: the archive has more than {MOST_MEMBERS} members; not read")


def _bounded(member: tarfile.TarInfo, path: Path) -> tarfile.TarInfo:
    """Return the member. Raises `UserError` if it claims to be larger than MOST_MEMBER_BYTES."""
    if not 0 <= member.size <= MOST_MEMBER_BYTES:
        raise UserError(
            f"--data-dir {path}: {_short(member.name)} in the archive claims {member.size} bytes; "
            f"at most {MOST_MEMBER_BYTES} are read"
        )
    return member


def _is_image(name: str) -> bool:
    # For each x.png, macOS archives also have a "._x.png", which is not an image.
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "...")


def _decode(content: bytes, where: Path, name: str) -> np.ndarray[Any, Any]:
    """The image as uint8 [32, 32, 3]."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(_bare(content)), formats=("PNG", "JPEG"))
        if (picture.mode, picture.size) == ("RGB", (32, 32)):  # from the header, before any decoding
            return np.asarray(picture)
        what = f"is {picture.mode} {picture.width}x{picture.height}; expected: RGB 32x32"
    except Exception as error:  # Pillow's decoders can raise any error for damaged bytes
        what = f"cannot be read as PNG or JPEG ({type(error).__name__})"
    raise UserError(f"--data-dir {where}: {_short(name)} {what}")


def _bare(content: bytes) -> bytes:
    """Remove all parts of a PNG or JPEG that do not define its pixels.

    A text or a colour profile of 1 kB can unpack to 1 MB, and Pillow unpacks all of them. Raises `ValueError` for an
    image that is truncated or has too many parts.
    """
    if content.startswith(PNG):
        return PNG + b"".join(_chunks(content))
    if content.startswith(JPEG):
        return JPEG + b"".join(_segments(content))
    return content


def _chunks(content: bytes) -> Iterator[bytes]:
    """The chunks of a PNG that define its pixels."""
    start = len(PNG)
    for _ in range(MOST_PICTURE_PARTS):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")  # with length, type and checksum
        if end > len(content):
            raise ValueError("cut")
        kind = content[start + 4 : start + 8]
        if kind in PNG_PIXELS:
            yield content[start:end]
        if kind == b"IEND":
            return
        start = end
    raise ValueError("too many parts")


def _segments(content: bytes) -> Iterator[bytes]:
    """The segments of a JPEG that define its pixels; the last one holds all scans and the rest of the file."""
    start = len(JPEG)
    for _ in range(MOST_PICTURE_PARTS):
        marker = JPEG_MARKER.match(content, start)
        if marker is None:
            raise ValueError("cut")
        start, kind = marker.start(1) - 1, marker[1][0]  # any number of 0xFF may come before the last
        end = start + 2 + int.from_bytes(marker[2], "big")
        if kind == JPEG_SCAN:
            if content.count(bytes([0xFF, JPEG_SCAN]), start) > MOST_PICTURE_PARTS:
                raise ValueError("too many scans")
            yield content[start:]
            return
        if kind in JPEG_PIXELS:
            yield content[start:end]
        start = end
    raise ValueError("too many parts")


def _assembled(decoded: dict[Named, np.ndarray[Any, Any]], where: Path) -> Pixels:
    counts = {part: Counter(named[1] for named in decoded if named[0] == part) for part in PARTS}
    for part in PARTS:
        if not counts[part]:
            raise UserError(f"--data-dir {where}: it has no {part} images; expected: {FOLDER_LAYOUT}")
    odd = sorted(counts["train"].keys() ^ counts["test"].keys())
    if odd:
        raise UserError(
            f"--data-dir {where}: train and test must have the same classes, "
            f"but {', '.join(map(_short, odd[:5]))} has images in only one of them"
        )
    alone = sorted(name for name, count in counts["train"].items() if count < 2)
    if alone:
        raise UserError(
            f"--data-dir {where}: class {_short(alone[0])} has one training image; "
            "at least two are needed, one of them for validation"
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
