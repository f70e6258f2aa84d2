"""The mixed-integer program against all choices there are, and cost terms against the costs of real plans."""

import itertools
import random
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import mixture
from small_nets import Mobile, Residual, pictures, shaken
from tiny import tiny

from secateur.choose import table as module
from secateur.choose.cost import Workload, costs
from secateur.choose.plan import Kept, Plan
from secateur.choose.select import least_units
from secateur.choose.slots import make_slots
from secateur.choose.table import Choice, Level, Slot, Table, Term, cost_terms, least, solve
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.space import Space, discover

# The program


def term(draw: np.random.Generator, slots: tuple[int, ...], counts: list[int], high: float) -> Term:
    return Term(slots, draw.uniform(0, high, [counts[s] for s in slots]))


def random_table(seed: int, *, loss_over: int = 2) -> Table:
    """2 to 4 slots of 2 to 4 levels; terms over none, one, two and three of them."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(2, 5, size=int(draw.integers(2, 5))).tolist()
    slots = tuple(Slot(f"slot{i}", tuple(Level({f"axis{i}": 9 - n}) for n in range(c))) for i, c in enumerate(counts))
    every = [k for width in (1, 2, 3) for k in itertools.combinations(range(len(counts)), width)]
    measures = {}
    for name in ("params", "macs", "memory"):
        own = [key for key in every if draw.random() < (0.9, 0.5, 0.3)[len(key) - 1]]
        measures[name] = (Term((), np.array(draw.uniform(0, 80))), *(term(draw, key, counts, 10.0) for key in own))
    singles = [term(draw, (i,), counts, 10.0 ** draw.integers(-4, 2)) for i in range(len(counts))]
    joint = [term(draw, key, counts, 3.0) for key in every if 1 < len(key) <= loss_over and draw.random() < 0.4]
    return Table(slots, (*singles, *joint), measures)


def choices(table: Table) -> list[Choice]:
    return list(itertools.product(*(range(len(slot.levels)) for slot in table.slots)))


def value(terms: tuple[Term, ...], choice: Choice) -> float:
    return sum(float(t.values[tuple(choice[s] for s in t.slots)]) for t in terms)


def fitting(table: Table, limits: Mapping[str, float]) -> list[Choice]:
    return [c for c in choices(table) if all(value(table.costs[m], c) <= limit for m, limit in limits.items())]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.0, 1.0))
def test_the_choice_is_the_best_of_all(seed: int, measures: int, tightness: float) -> None:
    table = random_table(seed)
    limits = {}
    for name in ("params", "macs", "memory")[:measures]:
        costs_there = sorted(value(table.costs[name], c) for c in choices(table))
        limits[name] = costs_there[int(tightness * (len(costs_there) - 1))]  # some choice costs exactly that
    able = fitting(table, limits)
    if not able:
        with pytest.raises(SecateurError, match="not all together"):
            solve(table, limits)
        return
    found = solve(table, limits)
    assert found.choice in able
    best = min(value(table.loss, c) for c in able)
    assert value(table.loss, found.choice) == pytest.approx(best, rel=1e-5, abs=1e-12)
    assert found.optimal
    assert table.fits(found.choice, limits)
    assert table.lost(found.choice) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_below_all_names_the_smallest(seed: int) -> None:
    table = random_table(seed)
    floors = {name: min(value(table.costs[name], c) for c in choices(table)) for name in ("params", "macs")}
    for name, floor in floors.items():
        assert least(table, name) == pytest.approx(floor, rel=1e-6)
        assert table.cost(name, table.whole) == pytest.approx(value(table.costs[name], (0,) * len(table.slots)))
    scaled = {n: tuple(Term(t.slots, t.values * 1e6) for t in terms) for n, terms in table.costs.items()}
    big = Table(table.slots, table.loss, scaled)
    with pytest.raises(SecateurError) as error:
        solve(big, {"params": floors["params"] * 1e6 * 0.99, "macs": floors["macs"] * 1e6 * 1.5})
    text = str(error.value)
    told = dict(re.findall(r"(\w+)=[\d,]+: the smallest reachable is ([\d,]+)", text))
    assert {n: int(x.replace(",", "")) for n, x in told.items()} == {
        n: pytest.approx(1e6 * floor, abs=1 + 1e-6 * 1e6 * floor) for n, floor in floors.items()
    }
    assert re.search(r"params=[^;]*which is above the limit", text)
    assert not re.search(r"macs=[^;]*which is above the limit", text)
    assert "together" not in text


def two(first: list[float], second: list[float], loss: list[float]) -> Table:
    """One slot, two measures."""
    slot = Slot("a", tuple(Level({"x": len(first) - i}) for i in range(len(first))))
    by = {"params": (Term((0,), np.array(first)),), "macs": (Term((0,), np.array(second)),)}
    return Table((slot,), (Term((0,), np.array(loss)),), by)


def test_limits_that_can_only_be_met_alone() -> None:
    table = two([10, 4, 8], [10, 8, 4], [0, 1, 1])
    with pytest.raises(SecateurError, match=r"each could be met alone, but not all together") as error:
        solve(table, {"params": 5, "macs": 5})
    assert "params=5: the smallest reachable is 4 (40.0% of the dense)" in str(error.value)
    assert "macs=5: the smallest reachable is 4 (40.0% of the dense)" in str(error.value)
    assert solve(table, {"params": 5}).choice == (1,)
    assert solve(table, {"params": 8, "macs": 4}).choice == (2,)


def test_seconds_are_shown_as_such() -> None:
    table = two([10, 4], [10, 8], [0, 1])
    table = Table(table.slots, table.loss, {"latency": (Term((0,), np.array([0.02, 0.0125])),)})
    with pytest.raises(
        SecateurError, match=r"latency=0.01 s: the smallest reachable is 0.0125 s \(62.5% of the dense\)"
    ):
        solve(table, {"latency": 0.01})


def test_a_limit_is_kept_to_the_last_unit_of_large_numbers() -> None:
    """Solvers allow limits to be missed by a millionth: that is thousands of parameters of a large model."""
    table = two([7e9 + 100, 7e9 + 1, 7e9 - 100, 5e9], [0, 0, 0, 0], [0, 1, 2, 3])
    assert solve(table, {"params": 7e9 + 100}).choice == (0,)
    assert solve(table, {"params": 7e9 + 99}).choice == (1,)
    assert solve(table, {"params": 7e9}).choice == (2,)
    assert solve(table, {"params": 7e9 - 101}).choice == (3,)


def test_small_losses_count_beside_large_ones() -> None:
    """A level that nobody would choose must not blur what the others lose."""
    draw = np.random.default_rng(0)
    slots = tuple(Slot(f"s{i}", tuple(Level({f"x{i}": 4 - n}) for n in range(4))) for i in range(4))
    losses = tuple(Term((i,), np.array([0, *draw.uniform(1e-7, 1e-5, 2), 1e3])) for i in range(4))
    table = Table(slots, losses, {"params": tuple(Term((i,), np.array([9.0, 7, 5, 1])) for i in range(4))})
    able = fitting(table, {"params": 25})
    assert table.lost(solve(table, {"params": 25}).choice) == pytest.approx(
        min(value(losses, c) for c in able), rel=1e-5
    )


def test_one_slot_and_no_loss() -> None:
    assert solve(two([3, 2, 1], [1, 1, 1], [0, 0, 0]), {"params": 2}).choice in {(1,), (2,)}


def test_too_many_combinations_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COMBINATIONS", 20)
    slots = tuple(Slot(f"s{i}", (Level(),) * 4) for i in range(3))
    losses = tuple(Term((i,), np.arange(4.0)) for i in range(3))
    alone = Table(slots, losses, {"params": tuple(Term((i,), np.arange(4.0)[::-1].copy()) for i in range(3))})
    assert solve(alone, {"params": 5}).choice
    joint = Table(slots, losses, {"params": (Term((0, 1), np.ones((4, 4))),)})
    with pytest.raises(SecateurError, match="the levels have 28 combinations, too many to solve: ask for fewer levels"):
        solve(joint, {"params": 5})


def test_time_that_runs_out_is_no_proof_that_a_budget_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        status, x = 1, None

    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: Nothing())
    with pytest.raises(SecateurError, match="no choice was found within 3 s: give it longer, or ask for fewer levels"):
        solve(two([3, 2, 1], [1, 1, 1], [0, 1, 2]), {"params": 2}, seconds=3)


# Costs


@cache
def case(name: str) -> tuple[Any, Space, Any]:
    """Model, Space, inputs."""
    if name in ("residual", "mobile"):
        model, x = shaken(Residual() if name == "residual" else Mobile()), pictures()
        return model, discover(model, x), x
    wide: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    made = {
        "llama": lambda: tiny("llama", dtype=torch.float32, **wide),
        "gpt2": lambda: tiny("gpt2", dtype=torch.float32),
        "mixtral": lambda: mixture("mixtral", dtype=torch.float32),
    }
    model = made[name]()
    return model, discover(model), None


def slots_of(space: Space, *, uniform: bool, drop: bool) -> list[Slot]:
    axes = [a for a in space.axes if a.kind not in ("head_dim",)]
    return make_slots(space, axes, least_units(space, [], axes, 0.0, {}), levels=5, uniform=uniform, drop=drop)


def plan_of(space: Space, slots: list[Slot], choice: Choice) -> Plan:
    """The first units of each group stay; axes of dropped blocks are left out."""
    levels = [slot.levels[i] for slot, i in zip(slots, choice, strict=True)]
    gone = [name for level in levels for name in level.dropped]
    out = {p for block in space.blocks if block.name in gone for p in block.parameters}
    kept = {}
    for name, n in ((name, n) for level in levels for name, n in level.sizes.items()):
        axis = space.axis(name)
        if not all(part.parameter in out for part in axis.slices):
            units = tuple(g * axis.per_group + i for g in range(axis.groups) for i in range(n))
            kept[name] = Kept(axis.kind, axis.size, units)
    return Plan(kept, tuple(b.name for b in space.blocks if b.name in gone))


WORKLOADS = (Workload(), Workload(3, 77, lambda path: 50 if ".0." in path else None, torch.bfloat16))
CASES = ("llama", "gpt2", "mixtral", "residual", "mobile")


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_costs_are_those_of_the_plan(name: str, uniform: bool, drop: bool) -> None:
    _, space, _ = case(name)
    slots = slots_of(space, uniform=uniform, drop=drop)
    draw = random.Random(0)
    for workload in WORKLOADS:
        terms = cost_terms(space, workload, slots)
        table = Table(tuple(slots), (), terms)
        picked = [table.whole, tuple(len(slot.levels) - 1 for slot in slots)]
        picked += [tuple(draw.randrange(len(slot.levels)) for slot in slots) for _ in range(6)]
        for choice in picked:
            true = costs(space, plan_of(space, slots, choice), workload)
            for measure in ("params", "active_params", "memory", "macs", "flops"):
                expected = true.flops if measure == "flops" else true.of(measure)
                assert table.cost(measure, choice) == pytest.approx(expected, rel=1e-12), (measure, choice)


@pytest.mark.parametrize(
    ("name", "uniform"), [("llama", True), ("llama", False), ("residual", False), ("mobile", False)]
)
def test_parameters_are_those_of_the_cut_model(name: str, uniform: bool) -> None:
    model, space, inputs = case(name)
    slots = slots_of(space, uniform=uniform, drop=name == "llama")
    table = Table(tuple(slots), (), cost_terms(space, Workload(), slots))
    draw = random.Random(1)
    choice = tuple(draw.randrange(1, len(slot.levels)) if i % 2 else 0 for i, slot in enumerate(slots))
    pruned = apply(model, plan_of(space, slots, choice), space=space, inputs=inputs)
    assert table.cost("params", choice) == sum(p.numel() for p in pruned.parameters())


def test_terms_lie_in_no_other() -> None:
    """Else the program would have more variables than it needs."""
    _, space, _ = case("llama")
    terms = cost_terms(space, Workload(), slots_of(space, uniform=True, drop=True))
    for own in terms.values():
        keys = [t.slots for t in own]
        assert len(set(keys)) == len(keys)
        assert not any(a and set(a) < set(b) for a in keys for b in keys)
