"""Image folders and archives of them: which are read, and which are rejected."""

import io
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, PngImagePlugin

from tune_kd.data import image_folder
from tune_kd.data.image_folder import Pixels, listing, read_archive
from tune_kd.system.errors import UserError

CLASSES = ("cat", "dog")


def png(value: int, *, size: int = 32, mode: str = "RGB", form: str = "PNG") -> bytes:
    """A grey image whose first pixel is (value, 1, 2), so that channels and order are visible."""
    pixels = np.full((size, size, 3), value, np.uint8)
    pixels[0, 0] = (value, 1, 2)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def tree() -> dict[str, bytes]:
    files = {f"train/{name}/{i}.png": png(10 * k + i) for k, name in enumerate(CLASSES) for i in range(3)}
    return files | {f"test/{name}/{i}.png": png(100 + 10 * k + i) for k, name in enumerate(CLASSES) for i in (0, 1)}


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def entry(name: str, content: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def packed(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    compression = {"tar": "", "gz": "gz", "tgz": "gz", "xz": "xz", "txz": "xz"}[path.name.rpartition(".")[2]]
    with tarfile.open(path, f"w:{compression}", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return path


def archived(path: Path, files: dict[str, bytes]) -> Path:
    return packed(path, [entry(name, content) for name, content in files.items()])


def read_folder(folder: Path) -> Pixels:
    return image_folder.read_folder(folder, listing(folder), progress=False)


def same(one: Pixels, other: Pixels) -> bool:
    tensors = ("train_images", "train_labels", "test_images", "test_labels")
    return one.classes == other.classes and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def problem(read: Callable[[], object]) -> str:
    """The single message with which `read` fails."""
    with pytest.raises(UserError) as caught:
        read()
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    return sentence


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    pixels = read_folder(unpacked(tmp_path, tree()))
    assert pixels.classes == CLASSES
    assert pixels.train_images[:, 0, 5, 5].tolist() == [0, 1, 2, 10, 11, 12]
    assert pixels.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert pixels.test_images[:, 0, 5, 5].tolist() == [100, 101, 110, 111]
    assert pixels.test_labels.tolist() == [0, 0, 1, 1]


def test_channels_come_first_and_pixels_are_exact(tmp_path: Path) -> None:
    pixels = read_folder(unpacked(tmp_path, tree()))
    assert pixels.train_images.dtype == torch.uint8
    assert pixels.train_images.shape == (6, 3, 32, 32)
    assert pixels.train_images[4, :, 0, 0].tolist() == [11, 1, 2]


@pytest.mark.parametrize("suffix", image_folder.ARCHIVES)
@pytest.mark.parametrize("outer", ["", "./", "cifar/"])
def test_an_archive_reads_the_same_as_its_folder(tmp_path: Path, suffix: str, outer: str) -> None:
    expected = read_folder(unpacked(tmp_path / "folder", tree()))
    shuffled = {outer + name: content for name, content in reversed(tree().items())}
    archive = archived(tmp_path / f"images{suffix}", shuffled)
    assert same(read_archive(archive, progress=False), expected)


def test_jpeg_files_and_uppercase_suffixes_are_read_and_other_files_are_ignored(tmp_path: Path) -> None:
    more = {
        "train/cat/3.JPG": png(50, form="JPEG"),
        "train/dog/3.jpeg": png(50, form="JPEG"),
        "train/cat/._0.png": b"what macOS leaves",
        "train/cat/notes.txt": b"not a picture",
        "README.png": b"not in a class",
    }
    folder = unpacked(tmp_path / "folder", tree() | more)
    pixels = read_folder(folder)
    assert len(pixels.train_labels) == 8
    assert same(read_archive(archived(tmp_path / "x.tar", tree() | more), progress=False), pixels)


# Layouts and images that are rejected, in folders and in archives


def without(prefix: str) -> dict[str, bytes]:
    return {name: content for name, content in tree().items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (without("test/"), ["test", "train/CLASS"]),
        (without("train/"), ["train", "test/CLASS"]),
        (without("test/dog"), ["same classes", "'dog'"]),
        (without("train/cat"), ["same classes", "'cat'"]),
        ({n: c for n, c in tree().items() if n not in ("train/cat/0.png", "train/cat/1.png")}, ["'cat'", "one"]),
        (tree() | {"train/cat/1.png": png(1, size=31)}, ["train/cat/1.png", "31x31", "32x32"]),
        (tree() | {"train/cat/1.png": png(1, mode="L")}, ["train/cat/1.png", "L 32x32", "RGB"]),
        (tree() | {"train/cat/1.png": png(1)[:-30]}, ["train/cat/1.png", "cannot be read"]),
        (tree() | {"train/cat/1.png": b""}, ["train/cat/1.png", "cannot be read"]),
        (tree() | {"train/cat/1.png": png(1, form="GIF")}, ["train/cat/1.png", "cannot be read"]),
        (tree() | {"train/cat/1.png": bytes(2**20 + 1)}, ["train/cat/1.png", "1048577"]),
    ],
    ids=["no test", "no train", "test class", "train class", "one", "size", "grey", "cut", "empty", "gif", "huge"],
)
def test_invalid_layouts_and_images_are_rejected_by_name(
    tmp_path: Path, files: dict[str, bytes], words: list[str]
) -> None:
    folder = unpacked(tmp_path / "folder", files)
    archive = archived(tmp_path / "images.tar.gz", files)
    for path, sentence in (
        (folder, problem(lambda: read_folder(folder))),
        (archive, problem(lambda: read_archive(archive, progress=False))),
    ):
        assert f"--data-dir {path}" in sentence
        assert all(word in sentence for word in words), sentence


# Hostile archives


def special(kind: bytes, name: str = "train/cat/9.png", target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "word"),
    [
        (entry("/tmp/train/cat/9.png", png(1)), "outside"),
        (entry("../train/cat/9.png", png(1)), "outside"),
        (entry("train/cat/../../../9.png", png(1)), "outside"),
        ((special(tarfile.DIRTYPE, "../evil"), b""), "outside"),
        ((special(tarfile.SYMTYPE), b""), "link"),
        ((special(tarfile.LNKTYPE), b""), "link"),
        ((special(tarfile.CHRTYPE), b""), "device"),
        ((special(tarfile.FIFOTYPE), b""), "device"),
        (entry("train/cat/9.png", bytes(2**20 + 1)), "1048577"),
        (entry("padding.bin", bytes(2**20 + 1)), "1048577"),
        (entry("train/cat/0.png", png(1)), "twice"),
        (entry("other/train/cat/9.png", png(1)), "second"),
    ],
)
def test_a_hostile_archive_is_rejected_without_writing_files(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [entry(name, content) for name, content in tree().items()]
    (tmp_path / "in").mkdir()
    archive = packed(tmp_path / "in" / "deep.tar.gz", [*members, member])
    monkeypatch.chdir(tmp_path / "in")
    before = sorted(os.walk(tmp_path))
    sentence = problem(lambda: read_archive(archive, progress=False))
    assert word in sentence and str(archive) in sentence
    assert sorted(os.walk(tmp_path)) == before
    assert not Path("/tmp/train").exists()


def test_an_archive_with_too_many_members_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MOST_MEMBERS", 5)
    archive = archived(tmp_path / "x.tar", tree())
    assert "more than 5 members" in problem(lambda: read_archive(archive, progress=False))


def test_an_archive_that_unpacks_to_too_many_bytes_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MOST_ARCHIVE_BYTES", 2**21)
    archive = archived(tmp_path / "x.tar.xz", {f"{i}.bin": bytes(2**20) for i in range(4)})
    assert archive.stat().st_size < 2**14
    assert "unpacks to more than" in problem(lambda: read_archive(archive, progress=False))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [2**20 + 1, 2**40, -512])
def test_a_tar_header_that_claims_an_invalid_size_is_rejected(tmp_path: Path, kind: bytes, size: int) -> None:
    member = tarfile.TarInfo("long")
    member.type, member.size = kind, size
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    assert f"'long' in the archive claims {size} bytes" in problem(lambda: read_archive(path, progress=False))


def test_too_many_bytes_of_extended_headers_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "MOST_EXTENDED_BYTES", 2**12)
    long = [entry("train/cat/" + "x" * 200 + f"{i}.txt") for i in range(30)]
    archive = packed(tmp_path / "x.tar", long)
    assert "more than 4096 bytes of extended headers" in problem(lambda: read_archive(archive, progress=False))


def extended(kind: bytes, content: bytes) -> bytes:
    """An extended header that no real program writes."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, len(content)
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content", [b"9" * 600, b"30 path=a\n30", b"0 path=a\n", b"3 path=a\n", b"path=a\n", b"-9 path=a\n", b"9 size=x\n"]
)
def test_a_malformed_extended_header_is_reported_as_damage(tmp_path: Path, content: bytes) -> None:
    path = archived(tmp_path / "x.tar", tree())
    path.write_bytes(extended(tarfile.XHDTYPE, content) + path.read_bytes())
    assert "truncated or damaged" in problem(lambda: read_archive(path, progress=False))


@pytest.mark.parametrize("keyword", ["GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.name"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE])
def test_a_sparse_member_is_rejected(tmp_path: Path, keyword: str, kind: bytes) -> None:
    path = archived(tmp_path / "x.tar", tree())
    record = f"{len(keyword) + 6} {keyword}=1\n".encode()
    path.write_bytes(extended(kind, record) + path.read_bytes())
    assert "'train/cat/0.png' in the archive is a link, a device or a sparse file" in problem(
        lambda: read_archive(path, progress=False)
    )


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_with_long_names_and_pax_headers_reads_the_same_as_its_folder(tmp_path: Path, form: int) -> None:
    files = {name.replace("cat", "k\u00e4tzchen" + "x" * 120).replace("/0", "/" + "0" * 200): content
             for name, content in tree().items()}  # fmt: skip
    expected = read_folder(unpacked(tmp_path / "folder", files))
    notes = {"comment": "of all", "SCHILY.xattr.user.a": "b"} if form == tarfile.PAX_FORMAT else None
    with tarfile.open(tmp_path / "x.tar", "w", format=form, pax_headers=notes) as archive:
        archive.add(tmp_path / "folder", "data")
    assert same(read_archive(tmp_path / "x.tar", progress=False), expected)


# Images that unpack to many bytes


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def segment(kind: int, content: bytes) -> bytes:
    return bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content


def with_parts(picture: bytes, *parts: bytes) -> bytes:
    """The image with extra parts after its PNG header or at the start of a JPEG."""
    start = 33 if picture.startswith(image_folder.PNG) else 2
    return picture[:start] + b"".join(parts) + picture[start:]


def test_image_metadata_is_skipped_without_being_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_folder(unpacked(tmp_path / "plain", tree() | {"train/cat/3.jpg": png(50, form="JPEG")}))
    notes = [chunk(kind, b"a\0\0" + zlib.compress(bytes(2**20))) for kind in (b"zTXt", b"iCCP", b"acTL")]
    notes.append(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**20))))
    files = {name: with_parts(content, *notes) for name, content in tree().items()}
    marks = [segment(kind, b"Exif\0\0" + bytes(60000)) for kind in (0xE1, 0xE2, 0xED, 0xFE)]
    files["train/cat/3.jpg"] = with_parts(png(50, form="JPEG"), b"\xff" * 1000, *marks)
    folder = unpacked(tmp_path / "noted", files)

    def unpack(*_: object) -> None:
        raise AssertionError("it is unpacked")

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", unpack)
    monkeypatch.setattr(PngImagePlugin.PngStream, "check_text_memory", unpack)
    assert same(read_folder(folder), expected)


@pytest.mark.parametrize(
    "picture",
    [
        with_parts(png(1), *([chunk(b"teSt", b"")] * image_folder.MOST_PICTURE_PARTS)),
        with_parts(png(1), *([chunk(b"IDAT", b"")] * image_folder.MOST_PICTURE_PARTS)),
        with_parts(png(1, form="JPEG"), *([segment(0xC4, b"")] * image_folder.MOST_PICTURE_PARTS)),
        with_parts(png(1, form="JPEG"), *([segment(0xE1, b"")] * image_folder.MOST_PICTURE_PARTS)),
        png(1, form="JPEG")[:-2] + segment(0xDA, b"\x01\x01\x00\x3f\x01\x01") * (image_folder.MOST_PICTURE_PARTS + 1),
        image_folder.JPEG + b"\xff" * 2**19,
        with_parts(png(1), (2**31).to_bytes(4, "big") + b"teSt"),
    ],
    ids=["chunks", "pixels", "tables", "notes", "scans", "fill", "length"],
)
def test_an_image_with_too_many_or_oversized_parts_is_rejected(tmp_path: Path, picture: bytes) -> None:
    folder = unpacked(tmp_path, tree() | {"train/cat/1.png": picture})
    assert "cannot be read as PNG or JPEG (ValueError)" in problem(lambda: read_folder(folder))


# Archives that are truncated or damaged


class Whole:
    """Undamaged archives and their content. A class, so that a failure does not print the bytes."""

    def __init__(self, folder: Path) -> None:
        kinds = ("tar", "tar.gz", "tar.xz")
        self.content = {kind: archived(folder / f"x.{kind}", tree()).read_bytes() for kind in kinds}
        self.pixels = read_archive(folder / "x.tar", progress=False)
        self.path = folder / "damaged"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_tar_truncated_at_a_header_is_rejected(whole: Whole, extra: int) -> None:
    # tarfile.open ends without an error here. There are 10 members of a header and a block each, then zeros.
    path = whole.path.with_suffix(".tar")
    for size in range(1024, 10 * 1024 + 1, 1024):
        path.write_bytes(whole.content["tar"][: size + extra])
        assert "truncated or damaged" in problem(lambda: read_archive(path, progress=False))


def test_a_tar_with_a_damaged_header_is_rejected(whole: Whole) -> None:
    path = whole.path.with_suffix(".tar")
    for header in range(0, 10 * 1024, 1024):  # here, too, tarfile.open ends without an error
        damaged = bytearray(whole.content["tar"])
        damaged[header] ^= 1
        path.write_bytes(damaged)
        assert "truncated or damaged" in problem(lambda: read_archive(path, progress=False))


def test_a_tar_with_a_zeroed_header_is_rejected(whole: Whole) -> None:
    path = whole.path.with_suffix(".tar")
    for header in range(0, 10 * 1024, 1024):
        path.write_bytes(whole.content["tar"][:header] + bytes(512) + whole.content["tar"][header + 512 :])
        assert "continues after its end" in problem(lambda: read_archive(path, progress=False))


@settings(max_examples=60, deadline=None)
@given(choose=st.data())
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_a_truncated_archive_is_never_read_as_a_smaller_one(whole: Whole, kind: str, choose: st.DataObject) -> None:
    content, path = whole.content[kind], whole.path.with_suffix(f".{kind}")
    # In an uncompressed tar, also between members, where each header starts.
    step = choose.draw(st.sampled_from([1, 512]))
    path.write_bytes(content[: step * choose.draw(st.integers(0, (len(content) - 1) // step))])
    try:
        assert same(read_archive(path, progress=False), whole.pixels)
    except UserError as mistake:
        assert "truncated or damaged" in str(mistake)
    else:
        assert kind == "tar" and not any(content[path.stat().st_size - 512 :]), "more than padding is missing"


@settings(max_examples=60, deadline=None)
@given(choose=st.data())
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_a_damaged_byte_is_detected_or_changes_no_label(whole: Whole, kind: str, choose: st.DataObject) -> None:
    damaged, path = bytearray(whole.content[kind]), whole.path.with_suffix(f".{kind}")
    damaged[choose.draw(st.integers(0, len(damaged) - 1))] ^= choose.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        pixels = read_archive(path, progress=False)
    except UserError:
        return
    # gzip and xz have checksums over everything. An uncompressed tar has them only over its headers, and Pillow does
    # not check those of PNG's pixels.
    assert torch.equal(pixels.train_labels, whole.pixels.train_labels)
    assert torch.equal(pixels.test_labels, whole.pixels.test_labels)
    assert kind == "tar" or same(pixels, whole.pixels)
