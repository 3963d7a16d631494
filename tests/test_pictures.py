"""Picture folders and archives of them: what is read, and what is refused."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tune_kd import pictures
from tune_kd.pictures import Pixels, listing, read_archive
from tune_kd.study import Mistake

CLASSES = ("cat", "dog")


def png(value: int, *, size: int = 32, mode: str = "RGB", form: str = "PNG") -> bytes:
    """A grey picture whose first pixel is (value, 1, 2), so that channels and order show."""
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
    return pictures.read_folder(folder, listing(folder), progress=False)


def same(one: Pixels, other: Pixels) -> bool:
    tensors = ("train_images", "train_labels", "test_images", "test_labels")
    return one.classes == other.classes and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def problem(read: Callable[[], object]) -> str:
    """The one sentence with which `read` is refused."""
    with pytest.raises(Mistake) as caught:
        read()
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    return sentence


def test_a_folder_is_read_in_the_order_of_its_sorted_names(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("suffix", pictures.ARCHIVES)
@pytest.mark.parametrize("outer", ["", "./", "cifar/"])
def test_an_archive_gives_what_its_folder_gives(tmp_path: Path, suffix: str, outer: str) -> None:
    expected = read_folder(unpacked(tmp_path / "folder", tree()))
    shuffled = {outer + name: content for name, content in reversed(tree().items())}
    archive = archived(tmp_path / f"images{suffix}", shuffled)
    assert same(read_archive(archive, progress=False), expected)


def test_jpeg_files_and_capital_suffixes_are_pictures_and_other_files_are_not(tmp_path: Path) -> None:
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


# Layouts and pictures that are refused, in a folder and in an archive alike


def without(prefix: str) -> dict[str, bytes]:
    return {name: content for name, content in tree().items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (without("test/"), ["test", "train/CLASS"]),
        (without("train/"), ["train", "test/CLASS"]),
        (without("test/dog"), ["same classes", "'dog'"]),
        (without("train/cat"), ["same classes", "'cat'"]),
        (
            {n: c for n, c in tree().items() if n not in ("train/cat/0.png", "train/cat/1.png")},
            ["'cat'", "one"],
        ),
        (tree() | {"train/cat/1.png": png(1, size=31)}, ["train/cat/1.png", "31x31", "32x32"]),
        (tree() | {"train/cat/1.png": png(1, mode="L")}, ["train/cat/1.png", "L 32x32", "RGB"]),
        (tree() | {"train/cat/1.png": png(1)[:-30]}, ["train/cat/1.png", "cannot be read"]),
        (tree() | {"train/cat/1.png": b""}, ["train/cat/1.png", "cannot be read"]),
        (tree() | {"train/cat/1.png": png(1, form="GIF")}, ["train/cat/1.png", "cannot be read"]),
        (tree() | {"train/cat/1.png": bytes(2**20 + 1)}, ["train/cat/1.png", "1048577"]),
    ],
    ids=[
        "no test",
        "no train",
        "test class",
        "train class",
        "one",
        "size",
        "grey",
        "cut",
        "empty",
        "gif",
        "huge",
    ],
)
def test_wrong_layouts_and_pictures_are_named(tmp_path: Path, files: dict[str, bytes], words: list[str]) -> None:
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
def test_a_hostile_archive_is_refused_and_nothing_is_written(
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


def test_an_archive_with_absurdly_many_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_MEMBERS", 5)
    archive = archived(tmp_path / "x.tar", tree())
    assert "more than 5 members" in problem(lambda: read_archive(archive, progress=False))


def test_an_archive_that_unpacks_to_absurdly_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_ARCHIVE_BYTES", 2**21)
    archive = archived(tmp_path / "x.tar.xz", {f"{i}.bin": bytes(2**20) for i in range(4)})
    assert archive.stat().st_size < 2**14
    assert "unpacks to more than" in problem(lambda: read_archive(archive, progress=False))


def test_a_forged_header_cannot_make_the_reader_hold_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST_ARCHIVE_BYTES", 2**21)
    member = tarfile.TarInfo("long")
    member.type = tarfile.GNUTYPE_LONGNAME  # tarfile reads a long name whole, before anyone sees the member
    member.size = 2**23
    archive = packed(tmp_path / "x.tar.gz", [(member, bytes(2**23))])
    assert "unpacks to more than" in problem(lambda: read_archive(archive, progress=False))


def test_nested_headers_without_end_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type = tarfile.XHDTYPE  # each is read by a recursive call
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.USTAR_FORMAT) * 5000)
    assert "cut or damaged" in problem(lambda: read_archive(path, progress=False))


# Archives that are cut or damaged


class Whole:
    """Undamaged archives, and what is in them. A class, so that a failure does not print the bytes."""

    def __init__(self, folder: Path) -> None:
        kinds = ("tar", "tar.gz", "tar.xz")
        self.content = {kind: archived(folder / f"x.{kind}", tree()).read_bytes() for kind in kinds}
        self.pixels = read_archive(folder / "x.tar", progress=False)
        self.path = folder / "damaged"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_tar_cut_where_a_header_starts_is_not_taken_for_a_whole_one(whole: Whole, extra: int) -> None:
    # tarfile ends in silence here; 10 members of a header and a block each, then zeros.
    path = whole.path.with_suffix(".tar")
    for size in range(1024, 10 * 1024 + 1, 1024):
        path.write_bytes(whole.content["tar"][: size + extra])
        assert "cut or damaged" in problem(lambda: read_archive(path, progress=False))


def test_a_tar_with_a_damaged_header_is_not_taken_for_a_whole_one(whole: Whole) -> None:
    path = whole.path.with_suffix(".tar")
    for header in range(0, 10 * 1024, 1024):  # here, too, tarfile ends in silence
        damaged = bytearray(whole.content["tar"])
        damaged[header] ^= 1
        path.write_bytes(damaged)
        assert "cut or damaged" in problem(lambda: read_archive(path, progress=False))


@settings(max_examples=60, deadline=None)
@given(choose=st.data())
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_a_cut_archive_is_never_taken_for_a_smaller_one(whole: Whole, kind: str, choose: st.DataObject) -> None:
    content, path = whole.content[kind], whole.path.with_suffix(f".{kind}")
    # In a bare tar, also right between members, where each header starts.
    step = choose.draw(st.sampled_from([1, 512]))
    path.write_bytes(content[: step * choose.draw(st.integers(0, (len(content) - 1) // step))])
    try:
        assert same(read_archive(path, progress=False), whole.pixels)
    except Mistake as mistake:
        assert "cut or damaged" in str(mistake)
    else:
        assert kind == "tar" and not any(content[path.stat().st_size - 512 :]), "more than padding is missing"


@settings(max_examples=60, deadline=None)
@given(choose=st.data())
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_damage_is_noticed_or_harmless(whole: Whole, kind: str, choose: st.DataObject) -> None:
    damaged, path = bytearray(whole.content[kind]), whole.path.with_suffix(f".{kind}")
    damaged[choose.draw(st.integers(0, len(damaged) - 1))] ^= choose.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        pixels = read_archive(path, progress=False)
    except Mistake:
        return
    # gzip and xz have checksums over all. A bare tar has them over its headers alone, and Pillow does not
    # compare those of PNG's pixels.
    assert torch.equal(pixels.train_labels, whole.pixels.train_labels)
    assert torch.equal(pixels.test_labels, whole.pixels.test_labels)
    assert kind == "tar" or same(pixels, whole.pixels)
