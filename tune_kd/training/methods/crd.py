"""Distillation by contrasting an image's embedding with those of images of other classes: Tian et al. 2020,
"Contrastive representation distillation"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tune_kd.study.methods import Method
from tune_kd.system.errors import UserError
from tune_kd.training.loss import Batch, Context, at_least_32_bits, without_autocast

METHOD = Method(
    "crd",
    loss="tune_kd.training.methods.crd:CRD",
    needs="features",
    settings={"weight": 0.8, "nce_k": 16384.0, "nce_t": 0.07, "nce_m": 0.5, "dimension": 128.0},
)


class CRD(nn.Module):
    """`weight` times the sum of two `contrast` losses: the student with a memory of the teacher, and the teacher with a
    memory of the student.

    Both embeddings are projected to `dimension` numbers and scaled to length 1. For each image of the batch, `nce_k`
    images of other classes are drawn with replacement (the authors draw without replacement if there are enough).
    Scores are products with the memory, divided by `nce_t`. After the scores, the new embeddings are mixed into the
    memories of the batch's images, with momentum `nce_m`.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        assert context.teacher is not None
        self.negatives, dimension = (_whole(name, context.settings[name]) for name in ("nce_k", "dimension"))
        self.student_projection = nn.Linear(context.student.embedding, dimension)
        self.teacher_projection = nn.Linear(context.teacher.embedding, dimension)
        self.student_memory = Memory(len(context.train_labels), dimension)
        self.teacher_memory = Memory(len(context.train_labels), dimension)
        self.others = OtherClasses(context.train_labels, context.classes)

    def forward(self, batch: Batch, *, weight: float | Tensor, nce_t: float | Tensor, nce_m: float | Tensor) -> Tensor:
        assert batch.student_embedding is not None and batch.teacher_embedding is not None
        with without_autocast(batch.student_embedding):
            student_BD = _projected(self.student_projection, batch.student_embedding)
            teacher_BD = _projected(self.teacher_projection, batch.teacher_embedding.detach())
            drawn_BN = self.others.counts(batch.labels, self.negatives)
            student: Tensor = self.teacher_memory(student_BD, batch.index, drawn_BN, nce_t)
            teacher: Tensor = self.student_memory(teacher_BD, batch.index, drawn_BN, nce_t)
            if self.training:
                self.student_memory.update(student_BD, batch.index, nce_m)
                self.teacher_memory.update(teacher_BD, batch.index, nce_m)
            return weight * (student + teacher)


class Memory(nn.Module):
    """A vector for each training image, [N, D], and the constant Z of the scores, which the first batch sets."""

    def __init__(self, count: int, dimension: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / dimension)  # for vectors of length about 1
        self.register_buffer("vectors", torch.empty(count, dimension).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((), math.inf))  # infinite until it is set
        self.vectors: Tensor
        self.log_z: Tensor

    def forward(self, vectors: Tensor, index: Tensor, drawn: Tensor, temperature: float | Tensor) -> Tensor:
        """`contrast` of vectors [B, D] with the memory. Scalar."""
        # A copy, because the backward pass needs the memory before its update.
        scores_BN = vectors @ self.vectors.clone().T / temperature
        log_z = torch.where(self.log_z.isinf(), log_normaliser(scores_BN.detach(), index, drawn), self.log_z)
        if self.training:
            self.log_z.copy_(log_z)
        return contrast(scores_BN, index, drawn, log_z)

    @torch.no_grad()
    def update(self, vectors: Tensor, index: Tensor, momentum: float | Tensor) -> None:
        """Mix the vectors of the images at `index` [B] with new ones [B, D], in place."""
        mixed_BD = momentum * self.vectors[index] + (1 - momentum) * vectors
        self.vectors.index_copy_(0, index, F.normalize(mixed_BD, dim=1))


class OtherClasses(nn.Module):
    """Draw training images of other classes, given labels int64 [N]. Stores N + 2 * classes numbers.

    Raises `UserError` if all labels are the same.
    """

    def __init__(self, labels: Tensor, classes: int) -> None:
        super().__init__()
        sizes = torch.bincount(labels, minlength=classes)
        if int(sizes.max()) == len(labels):
            raise UserError("crd contrasts images of different classes, but all training images have the same class")
        # Sorted by class, so that each class is contiguous and a draw can skip the image's own class.
        self.register_buffer("positions", labels.argsort(stable=True), persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.positions: Tensor
        self.sizes: Tensor
        self.starts: Tensor

    def draw(self, labels: Tensor, count: int) -> Tensor:
        """Positions int64 [B, count] of images of other classes than labels [B], uniform and with replacement."""
        size_B1, start_B1 = self.sizes[labels][:, None], self.starts[labels][:, None]
        number_BK = torch.randint(2**62, (len(labels), count), device=labels.device)
        number_BK = number_BK % (len(self.positions) - size_B1)
        return self.positions[number_BK + size_B1 * (number_BK >= start_B1)]

    def counts(self, labels: Tensor, count: int) -> Tensor:
        """How often `draw` returns each image: float32 [B, N], whose rows sum to `count`."""
        drawn_BK = self.draw(labels, count)
        ones = torch.ones((), device=labels.device).expand(drawn_BK.shape)
        return torch.zeros(len(labels), len(self.positions), device=labels.device).scatter_add_(1, drawn_BK, ones)


def contrast(scores: Tensor, index: Tensor, drawn: Tensor, log_z: Tensor) -> Tensor:
    """Noise-contrastive loss of scores [B, N] of the images of a batch with all training images.

    `index` int64 [B] are the positions of the batch's images, `drawn` [B, N] counts how often an image was drawn as a
    negative (K times in each row), and `log_z` is the logarithm of the 0-dim constant Z. With P = exp(score) / Z and
    h = P / (P + K / N): -log h of the image itself, plus -log(1 - h) summed over its negatives, averaged over the
    batch. Scalar, in nats. Takes memory for B * N numbers.
    Source: equations 18 and 19 of Tian et al. 2020, without the 1e-7 that their code adds to denominators.
    """
    noise_B1 = drawn.sum(1, keepdim=True) / scores.shape[1]
    odds_BN = scores - log_z - noise_B1.log()  # log(h / (1 - h))
    same_B = odds_BN.gather(1, index[:, None])[:, 0]
    return -(F.logsigmoid(same_B) + (drawn * F.logsigmoid(-odds_BN)).sum(1)).mean()


def log_normaliser(scores: Tensor, index: Tensor, drawn: Tensor) -> Tensor:
    """The logarithm of Z: N times the mean of exp(score) over the batch's images and their negatives. 0-dim.

    Shapes are those of `contrast`.
    """
    ones = torch.ones_like(index[:, None], dtype=drawn.dtype)
    counts_BN = drawn.scatter_add(1, index[:, None], ones)
    return (scores + counts_BN.log()).logsumexp((0, 1)) - counts_BN.sum().log() + math.log(scores.shape[1])


def _projected(projection: nn.Module, embedding_BE: Tensor) -> Tensor:
    return F.normalize(projection(at_least_32_bits(embedding_BE)), dim=1)


def _whole(name: str, value: float) -> int:
    if value < 1 or value != int(value):
        raise UserError(f"{name} of crd is {value:g}; expected a whole number, at least 1")
    return int(value)
