"""The search over uniform architectures, against a brute force over all of them."""

import inspect
import itertools
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.choose.budget import Budget
from secateur.choose.cost import Costs, UniformCost
from secateur.choose.search import (
    DIVISORS,
    MIN_CHOICES,
    Candidate,
    Grid,
    check_reachable,
    choices,
    cost_at,
    per_group,
    search,
)
from secateur.errors import SecateurError
from secateur.space import Polynomial

COST = UniformCost(
    fixed={"params": {("hidden",): 7.0}, "memory": {("hidden",): 14.0}},
    per_layer={
        "params": {("ffn", "hidden"): 3.0, ("heads", "hidden", "kv_groups"): 4.0},
        "memory": {("ffn", "hidden"): 6.0, ("kv_groups",): 200.0},
    },
)
DENSE = {"hidden": 16, "ffn": 24, "heads": 8, "kv_groups": 4, "layers": 4}
GRID = Grid(
    DENSE, {"hidden": [16, 12, 8], "ffn": [24, 12], "heads": [8, 6, 4, 3], "kv_groups": [4, 3, 2], "layers": [4, 3]}
)


def anything(_: Mapping[str, int]) -> bool:
    return True


# Choices


@given(
    kind=st.sampled_from(sorted(DIVISORS)),
    size=st.integers(1, 3000),
    max_cut=st.floats(0, 0.95),
    divisor=st.none() | st.integers(1, 700),
)
def test_choices_are_the_present_size_and_multiples_within_the_cut(
    kind: str, size: int, max_cut: float, divisor: int | None
) -> None:
    found = choices(kind, size, max_cut, divisor)
    assert found[0] == size
    assert found == sorted(set(found), reverse=True)
    assert all(n >= max(1, size * (1 - max_cut) - 1e-6) for n in found)
    if divisor is not None:
        step = divisor
    else:
        halvings = itertools.takewhile(bool, (DIVISORS[kind] >> i for i in range(20)))
        step = next(s for s in halvings if s == 1 or len(expected(size, max_cut, s)) >= MIN_CHOICES)
    assert found == expected(size, max_cut, step)


def expected(size: int, max_cut: float, step: int) -> list[int]:
    multiples = {n for n in range(1, size + 1) if n % step == 0 and n >= size * (1 - max_cut) - 1e-9}
    return sorted(multiples | {size}, reverse=True)


def test_choices_of_known_sizes() -> None:
    # Seven steps of 256 are too few, so they are steps of 128.
    assert choices("hidden", 4096, 0.4) == list(range(4096, 2457, -128))
    assert choices("hidden", 8192, 0.4) == list(range(8192, 4915, -256))
    assert choices("ffn", 100, 0.4, 30) == [100, 90, 60]
    assert choices("ffn", 100, 0.4, 512) == [100]
    assert choices("layers", 10, 0.2) == [10, 9, 8]
    assert choices("heads", 8, 0.0) == [8]
    assert choices("layers", 1, 0.9) == [1]
    assert choices("experts", 128, 0.4) == list(range(128, 76, -4))
    assert choices("ssm_head_dim", 64, 0.4) == list(range(64, 38, -2))
    assert choices("ssm_heads", 24, 0.5, multiple=8) == [24, 16]
    assert choices("experts", 8, 0.9, minimum=6) == [8, 7, 6]


@pytest.mark.parametrize("divisor", [0, -4])
def test_a_divisor_below_one_is_an_error(divisor: int) -> None:
    with pytest.raises(SecateurError, match=f"the divisor of ffn must be at least 1, not {divisor}"):
        choices("ffn", 100, 0.4, divisor)


# The grid


def test_points_are_made_one_at_a_time() -> None:
    assert inspect.isgenerator(GRID.points())
    wide = Grid(DENSE, {kind: range(10_000, 0, -1) for kind in ("hidden", "ffn", "layers")})
    assert next(iter(wide.points())) == {"hidden": 10_000, "ffn": 10_000, "layers": 10_000}  # of 10^12


@given(
    heads=st.lists(st.integers(1, 16), min_size=1, max_size=6, unique=True),
    groups=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    each=st.integers(1, 4),
    whole=st.integers(1, 8),
)
def test_heads_are_shared_evenly_and_no_group_gains(heads: list[int], groups: list[int], each: int, whole: int) -> None:
    grid = Grid({"heads": each * whole, "kv_groups": whole}, {"heads": heads, "kv_groups": groups})
    wanted = [{"heads": h, "kv_groups": g} for h in heads for g in groups if h / g == h // g and h // g <= each]
    assert list(grid.points()) == wanted


def test_without_groups_every_combination_is_a_point() -> None:
    grid = Grid({"heads": 3, "ffn": 2}, {"heads": [3, 2], "ffn": [2, 1]})
    assert list(grid.points()) == [
        {"heads": 3, "ffn": 2}, {"heads": 3, "ffn": 1}, {"heads": 2, "ffn": 2}, {"heads": 2, "ffn": 1},
    ]  # fmt: skip
    assert per_group({"heads": 3}) == 3
    assert per_group({"heads": 8, "kv_groups": 2}) == 4


def test_probes_are_in_the_middle_and_heads_stay_in_their_groups() -> None:
    assert GRID.probes() == {"hidden": 12, "ffn": 12, "kv_groups": 3, "heads": 1 * 4}
    alone = Grid({"heads": 8, "layers": 4, "ffn": 8}, {"heads": [8, 7, 6, 5], "layers": [4, 3], "ffn": [8]})
    assert alone.probes() == {"heads": 6}
    only_groups = Grid(DENSE, {"kv_groups": [4, 2], "heads": [8, 4]})
    assert only_groups.probes() == {"kv_groups": 2, "heads": 4}


def test_what_follows_another_kind_is_no_choice_of_its_own() -> None:
    grid = Grid({"ffn": 8, "expert_ffn": 16}, {"ffn": [8, 6, 4], "expert_ffn": [16, 12, 8]}, {"expert_ffn": "ffn"})
    assert list(grid.points()) == [{"ffn": n, "expert_ffn": 2 * n} for n in (8, 6, 4)]
    assert list(grid.points(smallest_first=True)) == list(grid.points())[::-1]
    assert grid.probes() == {"ffn": 6, "expert_ffn": 12}  # each is probed by itself


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 400))
def test_a_thinned_grid_keeps_the_ends(counts: list[int], most: int) -> None:
    names = ("hidden", "ffn", "experts", "expert_ffn", "layers")
    grid = Grid(dict.fromkeys(names, 9), {k: list(range(9, 9 - n, -1)) for k, n in zip(names, counts, strict=False)})
    thin = grid.thinned(most)
    for kind, sizes in grid.choices.items():
        kept = thin.choices[kind]
        assert set(kept) <= set(sizes)
        assert (kept[0], kept[-1]) == (sizes[0], sizes[-1])
    points = len(list(thin.points()))
    assert points <= max(most, 2 ** len(counts))
    assert points == len(list(grid.points())) or len(list(grid.points())) > most


# The search


def brute_force(limits: Mapping[str, float], weights: Mapping[str, float]) -> list[tuple[float, dict[str, int]]]:
    """All that keep the limits, by a formula of its own, in the order of the loss."""
    found = []
    for hidden, ffn, heads, groups, layers in itertools.product(*GRID.choices.values()):
        sizes = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_groups": groups, "layers": layers}
        if heads % groups or heads // groups > 2 or sizes == DENSE:
            continue
        params = 7 * hidden + layers * (3 * ffn * hidden + 4 * hidden * heads)
        memory = 14 * hidden + layers * (6 * ffn * hidden + 200 * groups)
        if params <= limits.get("params", 1e9) and memory <= limits.get("memory", 1e9):
            found.append((loss_of(sizes, weights), sizes))
    return sorted(found, key=lambda entry: entry[0])


def loss_of(sizes: Mapping[str, int], weights: Mapping[str, float]) -> float:
    return sum(weights[kind] * (1 - size / DENSE[kind]) for kind, size in sizes.items())


@given(
    params=st.floats(0.2, 1.0),
    memory=st.none() | st.floats(0.2, 1.0),
    top_k=st.integers(1, 12),
    weights=st.lists(st.floats(0.1, 10), min_size=5, max_size=5, unique=True),
)
def test_the_search_equals_a_brute_force(params: float, memory: float | None, top_k: int, weights: list[float]) -> None:
    dense = cost_at(COST, DENSE)
    texts = [f"params={params * 100:.4f}%"] + ([] if memory is None else [f"memory={memory * 100:.4f}%"])
    budget = Budget.parse(texts)
    limits = {measure: limit.absolute(dense.of(measure)) for measure, limit in budget.limits.items()}
    by_kind = dict(zip(DENSE, weights, strict=True))
    wanted = brute_force(limits, by_kind)
    if not wanted:
        with pytest.raises(SecateurError, match="the budget cannot be met"):
            search(GRID, COST, budget, lambda s: loss_of(s, by_kind), anything, top_k)
        return
    best, feasible = search(GRID, COST, budget, lambda s: loss_of(s, by_kind), anything, top_k)
    assert feasible == len(wanted)
    assert [c.loss for c in best] == pytest.approx([loss for loss, _ in wanted[:top_k]])
    for candidate in best:
        assert dict(candidate.sizes) in [sizes for _, sizes in wanted]
        assert all(candidate.costs.of(measure) <= limit for measure, limit in limits.items())
    assert len({tuple(c.sizes.values()) for c in best}) == len(best)


def test_costs_count_heads_of_one_group() -> None:
    sizes = {"hidden": 8, "ffn": 12, "heads": 6, "kv_groups": 3, "layers": 3}
    found = cost_at(COST, sizes)
    assert found.params == found.active_params == 7 * 8 + 3 * (3 * 12 * 8 + 4 * 8 * 6)
    assert found.memory == 14 * 8 + 3 * (6 * 12 * 8 + 200 * 3)


def test_of_equal_losses_the_larger_model_is_better() -> None:
    best, _ = search(GRID, COST, Budget.parse("params=90%"), lambda _: 1.0, anything, 3)
    params = [c.costs.params for c in best]
    assert params == sorted(params, reverse=True)
    every, _ = search(GRID, COST, Budget.parse("params=90%"), lambda _: 1.0, anything, 10**6)
    assert params == [c.costs.params for c in every[:3]]


def test_the_dense_model_is_no_candidate() -> None:
    best, feasible = search(GRID, COST, Budget.parse("params=100%"), lambda s: loss_of(s, DENSE), anything, 10**6)
    assert len(best) == feasible == len(list(GRID.points())) - 1
    assert DENSE not in [dict(c.sizes) for c in best]


def test_what_is_not_valid_is_no_candidate_and_not_the_smallest_reachable() -> None:
    def whole_hidden(sizes: Mapping[str, int]) -> bool:
        return sizes["hidden"] == 16

    best, _ = search(GRID, COST, Budget.parse("params=80%"), lambda s: loss_of(s, DENSE), whole_hidden, 10**6)
    assert {c.sizes["hidden"] for c in best} == {16}
    smallest = min(c.costs.params for c in best)
    with pytest.raises(SecateurError) as caught:
        search(GRID, COST, Budget.parse("params=10%"), lambda _: 0.0, whole_hidden, 1)
    assert f"the smallest reachable is {smallest:,.0f} " in str(caught.value)


def test_a_budget_that_cannot_be_met_names_the_smallest_reachable_of_each_limit() -> None:
    every, _ = search(GRID, COST, Budget.parse("params=100%"), lambda _: 0.0, anything, 10**6)
    floors = {m: min(c.costs.of(m) for c in every) for m in ("params", "memory")}
    dense = cost_at(COST, DENSE)
    with pytest.raises(SecateurError) as caught:
        search(GRID, COST, Budget.parse(["params=99%", "memory=5B"]), lambda _: 0.0, anything, 1)
    text = str(caught.value)
    for measure, floor in floors.items():
        share = 100 * floor / dense.of(measure)
        assert f"the smallest reachable is {floor:,.0f} ({share:.1f}% of the dense)" in text
    assert text.count("which is above the limit") == 1
    assert "memory=5: the smallest reachable is" in text
    assert "--max-width-cut" in text


@pytest.mark.parametrize("text", ["params=90%", "params=60%, memory=70%", "params=5%", "memory=5B"])
def test_what_is_out_of_reach_is_told_without_a_search(text: str) -> None:
    budget = Budget.parse(text)
    messages = []
    for ask in (
        lambda: check_reachable(GRID, COST, budget, anything),
        lambda: search(GRID, COST, budget, lambda _: 0.0, anything, 1),
    ):
        try:
            ask()
            messages.append("")
        except SecateurError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert bool(messages[0]) == ("5%" in text or "5B" in text)


def test_where_it_is_known_which_layers_go_these_count() -> None:
    whole: dict[str, Polynomial] = {m: {(): 100.0} for m in COST.fixed}
    cost = UniformCost(COST.fixed, COST.per_layer, {3: whole})
    assert cost_at(cost, {**DENSE, "layers": 3}).params == 100
    assert cost_at(cost, DENSE) == cost_at(COST, DENSE)


def test_limits_that_hold_one_by_one_may_not_hold_together() -> None:
    simple = UniformCost({"params": {("ffn",): 1.0}, "memory": {("hidden",): 1.0}}, {"params": {}, "memory": {}})

    def one_or_the_other(sizes: Mapping[str, int]) -> bool:
        return sizes["ffn"] == 24 or sizes["hidden"] == 16

    for text in ("params=12", "memory=8B"):
        assert search(GRID, simple, Budget.parse(text), lambda _: 0.0, one_or_the_other, 1)[1] > 0
    with pytest.raises(SecateurError, match="the budget cannot be met"):
        search(GRID, simple, Budget.parse("params=12, memory=8B"), lambda _: 0.0, one_or_the_other, 1)


def test_no_more_than_the_best_are_held() -> None:
    alive = peak = 0

    class Loss(float):
        def __new__(cls, value: float) -> "Loss":
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)
            return super().__new__(cls, value)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    wide = Grid(DENSE, {**GRID.choices, "ffn": range(24, 0, -1), "hidden": range(16, 4, -1)})
    best, feasible = search(wide, COST, Budget.parse("params=95%"), lambda s: Loss(loss_of(s, DENSE)), anything, 5)
    assert len(best) == 5
    assert feasible > 2000
    assert peak < 20


def test_the_loss_is_asked_only_of_what_keeps_the_budget() -> None:
    asked: list[Costs] = []

    def loss(sizes: Mapping[str, int]) -> float:
        asked.append(cost_at(COST, sizes))
        return 0.0

    _, feasible = search(GRID, COST, Budget.parse("params=60%"), loss, anything, 2)
    limit = 0.6 * cost_at(COST, DENSE).params
    assert len(asked) == feasible
    assert all(costs.params <= limit for costs in asked)


def test_the_points_are_walked_once_and_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    points = Grid.points

    def watched(self: Grid) -> Iterator[dict[str, int]]:
        walks.append(self)
        return points(self)

    monkeypatch.setattr(Grid, "points", watched)
    found, _ = search(GRID, COST, Budget.parse("params=60%"), lambda _: 0.0, anything, 2)
    assert len(walks) == 1
    assert all(isinstance(c, Candidate) for c in found)
