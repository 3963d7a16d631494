"""Teachers by content id: published once, shared by runs, and what they answer, computed once.

TEACHERS/ID/weights.safetensors   the best-validation weights
TEACHERS/ID/card.json             what it is, its epochs, and the digest of the weights: written last
TEACHERS/ID/answers/KEY/          logits by weights and preprocessing: of views, and of the test images
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
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tune_kd.data.augment import Views, draw_views, numbered_views, prepare, show, view_numbers
from tune_kd.data.datasets import DataSet, on_device
from tune_kd.study.trial import Answering, Epoch, Trial
from tune_kd.system.crash_points import point
from tune_kd.system.errors import CorruptFile, UnexpectedFile
from tune_kd.system.files import MOST_RECORD_BYTES, publish, read, sealed, sha256, unsealed
from tune_kd.system.object_store import Mirror
from tune_kd.training import networks
from tune_kd.training.checkpoints import MOST_STATE_BYTES, pack, unpack
from tune_kd.training.device import autocast, float32_as
from tune_kd.training.logit_cache import Answers

if TYPE_CHECKING:  # importing torchvision takes seconds, which the driver of a run can do without
    from torchvision.models import ResNet

BATCH = 512  # views answered at a time; fixed, since an answer computed again is to be the same to the bit


class TeacherChanged(RuntimeError):
    """A teacher's file is not the one that was published."""


@dataclass(frozen=True)
class Card:
    """What a teacher is: the trial that trained it, its epochs, and the digest of its file of weights."""

    trial: Trial
    epochs: list[Epoch]
    weights_sha256: str


def publish_teacher(folder: Path, trial: Trial, weights: dict[str, Tensor], epochs: Iterable[Epoch]) -> None:
    """Publish a trained teacher. The card comes last: a teacher without one does not exist."""
    home = folder / trial.trial_id
    home.mkdir(parents=True, exist_ok=True)
    data = pack(weights, {"teacher_id": trial.trial_id})
    mirror = Mirror.of(folder)
    publish(home / "weights.safetensors", data)
    mirror.send(home / "weights.safetensors", data)
    point("teacher.weights")
    card = {
        "teacher_id": trial.trial_id,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "trial": asdict(trial),
        "epochs": [asdict(epoch) for epoch in epochs],
    }
    publish(home / "card.json", sealed(card))
    mirror.send(home / "card.json")


def fetch_teacher(folder: Path, teacher_id: str) -> None:
    """Have a teacher here whose folder is mirrored, once a machine: the first process that asks fetches it. Raises
    OSError."""
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
    """The epochs of a published teacher whose weights are whole; null where it has to be trained."""
    card = _card(folder, teacher_id)
    if card is None or _digest(folder / teacher_id / "weights.safetensors") != card.weights_sha256:
        return None
    return card.epochs


def wrong_with(folder: Path, teacher_id: str, taught: str | None = None) -> str | None:
    """What is wrong with a published teacher; null where it is whole.

    That there is none, or that it is another, is wrong only where a run had one, of the weights `taught`.
    """
    home = folder / teacher_id
    if not os.path.exists(home / "card.json"):
        return f"{home / 'card.json'} is missing" if taught is not None else None
    card = _card(folder, teacher_id)
    if card is None:
        return f"{home / 'card.json'} was altered since it was written"
    if _digest(home / "weights.safetensors") != card.weights_sha256:
        return f"{home / 'weights.safetensors'} is not what its card says"
    if taught is not None and taught != _outcome_digest(card):
        return f"{home} was trained again, and is not the teacher that this run had"
    return None


def unfit(folder: Path, trial: Trial) -> str | None:
    """What keeps a teacher that is published under a trial's id from being adopted as this trial: its record, which may
    have been put there by hand, is not the trial's. Null where nothing does, or there is none."""
    home = folder / trial.trial_id
    remedy = f"remove {home} to have this teacher trained, or put a whole one there"
    try:
        card = _read_card(folder, trial.trial_id)
    except CorruptFile:  # by a disk: it is trained again
        return None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        return f"{home / 'card.json'} is no teacher's card ({where}: {error.errors()[0]['msg']}); {remedy}"
    if card is None:
        return None
    planned = trial.recipe.epochs
    if card.trial.trial_id != trial.trial_id:
        return f"{home / 'card.json'} is of trial {card.trial.trial_id}; {remedy}"
    if [each.epoch for each in card.epochs] != list(range(1, planned + 1)):
        return f"{home / 'card.json'} has {len(card.epochs)} epochs, and the teacher of this study {planned}; {remedy}"
    if [each.epoch for each in card.epochs if each.outcome is not None] != [planned]:
        return f"{home / 'card.json'} has not one outcome, of the last epoch, so not its test accuracies; {remedy}"
    return None


def _outcome_digest(card: Card) -> str | None:
    """The digest of last and best weights that the teacher's row has, too; null for one without an outcome."""
    outcome = card.epochs[-1].outcome if card.epochs else None
    return None if outcome is None else outcome.weights_digest


def weights_digest(folder: Path, teacher_id: str) -> str | None:
    """The digest that a teacher's card names; null where there is no whole card."""
    card = _card(folder, teacher_id)
    return None if card is None else card.weights_sha256


def writing(folder: Path, teacher_id: str) -> FileLock:
    """The lock of the one who may train and publish a teacher. The system frees it with its process."""
    (folder / teacher_id).mkdir(parents=True, exist_ok=True)
    # Not thread-local: a trial that is ended early may be cleaned up by another thread than its own.
    return FileLock(folder / teacher_id / ".lock", thread_local=False)


def _card(folder: Path, teacher_id: str) -> Card | None:
    """What a teacher's card says. Null where there is none, or it was altered."""
    with suppress(CorruptFile, ValidationError):
        return _read_card(folder, teacher_id)
    return None


def _read_card(folder: Path, teacher_id: str) -> Card | None:
    """Raises `CorruptFile` for a card that was altered since it was written, and `ValidationError` for what is none."""
    path = folder / teacher_id / "card.json"
    if not path.is_file():
        return None
    return TypeAdapter(Card).validate_python(unsealed(read(path, MOST_RECORD_BYTES), path))


def _digest(path: Path) -> str | None:
    """Of a file of weights; null where there is none."""
    try:
        return sha256(path, MOST_STATE_BYTES) if path.is_file() else None
    except UnexpectedFile:
        return None


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network in eval mode that answers for students on one device."""

    teacher_id: str
    digest: str  # SHA-256 of the weight file
    home: Path
    data: DataSet  # on its device, where images are cropped
    device: torch.device
    precision: str  # of its recipe, in which it answers too
    answering: Answering | None  # null where no student needs logits
    build: Callable[[], ResNet]

    @cached_property
    def net(self) -> ResNet:
        """The network on its device: built when it is asked, which students of ready answers never do."""
        return self.build()

    def answers(self, seed: int, epoch: int, views: Views) -> tuple[Tensor, int]:
        """Logits [N, K], on the CPU, for the views of one epoch in training order, and how many were asked for now.

        They do not depend on method, temperature or alpha: whoever needs a view first has it answered for all.
        """
        return self._training.take(self._rows(view_numbers(views, self.data)))

    def test_answers(self) -> Tensor:
        """Logits [N, K], on the CPU, for the test images as they are."""
        images = self.data.test.images
        return self._answers("test", len(images), lambda rows: images[rows.start : rows.stop]).take(
            torch.arange(len(images))
        )[0]

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the four residual stages for prepared images [B, 3, H, W]."""
        return networks.forward_with_features(self.net, images)[1]

    @cached_property
    def _drawn(self) -> Tensor | None:
        """Numbers of the views that students draw, each once, in the order of the first draw; null for all."""
        assert self.answering is not None, "the plan has no logit student of this teacher"
        return None if self.answering.ahead else drawn_numbers(self.answering.draws, self.data)

    def _rows(self, numbers: Tensor) -> Tensor:
        """Where the table has the views of these numbers."""
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
    def _training(self) -> Answers:
        drawn, data = self._drawn, self.data
        count = len(data.train.labels) * data.views_per_image if drawn is None else len(drawn)

        def images(rows: range) -> Tensor:
            numbers = torch.arange(rows.start, rows.stop) if drawn is None else drawn[rows.start : rows.stop]
            return show(numbered_views(numbers, data).to(self.device), data)

        name = "all" if drawn is None else hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16]
        return self._answers(f"views-{name}", count, images)

    def _answers(self, name: str, rows: int, images: Callable[[range], Tensor]) -> Answers:
        """The table of a list of images, which `images` makes; of these weights and this preprocessing."""
        key = hashlib.sha256(f"{self.digest} {self.data.digest}".encode()).hexdigest()[:16]

        @torch.no_grad()
        def compute(wanted: range) -> Tensor:
            shown = torch.split(images(wanted), BATCH)
            with float32_as(self.precision), autocast(self.precision, self.device):
                return torch.cat([self.net(prepare(each, self.data)) for each in shown]).float().cpu()

        return Answers(self.home / "answers" / key / name, rows, len(self.data.classes), compute)


def drawn_numbers(draws: tuple[tuple[int, int], ...], data: DataSet) -> Tensor:
    """Numbers, each once, of all views that trials of these (seed, epochs) draw, in the order of the first draw."""
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
    """A published teacher, in eval mode and frozen.

    Raises `TeacherChanged` where its file was altered, or it is not the one whose outcome had the weights `taught`.
    """
    home = folder / teacher_id
    card = _card(folder, teacher_id)
    if card is None:
        raise TeacherChanged(
            f"teacher {teacher_id} has no whole card in {home}; start a new run to have it trained again"
        )
    if taught is not None and taught != _outcome_digest(card):
        raise TeacherChanged(f"{home} was trained again, with other weights than this run's teacher had; put it back")
    trial = card.trial
    path, expected = home / "weights.safetensors", card.weights_sha256

    def verified() -> bytes:
        found = read(path, MOST_STATE_BYTES)
        digest = hashlib.sha256(found).hexdigest()
        if digest != expected:
            raise TeacherChanged(
                f"{path} has the digest {digest[:16]}, its card says {expected[:16]}: "
                "the file was changed after it was published; restore it, or remove the folder and start a new run"
            )
        return found

    def build() -> ResNet:
        cell = trial.cell
        net = networks.build(trial.architecture, stem=cell.stem, classes=len(data.classes), width=cell.width, seed=0)
        net.load_state_dict(unpack(verified())[0])
        networks.to_device(net, device)
        return net.eval().requires_grad_(False)

    verified()
    shown = on_device(data, device)
    return Teacher(teacher_id, expected, home, shown, device, trial.recipe.precision, answering, build)
