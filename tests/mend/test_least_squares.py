"""The arithmetic of the repair, against torch's own least squares in float64."""

import pytest
import torch

from secateur.errors import SecateurError
from secateur.mend.least_squares import Moments, least_squares, lost_mean


def rows(n: int = 200, columns: int = 7, out: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, columns, generator=generator, dtype=torch.float64) + 0.7
    t = x @ torch.randn(columns, out, generator=generator, dtype=torch.float64) + 2
    return x, t + 0.3 * torch.randn(n, out, generator=generator, dtype=torch.float64), torch.ones(out, columns)


def moments(x: torch.Tensor, t: torch.Tensor, pieces: int = 3) -> Moments:
    found = Moments.zeros(x.shape[1], t.shape[1])
    for a, b in zip(x.chunk(pieces), t.chunk(pieces), strict=True):
        found.add(a, b)
    return found


def test_without_damping_it_is_least_squares() -> None:
    x, t, start = rows()
    fit = least_squares(moments(x, t), start, damping=0)
    expected = torch.linalg.lstsq(x, t).solution
    torch.testing.assert_close(fit.weight, expected.T, rtol=1e-9, atol=1e-9)
    assert fit.shift is None
    assert fit.after == pytest.approx(float((t - x @ expected).square().sum()), rel=1e-8)
    assert fit.before == pytest.approx(float((t - x @ start.T.double()).square().sum()), rel=1e-8)
    assert fit.total == pytest.approx(float(t.square().sum()), rel=1e-8)


def test_with_an_intercept_it_is_least_squares_with_a_column_of_ones() -> None:
    x, t, start = rows()
    fit = least_squares(moments(x, t), start, damping=0, intercept=True)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), t).solution
    assert fit.shift is not None
    torch.testing.assert_close(fit.weight, expected[:-1].T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.shift, expected[-1], rtol=1e-8, atol=1e-8)
    left = t - x @ fit.weight.T - fit.shift
    assert fit.after == pytest.approx(float(left.square().sum()), rel=1e-7)
    assert fit.total == pytest.approx(float((t - t.mean(0)).square().sum()), rel=1e-8)


def test_the_ridge_is_towards_the_start() -> None:
    x, t, _ = rows()
    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = least_squares(moments(x, t), start, damping=0.1)
    root = (0.1 * (x.T @ x).diagonal().mean()).sqrt()
    wide, wanted = torch.cat([x, root * torch.eye(7, dtype=x.dtype)]), torch.cat([t, root * start.T])
    torch.testing.assert_close(fit.weight, torch.linalg.lstsq(wide, wanted).solution.T, rtol=1e-9, atol=1e-9)


def test_targets_can_be_taken_in_parts() -> None:
    x, t, start = rows()
    whole = least_squares(moments(x, t), start).weight
    part = least_squares(moments(x, t).some(2, 4), start[2:4]).weight
    torch.testing.assert_close(part, whole[2:4])


def test_what_the_data_does_not_say_stays() -> None:
    x, t, start = rows()
    x[:, 3] = 0
    fit = least_squares(moments(x, t), start)
    assert torch.equal(fit.weight[:, 3], start[:, 3].double())
    nothing = least_squares(moments(torch.zeros_like(x), t), start, intercept=True)
    assert torch.equal(nothing.weight, start.double())
    assert nothing.shift is not None
    torch.testing.assert_close(nothing.shift, t.mean(0))


def test_fewer_rows_than_columns_keep_the_start_across_them() -> None:
    x, t, start = rows(n=4)
    fit = least_squares(moments(x, t, pieces=1), start, damping=1e-6)
    assert fit.after < 1e-6 * fit.before
    across = torch.linalg.svd(x).Vh[4:]  # directions that no row has
    torch.testing.assert_close(fit.weight @ across.T, start.double() @ across.T, rtol=1e-5, atol=1e-5)


def test_a_singular_one_takes_more_damping_and_says_so() -> None:
    x, t, start = rows()
    x[:, 1] = x[:, 0]
    sums = moments(x, t)
    sums.squares[0, 1] = sums.squares[1, 0] = sums.squares[0, 0] * (1 + 1e-9)  # no sum of squares has this
    fit = least_squares(sums, start, damping=0)
    assert fit.damping == pytest.approx(1e-3)
    assert bool(torch.isfinite(fit.weight).all())
    sums.squares[0, 1] = sums.squares[1, 0] = 1e12
    with pytest.raises(SecateurError, match="no inverse, however much it is damped"):
        least_squares(sums, start)


def test_the_mean_of_what_is_lost() -> None:
    x, _, _ = rows()
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    gone = torch.tensor([False, True, False, False, True, True, False])
    expected = (x[:, gone] @ weight[:, gone].double().T).mean(0)
    torch.testing.assert_close(lost_mean(weight, gone, x.mean(0)), expected)
