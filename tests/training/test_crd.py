"""CRD, checked against its formula in NumPy: the draws, the loss of two batches, and the memory between them."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from losses import context, numbers, taps, wave
from trials import CPU, distilling, exact, interrupted, two_epochs
from tune_kd.data.datasets import DataSet
from tune_kd.system.errors import UserError
from tune_kd.training.checkpoints import Checkpoints
from tune_kd.training.loop import train
from tune_kd.training.loss import Batch
from tune_kd.training.methods.crd import CRD, METHOD, OtherClasses, contrast, log_normaliser
from tune_kd.training.teachers import Teacher

LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 0, 1, 0, 2, 0, 1])  # three of class 1, four of 2, five of 0; none of 3 to 9
STUDENT, TEACHER = wave((4, 6), 0.7, 0.1), wave((4, 16), 0.9, 0.5)
STEP = {"weight": 0.8, "nce_t": 0.07, "nce_m": 0.5}

some_labels = st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(lambda labels: len({*labels}) > 1)


def module(labels=LABELS, seed=0, **settings):
    fixed = {"nce_k": 5.0, "dimension": 4.0, **settings}
    torch.manual_seed(seed)
    return CRD(context(taps(6), taps(16), labels, **fixed)).double()


def batch(index, student=STUDENT, teacher=TEACHER, labels=LABELS):
    return Batch(index, labels[index], torch.zeros(4, 10), None, student_embedding=student, teacher_embedding=teacher)


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def projected(linear, embedding):
    return unit(embedding.numpy() @ linear.weight.detach().numpy().T + linear.bias.detach().numpy())


def by_hand(vectors, memory, index, drawn, temperature, z):
    """The paper's formula, one image at a time, and Z."""
    scores = [
        np.exp(memory[[i, *others]] @ v / temperature) for v, i, others in zip(vectors, index, drawn, strict=True)
    ]
    z = np.mean(scores) * len(memory) if z is None else z
    noise = drawn.shape[1] / len(memory)
    total = 0.0
    for same, *others in np.array(scores) / z:
        total -= np.log(same / (same + noise))
        total -= sum(np.log(noise / (other + noise)) for other in others)
    return total / len(index), z


@pytest.mark.parametrize("nce_k", [1, 5, 40])  # 40 are more than there are images
def test_crd_matches_its_formula_over_two_batches(nce_k):
    loss, z = module(nce_k=float(nce_k)), [None, None]
    memories = [each.vectors.numpy().copy() for each in (loss.student_memory, loss.teacher_memory)]
    for number, index in enumerate((torch.tensor([3, 0, 7, 11]), torch.tensor([4, 3, 1, 2]))):
        student, teacher = (1 + number) * STUDENT + number, TEACHER - number
        torch.manual_seed(number)
        drawn = loss.others.draw(LABELS[index], nce_k).numpy()
        torch.manual_seed(number)
        found = loss(batch(index, student, teacher), weight=0.3, nce_t=0.2, nce_m=0.9).item()

        s, t = projected(loss.student_projection, student), projected(loss.teacher_projection, teacher)
        mine, z[0] = by_hand(s, memories[1], index.numpy(), drawn, 0.2, z[0])
        theirs, z[1] = by_hand(t, memories[0], index.numpy(), drawn, 0.2, z[1])
        assert found == pytest.approx(0.3 * (mine + theirs), rel=1e-7)  # counts are float32
        for memory, new in zip(memories, (s, t), strict=True):
            memory[index] = unit(0.9 * memory[index] + (1 - 0.9) * new)
        assert loss.student_memory.vectors.numpy() == pytest.approx(memories[0], rel=1e-12)
        assert loss.teacher_memory.vectors.numpy() == pytest.approx(memories[1], rel=1e-12)


def test_the_published_settings_are_the_defaults():
    assert METHOD.defaults == {"weight": 0.8, "nce_k": 16384, "nce_t": 0.07, "nce_m": 0.5, "dimension": 128}
    loss = CRD(context(taps(6), taps(16), LABELS, **METHOD.defaults))
    assert loss.student_memory.vectors.shape == loss.teacher_memory.vectors.shape == (12, 128)
    lengths = torch.cat([loss.student_memory.vectors, loss.teacher_memory.vectors]).norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(loss.student_memory.vectors, loss.teacher_memory.vectors)


@given(some_labels, st.integers(1, 40))
def test_negatives_come_from_other_classes_and_their_counts_match_the_draws(labels, count):
    others, labels = OtherClasses(torch.tensor(labels), 10), torch.tensor(labels)
    torch.manual_seed(0)
    drawn = others.draw(labels, count)
    assert drawn.shape == (len(labels), count)
    assert (labels[drawn] != labels[:, None]).all()
    torch.manual_seed(0)
    expected = np.stack([np.bincount(row, minlength=len(labels)) for row in drawn.numpy()])
    assert others.counts(labels, count).numpy().tolist() == expected.tolist()


def test_images_of_other_classes_are_drawn_equally_often():
    counts = OtherClasses(LABELS, 10).counts(torch.tensor([0, 1, 2]), 90_000)
    for label, row in enumerate(counts):
        others = row[label != LABELS]
        expected = 90_000 / len(others)
        assert (others - expected).abs().max() < 5 * expected**0.5


@given(st.lists(numbers, min_size=6, max_size=6), st.lists(st.integers(0, 3), min_size=4, max_size=4), st.floats(-3, 3))
def test_one_row_of_the_loss_matches_its_formula(scores, counts, log_z):
    scores, drawn = np.array(scores) / 4, np.array([0, 0, 1, *counts[1:]])
    p, noise = np.exp(scores - log_z), drawn.sum() / 6
    expected = -np.log(p[1] / (p[1] + noise)) - drawn @ np.log(noise / (p + noise))
    found = contrast(
        torch.from_numpy(scores)[None],
        torch.tensor([1]),
        torch.from_numpy(drawn)[None].double(),
        torch.tensor(log_z, dtype=torch.float64),
    )
    assert found.item() == pytest.approx(expected, rel=1e-8)


def test_only_the_student_and_the_projections_get_a_gradient():
    loss, student, teacher = module(), STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    index = torch.tensor([0, 1, 2, 3])
    loss(batch(index, student, teacher), **STEP).backward()
    assert teacher.grad is None
    assert all(each.grad.abs().sum() > 0 for each in (student, *loss.parameters()))
    assert len([*loss.parameters()]) == 4
    assert not any(each.requires_grad for each in loss.buffers())


def test_the_gradient_uses_the_memory_from_before_the_batch():
    loss = module()
    loss(batch(torch.arange(4, 8)), **STEP)  # sets Z, which is constant afterwards

    def again(student):
        torch.manual_seed(1)
        return copy.deepcopy(loss)(batch(torch.arange(4), student), **STEP)

    assert torch.autograd.gradcheck(again, STUDENT.clone().requires_grad_())


def test_only_training_updates_the_memory_and_only_for_the_images_of_the_batch():
    loss, index = module(), torch.tensor([0, 5, 2, 3])
    before = {name: each.clone() for name, each in loss.state_dict().items()}
    loss.eval()
    assert loss(batch(index), **STEP).isfinite()
    assert all(torch.equal(each, before[name]) for name, each in loss.state_dict().items())
    loss.train()
    loss(batch(index), **STEP)
    for owner in ("student", "teacher"):
        changed = (loss.state_dict()[f"{owner}_memory.vectors"] != before[f"{owner}_memory.vectors"]).any(1)
        assert changed.nonzero().flatten().tolist() == [0, 2, 3, 5]


def test_tensor_settings_give_the_same_loss_as_numbers():
    index, tensors = torch.arange(4), {name: torch.tensor(value, dtype=torch.float64) for name, value in STEP.items()}
    for name in STEP:
        one, other = module(), module()
        torch.manual_seed(0)
        expected = one(batch(index), **STEP).item()
        torch.manual_seed(0)
        assert other(batch(index), **{**STEP, name: tensors[name]}).item() == pytest.approx(expected, rel=1e-12)
        assert torch.equal(one.student_memory.vectors, other.student_memory.vectors)


def test_half_precision_embeddings_are_contrasted_in_single_precision():
    student, teacher, loss = STUDENT.bfloat16(), TEACHER.bfloat16(), module().float()
    same = copy.deepcopy(loss).double()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(batch(torch.arange(4), student, teacher), **STEP)
    torch.manual_seed(1)
    exactly = same(batch(torch.arange(4), student.double(), teacher.double()), **STEP)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exactly.item(), rel=1e-5)


@pytest.mark.parametrize("nce_t", [1e-3, 1e3])
def test_extreme_temperatures_give_finite_losses_and_gradients_in_single_precision(nce_t):
    """exp(score) alone would overflow."""
    loss, student = module().float(), STUDENT.float().requires_grad_()
    for index in (torch.arange(4), torch.arange(4, 8)):
        found = loss(batch(index, student, TEACHER.float()), **{**STEP, "nce_t": nce_t})
        found.backward()
        assert found.isfinite()
    assert student.grad.isfinite().all()


@given(some_labels)
def test_z_normalises_the_mean_of_p_to_1_over_n(labels):
    labels = torch.tensor(labels)
    index, scores = torch.arange(len(labels)), wave((len(labels), len(labels)), 0.7, 0.1, 3)
    drawn = OtherClasses(labels, 10).counts(labels, 7).double()
    p = (scores - log_normaliser(scores, index, drawn)).exp()
    mean = (p.diagonal().sum() + (drawn * p).sum()) / (8 * len(labels))
    assert mean.item() == pytest.approx(1 / len(labels))


@pytest.mark.parametrize(("name", "value"), [("nce_k", 0.0), ("nce_k", 2.5), ("dimension", -1.0)])
def test_settings_that_are_not_positive_integers_are_rejected(name, value):
    with pytest.raises(UserError, match=f"{name} of crd is {value:g}; expected a whole number, at least 1"):
        module(**{name: value})


def test_images_of_a_single_class_are_rejected():
    with pytest.raises(UserError, match="crd contrasts images of different classes"):
        module(labels=torch.ones(5, dtype=torch.int64))


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(pixels: DataSet, teacher: Teacher, tmp_path):
    one = two_epochs(distilling("crd", teacher))
    torch.manual_seed(1)
    rows, whole = [], Checkpoints(tmp_path / "whole")
    for row in train(one, pixels, teacher, device=CPU, checkpoints=whole):
        rows.append(row)
        torch.rand(3)  # other random draws between two epochs must not matter
    torch.manual_seed(2)
    assert [exact(each) for each in interrupted(one, pixels, teacher, tmp_path / "cut")] == [*map(exact, rows)]
    assert rows[1].loss_kd < rows[0].loss_kd
    assert rows[1].train_loss < rows[0].train_loss
    tensors, others = (Checkpoints(tmp_path / each).load()[0] for each in ("whole", "cut"))
    assert {"loss.student_memory.vectors", "loss.teacher_memory.log_z"} <= {*tensors}
    assert all(torch.equal(each, others[name]) for name, each in tensors.items())
