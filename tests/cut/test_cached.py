"""Cut models keep their promises beyond one plain forward pass: KV caches, long sequences, sizes left unsaid."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import Plan, apply, discover, plan
from secateur.choose.plan import Kept
from secateur.cut.config import cut_lists
from secateur.space import Space

LAYERS = {"gpt2": {"n_layer": 4}, "gptj": {"n_layer": 4}}
GEMMA = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


@cache
def four_layers(name: str) -> tuple[Any, Space]:
    model = tiny(name, **(GEMMA if name == "gemma2" else LAYERS.get(name, {"num_hidden_layers": 4})))
    return model, discover(model)


def half_of_heads(space: Space) -> dict[str, Kept]:
    """The first half of the heads of every group."""
    return {
        a.name: Kept(a.kind, a.size, tuple(u for u in range(a.size) if u % a.per_group < a.per_group // 2))
        for a in space.of_kind("heads")
    }


@pytest.mark.parametrize("cut", ["first attention", "second attention", "first layer and next attention", "heads"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gptj"])
def test_cached_decoding_equals_the_whole_pass_after_surgery(name: str, cut: str) -> None:
    model, space = four_layers(name)
    names = {kind: [b.name for b in space.blocks if b.kind == kind] for kind in ("layers", "attention", "mlp")}
    plans = {
        "first attention": Plan(dropped=(names["attention"][0],)),
        "second attention": Plan(dropped=(names["attention"][1],)),
        "first layer and next attention": Plan(dropped=(names["layers"][0], names["attention"][1])),
        "heads": Plan(half_of_heads(space), (names["mlp"][1],)),
    }
    small: Any = apply(model, plans[cut], space=space)
    ids = tokens(length=16)
    with torch.inference_mode():
        whole = small(ids, use_cache=False).logits
        step = small(ids[:, :8], use_cache=True)
        parts = [step.logits]
        for t in range(8, 16):
            step = small(ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


def longrope() -> Any:
    """A Phi-3 whose rotary table changes with the length of the sequence, and is kept in a buffer."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 24, "long_factor": [2.0] * 24}
    config = AutoConfig.for_model(
        "phi3", vocab_size=320, hidden_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=80, pad_token_id=0, max_position_embeddings=128, original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_discovery_leaves_buffers_that_the_forward_pass_sets_alone() -> None:
    model = longrope()
    fresh = copy.deepcopy(model)
    ids = tokens(length=40)
    space = discover(model)
    with torch.inference_mode():
        assert torch.equal(model(ids, use_cache=False).logits, fresh(ids, use_cache=False).logits)
    copy.deepcopy(model)
    ffn = {a.name: Kept("ffn", a.size, tuple(range(40))) for a in space.of_kind("ffn")}
    apply(model, Plan(ffn, ("model.layers.1.self_attn",)), space=space)


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_an_ffn_size_that_the_config_leaves_unsaid_is_kept(name: str) -> None:
    model = tiny(name, n_inner=None, dtype=torch.float32)
    small: Any = apply(model, plan(model, {"n_embd": 36, "n_head": 3}, data=tokens(4, 16)))
    assert (small.config.n_embd, small.config.n_head, small.config.n_inner) == (36, 3, 4 * 48)


def test_lists_of_a_config_follow_dropped_layers() -> None:
    gone = [False, True, False, False]
    values = {
        "layer_types": ["a", "b", "c", "d"],
        "no_rope_layers": [0, 1, 0, 1],
        "mlp_only_layers": [1, 3],
        "all_layers": [0, 1, 2, 3],
        "eos_token_id": [1, 2, 3, 4],
        "layer_flag": True,
    }
    assert cut_lists(values, gone) == {
        "layer_types": ["a", "c", "d"],
        "no_rope_layers": [0, 0, 1],
        "mlp_only_layers": [2],
        "all_layers": [0, 1, 2],
    }
