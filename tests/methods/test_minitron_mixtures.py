"""Minitron on mixtures of experts, state-space models and hybrids: exact dims, budgets, depth, and stock loading."""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from tiny import logits, tokens
from transformers import AutoModelForCausalLM

import secateur
from secateur.choose.budget import Budget
from secateur.choose.cost import costs
from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.cut.config import sizes_of
from secateur.errors import SecateurError
from secateur.methods.base import Decision
from secateur.methods.minitron import minitron
from secateur.space import Space, discover

DATA = [tokens(2, 12, seed=1)]
MIXTURES = {"mixtral": (2, 6), "qwen2_moe": (2, 6), "deepseek_v3": (2, 8), "gpt_oss": (2, 6), "nemotron_h": (2, 6)}


@cache
def dense(name: str) -> tuple[Any, Space]:
    model = mixture(name, dtype=torch.float32)
    return model, discover(model)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(model: Any) -> Space:
        return next((s for m, s in map(dense, ALL) if m is model), None) or discover(model)

    monkeypatch.setattr(sys.modules["secateur.methods.minitron"], "discover", known)


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def met(model: Any, top_k: int) -> int:
    """Parameters that one token meets, counted on the model itself."""
    total = 0
    for name, p in model.named_parameters():
        total += p.numel() * top_k // len(p) if ".experts." in name and p.dim() > 1 else p.numel()
    return total


EXACT: list[tuple[str, dict[str, int], dict[str, int]]] = [
    ("mixtral", {"num_local_experts": 4, "intermediate_size": 48}, {"experts": 4, "expert_ffn": 48}),
    ("mixtral", {"num_moe_experts": 3, "num_query_groups": 1}, {"experts": 3, "kv_groups": 1, "heads": 2}),
    (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24, "hidden_size": 40},
        {"experts": 4, "expert_ffn": 20, "shared_expert_ffn": 24, "hidden": 40},
    ),
    (
        "deepseek_v3",
        {"n_routed_experts": 6, "moe_intermediate_size": 20, "intermediate_size": 64},
        {"experts": 6, "expert_ffn": 20, "shared_expert_ffn": 40, "ffn": 64},
    ),
    (
        "gpt_oss",
        {"num_local_experts": 4, "intermediate_size": 56, "num_hidden_layers": 1},
        {"experts": 4, "expert_ffn": 56, "layers": 1},
    ),
    ("mamba2", {"hidden_size": 32}, {"hidden": 32, "ssm_heads": 4}),
    (
        "nemotron_h",
        {"mamba_num_heads": 4, "mamba_head_dim": 12, "hidden_size": 40, "num_experts": 5},
        {"ssm_heads": 4, "ssm_head_dim": 12, "hidden": 40, "experts": 5},
    ),
    ("jamba", {"intermediate_size": 56, "num_experts": 3}, {"ffn": 56, "expert_ffn": 56, "experts": 3}),
    ("jamba", {"hidden_size": 40}, {"hidden": 40, "ssm_channels": 80}),
    ("bamba", {"hidden_size": 40, "mamba_n_heads": 5}, {"hidden": 40, "ssm_heads": 5}),
]
ALL = tuple(dict.fromkeys([name for name, *_ in EXACT]))


@pytest.mark.parametrize(("name", "dims", "sizes"), EXACT, ids=str)
def test_exact_dims_load_in_stock_transformers(
    name: str, dims: Mapping[str, int], sizes: Mapping[str, int], tmp_path: Path
) -> None:
    model, space = dense(name)
    decision = minitron(model, Budget.parse(dims=dict(dims)), DATA, score_samples=1)
    before, after = sizes_of(space), sizes_of(space, decision.plan)
    for kind in before.__dataclass_fields__:
        assert after.get(kind) == sizes.get(kind, before.get(kind)), kind
    pruned: Any = apply(model, decision.plan, space=space)
    for key, size in dims.items():
        if hasattr(pruned.config, key):
            assert getattr(pruned.config, key) == size
    secateur.save(pruned, tmp_path, plan=decision.plan, overwrite=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ids = tokens(2, 9)
    assert torch.allclose(logits(loaded, ids), logits(pruned, ids), atol=1e-5)
    made = loaded.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.shape == (2, 11)


BUDGETS = [
    ("mixtral", "active_params=75%", ("heads", "kv_groups")),
    ("qwen2_moe", "params=75%, active_params=85%", ("heads", "kv_groups")),
    ("deepseek_v3", "active_params=88%", ("hidden", "heads")),
    ("gpt_oss", "params=70%", ("heads", "kv_groups", "hidden")),
    ("nemotron_h", "active_params=85%", ("heads", "kv_groups", "hidden", "shared_expert_ffn")),
    ("mamba2", "params=80%", ()),
    ("jamba", "params=75%", ("hidden", "heads", "kv_groups")),
]


@pytest.mark.parametrize(("name", "budget", "skip"), BUDGETS, ids=str)
def test_budgets_are_met_by_exact_counts(name: str, budget: str, skip: tuple[str, ...]) -> None:
    model, space = dense(name)
    parsed = Budget.parse(budget)
    decision = minitron(model, parsed, DATA, score_samples=1, top_k=1, skip=skip, max_depth_cut=0.0)
    pruned = apply(model, decision.plan, space=space)
    chosen = decision.details["search"]["candidates"][0]
    top_k = MIXTURES.get(name, (2, 4))[0]
    assert chosen["params"] == count(pruned)
    assert chosen["active_params"] == met(pruned, top_k)
    for measure, found, whole in (
        ("params", count(pruned), count(model)),
        ("active_params", met(pruned, top_k), met(model, top_k)),
    ):
        if measure in parsed.limits:
            assert 0.6 * whole < found <= parsed.limits[measure].absolute(whole)
    assert not hasattr(pruned.config, "secateur")  # a stock config describes it


@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_token_meets(name: str) -> None:
    model, space = dense(name)
    assert costs(space, Plan()).active_params == met(model, MIXTURES[name][0]) < costs(space, Plan()).params


def lean(name: str, budget: str, **options: Any) -> Decision:
    return minitron(dense(name)[0], Budget.parse(budget), DATA, **{"score_samples": 1, "top_k": 1, **options})


def test_layers_of_a_hybrid_are_counted_one_by_one() -> None:
    """Of four unlike layers those go that KL says; the budget counts just them, and the list of types follows."""
    model, space = dense("nemotron_h")
    widths = tuple(kind for kind in sizes_of(space).__dataclass_fields__ if kind != "layers" and space.of_kind(kind))
    decision = lean("nemotron_h", "params=95%", skip=widths, max_depth_cut=0.5, divisors={"layers": 1})
    pruned: Any = apply(model, decision.plan, space=space)
    chosen = decision.details["search"]["candidates"][0]
    assert chosen["params"] == count(pruned) <= 0.95 * count(model)
    gone = [int(name.rpartition(".")[2]) for name in decision.plan.dropped]
    kept = [kind for i, kind in enumerate(model.config.layers_block_type) if i not in gone]
    assert pruned.config.layers_block_type == kept
    assert len(pruned.model.layers) == len(kept) < 4
    with pytest.raises(SecateurError, match=r"params=8,715: the smallest reachable is [\d,]+ .* is above the limit"):
        lean("nemotron_h", "params=10%", skip=widths, max_depth_cut=0.5, divisors={"layers": 1})


@pytest.mark.parametrize(
    ("name", "dims", "message"),
    [
        (
            "mixtral",
            {"num_local_experts": 1},
            "dims: num_local_experts=1 leaves fewer experts than the 2 that a router",
        ),
        ("mixtral", {"intermediate_size": 50}, "dims: intermediate_size=50 must be a multiple of 4"),
        ("deepseek_v3", {"n_routed_experts": 5}, "dims: n_routed_experts=5 must be a multiple of 2"),
        ("deepseek_v3", {"n_routed_experts": 2}, "dims: n_routed_experts=2 leaves fewer experts than the 4"),
        ("mamba2", {"num_heads": 3}, "dims: num_heads=3 must be a multiple of 2"),
        ("bamba", {"mamba_n_heads": 5}, "dims: BambaConfig cannot describe hidden_size=48, .*mamba_n_heads=5"),
        ("mamba2", {"num_experts": 3}, "dims: the experts of this model cannot be cut, so num_experts=3 cannot be set"),
    ],
    ids=str,
)
def test_dims_that_do_not_fit(name: str, dims: dict[str, int], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        minitron(dense(name)[0], Budget.parse(dims=dims), DATA)


def test_an_active_budget_below_reach_names_the_smallest() -> None:
    with pytest.raises(SecateurError, match=r"active_params=[\d,]+: the smallest reachable is [\d,]+ \(\d\d\.\d% of"):
        lean("mixtral", "active_params=10%")
