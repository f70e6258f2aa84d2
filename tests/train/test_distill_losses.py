"""The losses of distillation against formulas written out in double precision."""

import copy
import math
from typing import Any

import heal
import numpy as np
import pytest
import torch
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.train import losses
from secateur.train.losses import attention_kl, forward_kl, in_chunks, relative_distance, signal_of
from secateur.train.objective import Distilling, Plain, summed
from secateur.train.settings import Distillation
from secateur.train.teacher import Live


def numbers(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    raised = [math.exp((x - top) / temperature) for x in row]
    return [x / sum(raised) for x in raised]


def kl_of(teacher: list[float], student: list[float], temperature: float, kept: int | None) -> float:
    """KL(teacher || student) of one prediction, all classes but the teacher's `kept` largest put together."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    order = sorted(range(len(p)), key=lambda i: -p[i])[:kept]
    pairs = [(p[i], q[i]) for i in order]
    rest = [i for i in range(len(p)) if i not in order]
    if rest:
        pairs.append((sum(p[i] for i in rest), sum(q[i] for i in rest)))
    return sum(a * math.log(a / b) for a, b in pairs)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kept", [None, 1, 4, 11])
def test_kl_is_the_formula(kept: int | None, temperature: float) -> None:
    teacher, student = numbers(7, 11), numbers(7, 11, seed=1)
    found = forward_kl(student, signal_of(teacher, temperature, kept), temperature)
    expected = [kl_of(a, b, temperature, kept) for a, b in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    full = forward_kl(student, signal_of(teacher, temperature, None), temperature)
    assert bool((found <= full + 1e-6).all())
    if kept == 11:
        assert torch.equal(found, full)


def test_a_sure_student_still_learns_about_the_rest() -> None:
    """The rest of the student is below the digits of 1 - sum, and its loss and gradient are there all the same."""
    teacher = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    student = torch.tensor([[40.0, 0.0, 1.0, 2.0]], requires_grad=True)
    found = forward_kl(student, signal_of(teacher, 1.0, 1), 1.0)
    assert float(found.detach()) == pytest.approx(kl_of(teacher[0].tolist(), student[0].tolist(), 1.0, 1), rel=1e-5)
    found.backward()  # type: ignore[no-untyped-call]
    p = softmax(teacher[0].tolist(), 1.0)[0]
    assert float(student.grad[0, 0]) == pytest.approx(1 - p, rel=1e-5)  # type: ignore[index]
    assert float(student.grad[0, 3]) == pytest.approx(-(1 - p) * softmax([0.0, 1.0, 2.0], 1.0)[2], rel=1e-5)  # type: ignore[index]


def test_top_k_of_many_rows_is_taken_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = signal_of(numbers(9, 5), 2.0, 3)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 20)
    parts = signal_of(numbers(9, 5), 2.0, 3)
    assert whole.which is not None
    assert parts.which is not None
    assert torch.equal(whole.logs, parts.logs)
    assert torch.equal(whole.which, parts.which)


@pytest.mark.parametrize("kept", [None, 3])
def test_chunks_change_nothing(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = signal_of(numbers(10, 6), 2.0, kept)
    targets = torch.tensor([0, 1, -100, 3, 4, 5, 0, -100, 2, 3])
    results = []
    for size in (2**24, 18):
        monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", size)
        own = numbers(12, 6, seed=3).requires_grad_()
        found: Any = losses_predictions(own, targets)
        kl, ce = summed(found, teacher, 2.0, grad=True, ce=True)
        (kl + 0.5 * ce).backward()  # type: ignore[no-untyped-call]
        results.append((kl, ce, own.grad))
    assert in_chunks(10, 6, lambda part: (torch.ones(part.stop - part.start).sum(),), grad=False)[0] == 10
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def losses_predictions(own: torch.Tensor, targets: torch.Tensor) -> Any:
    from secateur.load.predictions import Predictions

    return Predictions(own, torch.arange(1, 11), targets)


def test_relative_distance() -> None:
    own, wanted = numbers(5, 3).double().numpy(), numbers(5, 3, seed=1).double().numpy()
    expected = ((own - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
    assert float(relative_distance(numbers(5, 3), numbers(5, 3, seed=1))) == pytest.approx(expected, rel=1e-5)
    mean = numbers(5, 3, seed=1).mean(0).expand(5, 3)
    assert float(relative_distance(mean, numbers(5, 3, seed=1))) == pytest.approx(1)
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]])
    assert float(relative_distance(one, other)) == pytest.approx(1 / 4)  # one row has no spread
    assert float(relative_distance(torch.zeros(2, 2), torch.zeros(2, 2))) == 0


def test_attention_kl_by_hand() -> None:
    teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.1, 0.9]]]])  # two heads
    student = torch.tensor([[[[1.0, 0.0], [0.6, 0.4]]]])  # one
    second = 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)
    assert float(attention_kl(student, teacher, None)) == pytest.approx(second / 2)
    assert float(attention_kl(student, teacher, torch.tensor([[False, True]]))) == pytest.approx(second)


def pruned() -> Any:
    """A narrower student, so that features need a map."""
    return heal.llama(seed=5, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)


PAIRS = [("model.layers.0", "model.layers.1"), ("model.layers.1", "model.layers.0")]


@pytest.mark.parametrize("left", [True, False])
def test_the_whole_objective_has_the_gradient_of_the_plain_formula(left: bool) -> None:
    # In float64, eager attention of transformers gives NaN for padding on the left: its softmax is taken in float32.
    kind = torch.float32 if left else torch.float64
    teacher, batch = heal.llama().to(kind), heal.padded(heal.rows(3), left)
    student = pruned().to(kind)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    settings = Distillation(kl=0.7, ce=0.4, hidden=0.3, attention=0.2, temperature=2.0)
    objective = Distilling(Live(teacher, 2.0, None, {}), settings, PAIRS)
    objective.begin(student, batch, None)
    loss = objective(student, batch, None)["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.clone() for p in [*student.parameters(), *objective.state().parameters()]]

    plain = copy.deepcopy(student)
    maps = copy.deepcopy(objective.state()).to(kind).maps
    plain.zero_grad()
    for p in maps.parameters():  # type: ignore[union-attr]
        p.grad = None
    expected = plain_loss(teacher, plain, maps, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = [p.grad for p in [*plain.parameters(), *maps.parameters()]]  # type: ignore[union-attr]
    size = float(torch.cat([g.flatten() for g in wanted]).norm())
    for a, b in zip(found, wanted, strict=True):  # the losses are taken in float32
        assert float((a.double() - b).norm()) < 1e-4 * float(b.norm()) + 1e-6 * size


def plain_loss(teacher: Any, student: Any, maps: Any, batch: Any) -> torch.Tensor:
    """The same sum, a row and a position at a time, in float64."""
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        said = teacher(**batch, **options)
    got = student(**batch, **options)
    mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
    kl, ce = [], []
    for b in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            if mask[b, t] and mask[b, t + 1]:
                p, q = (functional.log_softmax(m.logits[b, t] / 2.0, -1) for m in (said, got))
                kl.append((p.exp() * (p - q)).sum())
                ce.append(-functional.log_softmax(got.logits[b, t], -1)[ids[b, t + 1]])
    hidden, attention = [], []
    # The last hidden state that transformers shows is behind the final norm, so the second block is run by itself.
    outs = [blocks(m, batch) for m in (student, teacher)]
    for number, (a, b) in enumerate([(0, 1), (1, 0)]):
        x, y = outs[0][a][mask], outs[1][b][mask].detach()
        x = x @ maps[str(number)].weight.T + maps[str(number)].bias
        hidden.append((x - y).square().sum() / (y - y.mean(0)).square().sum())
        p, q = said.attentions[b].mean(1)[mask], got.attentions[a].mean(1)[mask]
        attention.append((torch.xlogy(p, p) - p * q.clamp(min=1e-9).log()).sum(-1).mean())
    total: Any = 0.7 * 4 * torch.stack(kl).mean() + 0.4 * torch.stack(ce).mean()
    return total + 0.3 * torch.stack(hidden).mean() + 0.2 * torch.stack(attention).mean()  # type: ignore[no-any-return]


def blocks(model: Any, batch: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0]))
        for layer in model.model.layers
    ]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_the_maps_begin_as_least_squares() -> None:
    teacher, ids = heal.llama(), heal.rows(40)
    student = pruned()
    objective = Distilling(Live(teacher, 1.0, None, {}), Distillation(hidden=1.0), PAIRS)
    objective.begin(student, ids, None)
    own, wanted = blocks(student, {"input_ids": ids}), blocks(teacher, {"input_ids": ids})
    for number, (a, b) in enumerate([(0, 1), (1, 0)]):
        x, y = (t.detach().reshape(-1, t.shape[-1]).double().numpy() for t in (own[a], wanted[b]))
        wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        best, left, _, _ = np.linalg.lstsq(wide, y, rcond=None)
        linear: Any = objective.state().maps[str(number)]  # type: ignore[index,union-attr,unused-ignore]
        solution = np.concatenate([linear.weight.detach().numpy().T, linear.bias.detach().numpy()[None]])
        error = float(((wide @ solution - y) ** 2).sum())
        assert error <= float(left.sum()) * 1.001  # the ridge costs next to nothing
        assert np.allclose(solution, best, atol=0.05 * np.abs(best).max())


def test_models_without_logits_are_held_together_by_distance() -> None:
    torch.manual_seed(0)
    teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x = numbers(6, 4)
    found = Distilling(Live(teacher, 1.0, None, {}), Distillation(), [])(student, x, None)
    own, wanted = student(x), teacher(x)
    expected = (own - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert float(found["distance"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.equal(found["loss"], found["distance"])
    with pytest.raises(SecateurError, match="no logits"):
        Distilling(Live(teacher, 1.0, None, {}), Distillation(ce=1.0), [])(student, x, None)


def test_a_loss_of_the_users_own_must_be_a_number() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(SecateurError, match=r"one number that depends on the model, not shape \[3, 2\]"):
        Plain(lambda m, b: m(b))(model, torch.ones(3, 2), None)
    with pytest.raises(SecateurError, match="not float"):
        Plain(lambda m, b: 1.0)(model, torch.ones(3, 2), None)  # type: ignore[arg-type,return-value]
    with pytest.raises(SecateurError, match="depends on the model"):
        Plain(lambda m, b: torch.ones(()))(model, torch.ones(3, 2), None)
