"""Refinement and filling: within the limits, never worse, and better than the table alone."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.choose.refine import fill, refine
from secateur.choose.table import Choice, Level, Slot, Table, Term, solve


def table_of(counts: list[int], costs: list[list[float]], losses: list[list[float]]) -> Table:
    slots = tuple(Slot(f"s{i}", tuple(Level({f"x{i}": c - n}) for n in range(c))) for i, c in enumerate(counts))
    cost = tuple(Term((i,), np.array(own, dtype=float)) for i, own in enumerate(costs))
    return Table(slots, tuple(Term((i,), np.array(own, dtype=float)) for i, own in enumerate(losses)), {"params": cost})


def random_table(seed: int) -> Table:
    """Ever less, and ever worse."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(2, 5, size=int(draw.integers(2, 6))).tolist()
    costs = [sorted(draw.uniform(1, 10, c).tolist(), reverse=True) for c in counts]
    losses = [[0.0, *sorted(draw.uniform(0, 1, c - 1).tolist())] for c in counts]
    return table_of(counts, costs, losses)


def choices(table: Table) -> list[Choice]:
    return list(itertools.product(*(range(len(slot.levels)) for slot in table.slots)))


def loss_of(table: Table, seed: int) -> Callable[[Choice], float]:
    """A loss of the whole in which slots do not add up."""
    draw = np.random.default_rng(seed)
    weights = draw.uniform(-1, 1, (len(table.slots), len(table.slots)))

    def loss(choice: Choice) -> float:
        levels = np.array(choice, dtype=float)
        return float(table.lost(choice) + levels @ weights @ levels)

    return loss


def noting(seen: list[Choice], loss: Callable[[Choice], float]) -> Callable[[Choice], float]:
    """The same loss, which writes down what it is asked."""

    def note(choice: Choice) -> float:
        seen.append(choice)
        return loss(choice)

    return note


seeds = settings(max_examples=40, deadline=None, derandomize=True)


@seeds
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.integers(0, 40))
def test_the_result_keeps_the_limits_and_is_no_worse(seed: int, tightness: float, trials: int) -> None:
    table = random_table(seed)
    sizes = sorted(table.cost("params", c) for c in choices(table))
    limits = {"params": sizes[int(tightness * (len(sizes) - 1))]}
    start = solve(table, limits).choice
    loss = loss_of(table, seed)
    few: list[Choice] = []
    every: list[Choice] = []
    found = refine(table, start, limits, noting(few, loss), noting(every, loss), trials=trials, seed=seed)
    assert table.fits(found.choice, limits)
    assert found.loss == loss(found.choice) <= loss(start)
    assert all(table.fits(c, limits) for c in [*few, *every])
    assert len(few) == len(set(few)) <= trials
    assert every[0] == start
    assert found.loss == min(loss(c) for c in every)
    assert [n for n, _ in found.history] == sorted(n for n, _ in found.history)
    assert found.history[0] == (0, loss(start))
    assert found.history[-1] == (found.history[-1][0], found.loss)
    assert all(n <= trials for n, _ in found.history)


def additive() -> tuple[Table, Callable[[Choice], float], dict[str, float]]:
    """Two slots that are cheap to cut alone and ruinous together: the table does not know."""
    steps = [0.0, 1.0, 2.2, 3.6]
    table = table_of(
        [4] * 4, [[8, 6, 4, 2]] * 4, [steps, [1.1 * x for x in steps], [0, 1.5, 3, 4.5], [0, 1.6, 3.2, 4.8]]
    )

    def loss(choice: Choice) -> float:
        return table.lost(choice) + 5.0 * choice[0] * choice[1] + 0.3 * choice[2] * choice[3]

    return table, loss, {"params": 24.0}


def test_what_does_not_add_up_is_found() -> None:
    table, loss, limits = additive()
    start = solve(table, limits).choice
    best = min((c for c in choices(table) if table.fits(c, limits)), key=loss)
    assert loss(best) < loss(start)
    found = refine(table, start, limits, loss, loss, trials=96, seed=0)
    assert found.choice == best
    assert found.loss == loss(best)
    assert refine(table, start, limits, loss, loss, trials=0).choice == start


def test_even_a_few_trials_are_made() -> None:
    table, loss, limits = additive()
    for trials in (1, 5, 11):
        seen: list[Choice] = []
        refine(table, (2, 2, 0, 0), limits, noting(seen, loss), loss, trials=trials)
        assert len(seen) == trials


def test_few_samples_choose_and_all_decide() -> None:
    """What only the few like is never taken."""
    table, loss, limits = additive()
    start = solve(table, limits).choice
    wrong = refine(table, start, limits, lambda c: -loss(c), loss, trials=64, seed=1)
    assert wrong.loss <= loss(start)
    stuck = refine(table, start, limits, loss, lambda c: 0.0 if c == start else 1.0, trials=64, seed=1)
    assert (stuck.choice, stuck.loss, list(stuck.history)) == (start, 0.0, [(0, 0.0)])


def test_a_seed_gives_the_same_again() -> None:
    table, loss, limits = additive()
    start = (2, 2, 0, 0)

    def tried(seed: int) -> list[Choice]:
        seen: list[Choice] = []
        refine(table, start, limits, noting(seen, loss), loss, trials=40, seed=seed)
        return seen

    assert tried(3) == tried(3)
    assert tried(3) != tried(4)


def test_nothing_to_switch_ends_early() -> None:
    table = table_of([1, 1], [[3], [4]], [[0], [0]])
    assert refine(table, (0, 0), {"params": 7}, lambda _: 1.0, lambda _: 1.0, trials=40).choice == (0, 0)


@seeds
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.booleans())
def test_filling_climbs_until_nothing_more_fits(seed: int, tightness: float, drawn: bool) -> None:
    table = random_table(seed)
    lowest = tuple(len(slot.levels) - 1 for slot in table.slots)
    floor, top = table.cost("params", lowest), table.cost("params", table.whole)
    limits = {"params": floor + tightness * (top - floor)}
    draw = np.random.default_rng(seed) if drawn else None
    never = (0,)
    found = fill(table, lowest, limits, draw, never=never)
    assert found is not None
    assert table.fits(found, limits)
    assert found[0] == lowest[0]
    for s in range(1, len(found)):
        if found[s]:
            assert not table.fits((*found[:s], found[s] - 1, *found[s + 1 :]), limits)


def test_filling_takes_what_wins_most() -> None:
    table = table_of([3, 3], [[6, 4, 2]] * 2, [[0, 1, 9], [0, 5, 7]])
    assert fill(table, (2, 2), {"params": 6}) == (1, 2)
    assert fill(table, (2, 2), {"params": 8}) == (1, 1)
    assert fill(table, (2, 2), {"params": 10}) == (1, 0)


@pytest.mark.parametrize("limit", [3.9, 0.0])
def test_what_does_not_fit_is_not_filled(limit: float) -> None:
    assert fill(table_of([3, 3], [[6, 4, 2]] * 2, [[0, 1, 9]] * 2), (2, 2), {"params": limit}) is None
