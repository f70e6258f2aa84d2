"""Costs of mixtures of experts and of hybrids, whose layers are not alike, against counts of real tensors."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from mixtures import SIZES, mixture
from tiny import random_plan

from secateur.choose.cost import UNIFORM_KINDS, Workload, active_sizes, costs, least_cost, uniform_cost
from secateur.choose.plan import Plan
from secateur.choose.rank import plan_for_sizes
from secateur.cut.tensors import cut_tensors
from secateur.space import Space, discover


@cache
def dense(name: str) -> tuple[Any, Space]:
    model = mixture(name, dtype=torch.float32)
    return model, discover(model)


def counts(model: Any, space: Space, plan: Plan) -> tuple[int, int]:
    """Elements that are left, and those of them that two experts for each token meet."""
    left = cut_tensors(dict(model.named_parameters()), space, plan)
    met = {n: t.numel() * 2 // len(t) if ".experts." in n else t.numel() for n, t in left.items()}
    return sum(t.numel() for t in left.values()), sum(met.values())


@pytest.mark.parametrize("name", SIZES)
def test_random_plans(name: str) -> None:
    model, space = dense(name)
    for seed, share in enumerate((0.9, 0.7, 0.5)):
        plan = random_plan(space, [k for k in space.kinds() if k not in ("attention", "mlp")], seed, share)
        found = costs(space, plan)
        assert (found.params, found.active_params) == counts(model, space, plan)


def test_a_router_and_its_bias_are_met_by_every_token() -> None:
    for name in ("gpt_oss", "nemotron_h", "deepseek_v3"):
        _, space = dense(name)
        found = active_sizes(space)
        assert found
        assert all(".experts." in parameter for parameter in found)
    biases = [parameter for parameter in active_sizes(dense("gpt_oss")[1]) if parameter.endswith("bias")]
    assert len(biases) == 4


@pytest.mark.parametrize("name", ["nemotron_h", "deepseek_v3", "jamba"])
def test_uniform_cost_counts_the_layers_that_stay(name: str) -> None:
    _, space = dense(name)
    names = [block.name for block in space.layers()]
    ladder: list[tuple[str, ...]] = [(), (names[1],), (names[0], names[1])]
    kinds = [kind for kind in UNIFORM_KINDS if space.of_kind(kind)]
    totals = {k: space.of_kind(k)[0].size * 3 // 4 for k in kinds if k not in ("heads", "kv_groups", "experts")}
    totals |= {"experts": 4 if name != "jamba" else 3}
    if "ssm_heads" in totals:
        totals["ssm_heads"] = 4
    workload = Workload(batch=2, seq_len=9)
    uniform = uniform_cost(space, workload, kinds, ladder)
    scores = {a.name: torch.arange(a.size, dtype=torch.float32) for a in space.axes}
    heads: dict[str, float] = {
        kind: space.of_kind(kind)[0].per_group for kind in ("heads", "kv_groups") if kind in kinds
    }
    for gone in ladder:
        found = uniform({**totals, **heads}, len(names) - len(gone))
        exact = costs(space, plan_for_sizes(space, scores, totals, gone), workload)
        for measure in ("params", "active_params", "memory", "macs"):
            assert found.of(measure) == pytest.approx(exact.of(measure), rel=1e-12), measure


@pytest.mark.parametrize("name", ["nemotron_h", "jamba", "mixtral"])
def test_no_order_of_layers_costs_less_than_the_dearest_first(name: str) -> None:
    _, space = dense(name)
    names = [block.name for block in space.layers()]
    least = least_cost(space, Workload(), ())
    for measure in ("params", "active_params", "memory"):
        alone = min(costs(space, Plan(dropped=(n,))).of(measure) for n in names)
        assert least.of(measure, {}, len(names) - 1) == pytest.approx(alone)
        depths = [least.of(measure, {}, left) for left in range(1, len(names) + 1)]
        assert all(a < b for a, b in pairwise(depths))
