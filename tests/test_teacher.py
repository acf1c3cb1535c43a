"The teacher: closed form, no allocation, no training, saving, refusals."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from biojepa.model.teacher import EMATeacher


def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)


def move(module, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.add_(torch.randn(p.shape, generator=g).to(p.dtype))


@settings(max_examples=25, deadline=None)
@given(m=st.floats(0, 1), k=st.integers(0, 12), seed=st.integers(0, 99))
def test_closed_form_for_a_moving_student(m, k, seed):
    "ξ_k = m^k ξ_0 + (1 − m) Σ_j m^(k−j) θ_j, in float64."
    student = make(seed, torch.float64)
    teacher = EMATeacher(student, m)
    expected = [m**k * p.detach() for p in student.parameters()]
    for j in range(1, k + 1):
        move(student, 1000*seed + j)
        teacher.update(student)
        expected = [e + (1 - m) * m**(k - j) * p.detach() for e, p in zip(expected, student.parameters())]
    for xi, e in zip(teacher.parameters(), expected):
        torch.testing.assert_close(xi.detach(), e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [0., 1.])
def test_the_ends_are_exact(m):
    student = make()
    teacher, start = EMATeacher(student, 0.5), copy.deepcopy(student)
    move(student, 1)
    teacher.update(student, momentum=m)
    for xi, expected in zip(teacher.parameters(), (start if m else student).parameters()):
        assert torch.equal(xi, expected)


def test_update_is_in_place_and_leaves_the_student_alone():
    student = make()
    teacher = EMATeacher(student)
    move(student, 1)
    before = {n: t.clone() for n, t in student.state_dict().items()}
    held = {n: (t.data_ptr(), t._version) for n, t in teacher.model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16): teacher.update(student)
    for n, t in teacher.model.named_parameters():
        assert t.data_ptr() == held[n][0] and t._version > held[n][1] and t.dtype == torch.float32
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())
    shared = {t.data_ptr() for t in student.state_dict().values()
              } & {t.data_ptr() for t in teacher.state_dict().values()}
    assert not shared


def test_a_copy_of_a_trained_student_carries_no_gradient():
    student = make()
    student(torch.randn(6, 3)).sum().backward()
    teacher = EMATeacher(student)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad and p.grad is not None for p in student.parameters())
    assert not teacher(torch.randn(6, 3, requires_grad=True)).requires_grad


def test_the_teacher_is_deterministic_in_a_training_parent():
    teacher = EMATeacher(make())
    nn.ModuleList([teacher]).train()
    x = torch.randn(6, 3)
    assert torch.equal(teacher(x),
                       teacher(x)) and not teacher.training  # dropout and batch statistics would differ
    assert teacher.model[1].num_batches_tracked == 0


def test_an_optimiser_over_everything_trains_only_the_student():
    student = make()
    both = nn.ModuleList([student, EMATeacher(student)])
    before = [p.clone() for p in both[1].parameters()]
    optimiser = torch.optim.AdamW(both.parameters(), lr=1., weight_decay=0.5)
    both[0](torch.randn(6, 3)).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, both[1].parameters()))


def test_integer_and_float_buffers_follow_at_once():
    student = make()
    teacher = EMATeacher(student)
    student(torch.randn(6, 3))
    teacher.update(student)
    assert teacher.model[1].num_batches_tracked == 1
    assert torch.equal(teacher.model[1].running_var, student[1].running_var)


def test_state_dict_round_trip(tmp_path):
    student = make()
    teacher = EMATeacher(student)
    move(student, 3)
    teacher.update(student)
    torch.save(teacher.state_dict(), tmp_path/"teacher.pt")
    restored = EMATeacher(make(seed=9))
    restored.load_state_dict(torch.load(tmp_path/"teacher.pt", weights_only=True))
    x = torch.randn(6, 3)
    assert torch.equal(teacher(x), restored(x))
    move(student, 4)
    for t in (teacher, restored): t.update(student)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), restored.parameters()))


def test_a_half_precision_student_has_a_float32_teacher_that_arrives():
    student = make(dtype=torch.bfloat16)
    teacher = EMATeacher(student)
    move(student, 5)
    for _ in range(3000): teacher.update(student)
    for xi, theta in zip(teacher.parameters(), student.parameters()):
        assert xi.dtype == torch.float32
        torch.testing.assert_close(xi.detach(), theta.detach().float(), rtol=1e-4, atol=1e-4)
    assert all(b.dtype != torch.bfloat16 for b in teacher.buffers())


@pytest.mark.parametrize("call, said", [
    (lambda s, t: EMATeacher(s, -0.1), "momentum: found -0.1"),
    (lambda s, t: EMATeacher(s, float("nan")), "momentum: found nan"),
    (lambda s, t: t.update(s, momentum=2), "momentum: found 2"),
    (lambda s, t: t.update(s[0]), "found 2 parameters, the teacher has 6"),
    (lambda s, t: t.update(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))), "found "
                                                                                              "0 buffers"),
])
def test_refusals(call, said):
    student = make()
    with pytest.raises(ValueError, match=said): call(student, EMATeacher(student))
