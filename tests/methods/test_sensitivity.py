"""Probes are real cuts, the proxy adds them up, and layers go only when the real removal says so."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import logits, tiny, tokens
from torch import nn

from secateur.choose.plan import Kept, Plan
from secateur.choose.search import Grid
from secateur.cut import apply
from secateur.methods import sensitivity as module
from secateur.methods.sensitivity import PROPOSALS, Sensitivity, drop_layers, probe_kinds
from secateur.score.activation import Scores, activation_scores
from secateur.space import Space, discover

DATA = tokens(3, 12)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def deep() -> Any:
    return tiny("llama", dtype=torch.float32, num_hidden_layers=5, hidden_size=16, intermediate_size=8)


@pytest.fixture(scope="module")
def space(model: Any) -> Space:
    return discover(model)


@pytest.fixture(scope="module")
def scores(model: Any, space: Space) -> Scores:
    return activation_scores(model, space, [DATA])


def slow_kl(dense: Any, pruned: Any) -> float:
    """Mean KL over the predicted positions, in float64."""
    p, q = (logits(m, DATA).double()[:, :-1].log_softmax(-1) for m in (dense, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


def best(score: torch.Tensor, count: int, groups: int = 1) -> tuple[int, ...]:
    """The best units of each group, by plain Python."""
    each = len(score) // groups
    found: list[int] = []
    for group in range(groups):
        units = range(group * each, (group + 1) * each)
        found += sorted(sorted(units, key=lambda u: -float(score[u]))[: count // groups])
    return tuple(found)


def slow_probe(model: Any, space: Space, scores: Scores, kind: str, keep: int) -> tuple[float, float]:
    """KL of one cut of a kind, and the share of energy that it takes."""
    kept, losses = {}, []
    for axis in space.of_kind(kind):
        score = scores.axes[axis.name]
        units = best(score, keep, axis.groups)
        kept[axis.name] = Kept(kind, axis.size, units)
        losses.append(1 - sum(float(score[u]) ** 2 for u in units) / sum(float(x) ** 2 for x in score))
    pruned = apply(model, Plan(kept), space=space)
    return slow_kl(model, pruned), sum(losses) / len(losses)


def test_a_probe_is_the_kl_of_the_real_cut_for_its_lost_energy(model: Any, space: Space, scores: Scores) -> None:
    grid = Grid(
        {"hidden": 48, "ffn": 80, "heads": 4, "kv_groups": 2, "layers": 2},
        {"hidden": [48, 40, 32], "ffn": [80, 60], "heads": [4, 2, 1], "kv_groups": [2, 1], "layers": [2, 1]},
    )
    cut: list[Any] = []

    def kl(pruned: nn.Module) -> float:
        cut.append(pruned)
        return slow_kl(model, pruned)

    found = probe_kinds(model, space, scores, grid, kl)
    assert set(found) == {"hidden", "ffn", "kv_groups", "heads"}
    for kind, keep in (("hidden", 40), ("ffn", 60), ("kv_groups", 1), ("heads", 2)):
        real, energy = slow_probe(model, space, scores, kind, keep)
        assert real > 0
        assert found[kind] == pytest.approx(real / energy, rel=1e-3), kind
    assert [p.config.num_key_value_heads for p in cut] == [2, 2, 1, 2]


def test_a_gain_counts_as_no_loss(model: Any, space: Space, scores: Scores) -> None:
    grid = Grid({"ffn": 80}, {"ffn": [80, 60]})
    assert probe_kinds(model, space, scores, grid, lambda _: -0.25) == {"ffn": 0.0}


def test_the_proxy_adds_up_the_single_losses(space: Space, scores: Scores) -> None:
    dense = {"hidden": 48, "ffn": 80, "heads": 4, "kv_groups": 2, "layers": 2}
    weight = {"hidden": 2.0, "ffn": 3.0, "heads": 5.0, "kv_groups": 7.0}
    depth = [((), 0.0), (("model.layers.1",), 0.75)]
    loss = Sensitivity(weight, depth).loss(space, scores, dense)

    def energy(kind: str, keep: int) -> float:
        parts = []
        for axis in space.of_kind(kind):
            score = scores.axes[axis.name].double() ** 2
            parts.append(1 - float(score[list(best(scores.axes[axis.name], keep, axis.groups))].sum() / score.sum()))
        return sum(parts) / len(parts)

    assert loss(dense) == pytest.approx(0)
    sizes = {"hidden": 32, "ffn": 40, "heads": 1, "kv_groups": 1, "layers": 1}
    # One head for each group: as two of four, for the group that goes is charged to the groups.
    expected = (
        0.75 + 2 * energy("hidden", 32) + 3 * energy("ffn", 40) + 5 * energy("heads", 2) + 7 * energy("kv_groups", 1)
    )
    assert loss(sizes) == pytest.approx(expected)
    whole_groups = {**dense, "heads": 2, "kv_groups": 1}
    assert loss(whole_groups) == pytest.approx(7 * energy("kv_groups", 1))


# Depth


def influence(values: Sequence[float]) -> Scores:
    return Scores({}, {f"model.layers.{i}": value for i, value in enumerate(values)}, 1, 1)


def fake_kl(cost: Mapping[tuple[int, ...], float], model: Any) -> Callable[[nn.Module], float]:
    """KL by which of the layers are left, told apart by their first weight."""
    marks = [layer.input_layernorm.weight[0].item() for layer in model.model.layers]

    def kl(pruned: Any) -> float:
        left = [marks.index(layer.input_layernorm.weight[0].item()) for layer in pruned.model.layers]
        return cost[tuple(i for i in range(len(marks)) if i not in left)]

    return kl


def test_a_layer_that_influence_proposes_and_kl_rejects_stays(deep: Any) -> None:
    # Layer 3 has the least influence, but 0 is what can really go; 4 is never proposed, however cheap.
    scores = influence([0.3, 0.2, 0.9, 0.1, 0.95])
    cost: dict[tuple[int, ...], float] = {(3,): 5.0, (1,): 4.0, (0,): 1.0, (4,): 0.0}
    assert PROPOSALS == 3
    assert drop_layers(deep, discover(deep), scores, 1, fake_kl(cost, deep)) == [((), 0.0), (("model.layers.0",), 1.0)]


@pytest.fixture
def no_surgery(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the cut model, one that only knows which layers are left."""

    def stub(model: Any, plan: Plan, **_: Any) -> Any:
        left = [layer for i, layer in enumerate(model.model.layers) if f"model.layers.{i}" not in plan.dropped]
        return SimpleNamespace(model=SimpleNamespace(layers=left))

    monkeypatch.setattr(module, "apply", stub)


@pytest.mark.usefixtures("no_surgery")
def test_each_removal_is_measured_together_with_those_before(deep: Any) -> None:
    scores = influence([0.3, 0.2, 0.9, 0.1, 0.95])
    # With layer 0 gone, 3 is the better one of those that are left, although 1 alone was better.
    cost = {(3,): 3.0, (1,): 2.0, (0,): 1.0, (0, 1): 9.0, (0, 3): 6.0, (0, 2): 7.0}
    ladder = drop_layers(deep, discover(deep), scores, 2, fake_kl(cost, deep))
    assert ladder == [((), 0.0), (("model.layers.0",), 1.0), (("model.layers.0", "model.layers.3"), 6.0)]


@pytest.mark.usefixtures("no_surgery")
def test_where_kl_is_equal_the_lesser_influence_goes(deep: Any) -> None:
    scores = influence([0.3, 0.2, 0.9, 0.1, 0.95])
    ladder = drop_layers(deep, discover(deep), scores, 1, lambda _: 1.0)
    assert ladder[1][0] == ("model.layers.3",)
    assert drop_layers(deep, discover(deep), scores, 0, lambda _: 1.0) == [((), 0.0)]
