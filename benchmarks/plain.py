"""The baseline: knowledge distillation as it is usually written, without artificial slowdowns.

A Dataset of PIL images, torchvision's transforms, a DataLoader, the teacher's forward pass in every step, `.item()` on
every loss. Networks, losses, optimizer and schedule are those of `tune_kd`, so that the two can be compared. Data
loading and the code around the step are the usual ones.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils import data as loading
from torchvision import transforms
from torchvision.models import ResNet

from tune_kd.data.datasets import DataSet, Split
from tune_kd.study.spec import Cell, Recipe
from tune_kd.training import networks
from tune_kd.training.methods.feature import feature
from tune_kd.training.methods.logit import kd


class Pictures(loading.Dataset[tuple[Tensor, int]]):
    """PIL images in memory, transformed on access, as in torchvision's own data sets."""

    def __init__(self, split: Split, transform: transforms.Compose) -> None:
        self.images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in split.images]
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


@dataclass(frozen=True)
class PlainEpoch:
    """Measurements of an epoch of the plain loop."""

    images_per_second: float  # training images over training time
    seconds: float  # training and evaluation
    train_loss: float
    val_accuracy: float


def train_plain(
    architecture: str,
    cell: Cell,
    recipe: Recipe,
    data: DataSet,
    *,
    seed: int,
    device: torch.device,
    teacher: ResNet | None = None,
    workers: int = 0,
) -> Iterator[PlainEpoch]:
    """Train for `recipe.epochs` epochs; `teacher` runs in every step if `cell.method` needs it."""
    height, width = data.train.images.shape[2:]
    enlarge = [transforms.Resize((height * data.upsample, width * data.upsample), interpolation=0)]
    as_tensor = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    augment = [transforms.RandomCrop((height, width), padding=data.pad)]
    augment += [transforms.RandomHorizontalFlip()] if data.flip else []
    after = (enlarge if data.upsample > 1 else []) + as_tensor
    more = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
    torch.manual_seed(seed)
    loader = loading.DataLoader(
        Pictures(data.train, transforms.Compose([*augment, *after])), batch_size=recipe.batch_size, shuffle=True, **more
    )
    held_out = loading.DataLoader(
        Pictures(data.validation, transforms.Compose(after)), batch_size=recipe.batch_size, **more
    )

    classes = len(data.classes)
    student = networks.build(architecture, stem=cell.stem, classes=classes, width=cell.width, seed=seed).to(device)
    projections = nn.ModuleList()
    if cell.method == "feature":
        assert teacher is not None
        widths = [
            [max(norm.num_features for norm in stage.modules() if isinstance(norm, nn.BatchNorm2d))
             for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
            for net in (student, teacher)
        ]  # fmt: skip
        projections.extend(nn.Conv2d(one, other, 1, bias=False) for one, other in zip(*widths, strict=True))
        projections.to(device)
    parameters = [*student.parameters(), *projections.parameters()]
    optimizer = torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * len(loader), recipe.lr_min)

    for _ in range(recipe.epochs):
        started = time.perf_counter()
        student.train()
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if cell.method == "feature":
                assert teacher is not None and cell.alpha is not None and cell.beta is not None
                passed = networks.forward_with_features(student, images)
                with torch.no_grad():
                    wanted = networks.forward_with_features(teacher, images).features
                logits, loss_kd = passed.logits, feature(passed.features, wanted, projections, cell.beta)
                loss = cell.alpha * loss_kd + (1 - cell.alpha) * F.cross_entropy(logits, labels)
            elif cell.method == "logit":
                assert teacher is not None and cell.alpha is not None and cell.temperature is not None
                logits = student(images)
                with torch.no_grad():
                    answers = teacher(images)
                loss_kd = kd(logits, answers, cell.temperature)
                loss = cell.alpha * loss_kd + (1 - cell.alpha) * F.cross_entropy(logits, labels)
            else:
                loss = F.cross_entropy(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
        trained = time.perf_counter() - started
        student.eval()
        right = 0
        with torch.no_grad():
            for images, labels in held_out:
                right += (student(images.to(device)).argmax(1) == labels.to(device)).sum().item()
        yield PlainEpoch(
            images_per_second=len(data.train.labels) / trained,
            seconds=time.perf_counter() - started,
            train_loss=total / len(data.train.labels),
            val_accuracy=right / len(data.validation.labels),
        )
