"""Structural pruning end to end: budgets, scopes, limits, groups, repeated steps, and every refusal."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Mlp, Mobile, Residual, pairs, pictures, shaken
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur.choose.budget import Budget
from secateur.choose.cost import costs
from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import fingerprint
from secateur.methods.base import Decision
from secateur.methods.structural import FROM_DATA, FROM_WEIGHTS, SCOPES, structural
from secateur.space import Space, discover

EXAMPLE = torch.zeros(2, 1, 24, 24)
SPACES: dict[int, tuple[nn.Module, Space]] = {}


@pytest.fixture(scope="module")
def digits() -> Any:
    """The module of the bundled classifier."""
    path = Path(__file__).resolve().parents[2] / "examples" / "digits" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def resnet(digits: Any) -> Any:
    return digits.trained()


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Space of a model that many tests share is the same every time."""

    def known(model: nn.Module, inputs: Any = None) -> Space:
        if id(model) not in SPACES:
            SPACES[id(model)] = model, discover(model, inputs)
        return SPACES[id(model)][1]

    monkeypatch.setattr(sys.modules["secateur.methods.structural"], "discover", known)
    yield
    for key in [k for k, (model, _) in SPACES.items() if not hasattr(model, "layers")]:
        del SPACES[key]


def decide(model: nn.Module, budget: str, data: Any = (), **options: Any) -> Decision:
    return structural(model, Budget.parse(budget), data, **{"inputs": EXAMPLE, **options})


def macs(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return float(counter.get_total_flops()) / 2 / len(x)


def share_left(decision: Decision) -> dict[str, float]:
    """Axis -> share of its units that stays."""
    sizes = {a.name: 1.0 for a in decision.space.axes}
    return sizes | {name: len(kept.units) / kept.size for name, kept in decision.plan.kept.items()}


# Budgets


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", ["macs=50%", "flops=3.4M", "params=35%", "memory=700KiB", "macs=70%,params=55%"])
def test_budgets_are_hit_within_a_hundredth(resnet: Any, scope: str, budget: str) -> None:
    decision = decide(resnet, budget, scope=scope)
    dense, after = costs(decision.space, Plan()), costs(decision.space, decision.plan)
    used = {m: after.of(m) / limit.absolute(dense.of(m)) for m, limit in Budget.parse(budget).limits.items()}
    assert all(share <= 1 for share in used.values())
    assert max(used.values()) >= 0.99
    told = decision.details["target"]
    assert {m: t["reached"] / t["limit"] for m, t in told.items()} == pytest.approx(used)


@pytest.mark.parametrize("criterion", [*FROM_WEIGHTS, *FROM_DATA])
def test_every_criterion_is_as_counted_in_the_result(resnet: Any, digits: Any, criterion: str) -> None:
    data = [(x[:8], y[:8]) for x, y in digits.calibration()]
    before = fingerprint(resnet)
    decision = decide(resnet, "macs=50%", data, criterion=criterion)
    pruned = apply(resnet, decision.plan, space=decision.space, inputs=EXAMPLE)
    assert 0.99 * 5_704_192 / 2 <= macs(pruned, EXAMPLE) <= 5_704_192 / 2
    assert fingerprint(resnet) == before
    assert decision.details["calibration"]["samples"] == (16 if criterion in FROM_DATA else 0)
    again = decide(resnet, "macs=50%", data, criterion=criterion)
    assert again.plan == decision.plan


def test_criteria_differ(resnet: Any, digits: Any) -> None:
    data = [(x[:8], y[:8]) for x, y in digits.calibration()]
    plans = [decide(resnet, "macs=60%", data, criterion=c, scope="local").plan for c in (*FROM_WEIGHTS, *FROM_DATA)]
    kept = [tuple(k.units for k in plan.kept.values()) for plan in plans]
    assert len(set(kept)) == len(kept) - 1, "lamp orders the units of one axis as magnitude_l2 does, the others do not"


def test_a_budget_that_cannot_be_met(resnet: Any) -> None:
    with pytest.raises(SecateurError) as caught:
        decide(resnet, "macs=1%", keep_at_least=0.25)
    text = str(caught.value)
    assert text.startswith("the budget cannot be met (macs=57,042: the smallest reachable is ")
    assert "allow more: a lower keep_at_least, fewer limits, ignore or only" in text
    smallest = float(text.split("reachable is ")[1].split(" ", maxsplit=1)[0].replace(",", ""))
    decision = decide(resnet, f"macs={smallest}", keep_at_least=0.25)
    assert costs(decision.space, decision.plan).macs == smallest
    assert set(share_left(decision).values()) == {0.25}
    with pytest.raises(SecateurError, match="smallest reachable"):
        decide(resnet, f"macs={smallest - 1}", keep_at_least=0.25)


# Scopes


def test_local_keeps_the_same_share_of_every_axis_and_its_best_units(resnet: Any) -> None:
    decision = decide(resnet, "macs=50%", scope="local")
    shares = share_left(decision)
    assert max(shares.values()) - min(shares.values()) <= 2 / 16
    weights = dict(resnet.named_parameters())
    for axis in decision.space.axes:
        squares = []
        for unit in range(axis.size):  # slowly: every weight that loses something when the unit goes
            parts = [p for p in axis.slices if p.parameter in weights and not p.parameter.endswith("bias")]
            squares.append(sum(float(weights[p.parameter].select(p.dim, unit).detach().square().sum()) for p in parts))
        kept = decision.plan.kept[axis.name].units
        lost = [squares[u] for u in range(axis.size) if u not in kept]
        assert max(lost) <= min(squares[u] for u in kept) * (1 + 1e-5)


def test_global_compares_axes_by_their_mean(resnet: Any) -> None:
    from secateur.score.weights import magnitude

    decision = decide(resnet, "macs=50%")
    scores = {n: s / s.mean() for n, s in magnitude(resnet, decision.space).items()}
    kept, lost = [], []
    for name, values in scores.items():
        units = decision.plan.kept[name].units if name in decision.plan.kept else range(len(values))
        kept += [float(values[u]) for u in units]
        lost += [float(v) for u, v in enumerate(values) if u not in units]
    threshold = sorted(kept + lost)[len(lost)]
    wrong = sum(v < threshold for v in kept) + sum(v > threshold for v in lost)
    assert wrong <= 4, "a few units are given back to come near the budget"
    raw = decide(resnet, "macs=50%", normalize=False)
    assert raw.plan != decision.plan
    assert raw.details["normalized"] is False


def test_isomorphic_ranks_equal_structures_together(resnet: Any) -> None:
    """The insides of blocks are alike; each of the three streams is made of its own parts."""
    decision = decide(resnet, "macs=50%", scope="isomorphic")
    left = dict.fromkeys(("inside", "first", "second", "third"), 0)
    whole = dict(left)
    for axis in decision.space.axes:
        stream = {16: "first", 32: "second", 64: "third"}[axis.size]
        name = "inside" if len(axis.slices) < 10 else stream
        whole[name] += axis.size
        left[name] += len(decision.plan.kept[axis.name].units) if axis.name in decision.plan.kept else axis.size
    shares = [left[name] / whole[name] for name in whole]
    assert max(shares) - min(shares) <= 2 / 16
    inside = [share for n, share in share_left(decision).items() if len(decision.space.axis(n).slices) < 10]
    assert max(inside) - min(inside) > 0.2, "within a class the scores decide"


# What may go


def test_ignored_modules_keep_their_units(resnet: Any) -> None:
    decision = decide(resnet, "macs=80%", ignore=["fc", "layers.[0-5].conv2"])
    assert decision.plan.kept
    pruned: Any = apply(resnet, decision.plan, space=decision.space, inputs=EXAMPLE)
    assert pruned.fc.in_features == 64
    assert [layer.conv2.weight.shape for layer in pruned.layers[:6]] == [
        layer.conv2.weight.shape for layer in resnet.layers[:6]
    ]


def test_only_what_is_named_goes(resnet: Any) -> None:
    """The insides of the blocks by the names of their axes: the streams stay whole."""
    decision = decide(resnet, "macs=50%", only=["layers.[0-9].channels"])
    pruned: Any = apply(resnet, decision.plan, space=decision.space, inputs=EXAMPLE)
    assert [layer.conv2.out_channels for layer in pruned.layers] == [16] * 3 + [32] * 3 + [64] * 3
    assert 0.495 <= macs(pruned, EXAMPLE) / 5_704_192 <= 0.5


def test_limits_and_sizes(resnet: Any) -> None:
    decision = decide(resnet, "macs=55%", limits={"layers.8": 0.25, "layers.0.bn1": 0.125}, round_to={"channels": 4})
    for name, kept in decision.plan.kept.items():
        assert len(kept.units) % 4 == 0, name
    shares = share_left(decision)
    assert shares["layers.8.channels"] >= 0.75
    assert shares["layers.0.channels"] == 1, "an eighth of 16 is no multiple of 4"
    deep = decide(resnet, "macs=15%", keep_at_least=0.25, round_to=8)
    assert min(share_left(deep).values()) >= 0.25


def test_groups_keep_the_same_number() -> None:
    net = shaken(Mobile())
    x = pictures()
    decision = decide(net, "macs=55%", inputs=x, scope="local")
    assert any(decision.space.axis(name).groups == 4 for name in decision.plan.kept)
    pruned: Any = apply(net, decision.plan, space=decision.space, inputs=x)
    assert pruned(x).shape == (2, 5)
    assert 0.9 * 0.55 <= macs(pruned, x) / macs(net, x) <= 0.55


def test_language_models_stay_uniform_unless_told_otherwise() -> None:
    model = tiny("llama", dtype=torch.float32)
    alike = structural(model, Budget.parse("params=75%"), [tokens()], criterion="fisher")
    for kind in ("ffn", "heads", "kv_groups"):
        assert len({len(alike.plan.kept[a.name].units) if a.name in alike.plan.kept else a.size
                    for a in alike.space.of_kind(kind)}) == 1  # fmt: skip
    free = structural(model, Budget.parse("params=75%"), [tokens()], criterion="fisher", uniform=False, only=["ffn"])
    assert len({len(kept.units) for kept in free.plan.kept.values()}) == 2
    pruned: Any = apply(model, free.plan, space=free.space)
    assert sum(p.numel() for p in pruned.parameters()) <= 0.75 * sum(p.numel() for p in model.parameters())
    assert pruned(tokens(), use_cache=False).logits.shape == (2, 11, 320)


def test_an_encoder_with_labels() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_labels=3
    )
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(config).eval()
    batches = [{"input_ids": tokens(4, 9) % 60, "labels": torch.tensor([0, 1, 2, 1])}]
    result = secateur.prune(
        model, "params=80%", method="structural", criterion="taylor", data=batches, eval_data=batches, ignore=["hidden"]
    )
    assert result.report["costs"]["params"]["pruned"] <= 0.8 * result.report["costs"]["params"]["dense"]
    assert result.report["measured"]["samples"] == 4
    assert set(result.report["units"]) <= {"ffn", "heads"}


# The verbs


def test_the_report_of_a_classifier(digits: Any, resnet: Any) -> None:
    held_out = [(x[:100], y[:100]) for x, y in digits.held_out()][:2]
    options: dict[str, Any] = {"method": "structural", "inputs": EXAMPLE, "ignore": ["fc", "layers.5", "conv"]}
    result = secateur.prune(resnet, "macs=75%", eval_data=held_out, **options)
    report = result.report
    assert macs(result.model, EXAMPLE) == report["costs"]["macs"]["pruned"] <= 0.75 * 5_704_192
    assert report["costs"]["macs"]["dense"] == 5_704_192
    measured = report["measured"]
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    with torch.no_grad():
        dense, pruned = resnet(x), result.model(x)
    assert measured["samples"] == 200
    assert measured["accuracy"]["dense"] == pytest.approx(float((dense.argmax(1) == y).float().mean()))
    assert measured["accuracy"]["pruned"] == pytest.approx(float((pruned.argmax(1) == y).float().mean()))
    assert measured["loss"]["pruned"] == pytest.approx(float(functional.cross_entropy(pruned, y)), rel=1e-5)
    assert measured["top1"] == pytest.approx(float((dense.argmax(1) == pruned.argmax(1)).float().mean()))
    assert report["data"]["calibration"] is None
    assert report["units"]["channels"]["pruned"] < report["units"]["channels"]["dense"] == 448
    found = secateur.evaluate(result.model, held_out, against=resnet)
    assert (found["accuracy"], found["top1"]) == (measured["accuracy"]["pruned"], measured["top1"])


def test_repeated_steps_in_a_training_loop() -> None:
    model: nn.Module = shaken(Residual(24, 20))
    x, y = pictures(16), torch.randint(5, (16,), generator=torch.Generator().manual_seed(0))
    dense = macs(model, x)
    for step in (1, 2, 3):
        plan = secateur.plan(
            model, f"macs={dense * 0.5 ** (step / 3)}", method="structural", criterion="taylor", data=[(x, y)], inputs=x
        )
        model = secateur.apply(model, plan, inputs=x)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
    assert 0.45 * dense <= macs(model, x) <= 0.5 * dense
    assert all(p.grad is not None for p in model.parameters())


# Refusals


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("macs=50%", {"criterion": "magnitud_l2"}, "no criterion 'magnitud_l2'; did you mean 'magnitude_l2'"),
        ("macs=50%", {"scope": "globl"}, "no scope 'globl'; did you mean 'global'"),
        ("macs=50%", {"criterion": "taylor"}, "criterion taylor needs data"),
        ("macs=50%", {"criterion": "activation"}, "criterion activation needs data"),
        ("macs=50%", {"loss": print}, "criterion magnitude_l2 takes no loss"),
        ("latency=5ms", {}, "a budget of latency is not served by structural: it takes params"),
        ("n:m=2:4", {}, "a budget of n:m is not served"),
        ("macs=100%", {}, r"keeps the budget macs=100% already \(5,704,192 macs\): nothing would be cut"),
        ("macs=6M", {}, "keeps the budget macs=6000000 already"),
        ("macs=50%", {"ignore": ["layer"]}, "ignore: 'layer' matches no kind, axis or module; did you mean 'layers'"),
        ("macs=50%", {"keep_at_least": 1}, "keep_at_least must be at least 0 and below 1"),
        ("macs=50%", {"round_to": 128}, "keep_at_least, limits and round_to leave nothing to cut"),
        ("macs=50%", {"round_to": 0}, "round_to must be at least 1"),
        ("macs=50%", {"criterion": "batch_norm", "only": ["nothing"]}, "only: 'nothing' matches no"),
    ],
    ids=str,
)
def test_what_cannot_be(resnet: Any, budget: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        decide(resnet, budget, **options)


def test_exact_dims_are_not_served(resnet: Any) -> None:
    with pytest.raises(SecateurError, match="structural takes a budget, such as macs=50%, and no exact dims"):
        structural(resnet, Budget.parse(dims={"hidden_size": 3}), inputs=EXAMPLE)


def test_weights_that_are_not_finite_are_named() -> None:
    net = shaken(Mlp())
    with torch.no_grad():
        net.mid.weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match=r"criterion magnitude_l2: scores of \S+ are not finite"):
        decide(net, "params=60%", inputs=torch.zeros(2, 4))


def test_the_verbs_say_what_is_missing() -> None:
    net = shaken(Residual())
    with pytest.raises(SecateurError, match="pass `inputs`"):
        secateur.plan(net, "macs=50%", method="structural")
    with pytest.raises(SecateurError, match="minitron has no option 'inputs'"):
        secateur.plan(tiny("llama"), "params=70%", data=tokens(), inputs=pictures())
    with pytest.raises(SecateurError, match="structural has no option 'criterium'; did you mean 'criterion'"):
        secateur.plan(net, "macs=50%", method="structural", inputs=pictures(), criterium="random")
    with pytest.raises(SecateurError, match="criterion fisher needs data"):
        secateur.plan(net, "macs=50%", method="structural", inputs=pictures(), criterion="fisher")
    with pytest.raises(
        SecateurError,
        match=r"minitron needs a language model of Hugging Face .*use the method structural|default inputs",
    ):
        secateur.plan(net, "macs=50%", data=pairs())


def test_the_seed_is_that_of_random() -> None:
    net, x = shaken(Residual(24, 20)), pictures()
    plans = [
        secateur.plan(net, "macs=50%", method="structural", criterion="random", inputs=x, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2]
