"""The arithmetic of a basis for a narrower stream, against plain optimisation and autograd."""

import itertools

import pytest
import torch

from secateur.mend import rotation as module
from secateur.mend.rotation import complete, gained, missed, subspace, tie_rotation, tied_weight

D = 9


def moments(seed: int, size: int = D, count: int = 40) -> torch.Tensor:
    """A random second moment, [size, size] float64, far from a multiple of the identity."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=draw, dtype=torch.float64)
    rows = rows * torch.linspace(0.2, 2, size).double()[torch.randperm(size, generator=draw)]
    mix = torch.randn(size, size, generator=draw, dtype=torch.float64)
    return mix @ (rows.T @ rows) @ mix.T / count


SECONDS = [moments(seed) for seed in range(3)]
METRICS = [moments(seed) for seed in range(10, 13)]


def test_less_is_missed_the_wider_the_stream_and_nothing_at_full_width() -> None:
    found = [missed(subspace(SECONDS, METRICS, k), SECONDS, METRICS) for k in range(1, D + 1)]
    assert all(a > b for a, b in itertools.pairwise(found))
    whole = sum(float((M * C).sum()) for C, M in zip(SECONDS, METRICS, strict=True))
    assert found[-1] < 1e-6 * whole < found[-2]


def test_a_guess_misses_what_regression_misses() -> None:
    rows = torch.randn(500, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    A = torch.randn(D, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    guess = rows @ A @ torch.linalg.lstsq(rows @ A, rows).solution
    error = (rows - guess).T @ (rows - guess) / 500
    assert missed(A, [rows.T @ rows / 500], [METRICS[0]]) == pytest.approx(float((METRICS[0] * error).sum()), rel=1e-6)


def test_one_norm_has_a_closed_form_and_several_miss_less_than_any_start() -> None:
    root = module._power(SECONDS[0], 0.5)
    values = torch.linalg.eigvalsh(root @ METRICS[0] @ root)
    found = missed(subspace(SECONDS[:1], METRICS[:1], 4), SECONDS[:1], METRICS[:1])
    assert found == pytest.approx(float(values[:-4].sum()), rel=1e-6)
    best = subspace(SECONDS, METRICS, 4)
    least = missed(best, SECONDS, METRICS)
    start = subspace(SECONDS, METRICS, 4, iterations=1)
    assert least < missed(start, SECONDS, METRICS)
    draw = torch.Generator().manual_seed(6)
    for _ in range(20):
        apart = 0.05 * torch.randn(D, 4, generator=draw, dtype=torch.float64)
        assert missed(best + apart, SECONDS, METRICS) > least
    assert torch.allclose(best.T @ best, torch.eye(4).double())


def test_the_gradient_is_that_of_autograd() -> None:
    A = torch.randn(D, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    for C, M in zip(SECONDS, METRICS, strict=True):
        loss = loss + (M * C).sum() - torch.linalg.solve(A.T @ C @ A, A.T @ C @ M @ C @ A).diagonal().sum()
    (wanted,) = torch.autograd.grad(loss, A)
    energies = [C @ M @ C for C, M in zip(SECONDS, METRICS, strict=True)]
    whole = sum(float((M * C).sum()) for C, M in zip(SECONDS, METRICS, strict=True))
    assert module._closure(A, SECONDS, energies, whole)() == pytest.approx(float(loss.detach()), rel=1e-6)
    assert A.grad is not None
    assert torch.allclose(A.grad, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_basis_is_completed() -> None:
    A = subspace(SECONDS, METRICS, 4)
    whole = complete(A)
    assert torch.equal(whole[:, :4], A)
    assert torch.allclose(whole.T @ whole, torch.eye(D).double())


def of_the_head(A: torch.Tensor, N: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The loss that A N A'u has to diag(g) u."""
    apart = torch.diag(g) - A @ N @ A.T
    return (METRICS[1] * (apart @ SECONDS[1] @ apart.T)).sum()


def test_a_tied_head_is_turned_as_plain_optimisation_turns_it() -> None:
    g = torch.linspace(0.3, 2, D).double()
    A = subspace(SECONDS, METRICS, 5)
    free = torch.eye(5, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=30,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = of_the_head(A, (free + free.T) / 2, g)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    least = float(of_the_head(A, (free + free.T).detach() / 2, g))
    turned = tie_rotation(A, METRICS[1], g, SECONDS[1])
    pull, push = turned.T @ METRICS[1] @ turned, turned.T @ (METRICS[1] * g)
    weight, taken = tied_weight(pull, push, turned.T @ SECONDS[1] @ turned, SECONDS[1] @ turned)
    assert float(of_the_head(turned, torch.diag(weight), g)) == pytest.approx(least, rel=1e-4)
    whole = float((g[:, None] * METRICS[1] * g * SECONDS[1]).sum())
    assert whole + taken == pytest.approx(least, rel=1e-4)
    unturned, _ = tied_weight(A.T @ METRICS[1] @ A, A.T @ (METRICS[1] * g), A.T @ SECONDS[1] @ A, SECONDS[1] @ A)
    assert float(of_the_head(A, torch.diag(unturned), g)) > 1.01 * least


def test_no_other_weight_gains_more() -> None:
    A = subspace(SECONDS, METRICS, 5)
    given = A.T @ METRICS[1] @ A, A.T @ METRICS[1], A.T @ SECONDS[1] @ A, SECONDS[1] @ A
    weight, taken = tied_weight(*given)
    assert gained(*given, weight) == taken < 0
    for i in range(5):
        other = weight.clone()
        other[i] += 0.1
        assert gained(*given, other) > taken
