"""Schedules: their formulas, their bounds, and what is told about bad ones."""

import itertools
import math
from typing import Any

import pytest
import slow_sparsity as slow
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.train import Constant, Cubic, Exponential, Linear, MultiStep, Schedule
from secateur.train.schedule import schedule_of


@given(st.integers(0, 20), st.integers(0, 40), st.integers(1, 9), st.floats(0, 0.5), st.floats(0.5, 0.99))
def test_cubic_is_the_papers_curve(begin: int, length: int, frequency: int, first: float, final: float) -> None:
    schedule = Cubic(begin, begin + length, frequency, first)
    for t in range(begin + length + 5):
        expected = slow.cubic(t, begin, begin + length, frequency, first, final)
        assert schedule.sparsity(t, final) == pytest.approx(expected, abs=1e-12)


@given(
    st.sampled_from([Linear, Exponential, Cubic]),
    st.integers(0, 20),
    st.integers(0, 40),
    st.integers(1, 9),
    st.floats(0, 0.5),
    st.floats(0.5, 0.99),
)
def test_sparsity_never_falls_and_changes_only_when_due(
    kind: type[Schedule], begin: int, length: int, frequency: int, first: float, final: float
) -> None:
    schedule = kind(begin, begin + length, frequency, first)
    values = [schedule.sparsity(t, final) for t in range(begin + length + 3)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert set(values[:begin]) <= {first}
    assert values[-1] == values[begin + length] == final
    for t in range(1, len(values)):
        assert values[t] == values[t - 1] or schedule.due(t)
    assert not schedule.due(begin + length + 1)


def test_exponential_multiplies_the_density() -> None:
    schedule = Exponential(begin=10, end=14, initial=0.2)
    density = [1 - schedule.sparsity(t, 0.95) for t in range(10, 15)]
    ratios = [b / a for a, b in itertools.pairwise(density)]
    assert density[0] == pytest.approx(0.8)
    assert density[-1] == pytest.approx(0.05)
    assert ratios == pytest.approx([(0.05 / 0.8) ** 0.25] * 4)


def test_linear_and_constant_and_multistep() -> None:
    assert [Linear(2, 6, 2).sparsity(t, 0.8) for t in range(8)] == pytest.approx([0, 0, 0, 0, 0.4, 0.4, 0.8, 0.8])
    assert [Constant(begin=2).sparsity(t, 0.8) for t in range(4)] == [0, 0, 0.8, 0.8]
    assert [t for t in range(9) if Constant(begin=2, end=7, frequency=2).due(t)] == [2, 4, 6, 7]
    steps = MultiStep(steps=(1, 4), values=(0.5, 0.8), initial=0.1)
    assert [steps.sparsity(t, 0.8) for t in range(6)] == [0.1, 0.5, 0.5, 0.5, 0.8, 0.8]
    assert [t for t in range(9) if steps.due(t)] == [0, 1, 4]


@pytest.mark.parametrize("kind", [Linear, Exponential, Cubic, Constant])
def test_a_schedule_of_length_zero_jumps(kind: type[Schedule]) -> None:
    schedule = kind(begin=3, end=3)
    assert [schedule.sparsity(t, 0.9) for t in (2, 3, 4)] == [0, 0.9, 0.9]
    assert [t for t in range(6) if schedule.due(t)] == [3]
    assert not math.isnan(schedule.sparsity(3, 0.9))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Cubic(begin=5, end=4), "begins at 5 and ends at 4"),
        (lambda: Linear(begin=-1, end=4), "begins at -1"),
        (lambda: Cubic(begin=5), "needs an end"),
        (lambda: Cubic(begin=0, end=5, frequency=0), "frequency 0"),
        (lambda: Cubic(begin=0, end=5, initial=1.0), "initial sparsity 1"),
        (lambda: Cubic(begin=0, end=5, per="epochs"), "did you mean 'epoch'"),
        (lambda: MultiStep(steps=(3, 3), values=(0.1, 0.2)), "must increase"),
        (lambda: MultiStep(steps=(1, 3), values=(0.3, 0.2)), "must not fall"),
        (lambda: MultiStep(steps=(1, 3), values=(0.3, 1.2)), "in [0, 1]"),
        (lambda: MultiStep(steps=(1, 3), values=(0.3,)), "2 steps and 1 values"),
        (MultiStep, "0 steps"),
        (lambda: MultiStep(steps=(-1, 3), values=(0.3, 0.4)), "begins at -1"),
        (lambda: MultiStep(steps=(1, 3), values=(0.3, 0.4)).check(0.5), "make the last value the same"),
        (lambda: Cubic(0, 5, initial=0.6).check(0.5), "sparsity does not fall"),
        (lambda: Exponential(0, 5).check(1.0), "linear or cubic"),
        (lambda: schedule_of("cubik", 0, 5, 1), "did you mean 'cubic'"),
        (lambda: schedule_of("multistep", None, None, None), "steps and values"),
        (lambda: schedule_of(Cubic(0, 5), 1, None, None), "cubic has its own"),
        (lambda: schedule_of(None, None, 7, None), "no schedule is given"),
    ],
)
def test_a_bad_schedule_is_told(make: Any, says: str) -> None:
    with pytest.raises(SecateurError) as error:
        make()
    assert says in str(error.value)


def test_a_name_with_begin_and_end_is_the_object() -> None:
    assert schedule_of("cubic", 1, 9, 2) == Cubic(1, 9, 2)
    assert schedule_of("constant", None, None, None) == Constant()
    assert schedule_of(Linear(1, 2), None, None, None) == Linear(1, 2)
    assert schedule_of(None, None, None, None) is None
