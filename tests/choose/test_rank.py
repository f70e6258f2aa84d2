"""Keeping the best units of every axis."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from secateur.choose.cost import Workload, costs
from secateur.choose.rank import keep_best, plan_for_sizes
from secateur.errors import SecateurError
from secateur.space import Axis, discover


def axis(size: int, groups: int = 1) -> Axis:
    return Axis("x.ffn", "ffn", size, (), groups=groups)


def test_best_are_kept_in_ascending_order() -> None:
    kept = keep_best(axis(6), torch.tensor([5.0, 1, 4, 0, 3, 9]), 3)
    assert (kept.kind, kept.size, kept.units) == ("ffn", 6, (0, 2, 5))


def test_ties_keep_the_lower_number() -> None:
    assert keep_best(axis(6), torch.zeros(6), 2).units == (0, 1)
    assert keep_best(axis(6), torch.tensor([0.0, 1, 0, 1, 1, 0]), 4).units == (0, 1, 3, 4)


def test_each_group_keeps_its_own_best() -> None:
    scores = torch.tensor([9.0, 8, 7, 0, 1, 2])
    assert keep_best(axis(6, groups=2), scores, 2).units == (0, 5)
    assert keep_best(axis(6, groups=2), scores, 4).units == (0, 1, 4, 5)
    assert keep_best(axis(6, groups=2), torch.zeros(6), 4).units == (0, 1, 3, 4)


@given(st.data())
def test_against_a_sort_by_hand(data: st.DataObject) -> None:
    groups, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=groups * each, max_size=groups * each))
    share = data.draw(st.integers(1, each))
    expected: list[int] = []
    for g in range(groups):
        units = range(g * each, (g + 1) * each)
        expected += sorted(sorted(units, key=lambda u: (-values[u], u))[:share])
    kept = keep_best(axis(groups * each, groups), torch.tensor(values, dtype=torch.float32), share * groups)
    assert kept.units == tuple(expected)


@pytest.mark.parametrize("size", [0, -1, 7])
def test_impossible_size(size: int) -> None:
    with pytest.raises(SecateurError, match=f"6 units: {size} cannot be kept"):
        keep_best(axis(6), torch.zeros(6), size)


def test_size_that_groups_do_not_share() -> None:
    with pytest.raises(SecateurError, match="3 units cannot be shared evenly by its 2 groups"):
        keep_best(axis(6, groups=2), torch.zeros(6), 3)


def test_plan_for_sizes_counts_heads_over_the_groups_that_stay() -> None:
    model = tiny("llama", device="meta", num_attention_heads=16, num_key_value_heads=4, head_dim=6)
    space = discover(model)
    scores = {a.name: torch.arange(a.size, dtype=torch.float32) for a in space.axes}
    plan = plan_for_sizes(space, scores, {"kv_groups": 2, "heads": 6, "ffn": 40, "hidden": 48}, ["model.layers.0"])
    assert plan.dropped == ("model.layers.0",)
    prefix = "model.layers.1"
    # Hidden keeps its size, and the axes of a dropped layer are nobody's.
    assert set(plan.kept) == {f"{prefix}.self_attn.kv_groups", f"{prefix}.self_attn.heads", f"{prefix}.mlp.ffn"}
    assert plan.kept[f"{prefix}.self_attn.kv_groups"].units == (2, 3)
    # Three of four in every group, so six over the two groups that stay.
    assert plan.kept[f"{prefix}.self_attn.heads"].units == (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15)
    assert plan.kept[f"{prefix}.mlp.ffn"].units == tuple(range(40, 80))
    plan.check(space)
    assert costs(space, plan, Workload()).params < costs(space, type(plan)()).params


def test_heads_that_the_groups_do_not_share() -> None:
    space = discover(tiny("llama", device="meta", num_attention_heads=16, num_key_value_heads=4, head_dim=6))
    scores = {a.name: torch.zeros(a.size) for a in space.axes}
    with pytest.raises(SecateurError, match="7 heads cannot be shared evenly by 2 KV groups"):
        plan_for_sizes(space, scores, {"kv_groups": 2, "heads": 7})
