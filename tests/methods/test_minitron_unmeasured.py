"""Minitron by importance alone: nothing is measured by passes of the whole model."""

import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.plan import Plan
from secateur.choose.rank import keep_best
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import fingerprint
from secateur.methods.base import Decision
from secateur.methods.minitron import minitron
from secateur.methods.sensitivity import least_influence
from secateur.score.activation import Scores, activation_scores
from secateur.space import Space, discover

DATA = [tokens(2, 12, seed=1), tokens(2, 12, seed=2)]
SPACES: dict[int, tuple[nn.Module, Space]] = {}
LEAN: Mapping[str, Any] = {"score_samples": 2, "top_k": 2, "max_depth_cut": 0.0, "skip": ("hidden", "kv_groups")}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", dtype=torch.float32, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def thin() -> Any:
    """One layer: enough where none can go."""
    return tiny("llama", dtype=torch.float32, tie_word_embeddings=True, num_hidden_layers=1)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny("gpt2", dtype=torch.float32)


@pytest.fixture(scope="module")
def gemma2() -> Any:
    return tiny("gemma2", dtype=torch.float32)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Space of a model that many tests share is the same every time."""

    def known(model: nn.Module) -> Space:
        if id(model) not in SPACES:
            SPACES[id(model)] = model, discover(model)
        return SPACES[id(model)][1]

    monkeypatch.setattr(sys.modules["secateur.methods.minitron"], "discover", known)


def lean(model: nn.Module, budget: str, **options: Any) -> Decision:
    return minitron(model, Budget.parse(budget), DATA, **{**LEAN, **options})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# By importance alone


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be run whole to measure anything."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    for name in ("Reference", "compare", "drop_layers", "probe_kinds"):
        monkeypatch.setattr(f"secateur.methods.study.{name}", never)


def influence_of(model: Any) -> tuple[Space, Any]:
    space = discover(model)
    return space, activation_scores(model, space, DATA)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_layers_of_the_least_influence_go_unmeasured(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    space, scores = influence_of(model)
    order = [layer.name for layer in space.layers()]
    gone = sorted(order, key=lambda n: scores.blocks[n])[: len(order) - 1]
    found = minitron(model, Budget.parse(dims={"layers": 1}), DATA, measure=False)
    assert set(found.plan.dropped) == set(gone)
    assert list(found.plan.dropped) == [n for n in order if n in gone]
    sums = [[k, pytest.approx(sum(sorted(scores.blocks.values())[:k]))] for k in range(1, len(order))]
    assert found.details["depth"] == {"measured": False, "influence": sums}
    assert "depth_kl" not in found.details
    assert "score_samples" not in found.details["calibration"]
    assert count(apply(model, found.plan, space=space)) < count(model)


def test_of_layers_alike_the_earlier_goes_and_one_that_must_stay_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", dtype=torch.float32, num_hidden_layers=4)
    space = discover(model)
    names = [layer.name for layer in space.layers()]
    scores = Scores({}, dict(zip(names, (0.5, 0.1, 0.5, 0.1), strict=True)), 1, 1)
    before = fingerprint(model)
    assert least_influence(model, space, scores, 3) == [
        ((), 0.0),
        ((names[1],), 0.1),
        ((names[1], names[3]), 0.2),
        ((names[0], names[1], names[3]), 0.7),
    ]
    real = apply

    def refusing(model: Any, plan: Plan, **options: Any) -> Any:
        assert all(p.is_meta for p in model.parameters())
        if names[1] in plan.dropped:
            raise SecateurError("not without that one")
        return real(model, plan, **options)

    monkeypatch.setattr("secateur.methods.sensitivity.apply", refusing)
    found = least_influence(model, space, scores, 4)
    assert [gone for gone, _ in found] == [(), (names[3],), (names[0], names[3]), (names[0], names[2], names[3])]
    assert fingerprint(model) == before
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.usefixtures("unmeasured")
def test_the_least_expected_loss_wins_unmeasured(llama: Any) -> None:
    space, scores = influence_of(llama)
    steps = {"layers": 1, "hidden": 16, "ffn": 16}
    options: dict[str, Any] = {"max_depth_cut": 0.5, "max_width_cut": 0.5, "divisors": steps, "measure": False}
    found = minitron(llama, Budget.parse("params=60%"), DATA, **options)
    told = found.details["search"]
    (best,) = told["candidates"]
    assert (told["measured"], best["chosen"]) == (False, True)
    assert "score" not in told
    assert "score" not in best
    cut = apply(llama, found.plan, space=space)
    assert count(cut) == best["params"] <= 0.6 * count(llama)
    layers = [layer.name for layer in space.layers()]
    loss = sum(scores.blocks[name] for name in found.plan.dropped)
    groups = {k.size: len(k.units) for k in found.plan.kept.values() if k.kind == "kv_groups"}
    for axis in space.axes:  # by hand: what goes of each, by the layer that it is in, or by all layers
        inside = [name for name in layers if f"{axis.block}.".startswith(f"{name}.")]
        if set(inside) & set(found.plan.dropped) or axis.name not in found.plan.kept:
            continue
        energy, units = scores.axes[axis.name].double().square(), list(found.plan.kept[axis.name].units)
        if axis.kind == "heads" and groups:
            size = len(units) // axis.groups * axis.groups
            units = list(keep_best(axis, scores.axes[axis.name], size).units)
        lost = 1 - float(energy[units].sum() / energy.sum())
        loss += lost * (scores.blocks[inside[0]] if inside else len(layers))
    assert best["expected_loss"] == pytest.approx(loss)
    again = minitron(llama, Budget.parse("params=60%"), DATA, **options)
    assert (again.plan.kept, again.plan.dropped) == (found.plan.kept, found.plan.dropped)
    everything = lean(llama, "params=90%", score_samples=64, top_k=10, measure=False)
    assert everything.plan.kept


@pytest.mark.usefixtures("unmeasured")
def test_one_layer_and_sorted_units_unmeasured(thin: Any) -> None:
    found = minitron(thin, Budget.parse("params=90%"), DATA, measure=False, presorted=True, skip=("hidden", "heads"))
    assert found.details["search"]["influence"]["depth"] == []
    assert all(k.units == tuple(range(len(k.units))) for k in found.plan.kept.values())
    exact_ = minitron(thin, Budget.parse(dims={"ffn": 40}), DATA, measure=False)
    assert {len(k.units) for k in exact_.plan.kept.values()} == {40}
