"""Teachers by trial id: published once, shared by runs, their logits cached.

TEACHERS/ID/weights.safetensors   the best-validation weights
TEACHERS/ID/card.json             the trial, its epochs, and the digest of the weights; written last
TEACHERS/ID/answers/KEY/          logits for views and for the test images; KEY is a hash of all that they depend on
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from pydantic import ValidationError
from torch import Tensor

from tune_kd.data.augment import Views, draw_views, numbered_views, prepare, show, view_numbers
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.study.trial import Answering, Epoch, Trial
from tune_kd.system.adapters import adapter
from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UnexpectedFile
from tune_kd.system.files import MOST_RECORD_BYTES, publish, read, sealed, sha256, unsealed
from tune_kd.system.object_store import Mirror
from tune_kd.training import networks
from tune_kd.training.checkpoints import MOST_STATE_BYTES, pack, unpack
from tune_kd.training.compilation import Compiled, Function, compiled, compiling_pays
from tune_kd.training.device import autocast, first_line, float32_as
from tune_kd.training.logit_cache import LogitCache
from tune_kd.training.notices import tell

if TYPE_CHECKING:  # importing torchvision takes seconds, and the driver of a run does not need it
    from torchvision.models import ResNet

BATCH = 512  # views per forward pass on a CPU; fixed, so that recomputed logits are bitwise identical
GPU_BATCH = {torch.bfloat16: 1024, torch.float32: 512}  # on a GPU, by the type of the logits; both take the same memory


class TeacherChanged(RuntimeError):
    """A teacher's file differs from the published one."""


@dataclass(frozen=True)
class Card:
    """Description of a teacher: the trial that trained it, its epochs, and the SHA-256 of its weights file."""

    trial: Trial
    epochs: list[Epoch]
    weights_sha256: str


def publish_teacher(folder: Path, trial: Trial, weights: dict[str, Tensor], epochs: Iterable[Epoch]) -> None:
    """Publish a trained teacher. The card is written last: a teacher without a card counts as missing."""
    home = folder / trial.trial_id
    home.mkdir(parents=True, exist_ok=True)
    data = pack(weights, {"teacher_id": trial.trial_id})
    mirror = Mirror.of(folder)
    mirror.publish(home / "weights.safetensors", data)
    point("teacher.weights")
    card = {
        "teacher_id": trial.trial_id,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "trial": asdict(trial),
        "epochs": [asdict(epoch) for epoch in epochs],
    }
    mirror.publish(home / "card.json", sealed(card))


def fetch_teacher(folder: Path, teacher_id: str) -> None:
    """Download a teacher if its folder is mirrored, once per machine. Raises OSError."""
    home, mirror = folder / teacher_id, Mirror.of(folder)
    if mirror.url is None:
        return
    with writing(folder, teacher_id):
        card = home / "card.json"
        there = mirror.read(card, MOST_RECORD_BYTES)
        if there is None or (card.is_file() and read(card, MOST_RECORD_BYTES) == there):
            return
        mirror.fetch(home / "weights.safetensors", MOST_STATE_BYTES)
        publish(card, there)


def published_epochs(folder: Path, teacher_id: str) -> list[Epoch] | None:
    """The epochs of a published teacher with intact weights. Returns None if it has to be trained."""
    card = _card(folder, teacher_id)
    if card is None or _digest(folder / teacher_id / "weights.safetensors") != card.weights_sha256:
        return None
    return card.epochs


def wrong_with(folder: Path, teacher_id: str, taught: str | None = None) -> str | None:
    """The fault of a published teacher. Returns None if it has none.

    A missing or different teacher is a fault only if the run used one; `taught` is the digest of that one's outcome.
    """
    home = folder / teacher_id
    if not os.path.exists(home / "card.json"):
        return f"{home / 'card.json'} is missing" if taught is not None else None
    card = _card(folder, teacher_id)
    if card is None:
        return f"{home / 'card.json'} was changed after it was written"
    if _digest(home / "weights.safetensors") != card.weights_sha256:
        return f"{home / 'weights.safetensors'} does not match its card"
    if taught is not None and taught != _outcome_digest(card):
        return f"{home} was trained again, and is not the teacher that this run had"
    return None


def unfit(folder: Path, trial: Trial) -> str | None:
    """The reason why the teacher published under a trial's id cannot be used, e.g. a card that was put there by hand.

    Returns None if it can be used, or if there is none.
    """
    home = folder / trial.trial_id
    remedy = f"remove {home} to have this teacher trained, or put an intact one there"
    try:
        card = _read_card(folder, trial.trial_id)
    except CorruptFile:  # damaged on disk: it is trained again
        return None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        return f"{home / 'card.json'} is not a teacher's card ({where}: {error.errors()[0]['msg']}); {remedy}"
    if card is None:
        return None
    planned = trial.recipe.epochs
    if card.trial.trial_id != trial.trial_id:
        return f"{home / 'card.json'} belongs to trial {card.trial.trial_id}; {remedy}"
    if [each.epoch for each in card.epochs] != list(range(1, planned + 1)):
        return f"{home / 'card.json'} has {len(card.epochs)} epochs; this study's teacher has {planned}; {remedy}"
    if [each.epoch for each in card.epochs if each.outcome is not None] != [planned]:
        return f"{home / 'card.json'} must have one outcome, at its last epoch, with its test accuracies; {remedy}"
    return None


def _outcome_digest(card: Card) -> str | None:
    """The digest of last and best weights, as in the teacher's row. Returns None without an outcome."""
    outcome = card.epochs[-1].outcome if card.epochs else None
    return None if outcome is None else outcome.weights_digest


def weights_digest(folder: Path, teacher_id: str) -> str | None:
    """The digest of the weights, from a teacher's card. Returns None without an intact card."""
    card = _card(folder, teacher_id)
    return None if card is None else card.weights_sha256


def writing(folder: Path, teacher_id: str) -> FileLock:
    """The lock for training and publishing a teacher. The system releases it when the process dies."""
    (folder / teacher_id).mkdir(parents=True, exist_ok=True)
    # Not thread-local: a trial that ends early may be cleaned up by another thread.
    return FileLock(folder / teacher_id / ".lock", thread_local=False)


def _card(folder: Path, teacher_id: str) -> Card | None:
    """A teacher's card. Returns None if there is none or it was altered."""
    with suppress(CorruptFile, ValidationError):
        return _read_card(folder, teacher_id)
    return None


def _read_card(folder: Path, teacher_id: str) -> Card | None:
    """Like `_card`, but raises `CorruptFile` for an altered card and `ValidationError` for other content."""
    path = folder / teacher_id / "card.json"
    if not path.is_file():
        return None
    return adapter(Card).validate_python(unsealed(read(path, MOST_RECORD_BYTES), path))


def _digest(path: Path) -> str | None:
    """The SHA-256 of a weights file. Returns None if there is none."""
    try:
        return sha256(path, MOST_STATE_BYTES) if path.is_file() else None
    except UnexpectedFile:
        return None


@dataclass(frozen=True, eq=False)
class Teacher:
    """A published teacher on one device: a frozen network in eval mode, and a cache of its logits."""

    home: Path
    card: Card
    data: DataSet  # on the device, where images are cropped
    device: torch.device
    answering: Answering | None  # None if no student needs logits

    @property
    def teacher_id(self) -> str:
        return self.home.name

    @property
    def digest(self) -> str:
        """SHA-256 of the weights file."""
        return self.card.weights_sha256

    @property
    def precision(self) -> str:
        """The precision of the teacher's recipe, used for its logits too."""
        return self.card.trial.recipe.precision

    @cached_property
    def net(self) -> ResNet:
        """The network on its device. Built at first use: students whose logits are all cached do not need it."""
        net = self._built()
        networks.to_device(net, self.device)
        return net

    def _built(self) -> ResNet:
        """The network on the CPU."""
        trial, classes = self.card.trial, len(self.data.classes)
        net = networks.build(trial.architecture, stem=trial.cell.stem, classes=classes, width=trial.cell.width, seed=0)
        net.load_state_dict(unpack(_weights(self.home, self.digest))[0])
        return net.eval().requires_grad_(False)

    def frozen(self, precision: str) -> ResNet:
        """The network for inference in a precision. On a GPU its batch norms are folded, and its weights need no cast.
        If folding fails, returns the unfolded network."""
        if self.device.type == "cpu":  # results on a CPU must stay bitwise identical
            return self.net
        if precision not in self._folded:
            if (made := self._fold()) is not None:
                networks.to_device(made, self.device)
                made = made.to(torch.bfloat16 if precision == "bfloat16" else torch.float32).requires_grad_(False)
            self._folded[precision] = made
        return self._folded[precision] or self.net

    def _fold(self) -> ResNet | None:
        """The network with its batch norms folded, on the CPU. Returns None if folding fails, and reports that once."""
        try:
            return networks.folded(self._built())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            tell(f"a teacher's batch norms cannot be folded into its convolutions here ({first_line(error)}); "
                 "falling back to the unfolded teacher, which is slower")  # fmt: skip
            return None

    @cached_property
    def _folded(self) -> dict[str, ResNet | None]:
        """Folded networks by precision; None if folding failed."""
        return {}

    @property
    def is_folded(self) -> bool:
        """Whether the network in use has its batch norms folded."""
        return any(each is not None for each in self._folded.values())

    def logits(self, views: Views) -> tuple[Tensor, int]:
        """Logits [N, K], on the CPU, for the views of an epoch in training order, and how many this call computed.

        They do not depend on method, temperature or alpha, so all students of the teacher share them.
        """
        return self._training.take(self._rows(view_numbers(views, self.data)))

    def test_logits(self) -> Tensor:
        """Logits [N, K], on the CPU, for the test images."""
        images = self.data.test.images
        cache = self._cache("test", len(images), lambda rows: images[rows.start : rows.stop])
        return cache.take(torch.arange(len(images)))[0]

    @torch.no_grad()
    def passed(self, images: Tensor, precision: str, before_relu: bool = False) -> networks.Passed:
        """Logits and features for prepared images [B, 3, H, W], in the precision of the step around it."""
        return networks.forward_with_features(self.frozen(precision), images, before_relu)

    @cached_property
    def _drawn(self) -> Tensor | None:
        """Numbers of the views that students draw, in the order of the first draw. None means all views."""
        assert self.answering is not None, "the plan has no logit student of this teacher"
        return None if self.answering.ahead else drawn_numbers(self.answering.draws, self.data)

    def _rows(self, numbers: Tensor) -> Tensor:
        """The rows of the cache for the views of these numbers."""
        if self._drawn is None:
            return numbers
        in_order, places = self._sorted_draws
        return places[torch.searchsorted(in_order, numbers)]

    @cached_property
    def _sorted_draws(self) -> tuple[Tensor, Tensor]:
        assert self._drawn is not None
        in_order, places = self._drawn.sort()
        return in_order, places

    @cached_property
    def _training(self) -> LogitCache:
        drawn, data = self._drawn, self.data
        count = len(data.train.labels) * data.views_per_image if drawn is None else len(drawn)

        def images(rows: range) -> Tensor:
            numbers = torch.arange(rows.start, rows.stop) if drawn is None else drawn[rows.start : rows.stop]
            return show(numbered_views(numbers, data).to(self.device), data)

        name = "all" if drawn is None else hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16]
        return self._cache(f"views-{name}", count, images)

    def _cache(self, name: str, rows: int, images: Callable[[range], Tensor]) -> LogitCache:
        """The logit cache of a list of images for these weights and this preprocessing.

        `images(rows)` returns a range of the list, uint8 [N, 3, H, W], on the device.
        """
        on_cpu = self.device.type == "cpu"
        net: Function | None = None if on_cpu else self.frozen(self.precision)  # on a CPU it is built at first use
        kind = torch.bfloat16 if self.precision == "bfloat16" and not on_cpu else torch.float32
        batch = BATCH if on_cpu else GPU_BATCH[kind]
        # All that the logits depend on. On a CPU these parts must not change, or existing caches would be recomputed.
        parts = [self.digest, self.data.digest]
        parts += ["folded"] if self.is_folded else []
        parts += [] if on_cpu else [self.precision, f"stored as {kind}", f"batch {batch}"]
        if net is not None and compiling_pays(rows, self.precision, self.device):
            parts += ["compiled"]
            net = Compiled(net, {"a teacher's answers": compiled(net)}, f"{self.teacher_id} {batch} {self.precision}")
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

        @torch.no_grad()
        def compute(wanted: range) -> Tensor:
            shown = torch.split(images(wanted), batch)
            with float32_as(self.precision), autocast(self.precision, self.device):
                logits = torch.cat([(net or self.net)(prepare(each, self.data)) for each in shown])
            return (logits.float() if on_cpu else logits).cpu()

        return LogitCache(self.home / "answers" / key / name, rows, len(self.data.classes), compute, kind)


def drawn_numbers(draws: tuple[tuple[int, int], ...], data: DataSet) -> Tensor:
    """Unique numbers of all views that trials of these (seed, epochs) draw, in the order of the first draw."""
    count = len(data.train.labels)
    drawn = [
        view_numbers(draw_views(seed, epoch, count, pad=data.pad, flip=data.flip), data)
        for seed, epochs in draws
        for epoch in range(1, epochs + 1)
    ]
    together = torch.cat(drawn).numpy()
    _, first = np.unique(together, return_index=True)
    return torch.from_numpy(together[np.sort(first)])


def load_teacher(
    folder: Path,
    teacher_id: str,
    data: DataSet,
    device: torch.device,
    answering: Answering | None = None,
    taught: str | None = None,
) -> Teacher:
    """Load a published teacher and verify its weights.

    Raises `TeacherChanged` if its file was altered, or if the digest of its outcome is not `taught`.
    """
    home = folder / teacher_id
    card = _card(folder, teacher_id)
    if card is None:
        raise TeacherChanged(
            f"teacher {teacher_id} has no intact card in {home}; start a new run to have it trained again"
        )
    if taught is not None and taught != _outcome_digest(card):
        raise TeacherChanged(f"{home} was trained again, and its weights differ from this run's teacher; restore that")
    _weights(home, card.weights_sha256)
    return Teacher(home, card, on_device(data, device), device, answering)


def _weights(home: Path, expected: str) -> bytes:
    """The weights file. Raises `TeacherChanged` if it has another digest."""
    path = home / "weights.safetensors"
    found = read(path, MOST_STATE_BYTES)
    digest = hashlib.sha256(found).hexdigest()
    if digest != expected:
        raise TeacherChanged(
            f"{path} has digest {digest[:16]}, but its card has {expected[:16]}: "
            "the file was changed after it was published; restore it, or remove the folder and start a new run"
        )
    return found
