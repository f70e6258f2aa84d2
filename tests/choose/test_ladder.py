"""Ladders: rungs, their order, and where a budget stops."""

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import Mobile, Residual, pictures
from tiny import random_plan, tiny

from secateur.choose.cost import Workload, costs, polynomials
from secateur.choose.ladder import Ladder, Meter, in_order, ladder, plan_of, settle
from secateur.choose.plan import Kept, Plan
from secateur.errors import SecateurError
from secateur.space import Axis, Space, discover


@cache
def space_of(name: str) -> Space:
    nets: dict[str, Any] = {"residual": Residual, "mobile": Mobile}
    return discover(nets[name](), pictures()) if name in nets else discover(tiny(name, device="meta"))


def axis(name: str, size: int, groups: int = 1) -> Axis:
    return Axis(name, "ffn", size, (), groups)


def test_rungs_of_one_axis_are_its_units_worst_first() -> None:
    found = ladder([axis("a", 4)], {"a": torch.tensor([3.0, 1.0, 4.0, 2.0])}, least=1)
    assert found.sizes == (4, 3, 2, 1)
    assert found.scores.tolist() == [1.0, 2.0, 3.0]
    assert ladder([axis("a", 4)], {"a": torch.arange(4.0)}, least=3).sizes == (4, 3)
    assert ladder([axis("a", 4)], {"a": torch.arange(4.0)}, least=4).sizes == (4,)


@pytest.mark.parametrize(
    ("size", "groups", "divisor", "least", "sizes"),
    [
        (10, 1, 4, 1, (10, 8, 4)),
        (10, 1, 4, 5, (10, 8)),
        (12, 1, 4, 1, (12, 8, 4)),
        (12, 4, 1, 1, (12, 8, 4)),
        (12, 4, 1, 5, (12, 8)),
        (12, 4, 8, 1, (12, 8)),
        (10, 1, 16, 1, (10,)),
    ],
)
def test_sizes_are_multiples_and_share_the_groups(
    size: int, groups: int, divisor: int, least: int, sizes: tuple[int, ...]
) -> None:
    found = ladder([axis("a", size, groups)], {"a": torch.rand(size)}, least, divisor)
    assert found.sizes == sizes


def test_a_rung_of_several_units_has_their_mean() -> None:
    found = ladder([axis("a", 6)], {"a": torch.tensor([1.0, 2, 3, 4, 5, 6])}, least=1, divisor=2)
    assert found.scores.tolist() == [1.5, 3.5]
    grouped = ladder([axis("a", 6, 2)], {"a": torch.tensor([1.0, 2, 3, 50, 40, 60])}, least=1)
    assert grouped.scores.tolist() == [(1 + 40) / 2, (2 + 50) / 2]
    alike = ladder([axis("a", 3), axis("b", 3)], {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([7.0, 9, 5])}, 1)
    assert alike.scores.tolist() == [3.0, 4.5]


def rungs(*scores: list[float]) -> list[Ladder]:
    return [
        Ladder((axis(str(i), len(s) + 1),), tuple(range(len(s) + 1, 0, -1)), np.array(s)) for i, s in enumerate(scores)
    ]


def test_one_class_is_ranked_by_score() -> None:
    ladders = rungs([1.0, 4.0, 6.0], [2.0, 3.0], [5.0])
    assert in_order(ladders, [0, 0, 0]).tolist() == [0, 1, 1, 0, 2, 0]


def test_classes_of_their_own_lose_the_same_share() -> None:
    ladders = rungs([1.0] * 7, [100.0] * 3)  # 8 units and 4
    order = in_order(ladders, [0, 1])
    for k in range(1, 10):
        left = 8 - int((order[:k] == 0).sum()), 4 - int((order[:k] == 1).sum())
        assert abs(left[0] / 8 - left[1] / 4) <= 0.25


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["residual", "mobile", "llama", "gpt2"]), st.integers(0, 10**6), st.floats(0.2, 0.9))
def test_the_meter_agrees_with_the_costs(name: str, seed: int, share: float) -> None:
    space = space_of(name)
    kinds = sorted({a.kind for a in space.axes})
    plan = random_plan(space, kinds, seed, share)
    sizes = {n: len(k.units) for n, k in plan.kept.items()}
    ladders = [Ladder((a,), (a.size, sizes[a.name]), np.zeros(1)) for a in space.axes]
    meter = Meter(space, ladders, polynomials(space, Workload()))
    for levels, decided in ((np.zeros(len(ladders), np.int64), Plan()), (np.ones(len(ladders), np.int64), plan)):
        found, exact = meter(levels), costs(space, decided)
        assert {m: pytest.approx(value) for m, value in found.items()} == {m: exact.of(m) for m in found}


def setting(name: str, seed: int) -> tuple[list[Ladder], Meter]:
    space = space_of(name)
    generator = torch.Generator().manual_seed(seed)
    scores = {a.name: torch.rand(a.size, generator=generator) for a in space.axes}
    ladders = [ladder([a], scores, 1) for a in space.axes]
    return [x for x in ladders if len(x.sizes) > 1], Meter(
        space, [x for x in ladders if len(x.sizes) > 1], polynomials(space)
    )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["residual", "mobile"]), st.integers(0, 10**6), st.floats(0.15, 0.95), st.booleans())
def test_what_is_settled_is_within_the_limits_and_has_no_room_left(
    name: str, seed: int, share: float, both: bool
) -> None:
    ladders, meter = setting(name, seed)
    dense = meter(np.zeros(len(ladders), np.int64))
    limits = {"macs": share * dense["macs"]} | ({"params": (share + 0.05) * dense["params"]} if both else {})
    levels = settle(in_order(ladders, [0] * len(ladders)), meter, limits)
    assert all(meter(levels)[m] <= limit for m, limit in limits.items())
    for i in range(len(ladders)):
        if levels[i]:
            more = levels.copy()
            more[i] -= 1
            assert any(meter(more)[m] > limit for m, limit in limits.items())


def test_the_result_is_near_the_best_that_any_levels_reach() -> None:
    ladders, meter = setting("residual", 1)
    every = [meter(np.array(x))["macs"] for x in product(*(range(len(rung.sizes)) for rung in ladders))]
    dense = max(every)
    for share in (0.3, 0.45, 0.5, 0.62, 0.7, 0.83):
        best = max(cost for cost in every if cost <= share * dense)
        found = meter(settle(in_order(ladders, [0, 0]), meter, {"macs": share * dense}))["macs"]
        assert best - found <= 0.01 * share * dense


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    ladders, meter = setting("residual", 0)
    smallest = meter(np.array([len(x.sizes) - 1 for x in ladders]))
    dense = meter(np.zeros(len(ladders), np.int64))
    with pytest.raises(SecateurError) as caught:
        settle(in_order(ladders, [0, 0]), meter, {"macs": 1.0, "params": dense["params"]})
    share = 100 * smallest["macs"] / dense["macs"]
    text = str(caught.value)
    assert f"macs=1: the smallest reachable is {smallest['macs']:,.0f} ({share:.1f}% of the dense), which" in text
    assert text.count("above the limit") == 1


def test_the_plan_keeps_the_best() -> None:
    space = space_of("residual")
    scores = {a.name: torch.arange(a.size, 0, -1.0) for a in space.axes}
    ladders = [ladder([a], scores, 1) for a in space.axes]
    plan = plan_of(ladders, np.array([3, 0]), scores)
    first = space.axes[0]
    assert plan.kept == {first.name: Kept("channels", first.size, tuple(range(first.size - 3)))}
