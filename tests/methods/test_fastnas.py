"""FastNAS: masked copies against real cuts, monotone tables, the smallest greatest harm, and every refusal."""

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Mobile, Residual, pairs, pictures, shaken
from timers import counted, counting_clock
from tiny import random_plan, tiny, tokens
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import costs
from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.cut.pretend import Pretence
from secateur.errors import SecateurError
from secateur.load.model import fingerprint
from secateur.measure.closeness import Closeness
from secateur.measure.quality import Metric
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.base import Decision
from secateur.methods.fastnas import fastnas
from secateur.score.weights import magnitude
from secateur.space import discover

X = pictures()
DATA = pairs((16, 16))


def net(stream: int = 24, inside: int = 20) -> Any:
    torch.manual_seed(0)
    return shaken(Residual(stream, inside))


def decide(model: nn.Module, budget: str, data: Any = DATA, **options: Any) -> Decision:
    return fastnas(model, Budget.parse(budget), data, **{"inputs": X, "levels": 4, "adapt_batches": 2, **options})


# Masked copies


@pytest.mark.parametrize("make", [net, lambda: shaken(Mobile())])
def test_a_pretended_cut_computes_what_the_real_one_does(make: Any) -> None:
    model = make().double()
    x = [pictures(5, dtype=torch.float64), pictures(4, seed=8, dtype=torch.float64)]
    space = discover(model, x[0])
    before = fingerprint(model)
    pretence = Pretence(model, space, x[0])
    exact = [axis.name for axis in space.axes if pretence.exact(axis)]
    assert exact
    for seed, name in enumerate([*exact, *(a.name for a in space.axes if a.name not in exact)]):
        every = random_plan(space, ["channels"], seed=seed)
        plan = Plan({name: every.kept[name]})
        real = apply(model, plan, space=space, inputs=x[0])
        norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        with pretence.cut(plan) as pretended, torch.no_grad():
            assert (pretended is pretence.copy) == (name in exact)
            assert torch.allclose(pretended(x[0]), real(x[0]), atol=1e-12)
            if norms:  # their statistics come out the same too
                adapt_batch_norm(pretended, x)
                adapt_batch_norm(real, x)
                assert torch.allclose(pretended(x[0]), real(x[0]), atol=1e-12)
                assert not torch.allclose(pretended(x[0]), model(x[0]))
    with torch.no_grad():
        assert torch.equal(pretence.copy(x[0]), model(x[0])), "the copy is put right after each"
    assert fingerprint(model) == before


def test_normed_axes_are_really_cut() -> None:
    model = tiny("llama")
    space = discover(model)
    pretence = Pretence(model, space)
    kinds = {axis.kind for axis in space.axes if not pretence.exact(axis)}
    assert "hidden" in kinds
    plan = random_plan(space, ["ffn", "kv_groups"])
    with pretence.cut(plan) as pretended, torch.no_grad():
        real = apply(model, plan, space=space)
        assert torch.allclose(pretended(tokens()).logits, real(tokens()).logits, atol=1e-10)


# The table


def slow_loss(model: Any, space: Any, name: str, size: int) -> float:
    """Minus the score of one real cut, batch norm estimated anew, less that of the dense model treated alike."""
    axis = space.axis(name)
    worth = magnitude(model, space, [axis])[name]
    units = tuple(sorted(sorted(range(axis.size), key=lambda u: (-float(worth[u]), u))[:size]))
    cut = apply(model, Plan({name: Kept(axis.kind, axis.size, units)}), space=space, inputs=X)
    whole = copy.deepcopy(model)
    values = []
    for own in (whole, cut):
        adapt_batch_norm(own, DATA)
        values.append(-Closeness(model, DATA)(own))
    return values[0] - values[1]


def test_the_table_is_what_single_cuts_cost_and_monotone() -> None:
    model = net()
    before = fingerprint(model)
    decision = decide(model, "macs=50%")
    assert fingerprint(model) == before
    table = decision.details["sensitivity"]
    assert set(table) == {"conv.channels", "first.channels"}
    assert "latency" not in decision.details
    for name, row in table.items():
        sizes = [int(size) for size in row]
        assert sizes == sorted(sizes, reverse=True)
        values = list(row.values())
        assert values[0] == 0
        assert values == sorted(values)
        slow = [slow_loss(model, decision.space, name, size) for size in sizes[1:]]
        free = max((i + 1 for i, loss in enumerate(slow) if loss <= 0), default=0)  # larger sizes are not tried
        expected = np.maximum.accumulate([0.0] * (free + 1) + slow[free:])
        assert values == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert any(row[min(row, key=int)] > 0 for row in table.values())


@pytest.mark.parametrize("budget", ["macs=50%", "params=60%", "flops=70%,memory=65%"])
def test_budgets_and_the_smallest_greatest_harm(budget: str) -> None:
    model = net(96, 80)
    decision = decide(model, budget, adapt_batches=0)
    dense, after = costs(decision.space, Plan()), costs(decision.space, decision.plan)
    used = {m: after.of(m) / limit.absolute(dense.of(m)) for m, limit in Budget.parse(budget).limits.items()}
    assert 0.99 <= max(used.values()) <= 1
    table = decision.details["sensitivity"]

    def loss(name: str, size: int) -> float:
        sizes, values = zip(*((int(s), v) for s, v in table[name].items()), strict=True)
        return float(np.interp(-size, [-s for s in sizes], values))

    left = {a.name: a.size for a in decision.space.axes} | {n: len(k.units) for n, k in decision.plan.kept.items()}
    worst = max(loss(name, size) for name, size in left.items())

    def reach(threshold: float) -> float:
        """The most of a limit that is used where every axis is as small as the threshold lets it be."""
        kept = {}
        for axis in decision.space.axes:
            fit = [s for s in range(int(0.1 * axis.size) + 1, axis.size + 1) if loss(axis.name, s) <= threshold]
            if min(fit) < axis.size:
                kept[axis.name] = Kept(axis.kind, axis.size, tuple(range(min(fit))))
        found = costs(decision.space, Plan(kept))
        return max(found.of(m) / limit.absolute(dense.of(m)) for m, limit in Budget.parse(budget).limits.items())

    assert reach(worst * 1.05) <= 1
    assert reach(worst * 0.9) > 1, "a smaller greatest harm does not meet the budget"
    assert decide(model, budget, adapt_batches=0).plan == decision.plan


def test_the_profile_is_known_before_anything_is_scored() -> None:
    model = net()
    called: list[int] = []

    def score(own: nn.Module) -> float:
        called.append(1)
        return -float(own(X).square().mean())

    with pytest.raises(
        SecateurError, match=r"the budget cannot be met \(macs=.*the smallest reachable is .*allow more"
    ):
        decide(model, "macs=0.1%", score=score)
    assert not called
    profile = decide(model, "macs=50%", only=["first.channels"], keep_at_least=0.3, round_to=4).details["space"]
    space = discover(model, X)

    def at(size: int) -> Any:
        return costs(space, Plan({"first.channels": Kept("channels", 20, tuple(range(size)))}))

    assert profile["macs"]["min"] == at(8).macs
    assert profile["macs"]["max"] == costs(space, Plan()).macs
    assert profile["macs"]["middle"] == at(16).macs
    assert profile["macs"]["satisfiable"] is True
    assert profile["params"] == {"min": at(8).params, "middle": at(16).params, "max": costs(space, Plan()).params}


def test_language_models_stay_uniform() -> None:
    model = tiny("llama", dtype=torch.float32)
    options: dict[str, Any] = {"only": ["ffn", "kv_groups"], "inputs": None}
    alike = decide(model, "params=80%", [tokens()], **options)
    assert len({len(k.units) for k in alike.plan.kept.values() if k.kind == "ffn"}) == 1
    assert alike.details["score"]["name"] == "-kl"
    assert len(alike.details["sensitivity"]) == 2
    free = decide(model, "params=80%", [tokens()], uniform=False, **options)
    assert len(free.details["sensitivity"]) == 4


def test_scores_of_the_users_own() -> None:
    model = net()
    target = model(X).detach()

    def error(own: nn.Module) -> float:
        return float((own(X) - target).square().mean().detach())

    metric = decide(model, "macs=60%", score=Metric("error", error, higher_is_better=False))
    plain = decide(model, "macs=60%", score=lambda own: -error(own))
    assert metric.plan == plain.plan
    assert metric.details["score"]["name"] == "-error"


def test_a_score_with_the_wrong_sign_is_told() -> None:
    torch.manual_seed(0)
    model = shaken(Mobile())
    target = model(X).detach()

    def error(own: nn.Module) -> float:
        return float((own(X) - target).square().mean().detach())

    with pytest.raises(SecateurError, match=r"the dense model scores 0 by error, and (\d) of \1 cut models score more"):
        decide(model, "macs=70%", score=error)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _: float("nan"), "returned nan, not a finite number"),
        (lambda _: float("inf"), "returned inf, not a finite number"),
        (lambda _: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda _: "good", "failed: ValueError: could not convert"),
        (lambda _: None, "failed: TypeError"),
    ],
)
def test_a_score_that_fails_says_so(function: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        decide(net(), "macs=50%", score=function)


# Latency


def test_latency_is_bisected_with_a_clock() -> None:
    model = net()
    space = discover(model, X)
    asked: list[Plan] = []

    def clock(plan: Plan) -> float:
        asked.append(plan)
        return 1e-3 * costs(space, plan).macs / costs(space, Plan()).macs

    decision = decide(model, "latency=0.6ms,params=90%", clock=clock)
    assert 0.95 * 0.6e-3 <= clock(decision.plan) <= 0.6e-3
    assert decision.details["target"]["latency"]["reached"] == clock(decision.plan)
    assert decision.details["space"]["latency"]["max"] == 1e-3
    assert len(asked) < 16
    share = decide(model, "latency=60%", clock=clock)
    assert 0.95 * 0.6e-3 <= clock(share.plan) <= 0.6e-3
    with pytest.raises(SecateurError, match=r"latency=1e-05: the smallest reachable is"):
        decide(model, "latency=0.01ms", clock=clock)
    with pytest.raises(SecateurError, match=r"keeps the budget latency=0\.005s already"):
        decide(model, "latency=5ms", clock=clock)
    for bad, message in ((lambda _: 0.0, "clock returned 0.0 seconds"), (lambda _: float("nan"), "clock returned nan")):
        with pytest.raises(SecateurError, match=message):
            decide(model, "latency=60%", clock=bad)


def test_without_a_clock_the_parts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["secateur.methods.fastnas"], "Clock", counting_clock)
    model = net()
    decision = decide(model, "latency=60%")
    told = decision.details["latency"]
    assert told["dense"] == counted(model, X) == decision.details["space"]["latency"]["max"]
    assert told["limit"] == pytest.approx(0.6 * told["dense"])
    assert told["measured"] == counted(apply(model, decision.plan, space=decision.space, inputs=X), X)
    assert told["predicted"] == pytest.approx(told["measured"])
    assert 0.9 * told["limit"] <= told["measured"] <= told["limit"]


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("macs=50%", {"clock": lambda _: 1.0}, "a clock is given, and the budget does not limit latency"),
        ("macs=50%", {"data": []}, "fastnas needs data"),
        ("macs=50%", {"levels": 0}, "levels must be at least 1"),
        ("macs=50%", {"adapt_batches": -1}, "adapt_batches must be at least 0"),
        ("macs=50%", {"score_samples": 0}, "score_samples must be at least 1"),
        ("macs=50%", {"criterion": "magnitude"}, "did you mean 'magnitude_l"),
        ("macs=100%", {}, "keeps the budget"),
        ("sparsity=50%", {}, "a budget of sparsity is not served by fastnas"),
        ("macs=50%", {"ignore": ["frist"]}, "ignore: 'frist' matches no"),
    ],
)
def test_refusals(budget: str, options: dict[str, Any], message: str) -> None:
    options = dict(options)
    with pytest.raises(SecateurError, match=message):
        decide(net(), budget, options.pop("data", DATA), **options)
