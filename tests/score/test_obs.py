"""The greedy order of structured OBS against a brute force that solves every least-squares problem anew."""

from dataclasses import replace

import pytest
import torch

from secateur.errors import SecateurError
from secateur.score.obs import Consumed, by_unit, eliminate, inverted, ladder, together


class Problem:
    """A weight, what it meets, and which columns belong to which unit."""

    def __init__(self, seed: int, columns: list[list[int]], rows: int = 5, *, gradients: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        width = 1 + max(c for own in columns for c in own)
        self.columns = columns
        self.W = torch.randn(rows, width, generator=draw, dtype=torch.float64)
        mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
        X = torch.randn(3 * width, width, generator=draw, dtype=torch.float64) @ mix
        self.C = X.T @ X / len(X) + 0.02 * torch.eye(width, dtype=torch.float64)  # damped
        g = torch.randn(4 * rows, rows, generator=draw, dtype=torch.float64)
        self.G = g.T @ g / len(g) if gradients else torch.eye(rows, dtype=torch.float64)

    def consumed(self) -> Consumed:
        most = max(len(own) for own in self.columns)
        padded = torch.tensor([own + [-1] * (most - len(own)) for own in self.columns])
        return Consumed(self.W, torch.linalg.inv(self.C), padded, self.G @ self.W)

    def loss(self, gone: set[int]) -> float:
        """Least tr(G (W - W') C (W - W')') over W' without the columns of these units, from the normal equations."""
        out = {c for unit in gone for c in self.columns[unit]}
        stay = [c for c in range(self.W.shape[1]) if c not in out]
        new = torch.zeros_like(self.W)
        if stay:
            new[:, stay] = torch.linalg.lstsq(self.C[stay][:, stay], (self.W @ self.C)[:, stay].T).solution.T
        change = self.W - new
        return float((self.G * (change @ self.C @ change.T)).sum())


def greedy(problems: list[Problem], size: int, groups: int) -> list[list[int]]:
    """In every round each group loses the unit without which the whole loss is least."""
    per, gone, order = size // groups, set[int](), []
    for _ in range(per - 1):
        found = []
        for group in range(groups):
            alive = [u for u in range(group * per, (group + 1) * per) if u not in gone]
            found.append(min(alive, key=lambda u: sum(p.loss(gone | {u}) for p in problems)))
        order.append(found)
        gone |= set(found)
    return order


def single(size: int) -> list[list[int]]:
    return [[u] for u in range(size)]


def wide(size: int) -> list[list[int]]:
    """Units of several columns that do not lie together, and columns of no unit behind them."""
    return [[u, size + u, 2 * size + u] for u in range(size)]


CASES = {
    "one column": ([Problem(0, single(9))], 9, 1),
    "gradients": ([Problem(1, single(9), gradients=True)], 9, 1),
    "several columns": ([Problem(2, wide(6), gradients=True)], 6, 1),
    "columns of no unit": ([Problem(3, [[5], [1], [8], [2]])], 4, 1),
    "unequal numbers of columns": ([Problem(4, [[0, 3], [1], [2, 4, 5], [6], [7, 8]])], 5, 1),
    "two consumers": ([Problem(5, single(7)), Problem(6, wide(7), rows=3, gradients=True)], 7, 1),
    "groups": ([Problem(7, single(8))], 8, 2),
    "groups of several columns": ([Problem(8, wide(6), gradients=True), Problem(9, single(6))], 6, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_order_is_that_of_a_brute_force(name: str) -> None:
    problems, size, groups = CASES[name]
    order = eliminate([p.consumed() for p in problems], size, groups)
    assert order.dtype == torch.int64
    assert order.tolist() == greedy(problems, size, groups)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_not_that_of_costs_taken_once(seed: int) -> None:
    """Were the others not fitted anew after each, the order would differ: the oracle could not tell otherwise."""
    problem = Problem(20 + seed, single(9))
    once = sorted(range(9), key=lambda u: problem.loss({u}))[:-1]
    assert eliminate([problem.consumed()], 9).flatten().tolist() != once


def test_the_costs_of_the_steps_add_up_to_the_loss_of_all() -> None:
    """What is left of `worth` after each step must be the true cost of the next: else later steps would drift."""
    problem = Problem(11, wide(7), gradients=True)
    order = eliminate([problem.consumed()], 7).flatten().tolist()
    losses = [problem.loss(set(order[:k])) for k in range(len(order) + 1)]
    assert losses[0] == pytest.approx(0, abs=1e-9)
    assert losses == sorted(losses)
    # An order made from the very end of the way agrees: eliminate from the state after three removals.
    gone = order[:3]
    out = [c for u in gone for c in problem.columns[u]]
    stay = [c for c in range(problem.W.shape[1]) if c not in out]
    rest = Problem(0, single(1))
    rest.C, rest.G = problem.C[stay][:, stay], problem.G
    rest.W = torch.linalg.lstsq(rest.C, (problem.W @ problem.C)[:, stay].T).solution.T
    units = [u for u in range(7) if u not in gone]
    rest.columns = [[stay.index(c) for c in problem.columns[u]] for u in units]
    again = eliminate([rest.consumed()], len(units)).flatten().tolist()
    assert [units[u] for u in again] == order[3:]


def test_several_at_once_are_the_cheapest_of_that_round() -> None:
    problem = Problem(12, single(10))
    order = eliminate([problem.consumed()], 10, rounds_at_once=0.35).flatten().tolist()
    gone: list[int] = []
    for many in (3, 2, 1, 1, 1, 1):  # 35% of 10, 7, 5, 4, 3, 2
        alive = [u for u in range(10) if u not in gone]
        cheap = sorted(alive, key=lambda u: problem.loss({*gone, u}) - problem.loss(set(gone)))[:many]
        assert order[len(gone) : len(gone) + many] == cheap
        gone += cheap
    assert len(order) == 9


def test_several_at_once_keep_one_unit_of_each_group() -> None:
    order = eliminate([Problem(13, single(12)).consumed()], 12, 3, rounds_at_once=1.0)
    assert order.shape == (3, 3)
    for group in range(3):
        own = order[:, group].tolist()
        assert len(set(own)) == 3
        assert all(unit // 4 == group for unit in own)


def test_a_single_unit_stays() -> None:
    assert eliminate([Problem(14, single(1)).consumed()], 1).shape == (0, 1)
    assert eliminate([Problem(14, single(3)).consumed()], 3, 3).shape == (0, 3)


def test_the_inputs_stay_as_they_are() -> None:
    consumed = Problem(15, wide(4)).consumed()
    before = consumed.matrix.clone(), consumed.inverse.clone()
    eliminate([consumed], 4)
    assert torch.equal(consumed.matrix, before[0])
    assert torch.equal(consumed.inverse, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_costs_that_are_no_numbers_are_an_error(value: float) -> None:
    consumed = Problem(16, single(4)).consumed()
    consumed.matrix[2, 2] = value
    with pytest.raises(SecateurError, match="the costs of units are not finite"):
        eliminate([consumed], 4)


# What every size loses


@pytest.mark.parametrize("share", [0.0, 0.35])
@pytest.mark.parametrize("name", CASES)
def test_the_ladder_is_what_a_brute_force_loses_at_every_size(name: str, share: float) -> None:
    """Also between the units of a round, where several go at once."""
    problems, size, groups = CASES[name]
    found = ladder([p.consumed() for p in problems], size, groups, rounds_at_once=share)
    assert found.lost.shape == (size // groups,)
    for rounds, lost in enumerate(found.lost.tolist()):
        gone = {int(unit) for unit in found.order[:rounds].flatten()}
        assert lost == pytest.approx(sum(p.loss(gone) for p in problems), rel=1e-8, abs=1e-9)


def test_two_axes_of_one_matrix_lose_together_what_a_brute_force_says() -> None:
    """Twelve heads of two columns in four groups; columns that are in both count once."""
    heads = [[2 * u, 2 * u + 1] for u in range(12)]
    inner, outer = Problem(17, heads, gradients=True), Problem(17, heads, gradients=True)
    outer.columns = [[c for u in range(3 * g, 3 * g + 3) for c in heads[u]] for g in range(4)]
    one, other = inner.consumed(), outer.consumed()
    by_head, by_group = ladder([one], 12, 4), ladder([other], 4)
    found = together([other], [one.columns], by_group.order, by_head.order)
    assert found.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            gone = {int(unit) for unit in by_head.order[:j].flatten()}
            gone |= {3 * int(g) + k for g in by_group.order[:i].flatten() for k in range(3)}
            assert float(found[i, j]) == pytest.approx(inner.loss(gone), rel=1e-8, abs=1e-9)
    torch.testing.assert_close(found[:, 0], by_group.lost)
    torch.testing.assert_close(found[0], by_head.lost)
    assert float(found[3, 2]) != pytest.approx(float(found[3, 0] + found[0, 2]), rel=1e-3)  # no mere sum


@pytest.mark.parametrize("gradients", [False, True])
def test_float32_in_its_own_memory_finds_the_same(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several hundred columns, so that the matrices shrink many times, a few rows at a time."""
    monkeypatch.setattr("secateur.score.obs.ROWS", 7)
    problem = Problem(18, single(300), rows=20, gradients=gradients)
    exact = problem.consumed()
    short = [None if x is None else x.float().contiguous() for x in (exact.matrix, exact.inverse, exact.graded)]
    matrix, inverse, graded = short
    assert matrix is not None
    assert inverse is not None
    place = inverse.data_ptr()
    spare = Consumed(matrix, inverse, exact.columns, graded if gradients else None, spare=True)
    one = ladder([replace(exact, graded=exact.graded if gradients else None)], 300, rounds_at_once=0.02)
    other = ladder([spare], 300, rounds_at_once=0.02)
    assert inverse.data_ptr() == place
    assert not torch.equal(inverse, exact.inverse.float())  # it was used up
    torch.testing.assert_close(other.lost, one.lost, rtol=1e-3, atol=1e-4 * float(one.lost[-1]))
    half = [set(found.order[:150].flatten().tolist()) for found in (one, other)]
    assert len(half[0] & half[1]) >= 145
    gone = half[1]
    assert float(other.lost[150]) == pytest.approx(problem.loss(gone), rel=1e-3)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_inverse_lies_where_the_matrix_was(kind: torch.dtype) -> None:
    own = Problem(19, single(40)).C.to(kind)
    exact, place = torch.linalg.inv(own.double()), own.data_ptr()
    found = inverted(own)
    assert found.data_ptr() == place
    torch.testing.assert_close(found.double(), exact, rtol=1e-3 if kind == torch.float32 else 1e-8, atol=1e-3)
    with pytest.raises(SecateurError, match=r"have no inverse: give a larger damping, such as damping=0\.1"):
        inverted(-torch.eye(3))


def test_columns_by_unit() -> None:
    assert by_unit(torch.tensor([1, -1, 0, 1, 3]), 4).tolist() == [[2, -1], [0, 3], [-1, -1], [4, -1]]
    assert by_unit(torch.empty(0, dtype=torch.int64), 2).tolist() == [[-1], [-1]]
