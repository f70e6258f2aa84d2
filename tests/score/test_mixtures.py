"""Scores of experts and of state-space layers against slow loops of their own, one token at a time."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from mixtures import mixture
from tiny import tokens
from torch import nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.score import Scores, activation_scores
from secateur.score import experts as experts_
from secateur.space import Space, discover

Seen = dict[str, list[tuple[torch.Tensor, torch.Tensor]]]


@cache
def dense(name: str) -> tuple[Any, Space]:
    model = mixture(name, dtype=torch.float32)
    return model, discover(model)


@cache
def scored(name: str) -> Scores:
    model, space = dense(name)
    return activation_scores(model, space, [tokens(2, 7, seed=1), tokens(1, 7, seed=2)], layers=False)


def watch(model: Any, modules: list[str]) -> Seen:
    """(input, output) of modules, a sample at a time, in float64 of the whole model."""
    wide = copy.deepcopy(model).double()
    wide.config._experts_implementation = "eager"  # grouped products take no float64
    found: Seen = {name: [] for name in modules}
    for name in modules:

        def hook(_: nn.Module, args: Any, output: Any, key: str = name) -> None:
            found[key].append((args[0].double(), (output[0] if isinstance(output, tuple) else output).double()))

        wide.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for row in [*tokens(2, 7, seed=1), *tokens(1, 7, seed=2)]:
            wide(row[None], use_cache=False)
    return found


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found.double(), wanted.double(), rtol=2e-4, atol=1e-9)


# What one expert makes of one token, and how the router weighs it: written out for two families that differ in all.


def mixtral(block: Any, x: torch.Tensor) -> list[tuple[int, float, torch.Tensor, torch.Tensor]]:
    odds = torch.softmax(block.gate.weight.double() @ x, 0)
    best = torch.topk(odds, 2)
    result = []
    for e, odd in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        gate, up = (block.experts.gate_up_proj[e].double() @ x).chunk(2)
        inner = functional.silu(gate) * up
        result.append((e, odd / float(best.values.sum()), inner, block.experts.down_proj[e].double() @ inner))
    return result


def gpt_oss(block: Any, x: torch.Tensor) -> list[tuple[int, float, torch.Tensor, torch.Tensor]]:
    own, router = block.experts, block.router
    best = torch.topk(router.weight.double() @ x + router.bias.double(), 2)
    result = []
    for e, odd in zip(best.indices.tolist(), torch.softmax(best.values, 0).tolist(), strict=True):
        both = x @ own.gate_up_proj[e].double() + own.gate_up_proj_bias[e].double()
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        result.append((e, odd, inner, inner @ own.down_proj[e].double() + own.down_proj_bias[e].double()))
    return result


@pytest.mark.parametrize(("name", "route"), [("mixtral", mixtral), ("gpt_oss", gpt_oss)])
def test_experts_against_a_loop_over_tokens(name: str, route: Any) -> None:
    model, _ = dense(name)
    paths = [f"model.layers.{i}.mlp" for i in range(2)]
    seen = watch(model, paths)
    for path in paths:
        norms: list[list[float]] = [[] for _ in range(6)]
        energy = torch.zeros(80, dtype=torch.float64)
        with torch.no_grad():
            for before, after in seen[path]:
                inners = []
                for x, y in zip(before[0], after[0], strict=True):
                    pairs = route(model.get_submodule(path), x)
                    assert torch.allclose(sum((g * out for _, g, _, out in pairs), torch.zeros(())), y, atol=1e-6)
                    for e, gate, inner, out in pairs:
                        norms[e].append(gate * math.sqrt(float((out * out).sum())))
                        inners.append(inner.abs())
                energy += (sum(inners, torch.zeros(())) / len(inners)).square()
        reap = [math.fsum(values) / len(values) if values else 0.0 for values in norms]
        assert close(scored(name).axes[f"{path}.experts"], torch.tensor(reap))
        assert close(scored(name).axes[f"{path}.expert_ffn"], energy.sqrt())


@pytest.mark.parametrize(
    ("name", "module", "made"), [("mamba2", "backbone.layers.1.mixer", 96), ("nemotron_h", "model.layers.0.mixer", 128)]
)
def test_state_space_heads_against_what_the_projection_makes(name: str, module: str, made: int) -> None:
    """in_proj makes z, x, B, C, dt: heads and head dimensions are those of x."""
    model, _ = dense(name)
    energy = torch.zeros(made, dtype=torch.float64)
    for _, out in watch(model, [f"{module}.in_proj"])[f"{module}.in_proj"]:
        energy += out[0, :, made : 2 * made].abs().mean(0).square()
    heads = energy.reshape(-1, 16)
    assert close(scored(name).axes[f"{module}.ssm_heads"], heads.sum(1).sqrt())
    assert close(scored(name).axes[f"{module}.ssm_head_dim"], heads.sum(0).sqrt())


@pytest.mark.parametrize(
    ("name", "axis", "module"),
    [
        ("qwen2_moe", "model.layers.0.mlp.shared_expert.shared_expert_ffn", "down_proj"),
        ("jamba", "model.layers.0.mamba.ssm_channels", "out_proj"),
    ],
)
def test_units_that_a_projection_reads(name: str, axis: str, module: str) -> None:
    module = f"{axis.rpartition('.')[0]}.{module}"
    model, _ = dense(name)
    # The tokens of a batch may come as rows: [tokens, units] as well as [samples, positions, units].
    energy = sum((x.flatten(0, -2).abs().mean(0).square() for x, _ in watch(model, [module])[module]), torch.zeros(()))
    assert close(scored(name).axes[axis], energy.sqrt())


def test_padding_and_batches_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, space = dense("mixtral")
    rows = [tokens(1, n, seed=n)[0] for n in (5, 9, 3)]
    alone = activation_scores(model, space, [row[None] for row in rows], layers=False)
    ids, mask = torch.full((3, 11), 7), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    monkeypatch.setattr(experts_, "ROWS", 6)
    padded = activation_scores(model, space, [{"input_ids": ids, "attention_mask": mask}], layers=False)
    for name, scores in alone.axes.items():
        assert torch.allclose(scores, padded.axes[name], rtol=1e-4), name


def test_an_expert_that_no_token_meets_scores_nothing() -> None:
    model, space = copy.deepcopy(dense("gpt_oss")[0]), dense("gpt_oss")[1]
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    scores = activation_scores(model, space, [tokens()], layers=False).axes["model.layers.0.mlp.experts"]
    assert float(scores[3]) == 0 < float(scores.sort().values[1])


@pytest.mark.parametrize("how", ["eager", "batched_mm"])
def test_other_ways_of_running_the_experts(how: str) -> None:
    """Whatever runs them: the same scores, or a clear error where a copy of the weights hides what they read."""
    model, space = copy.deepcopy(dense("mixtral")[0]), dense("mixtral")[1]
    model.config._experts_implementation = how
    data = [tokens(2, 7, seed=1), tokens(1, 7, seed=2)]
    if how == "batched_mm":
        with pytest.raises(SecateurError, match=r"cannot be observed .*: skip the kinds experts and expert_ffn"):
            activation_scores(model, space, data, layers=False)
        return
    found = activation_scores(model, space, data, layers=False)
    for name, scores in scored("mixtral").axes.items():
        assert torch.allclose(scores, found.axes[name], rtol=1e-4), name


def test_a_mixture_of_another_form_is_an_error() -> None:
    class Experts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for args in ([torch.ones(4, 3)], [torch.ones(4, 3), torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 3)]):
        with pytest.raises(SecateurError, match=r"what the experts of the\.mixture do cannot be observed"):
            experts_.Mixture("the.mixture", Experts(), 5, {}).see(args, {}, torch.ones(4, 3), 2, None)

    class Wrong(Experts):
        def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return x

    call = [torch.ones(4, 3), torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2)]
    with pytest.raises(SecateurError, match="weighed by their gates, are not what it gives"):
        experts_.Mixture("the.mixture", Wrong(), 5, {}).see(call, {}, torch.ones(4, 3), 2, None)
