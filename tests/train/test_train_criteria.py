"""Each formula, values and gradients, against loops in float64."""

import math

import pytest
import slow_sparsity as slow
import torch

from secateur.train import criteria


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, seed=seed).requires_grad_()


def test_magnitude_and_its_normalisation() -> None:
    weight = random(3, 4)
    norm = math.sqrt(sum(float(w) ** 2 for w in weight.flatten()))
    expected = [abs(float(w)) / norm for w in weight.flatten()]
    assert criteria.magnitude(weight, normalize=True).flatten().tolist() == pytest.approx(expected)
    assert criteria.magnitude(weight).flatten().tolist() == [abs(float(w)) for w in weight.flatten()]
    assert not criteria.magnitude(torch.zeros(2, 2), normalize=True).any()
    assert criteria.magnitude(weight.bfloat16()).dtype == torch.float32


def test_weight_change() -> None:
    now, before = random(3, 4), random(3, 4, seed=1)
    expected = [abs(float(a) - float(b)) for a, b in zip(now.flatten(), before.flatten(), strict=True)]
    assert criteria.weight_change(now, before).flatten().tolist() == pytest.approx(expected)


def test_movement_gradients_are_the_papers() -> None:
    x, upstream = random(5, 4, seed=1), random(5, 3, seed=2)
    weight, scores = leaf(3, 4), leaf(3, 4, seed=3)
    mask = scores.detach() > 0.2
    torch.autograd.backward((x @ criteria.learned(weight, mask, scores).T), upstream)
    assert weight.grad is not None
    assert scores.grad is not None
    for i in range(3):
        for j in range(4):  # equation 4 of the paper: dL/dS_ij = dL/da_i W_ij x_j
            outer = sum(float(upstream[b, i]) * float(x[b, j]) for b in range(5))
            assert float(scores.grad[i, j]) == pytest.approx(outer * float(weight[i, j].detach()))
            assert float(weight.grad[i, j]) == pytest.approx(outer * float(mask[i, j]))


def test_soft_mask_and_penalty() -> None:
    scores = [leaf(3, 4), leaf(5, seed=1)]
    for s in scores:
        assert criteria.above(s, 0.3).flatten().tolist() == [slow.sigmoid(float(v)) > 0.3 for v in s.detach().flatten()]
    values = [float(v) for s in scores for v in s.detach().flatten()]
    penalty = criteria.score_penalty(scores)
    assert float(penalty.detach()) == pytest.approx(sum(map(slow.sigmoid, values)) / 17)
    torch.autograd.backward(penalty)
    gradient = [float(g) for s in scores if s.grad is not None for g in s.grad.flatten()]
    assert gradient == pytest.approx([slow.sigmoid(v) * (1 - slow.sigmoid(v)) / 17 for v in values])


def test_gates_open_by_noise_and_their_gradient_is_that_of_the_sigmoid() -> None:
    weight, logits, upstream = leaf(3, 4), leaf(3, 4, seed=1), random(3, 4, seed=2)
    noise = 2 * random(3, 4, seed=3)
    made = criteria.gated(weight, logits, noise)
    torch.autograd.backward(made, upstream)
    assert weight.grad is not None
    assert logits.grad is not None
    flat = zip(*(t.detach().flatten().tolist() for t in (made, weight, logits, noise, upstream)), strict=True)
    gradients = zip(weight.grad.flatten().tolist(), logits.grad.flatten().tolist(), strict=True)
    for (value, w, s, e, g), (dw, ds) in zip(flat, gradients, strict=True):
        p = slow.sigmoid(s + e)
        gate = 1.0 if p > 0.5 else 0.0
        assert (value, dw) == pytest.approx((w * gate, g * gate))
        assert ds == pytest.approx(g * w * p * (1 - p))
    still = criteria.gated(weight, logits, None).detach()
    assert torch.equal(still, weight.detach() * (logits.detach() > 0))


def test_gate_penalty_counts_open_gates() -> None:
    logits = [leaf(3, 4), leaf(8, seed=1)]
    values = [float(v) for s in logits for v in s.detach().flatten()]
    kept = sum(v > 0 for v in values)
    penalty = criteria.gate_penalty(logits, 0.7)
    assert float(penalty.detach()) == pytest.approx(((kept / 20 - 0.3) / 0.05) ** 2)
    torch.autograd.backward(penalty)
    gradient = [float(g) for s in logits if s.grad is not None for g in s.grad.flatten()]
    slope = 2 * (kept / 20 - 0.3) / 0.05**2 / 20
    assert gradient == pytest.approx([slope * slow.sigmoid(v) * (1 - slow.sigmoid(v)) for v in values])


def test_noise_is_logistic_and_depends_on_nothing_else() -> None:
    like = torch.zeros(200, 200)
    noise = criteria.gate_noise(like, 1, 2, 3)
    torch.manual_seed(1)
    assert torch.equal(noise, criteria.gate_noise(like, 1, 2, 3))
    others = [criteria.gate_noise(like, *key) for key in ((0, 2, 3), (1, 1, 3), (1, 2, 4))]
    assert not any(torch.equal(noise, other) for other in others)
    assert float((noise > 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((noise > math.log(9)).double().mean()) == pytest.approx(0.1, abs=0.01)  # P(logit(u) > logit(.9))
    assert slow.sigmoid(criteria.LOGIT) == pytest.approx(0.99)


def test_sr_ste_gradient_is_dense_and_its_decay_is_on_what_is_masked() -> None:
    weight, upstream = leaf(4, 8), random(4, 8, seed=1)
    mask = torch.tensor([slow.n_of_m([abs(v) for v in row], 2, 4) for row in weight.tolist()])
    made = criteria.dense_gradient(weight, mask)
    torch.autograd.backward(made, upstream)
    assert torch.equal(made.detach(), weight.detach() * mask)
    assert weight.grad is not None
    torch.autograd.backward(criteria.masked_decay([weight], [mask], 0.3))
    for i in range(4):
        for j in range(8):  # equation 9 of the paper: the gradient plus lambda_w (1 - mask) W
            expected = float(upstream[i, j]) + 0.3 * (0 if mask[i, j] else 1) * float(weight[i, j].detach())
            assert float(weight.grad[i, j]) == pytest.approx(expected)


def test_masked_zeros_are_positive_and_swallow_what_is_not_finite() -> None:
    weight = torch.tensor([-1.0, math.nan, math.inf, 2.0])
    made = criteria.masked(weight, torch.tensor([False, False, False, True]))
    assert made.tolist() == [0, 0, 0, 2]
    assert not made.signbit().any()
