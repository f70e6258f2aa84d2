"""GradNAS: squared gradients of masks against autograd, what an axis loses in all, and every refusal."""

from typing import Any

import pytest
import torch
from small_nets import Residual, pairs, pictures, shaken
from tiny import tiny, tokens
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import costs
from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import fingerprint
from secateur.methods.base import Decision
from secateur.methods.gradnas import gradnas
from secateur.score.gradients import fisher
from secateur.space import discover

DATA = [tokens(3, 9), tokens(2, 9, seed=6)]


def masked_gradients(model: Any, path: str, units: int, batch: torch.Tensor) -> torch.Tensor:
    """dL/dm for a mask on what `path` reads, by autograd through the mask itself."""
    mask = torch.ones(units, requires_grad=True)
    module = model.get_submodule(path)

    def hook(_: nn.Module, args: Any) -> Any:
        x = args[0]
        return (x * mask.repeat_interleave(x.shape[-1] // units),)

    handle = module.register_forward_pre_hook(hook)
    loss = model(batch, labels=batch).loss
    handle.remove()
    return torch.autograd.grad(loss, mask)[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_scores_are_those_of_a_mask(name: str) -> None:
    model = tiny(name, dtype=torch.float32)
    space = discover(model)
    heads, ffn = space.of_kind("heads")[0], space.of_kind("ffn")[0]
    found = {whole: fisher(model, space, DATA, [heads, ffn], whole=whole) for whole in (True, False)}
    for axis in (heads, ffn):
        reader = next(r.module for r, _ in space.consumers(axis))
        batches = sum(masked_gradients(model, reader, axis.size, b).square() for b in DATA) / 2
        rows = [row[None] for batch in DATA for row in batch]
        samples = sum(masked_gradients(model, reader, axis.size, row).square() for row in rows) / 5
        assert torch.allclose(found[True][axis.name], torch.as_tensor(batches), rtol=1e-3, atol=1e-9)
        assert torch.allclose(found[False][axis.name], torch.as_tensor(samples), rtol=1e-3, atol=1e-9)


def losses(decision: Decision, scores: dict[str, torch.Tensor]) -> dict[str, float]:
    """Axis -> sum of the scores that it loses."""
    found = {}
    for name, kept in decision.plan.kept.items():
        found[name] = sum(float(scores[name][u]) for u in range(kept.size) if u not in kept.units)
    return found


def test_no_axis_loses_more_than_one_threshold() -> None:
    model = tiny("llama", dtype=torch.float32, intermediate_size=120, num_hidden_layers=3)
    decision = gradnas(model, Budget.parse("params=80%"), DATA)
    axes = [a for a in decision.space.axes if a.kind in ("ffn", "kv_groups")]
    scores = fisher(model, decision.space, DATA, axes, whole=True)
    lost = losses(decision, scores)
    threshold = max(lost.values())
    for axis in axes:  # one unit more of any axis would cross it, but for what swaps do to come near the budget
        kept = decision.plan.kept.get(axis.name)
        units = kept.units if kept is not None else tuple(range(axis.size))
        next_worst = min(float(scores[axis.name][u]) for u in units)
        if len(units) > max(1, round(0.1 * axis.size)):
            assert lost.get(axis.name, 0.0) + next_worst >= threshold * 0.9, axis.name
    unit = gradnas(model, Budget.parse("params=80%"), DATA, threshold="unit")
    assert unit.plan != decision.plan
    kept_least = min(float(scores[n][u]) for n, k in unit.plan.kept.items() if k.kind == "ffn" for u in k.units)
    gone = sorted(float(scores[n][u]) for n, k in unit.plan.kept.items() for u in range(k.size) if u not in k.units)
    assert gone[-5] <= kept_least, "all but a few swaps are below what stays"


@pytest.mark.parametrize("budget", ["params=70%", "macs=75%", "flops=80%", "memory=80%,macs=90%"])
def test_budgets(budget: str) -> None:
    model = tiny("gpt2", dtype=torch.float32, n_inner=200)
    before = fingerprint(model)
    decision = gradnas(model, Budget.parse(budget), DATA)
    dense, after = costs(decision.space, Plan()), costs(decision.space, decision.plan)
    used = [after.of(m) / limit.absolute(dense.of(m)) for m, limit in Budget.parse(budget).limits.items()]
    assert 0.99 <= max(used) <= 1
    assert fingerprint(model) == before
    assert gradnas(model, Budget.parse(budget), DATA).plan == decision.plan
    assert {k.kind for k in decision.plan.kept.values()} <= {"heads", "ffn"}


def test_uniform_and_normalised() -> None:
    model = tiny("llama", dtype=torch.float32)
    alike = gradnas(model, Budget.parse("params=80%"), DATA, uniform=True)
    for kind in ("ffn", "kv_groups"):
        assert len({len(k.units) for k in alike.plan.kept.values() if k.kind == kind}) <= 1
    plain, normal = (gradnas(model, Budget.parse("params=80%"), DATA, normalize=n).plan for n in (False, True))
    assert plain != normal


def bert(kind: str) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, num_labels=3
    )
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def test_encoders_with_labels_and_with_a_loss() -> None:
    batches = [{"input_ids": tokens(4, 9) % 60, "labels": torch.tensor([0, 1, 2, 1])}]
    model = bert("BertForSequenceClassification")
    decision = gradnas(model, Budget.parse("params=80%"), batches)
    pruned: Any = apply(model, decision.plan, space=decision.space)
    assert pruned(batches[0]["input_ids"]).logits.shape == (4, 3)
    assert {k.kind for k in decision.plan.kept.values()} == {"ffn", "heads"}
    embedder = bert("BertModel")
    ids = [{"input_ids": tokens(4, 9) % 60}]
    with pytest.raises(SecateurError, match="give a loss: a function"):
        gradnas(embedder, Budget.parse("params=80%"), ids)

    def spread(own: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = own(**batch).last_hidden_state[:, 0, :5].square().mean()
        return loss

    assert gradnas(embedder, Budget.parse("params=80%"), ids, loss=spread).plan.kept


def test_a_convolutional_network() -> None:
    net = shaken(Residual(24, 20))
    decision = gradnas(net, Budget.parse("macs=60%"), pairs((8, 8)), inputs=pictures())
    pruned: Any = apply(net, decision.plan, space=decision.space, inputs=pictures())
    assert pruned(pictures()).shape == (2, 5)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("params=70%", {"data": []}, "gradnas needs data"),
        ("params=70%", {"per": "batches"}, "per: there is no 'batches'; did you mean 'batch'"),
        ("params=70%", {"threshold": "axes"}, "threshold: there is no 'axes'; did you mean 'axis'"),
        ("latency=5ms", {}, "a budget of latency is not served by gradnas"),
        ("params=1%", {}, "the smallest reachable is"),
        ("params=70%", {"ignore": ["fnn"]}, "ignore: 'fnn' matches no"),
        ("params=70%", {"loss": lambda m, b: torch.zeros(2)}, "no scalar tensor"),
        ("params=70%", {"loss": lambda m, b: torch.tensor(1.0)}, "does not depend on the weights"),
    ],
)
def test_refusals(budget: str, options: dict[str, Any], message: str) -> None:
    model = tiny("llama", dtype=torch.float32)
    data = options.pop("data", DATA)
    with pytest.raises(SecateurError, match=message):
        gradnas(model, Budget.parse(budget), data, **options)
