"""Teachers by content id: published once, shared by runs, and what they answer, computed once.

TEACHERS/ID/weights.safetensors   the best-validation weights
TEACHERS/ID/card.json             what it is, its epochs, and the digest of the weights: written last
TEACHERS/ID/answers/              logits for each epoch's views, shared by all students that see them
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import TypeAdapter
from torch import Tensor
from torchvision.models import ResNet

from tune_kd import models
from tune_kd.checkpoints import pack, unpack
from tune_kd.data import DataSet, Views, crop, prepare
from tune_kd.storage import publish
from tune_kd.trial import Epoch, Trial

BATCH = 512  # views answered at a time; fixed, since an answer computed again is to be the same to the bit


class TeacherChanged(RuntimeError):
    """A teacher's file is not the one that was published."""


def publish_teacher(folder: Path, trial: Trial, weights: dict[str, Tensor], epochs: Iterable[Epoch]) -> None:
    """Publish a trained teacher. The card comes last: a teacher without one does not exist."""
    home = folder / trial.trial_id
    home.mkdir(parents=True, exist_ok=True)
    data = pack(weights, {"teacher_id": trial.trial_id})
    publish(home / "weights.safetensors", data)
    card = {
        "teacher_id": trial.trial_id,
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "trial": asdict(trial),
        "epochs": [asdict(epoch) for epoch in epochs],
    }
    publish(home / "card.json", json.dumps(card, indent=1).encode())


def published_epochs(folder: Path, teacher_id: str) -> list[Epoch] | None:
    """The epochs of a published teacher whose weights are whole; null where it has to be trained."""
    card = _card(folder, teacher_id)
    if card is None or _digest(folder / teacher_id / "weights.safetensors") != card["weights_sha256"]:
        return None
    return TypeAdapter(list[Epoch]).validate_python(card["epochs"])


def writing(folder: Path, teacher_id: str) -> FileLock:
    """The lock of the one who may train and publish a teacher. The system frees it with its process."""
    (folder / teacher_id).mkdir(parents=True, exist_ok=True)
    # Not thread-local: a trial that is ended early may be cleaned up by another thread than its own.
    return FileLock(folder / teacher_id / ".lock", thread_local=False)


def _card(folder: Path, teacher_id: str) -> dict[str, Any] | None:
    path = folder / teacher_id / "card.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network in eval mode that answers for students on one device."""

    teacher_id: str
    digest: str  # SHA-256 of the weight file
    net: ResNet
    home: Path
    data: DataSet

    def answers(self, seed: int, epoch: int, views: Views) -> Tensor:
        """Logits [N, K], on the CPU, for the views of one epoch in training order.

        They do not depend on method, temperature or alpha: the first student that needs them computes them, the
        others of that seed read them. One who comes meanwhile waits.
        """
        train = self.data.train.images

        def compute() -> Tensor:
            parts = []
            for some in torch.split(torch.arange(len(views.order)), BATCH):
                index = views.order[some]
                images = crop(
                    train[index.to(train.device)], views.top[some], views.left[some], views.flip[some], self.data.pad
                )
                parts.append(self._logits(images))
            return torch.cat(parts)

        return self._once(f"seed-{seed}-epoch-{epoch}", compute)

    def test_answers(self) -> Tensor:
        """Logits [N, K], on the CPU, for the test images as they are."""
        images = self.data.test.images
        return self._once("test", lambda: torch.cat([self._logits(part) for part in torch.split(images, BATCH)]))

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the four residual stages for prepared images [B, 3, H, W]."""
        return models.forward_with_features(self.net, images)[1]

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(prepare(images, self.data))
        return logits.cpu()

    def _once(self, name: str, compute: Any) -> Tensor:
        """What was published under a name, or is computed and published now, by one process at a time."""
        folder = self.home / "answers" / self.data.digest[:16]
        path = folder / f"{name}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"):
            found = self._read(path)
            if found is None:
                found = compute()
                content = hashlib.sha256(found.numpy().tobytes()).hexdigest()
                publish(path, pack({"logits": found}, {"teacher": self.digest, "content": content}))
        return found

    def _read(self, path: Path) -> Tensor | None:
        """Published answers, if they are whole and this teacher's."""
        if not path.is_file():
            return None
        try:
            tensors, notes = unpack(path.read_bytes())
        except Exception:  # any reader's error means the same here: compute them again
            return None
        logits = tensors["logits"]
        whole = hashlib.sha256(logits.numpy().tobytes()).hexdigest() == notes["content"]
        return logits if whole and notes["teacher"] == self.digest else None


def load_teacher(folder: Path, trial: Trial, data: DataSet, device: torch.device) -> Teacher:
    """The teacher of a student, in eval mode and frozen. Raises `TeacherChanged` where its file was altered."""
    assert trial.teacher_id is not None
    assert trial.cell.teacher is not None
    home = folder / trial.teacher_id
    card = _card(folder, trial.teacher_id)
    if card is None:
        raise TeacherChanged(
            f"teacher {trial.teacher_id} has no card in {home}; start a new run to have it trained again"
        )
    found = (home / "weights.safetensors").read_bytes()
    digest = hashlib.sha256(found).hexdigest()
    if digest != card["weights_sha256"]:
        raise TeacherChanged(
            f"{home}/weights.safetensors has the digest {digest[:16]}, its card says {card['weights_sha256'][:16]}: "
            "the file was changed after it was published; restore it, or remove the folder and start a new run"
        )
    cell = trial.cell
    net = models.build(trial.cell.teacher, stem=cell.stem, classes=len(data.classes), width=cell.width, seed=0)
    net.load_state_dict(unpack(found)[0])
    models.to_device(net, device)
    net.eval().requires_grad_(False)
    return Teacher(trial.teacher_id, digest, net, home, data)
