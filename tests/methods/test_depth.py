"""Depth: every removal is measured, influence only proposes, budgets and counts are met, and every refusal."""

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import logits, tiny, tokens, zeroed
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import costs
from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.batches import first_samples
from secateur.load.model import fingerprint
from secateur.measure.closeness import Closeness
from secateur.methods.base import Decision
from secateur.methods.depth import depth
from secateur.score.activation import activation_scores
from secateur.score.influence import influence
from secateur.space import Space, discover

DATA = [tokens(3, 9), tokens(2, 9, seed=6)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", dtype=torch.float32, num_hidden_layers=4, hidden_size=24, intermediate_size=40)


@pytest.fixture(scope="module")
def space(model: Any) -> Space:
    return discover(model)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch, model: Any, space: Space) -> None:
    def known(own: nn.Module, inputs: Any = None) -> Space:
        return space if own is model else discover(own, inputs)

    monkeypatch.setattr(sys.modules["secateur.methods.depth"], "discover", known)


def decide(model: nn.Module, budget: str = "", data: Any = DATA, **options: Any) -> Decision:
    return depth(model, Budget.parse(budget), data, **options)


def slow_kl(dense: Any, pruned: Any) -> float:
    """Mean KL over the predicted positions, in float64."""
    total, count = 0.0, 0
    for batch in DATA:
        p, q = (logits(m, batch).double()[:, :-1].log_softmax(-1) for m in (dense, pruned))
        total += float((p.exp() * (p - q)).sum())
        count += p.shape[0] * p.shape[1]
    return total / count


def slow_greedy(model: Any, space: Space, names: list[str], count: int) -> tuple[list[str], list[float]]:
    """Greedy removal by trying everything, by blocks that add nothing in place of a cut."""
    gone: list[str] = []
    found: list[float] = []
    for _ in range(count):
        trials = []
        for name in names:
            if name not in gone:
                dropped = tuple(n for n in names if n in gone or n == name)
                trials.append((slow_kl(model, zeroed(model, space, Plan(dropped=dropped))), name))
        best = min(trials)
        gone.append(best[1])
        found.append(best[0])
    return gone, found


def test_the_best_of_all_goes_first_and_is_measured_with_those_before(model: Any, space: Space) -> None:
    before = fingerprint(model)
    names = [block.name for block in space.layers()]
    decision = decide(model, count=2, proposals=0)
    gone, distances = slow_greedy(model, space, names, 2)
    steps = decision.details["steps"]
    assert [step["dropped"] for step in steps] == gone
    assert [step["distance"] for step in steps] == pytest.approx(distances, rel=1e-4)
    assert [step["tried"] for step in steps] == [4, 3]
    assert decision.plan.dropped == tuple(n for n in names if n in gone)
    assert decide(model, count=2, proposals=0).plan == decision.plan
    assert fingerprint(model) == before


def test_sublayers_by_themselves(model: Any, space: Space) -> None:
    names = [block.name for block in space.blocks if block.kind != "layers"]
    decision = decide(model, count=2, proposals=0, what="sublayers")
    gone, _ = slow_greedy(model, space, names, 2)
    assert set(decision.plan.dropped) == set(gone)
    pruned = apply(model, decision.plan, space=space)
    assert logits(pruned, DATA[0]).shape == (3, 9, 320)


def test_only_so_many_are_tried_those_of_the_least_influence(model: Any) -> None:
    decision = decide(model, count=1, proposals=2)
    assert decision.details["steps"][0]["tried"] == 2
    known: Mapping[str, float] = decision.details["influence"]
    assert decision.plan.dropped[0] in sorted(known, key=lambda name: known[name])[:2]


@pytest.mark.parametrize(
    ("what", "budget"), [("layers", "params=75%"), ("both", "macs=70%,params=80%"), ("layers", "memory=80%")]
)
def test_budgets_are_kept_and_nothing_goes_in_vain(model: Any, space: Space, what: str, budget: str) -> None:
    decision = decide(model, budget, what=what, proposals=2)
    dense = costs(space, Plan())

    def used(dropped: tuple[str, ...]) -> float:
        found = costs(space, Plan(dropped=dropped))
        return max(found.of(m) / limit.absolute(dense.of(m)) for m, limit in Budget.parse(budget).limits.items())

    assert used(decision.plan.dropped) <= 1
    inside = tuple(f"{name}." for name in decision.plan.dropped)
    assert not any(name.startswith(inside) for name in decision.plan.dropped)
    steps = [step for step in decision.details["steps"] if "dropped" in step]
    assert used(tuple(step["dropped"] for step in steps[:-1])) > 1, "it stops at once"
    pruned = apply(model, decision.plan, space=space)
    assert sum(p.numel() for p in pruned.parameters()) == costs(space, decision.plan).params
    for m, told in decision.details["target"].items():
        assert told["reached"] == costs(space, decision.plan).of(m)


def test_what_costs_least_for_what_it_saves_goes_first_and_what_fits_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks a (saves 1, costs 1), b (saves 4, costs 2) and c (saves 5, costs 3); 6 must go."""
    module = sys.modules["secateur.methods.depth"]
    saved, harm = {"a": 1, "b": 4, "c": 5}, {"a": 0.1, "b": 2.0, "c": 3.0}

    def tried(_: Any, __: Any, order: Any, gone: Any, proposed: Any, *___: Any) -> Any:
        trials = [(rank, tuple(b for b in order if b in gone or b == name)) for rank, name in enumerate(proposed)]
        return [(sum(harm[b] for b in trial), rank, trial) for rank, trial in trials]

    monkeypatch.setattr(module, "tried_removals", tried)
    goal: Any = SimpleNamespace(left=lambda dropped: 6 - sum(saved[b] for b in dropped), count=None)
    search = module._Search(
        None, None, None, ["a", "b", "c"], dict.fromkeys("abc", 0.0), None, goal, 0, lambda items, _: items
    )
    dropped, steps = search.run()
    assert [step.get("dropped") for step in steps] == ["a", "b", "c", None], "0.1 for each saved, then 0.5, then c"
    assert steps[-1] == {"restored": "b", "distance": 3.1, "tried": 2}, "without it the budget is kept as well"
    assert dropped == ("a", "c")
    goal.left = lambda dropped: 5 - sum(saved[b] for b in dropped)
    dropped, steps = search.run()
    assert dropped == ("a", "b"), "b saves the 4 that are left at less cost than c, which saves more"
    goal.left = lambda dropped: 4.5 - sum(saved[b] for b in dropped)
    harm["b"], harm["a"] = 9.0, 0.1
    dropped, steps = search.run()
    assert steps[-1]["restored"] == "a"
    assert dropped == ("c",)


# Influence


def test_influence_of_layers_is_that_of_minitron_and_of_sublayers_what_they_add(model: Any, space: Space) -> None:
    blocks = [b for b in space.blocks if b.index == 1]
    found = influence(model, DATA, list(space.blocks))
    known = activation_scores(model, space, DATA, axes=[], layers=True).blocks
    assert {n: found[n] for n in known} == pytest.approx(dict(known), abs=1e-6)
    layer = model.model.layers[1]
    seen: dict[str, list[torch.Tensor]] = {"in": [], "attention": [], "mlp": []}
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen["in"].append(args[0])),
        layer.self_attn.register_forward_hook(lambda _, __, out: seen["attention"].append(out[0])),
        layer.mlp.register_forward_hook(lambda _, __, out: seen["mlp"].append(out)),
    ]
    for batch in DATA:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    streams: Any = list(zip(*seen.values(), strict=True))
    attention = torch.cat([torch.cosine_similarity(x, x + a, dim=-1).flatten() for x, a, _ in streams])
    mlp = torch.cat([torch.cosine_similarity(x + a, x + a + m, dim=-1).flatten() for x, a, m in streams])
    expected = {"attention": 1 - float(attention.mean()), "mlp": 1 - float(mlp.mean())}
    assert {b.kind: found[b.name] for b in blocks if b.kind != "layers"} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gptj"])
def test_influence_is_zero_only_for_what_does_nothing(name: str) -> None:
    """Norms behind a sub-layer count (Gemma), and so do sub-layers side by side (GPT-J)."""
    model = tiny(name, dtype=torch.float32)
    own = discover(model)
    blocks = [b for b in own.blocks if b.kind != "layers"]
    assert len(blocks) == 4
    found = influence(model, DATA, blocks)
    assert all(1e-4 < value < 2 for value in found.values())
    silent = model.get_submodule(blocks[-1].name)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
    assert influence(model, DATA, blocks)[blocks[-1].name] == pytest.approx(0, abs=1e-6)


def test_padding_does_not_count(model: Any, space: Space) -> None:
    ids = DATA[0]
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = influence(model, [{"input_ids": ids, "attention_mask": mask}], list(space.layers()))
    short = influence(model, [ids[:, :6]], list(space.layers()))
    assert padded == pytest.approx(short, abs=1e-5)


# Distances


def test_closeness_of_language_models_classifiers_and_others(model: Any) -> None:
    import transformers

    torch.manual_seed(0)
    pruned = tiny("llama", dtype=torch.float32, num_hidden_layers=4, hidden_size=24, intermediate_size=40, seed=3)
    closeness = Closeness(model, DATA)
    assert closeness.measure == "kl"
    assert closeness(model) == pytest.approx(0, abs=1e-6)
    assert closeness(pruned) == pytest.approx(slow_kl(model, pruned), rel=1e-4)
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    labelled = Closeness(one, [(x, torch.tensor([0, 1, 2, 0, 1]))])
    assert labelled.measure == "kl"
    p, q = (m(x).double().log_softmax(-1) for m in (one, other))
    assert labelled(other) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    numbers = Closeness(one, [x])
    assert numbers.measure == "mse"
    expected = float((one(x) - other(x)).square().sum() / (one(x) - one(x).mean()).square().sum())
    assert numbers(other) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(SecateurError, match="only equal outputs can be compared"):
        numbers(nn.Linear(4, 2))
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    bert: Any = transformers.BertModel(config).eval()
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[:, 5:] = 0
    assert Closeness(bert, [{"input_ids": tokens(4, 9) % 60, "attention_mask": mask}]).measure == "mse"
    assert [len(b) for b in first_samples(DATA, 3)] == [3]
    assert [len(b) for b in first_samples(DATA, 4)] == [3, 1]


class Chain(nn.Module):
    """Numbers in, four blocks of unequal weight around a stream, numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(Residual(12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Residual(nn.Module):
    """x + MLP(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x)))


def test_a_plain_network_by_its_squared_error() -> None:
    torch.manual_seed(0)
    net = Chain().eval()
    x = torch.randn(16, 4)
    with torch.no_grad():
        for parameter in net.blocks[2].parameters():
            parameter.mul_(0.01)
    decision = decide(net, "params=85%", [x], inputs=x)
    assert decision.details["distance"] == "mse"
    assert decision.plan.dropped == ("blocks.2",)
    pruned = apply(net, decision.plan, space=decision.space, inputs=x)
    error = (net(x) - pruned(x)).square().sum() / (net(x) - net(x).mean()).square().sum()
    assert decision.details["steps"][0]["distance"] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("params=70%", {"data": []}, "depth needs data"),
        ("params=70%", {"what": "layer"}, "what: there is no 'layer'; did you mean 'layers'"),
        ("params=70%", {"count": 1}, "give either count=1 or a budget, not both: params=70%"),
        ("", {}, "no budget is given: it takes params"),
        ("", {"count": 0}, "count must be at least 1, not 0"),
        ("", {"count": 4}, "count=4: at most 3 blocks can be dropped"),
        ("params=70%", {"proposals": -1}, "proposals must be at least 0"),
        ("params=70%", {"ignore": ["model.layer.0"]}, r"did you mean 'model\.layers\.0'"),
        ("params=70%", {"ignore": ["model.layers.*"]}, "has no layers that can be dropped without"),
        ("params=5%", {}, r"cannot be met by dropping blocks \(params=.*: the smallest reachable is"),
        ("params=100%", {}, "keeps the budget params=100% already"),
        ("latency=1ms", {}, "a budget of latency is not served by depth"),
    ],
)
def test_refusals(model: Any, budget: str, options: dict[str, Any], message: str) -> None:
    options = dict(options)
    with pytest.raises(SecateurError, match=message):
        decide(model, budget, options.pop("data", DATA), **options)


def test_a_model_without_layers() -> None:
    with pytest.raises(SecateurError, match="Linear has no layers that can be dropped"):
        decide(nn.Linear(4, 3), "params=70%", [torch.randn(2, 4)], inputs=torch.randn(2, 4))
