"""Data sets, their split and sizes, and the views of an epoch."""

import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as reference
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tune_kd.data import augment, datasets as rooms
from tune_kd.data.augment import crop, draw_views, numbered_views, prepare, show, view_numbers
from tune_kd.data.cifar import CIFAR_CLASSES, recognised
from tune_kd.data.cifar_pickles import CIFAR100
from tune_kd.data.datasets import DataSet, Split, load
from tune_kd.data.image_folder import Pixels
from tune_kd.study.cost import IMAGES
from tune_kd.system.errors import UserError

REAL_ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cifar10-images.tar.xz"
PARTS = ("train", "validation", "test")


def parts(data: DataSet) -> dict[str, Split]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def numbered(train: int, test: int, classes: int = 10) -> Pixels:
    """A stand-in for CIFAR-10 in which every image contains its own number, so that overlaps are visible."""

    def part(count: int, start: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(start, start + count)
        pixels = torch.stack([numbers // 65536, numbers // 256 % 256, numbers % 256], dim=1)
        return pixels.to(torch.uint8)[:, :, None, None], torch.arange(count) % classes

    return Pixels(tuple(f"class{i}" for i in range(classes)), *part(train, 0), *part(test, train))


def numbers(split: Split) -> list[int]:
    channels = split.images.flatten(1).to(torch.int64)
    return (channels @ torch.tensor([65536, 256, 1])).tolist()


@pytest.fixture(autouse=True)
def small_ones_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow small stand-ins for CIFAR-10. A separate test checks that they are otherwise rejected."""
    monkeypatch.setattr(rooms, "recognised", lambda pixels, _: pixels)


@pytest.fixture
def whole_cifar10(monkeypatch: pytest.MonkeyPatch) -> Pixels:
    pixels = numbered(50_000, 10_000)
    monkeypatch.setattr(rooms, "load_pixels", lambda folder, **_: pixels)
    return pixels


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


# Digits


def test_the_digest_of_digits_is_pinned(digits: DataSet) -> None:
    assert digits.digest == "49354611e464849e78e9db227c60aa9409de0bee3b9ba527e00803f60a53d3b5"


def test_digits_are_scaled_to_uint8_in_three_equal_channels(digits: DataSet) -> None:
    images = digits.train.images
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 8, 8)
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert len(set(images.flatten().tolist())) == 17
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_digits_are_split_60_20_20_in_every_class(digits: DataSet) -> None:
    counts = {name: part.labels.bincount() for name, part in parts(digits).items()}
    whole = sum(counts.values(), torch.zeros(10, dtype=torch.int64))
    assert int(whole.sum()) == 1797
    for name, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert (counts[name] / whole - share).abs().max() < 0.01


def test_digits_are_upsampled_to_16_by_16(digits: DataSet) -> None:
    assert (digits.pad, digits.flip, digits.upsample) == (1, False, 2)
    assert prepare(digits.train.images[:5], digits).shape == (5, 3, 16, 16)


def test_digits_mean_and_std_are_those_of_the_training_pixels(digits: DataSet) -> None:
    pixels = digits.train.images.to(torch.float64) / 255
    assert digits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert digits.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=6e-5)


def test_loading_digits_reports_that_a_data_folder_is_not_read(tmp_path: Path) -> None:
    said: list[str] = []
    load("digits", tmp_path, say=said.append)
    assert len(said) == 1 and str(tmp_path) in said[0]


# CIFAR-10's split


def test_cifar10_is_split_45000_5000_10000_with_balanced_classes(whole_cifar10: Pixels) -> None:
    data = load("cifar10", say=pytest.fail)
    for part, a_class in ((data.train, 4500), (data.validation, 500), (data.test, 1000)):
        assert part.labels.bincount().tolist() == [a_class] * 10
    assert (data.pad, data.flip, data.upsample) == (4, True, 1)
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.std == (0.2470, 0.2435, 0.2616)


def test_cifar100_is_split_45000_5000_10000_with_balanced_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    pixels = numbered(50_000, 10_000, classes=100)
    monkeypatch.setattr(rooms, "load_pixels", lambda folder, **options: asked.append(options["form"]) or pixels)
    data = load("cifar100", say=pytest.fail)
    for part, a_class in ((data.train, 450), (data.validation, 50), (data.test, 100)):
        assert part.labels.bincount().tolist() == [a_class] * 100
    assert (data.name, data.pad, data.flip, len(data.classes)) == ("cifar100", 4, True, 100)
    assert data.mean == (0.5071, 0.4865, 0.4409)
    assert data.std == (0.2673, 0.2564, 0.2762)
    assert asked == [CIFAR100]
    assert {name: images.views for name, images in IMAGES.items()}["cifar100"] == data.views_per_image


def test_no_image_is_in_two_parts_and_none_is_lost(whole_cifar10: Pixels) -> None:
    data = load("cifar10")
    everything = [number for part in parts(data).values() for number in numbers(part)]
    assert sorted(everything) == list(range(60_000))
    assert min(numbers(data.test)) == 50_000, "a test image among the training images, or the other way"


def test_labels_stay_with_their_images(whole_cifar10: Pixels) -> None:
    data = load("cifar10", train=777)
    assert [number % 10 for number in numbers(data.train)] == data.train.labels.tolist()


def test_only_the_split_seed_changes_the_split(whole_cifar10: Pixels) -> None:
    torch.manual_seed(1)
    first = load("cifar10")
    torch.manual_seed(2)
    assert load("cifar10").digest == first.digest
    other = load("cifar10", split_seed=1)
    assert other.digest != first.digest
    assert set(numbers(other.validation)) != set(numbers(first.validation))


def test_loading_leaves_the_global_generator_alone(whole_cifar10: Pixels) -> None:
    before = torch.get_rng_state()
    load("cifar10", train=100)
    load("digits", train=100)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_smaller_part_is_balanced_and_contained_in_every_larger_one(choose: st.DataObject) -> None:
    pixels = numbered(choose.draw(st.integers(60, 300)), choose.draw(st.integers(30, 90)), classes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "load_pixels", lambda folder, **_: pixels)
        whole = load("cifar10", say=lambda _: None)
        large = {n: choose.draw(st.integers(3, len(p.labels))) for n, p in parts(whole).items()}
        small = {n: choose.draw(st.integers(3, size)) for n, size in large.items()}
        at_large = load("cifar10", say=lambda _: None, **large)  # type: ignore[arg-type]
        at_small = load("cifar10", say=lambda _: None, **small)  # type: ignore[arg-type]
    for name, part in parts(at_small).items():
        assert len(part.labels) == small[name]
        assert set(numbers(part)) <= set(numbers(parts(at_large)[name])) <= set(numbers(parts(whole)[name]))
        counts, most = part.labels.bincount(minlength=3), parts(whole)[name].labels.bincount()
        full = counts == most  # only a class with no images left may have fewer
        assert counts[~full].numel() == 0 or int(counts.max() - counts[~full].min()) <= 1


def test_cifar_with_wrong_counts_of_images_or_classes_is_rejected() -> None:
    with pytest.raises(UserError, match=r"49999 training and 10000 test .* 50000 and 10000"):
        recognised(numbered(49_999, 10_000), "cifar10")
    with pytest.raises(UserError, match=r"of 10 classes, but CIFAR-100 has 50000 and 10000 of 100"):
        recognised(numbered(50_000, 10_000), "cifar100")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_recognised_by_its_class_names(name: str) -> None:
    published = CIFAR_CLASSES[name]
    assert list(published) == sorted(set(published))
    whole = replace(numbered(50_000, 10_000, classes=len(published)), classes=published)
    assert torch.equal(recognised(whole, name).train_labels, whole.train_labels)
    other = ("acorn", *published[1:-1], "zebra")
    with pytest.raises(UserError) as refused:
        recognised(replace(whole, classes=other), name)
    for words in ("has no class 'acorn', 'zebra',", f"its class {published[0]!r}, {published[-1]!r} is missing"):
        assert words in str(refused.value)
    with pytest.raises(UserError, match=r"has no class 'class0', 'class1', 'class2', 'class3', 'class4' \.\.\.,"):
        recognised(numbered(50_000, 10_000, classes=len(published)), name)


@pytest.mark.parametrize(
    "classes",
    [
        ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ("Aeroplane", "AUTO", "Bird", "Cat", "Deer", "Dog", "Frog", "Horse", "Ship", "Truck"),
        tuple(f"({number}) {name.upper()}" for number, name in enumerate(CIFAR_CLASSES["cifar10"])),
        tuple(f"{number:02d}_{name}" for number, name in enumerate(CIFAR_CLASSES["cifar10"])),
    ],
)
def test_cifar10_with_other_spellings_of_its_classes_is_recognised(classes: tuple[str, ...]) -> None:
    """Folders are sorted by name, so `car` comes after `bird`; in the published order, `automobile` comes before it."""
    published = replace(numbered(50_000, 10_000), classes=CIFAR_CLASSES["cifar10"])
    by_name = sorted(range(10), key=lambda label: classes[label])
    position = torch.tensor(by_name).argsort()
    read = replace(
        published,
        classes=tuple(classes[label] for label in by_name),
        train_labels=position[published.train_labels],
        test_labels=position[published.test_labels],
    )
    found = recognised(read, "cifar10")
    assert found.classes == published.classes
    assert torch.equal(found.train_labels, published.train_labels)
    assert torch.equal(found.test_labels, published.test_labels)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("AquariumFish", "aquarium_fish"), ("aquarium fish", "aquarium_fish"), ("Maple", "maple_tree"), ("cra", "crab"),
     ("computer_keyboard", "keyboard"), ("lawnmower", "lawn_mower"),
     ("pick-up truck", "pickup_truck"), ("46 man", "man")],
)  # fmt: skip
def test_common_spellings_of_cifar100_classes_are_recognised(spelled: str, name: str) -> None:
    published = CIFAR_CLASSES["cifar100"]
    whole = replace(numbered(50_000, 10_000, classes=100), classes=published)
    called = replace(whole, classes=tuple(spelled if each == name else each for each in published))
    assert recognised(called, "cifar100").classes == published


def test_cifar10_with_two_folders_for_one_class_is_rejected() -> None:
    doubled = ("airplane", "automobile", "bird", "car", "cat", "deer", "dog", "frog", "horse", "ship")
    with pytest.raises(UserError, match="has no class 'automobile', 'car', and its class 'truck' is missing"):
        recognised(replace(numbered(50_000, 10_000), classes=doubled), "cifar10")


# Mistakes


def test_loading_an_unknown_data_set_raises() -> None:
    with pytest.raises(AssertionError):
        load("mnist")


def test_all_impossible_sizes_are_reported_with_value_and_limit(whole_cifar10: Pixels) -> None:
    with pytest.raises(UserError) as caught:
        load("cifar10", train=45_001, validation=9, test=10_001)
    train, validation, test = caught.value.problems
    assert "train" in train and "45001" in train and "45000" in train
    assert "validation" in validation and "9 " in validation and "10" in validation
    assert "test" in test and "10001" in test and "10000" in test


def test_sizes_that_just_fit_are_accepted(whole_cifar10: Pixels) -> None:
    data = load("cifar10", train=45_000, validation=10, test=10_000)
    assert data.validation.labels.bincount().tolist() == [1] * 10


def test_all_sizes_below_one_are_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load("digits", train=0, test=-3)
    assert len(caught.value.problems) == 2


# Digest


@pytest.mark.parametrize("change", [{"train": 1000}, {"validation": 100}, {"test": 100}, {"split_seed": 1}])
def test_the_digest_covers_split_and_sizes(digits: DataSet, change: dict[str, int]) -> None:
    assert load("digits", **change).digest != digits.digest  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", ["train_images", "train_labels", "test_images", "test_labels"])
def test_the_digest_covers_every_pixel_and_label(monkeypatch: pytest.MonkeyPatch, tensor: str) -> None:
    pixels = numbered(100, 30)
    monkeypatch.setattr(rooms, "load_pixels", lambda folder, **_: pixels)
    before = load("cifar10", say=lambda _: None).digest
    original = pixels
    swapped = getattr(original, tensor).clone()
    swapped[[0, 1]] = swapped[[1, 0]]  # two items change places, so that every count stays the same
    pixels = replace(original, **{tensor: swapped})
    assert load("cifar10", say=lambda _: None).digest != before
    for place in (0, getattr(original, tensor).numel() // 2, -1):
        changed = getattr(original, tensor).clone()
        changed.view(-1)[place] ^= 1
        pixels = replace(original, **{tensor: changed})
        assert load("cifar10", say=lambda _: None).digest != before


@pytest.mark.parametrize(
    "change", [{"pad": 2}, {"flip": True}, {"upsample": 1}, {"mean": (0.3, 0.3, 0.3)}, {"std": (0.3, 0.3, 0.3)}]
)
def test_the_digest_covers_augmentation_and_normalisation(
    digits: DataSet, change: dict[str, float | bool | tuple[float, ...]]
) -> None:
    known = {"mean": digits.mean, "std": digits.std, "pad": 1, "flip": False, "upsample": 2}

    def digest(**rule: object) -> str:
        return rooms._finished("digits", digits.classes, parts(digits), **rule).digest  # type: ignore[arg-type]

    assert digest(**known) == digits.digest
    assert digest(**{**known, **change}) != digits.digest


# Views


@given(st.integers(0, 2**40), st.integers(0, 10_000), st.integers(0, 200), st.integers(0, 5), st.booleans())
def test_views_have_a_permutation_and_offsets_within_the_padding(
    seed: int, epoch: int, count: int, pad: int, flip: bool
) -> None:
    views = draw_views(seed, epoch, count, pad=pad, flip=flip)
    assert sorted(views.order.tolist()) == list(range(count))
    for offset in (views.top, views.left):
        assert offset.dtype == torch.int64 and offset.shape == (count,)
        assert count == 0 or 0 <= int(offset.min()) <= int(offset.max()) <= 2 * pad
    assert views.flip.dtype == torch.bool and views.flip.shape == (count,)
    assert flip or not views.flip.any()


def test_views_depend_only_on_seed_epoch_and_count() -> None:
    torch.manual_seed(1)
    first = draw_views(3, 7, 500, pad=4, flip=True)
    torch.manual_seed(2)
    draw_views(3, 8, 500, pad=4, flip=True)
    again = draw_views(3, 7, 500, pad=4, flip=True)
    for name in ("order", "top", "left", "flip"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    # Pinned: a change in PyTorch or in the name of a stream would change every study's results.
    assert first.order[:8].tolist() == [315, 60, 399, 195, 490, 79, 269, 36]
    assert first.top[:8].tolist() == [2, 4, 2, 6, 7, 1, 7, 3]
    assert first.flip[:8].int().tolist() == [0, 0, 1, 0, 0, 0, 1, 1]


def test_drawing_views_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_views(0, 1, 100, pad=4, flip=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_different_seeds_and_epochs_draw_different_views() -> None:
    drawn = [draw_views(seed, epoch, 100, pad=4, flip=True) for seed in range(4) for epoch in range(1, 5)]
    for name in ("order", "top", "left", "flip"):
        assert len({tuple(getattr(views, name).tolist()) for views in drawn}) == 16


def test_padding_and_flipping_do_not_change_the_other_draws() -> None:
    with_crops, without = draw_views(0, 1, 300, pad=4, flip=True), draw_views(0, 1, 300, pad=0, flip=True)
    assert torch.equal(with_crops.order, without.order)
    assert torch.equal(with_crops.flip, without.flip)
    assert torch.equal(with_crops.top, draw_views(0, 1, 300, pad=4, flip=False).top)


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    views = draw_views(0, 1, 90_000, pad=1, flip=True)
    cells = (views.top * 3 + views.left) * 2 + views.flip.long()
    expected = 90_000 / 18
    chi2 = float(((cells.bincount(minlength=18) - expected) ** 2 / expected).sum())
    assert chi2 < 40.8  # 17 degrees of freedom, p = 0.001; the draw is fixed, so this cannot be flaky


@pytest.mark.parametrize("wrong", [{"count": -1, "pad": 1}, {"count": 1, "pad": -1}])
def test_negative_counts_and_pads_raise(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="-1"):
        draw_views(0, 1, wrong["count"], pad=wrong["pad"], flip=False)


# Crops


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (8, 1), (5, 0)])
def test_crops_equal_torchvision_at_every_offset_and_both_flips(size: int, pad: int) -> None:
    offsets = range(2 * pad + 1)
    views = list(itertools.product(offsets, offsets, (False, True)))
    images = torch.randint(0, 256, (len(views), 3, size, size), dtype=torch.uint8)
    top, left, flip = (torch.tensor(column) for column in zip(*views, strict=True))
    crops = crop(images, top, left, flip, pad)
    assert crops.dtype == torch.uint8
    for image, (y, x, mirrored), ours in zip(images, views, crops, strict=True):
        theirs = reference.crop(reference.pad(image, [pad]), y, x, size, size)
        assert torch.equal(ours, reference.hflip(theirs) if mirrored else theirs), (y, x, mirrored)


@given(st.data())
def test_crops_equal_torchvision_for_images_that_are_not_square(choose: st.DataObject) -> None:
    height, width = choose.draw(st.integers(1, 6)), choose.draw(st.integers(1, 6))
    pad, batch = choose.draw(st.integers(0, 3)), choose.draw(st.integers(1, 3))
    image = torch.arange(batch * 3 * height * width).add(1).reshape(batch, 3, height, width).to(torch.uint8)
    views = draw_views(choose.draw(st.integers(0, 99)), 1, batch, pad=pad, flip=True)
    ours = crop(image, views.top, views.left, views.flip, pad)
    for i in range(batch):
        top, left = int(views.top[i]), int(views.left[i])
        theirs = reference.crop(reference.pad(image[i], [pad]), top, left, height, width)
        assert torch.equal(ours[i], reference.hflip(theirs) if views.flip[i] else theirs)


# What reaches the network


def test_prepare_equals_torchvision_normalisation(digits: DataSet) -> None:
    data = replace(digits, upsample=1, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    theirs = reference.normalize(images.float() / 255, list(data.mean), list(data.std))
    assert torch.equal(prepare(images, data), theirs)


def test_upsampling_repeats_pixels(digits: DataSet) -> None:
    images = digits.test.images[:3]
    small, large = prepare(images, replace(digits, upsample=1)), prepare(images, digits)
    assert large.dtype == torch.float32
    assert torch.equal(large, small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_prepared_training_images_are_centred_and_scaled(digits: DataSet) -> None:
    pixels = prepare(digits.train.images, digits)
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-3)
    assert float(pixels.std()) == pytest.approx(1, abs=1e-3)


def test_preparing_images_in_inference_mode_does_not_break_later_training(digits: DataSet) -> None:
    # Otherwise the cached mean and std would be inference tensors, which autograd refuses to save.
    data = replace(digits, mean=(0.11, 0.12, 0.13), std=(0.21, 0.22, 0.23))
    with torch.inference_mode():
        prepare(digits.test.images[:2], data)
    scale = torch.ones(1, requires_grad=True)
    torch.autograd.grad((prepare(digits.test.images[:2], data) * scale).sum(), scale)
    assert not augment._per_channel(data.mean, torch.device("cpu")).is_inference()


def test_importing_datasets_opens_no_connection_and_imports_no_image_library() -> None:
    script = (
        "import sys\n"
        "def refuse(event, _):\n"
        "    assert event not in ('socket.connect', 'socket.getaddrinfo'), event\n"
        "sys.addaudithook(refuse)\n"
        "import tune_kd.data.datasets\n"
        "print(sorted({'torchvision', 'PIL', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The real images


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSet, Path]:
    if not REAL_ARCHIVE.is_file():
        pytest.skip(f"needs {REAL_ARCHIVE.name}, which is not part of the project")
    cache = tmp_path_factory.mktemp("cache")
    return load("cifar10", REAL_ARCHIVE, cache=cache, progress=False, say=pytest.fail), cache


def test_the_real_archive_contains_all_of_cifar10(real: tuple[DataSet, Path]) -> None:
    data, _ = real
    assert data.classes[:2] == ("airplane", "automobile") and len(data.classes) == 10
    assert [len(part.labels) for part in parts(data).values()] == [45_000, 5_000, 10_000]
    pixels = data.train.images[:, :, ::4, ::4].to(torch.float32) / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(data.mean, abs=0.005)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(data.std, abs=0.005)


def test_a_second_load_is_fast_and_identical(real: tuple[DataSet, Path]) -> None:
    data, cache = real
    start = time.monotonic()
    again = load("cifar10", REAL_ARCHIVE, cache=cache, progress=False, say=pytest.fail)
    assert time.monotonic() - start < 6  # 1.5 s on two idle cores; decoding takes 14
    assert again.digest == data.digest


@given(seed=st.integers(0, 99), pad=st.integers(0, 4), flip=st.booleans())
def test_view_numbers_round_trip_and_are_unique(digits: DataSet, seed: int, pad: int, flip: bool) -> None:
    shown = replace(digits, pad=pad, flip=flip)
    views = draw_views(seed, 1, len(shown.train.labels), pad=pad, flip=flip)
    numbers = view_numbers(views, shown)
    again = numbered_views(numbers, shown)
    for name in ("order", "top", "left", "flip"):
        assert torch.equal(getattr(again, name), getattr(views, name))
    everything = torch.arange(5 * shown.views_per_image)
    assert torch.equal(view_numbers(numbered_views(everything, shown), shown), everything)


def test_show_returns_the_drawn_crop_of_the_drawn_image(digits: DataSet) -> None:
    views = draw_views(3, 2, len(digits.train.labels), pad=digits.pad, flip=digits.flip)
    expected = crop(digits.train.images[views.order], views.top, views.left, views.flip, digits.pad)
    assert torch.equal(show(views, digits), expected)
    assert torch.equal(show(views[10:20], digits), expected[10:20])
