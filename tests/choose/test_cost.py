"""Analytic costs against the counts of real models and real caches."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, random_plan, tiny, tokens

from secateur.choose.cost import Workload, costs, gone_parameters, lengths, uniform_cost
from secateur.choose.plan import Kept, Plan
from secateur.choose.rank import plan_for_sizes
from secateur.cut import apply
from secateur.cut.tensors import cut_tensors
from secateur.space import Space, discover

HEADS: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 4}


@cache
def dense(name: str) -> tuple[Any, Space]:
    options = {} if name in ("gpt2", "gptj") else HEADS
    model = tiny(name, dtype=torch.float32, **options)
    return model, discover(model)


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_model(name: str) -> None:
    model, space = dense(name)
    assert costs(space, Plan()).params == costs(space, Plan()).active_params == count(model)
    assert costs(space, Plan()).of("params") == count(model)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(ARCHITECTURES), st.integers(0, 10**6), st.floats(0.1, 0.95), st.data())
def test_random_plans(name: str, seed: int, share: float, data: st.DataObject) -> None:
    """Elements that are really left after slicing, for any mix of kinds."""
    model, space = dense(name)
    kinds = data.draw(st.sets(st.sampled_from(space.kinds()), min_size=1))
    plan = random_plan(space, sorted(kinds), seed, share)
    left = cut_tensors(dict(model.named_parameters()), space, plan)
    assert costs(space, plan).params == sum(t.numel() for t in left.values())
    assert set(left) == set(space.parameters) - gone_parameters(space, plan)
    for key, kept in plan.kept.items():
        assert lengths(space, plan)[key] * space.axis(key).groups == len(kept.units)


def cached_elements(model: Any, batch: int, length: int) -> int:
    """Elements of keys and values that a real forward pass leaves in its cache."""
    with torch.no_grad():
        cache_ = model(tokens(batch, length), use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache_.layers if layer.keys is not None)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gptj"])
def test_cache_of_the_whole_model(name: str) -> None:
    model, space = dense(name)
    memory = costs(space, Plan(), Workload(batch=3, seq_len=7)).memory
    assert memory == 4 * (count(model) + cached_elements(model, 3, 7))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ["kv_groups", "heads"]),
        ("llama", ["kv_groups", "heads", "hidden", "ffn", "layers"]),
        ("phi3", ["kv_groups"]),
        ("gpt2", ["head_dim", "heads"]),
    ],
)
def test_cache_of_a_cut_model(name: str, kinds: list[str]) -> None:
    model, space = dense(name)
    plan = random_plan(space, kinds)
    new = apply(model, plan, space=space)
    memory = costs(space, plan, Workload(batch=2, seq_len=9)).memory
    assert memory == 4 * (count(new) + cached_elements(new, 2, 9))


def test_cache_of_a_model_without_one_attention() -> None:
    model, space = dense("llama")
    plan = Plan(dropped=("model.layers.1.self_attn",))
    new = apply(model, plan, space=space)
    memory = costs(space, plan, Workload(batch=2, seq_len=9)).memory
    placeholder = 2 * 2 * 9  # the dropped attention counts positions in the cache with one key and one value each
    assert memory == 4 * (count(new) + cached_elements(new, 2, 9) - placeholder)


def test_cache_stops_at_the_window() -> None:
    model, space = dense("gemma2")
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    whole = costs(space, Plan(), Workload(1, 100)).memory - base
    windows = {"model.layers.0.self_attn": 25, "model.layers.1.self_attn": None}
    windowed = costs(space, Plan(), Workload(1, 100, windows.get)).memory - base
    assert windowed == pytest.approx(whole * 125 / 200)
    assert costs(space, Plan(), Workload(1, 10, windows.get)).memory - base == pytest.approx(whole / 10)


def test_bytes_follow_the_dtype() -> None:
    model = tiny("llama", dtype=torch.bfloat16, device="meta")
    space = discover(model)
    assert costs(space, Plan(), Workload(1, 2)).memory == 2 * count(model) + 2 * 2 * 2 * 2 * 2 * 12
    per_position = costs(space, Plan(), Workload(1, 1)).memory - 2 * count(model)
    assert per_position == 2 * 2 * 2 * 2 * 12  # bytes, layers, keys and values, groups, head dimension
    wide = costs(space, Plan(), Workload(1, 1, stored=torch.float32)).memory
    assert wide == 2 * costs(space, Plan(), Workload(1, 1)).memory


def test_tied_parameters_count_once() -> None:
    tied, untied = (tiny("llama", device="meta", tie_word_embeddings=t) for t in (True, False))
    difference = costs(discover(untied), Plan()).params - costs(discover(tied), Plan()).params
    assert difference == 320 * 48


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt2"])
@pytest.mark.parametrize("drop", [False, True])
def test_uniform_cost_is_the_cost_of_uniform_plans(name: str, drop: bool) -> None:
    _, space = dense(name)
    workload = Workload(batch=2, seq_len=33)
    uniform = uniform_cost(space, workload)
    grouped = bool(space.of_kind("kv_groups"))
    totals = {"hidden": 36, "ffn": 31, "heads": 4 if grouped else 3} | ({"kv_groups": 2} if grouped else {})
    scores = {a.name: torch.arange(a.size, dtype=torch.float32) for a in space.axes}
    plan = plan_for_sizes(space, scores, totals, [space.layers()[0].name] if drop else [])
    sizes = totals | {"heads": 2 if grouped else 3}
    found, expected = uniform(sizes, len(space.layers()) - drop), costs(space, plan, workload)
    assert found.params == pytest.approx(expected.params, rel=1e-12)
    assert found.memory == pytest.approx(expected.memory, rel=1e-12)


def test_uniform_cost_of_the_whole_model() -> None:
    model, space = dense("llama")
    whole = uniform_cost(space, Workload())({"hidden": 48, "ffn": 80, "heads": 3, "kv_groups": 4}, 2)
    assert whole.params == count(model)


def test_axes_of_dropped_layers_cost_nothing() -> None:
    _, space = dense("llama")
    alone = Plan(dropped=("model.layers.0",))
    with_units = Plan({"model.layers.0.mlp.ffn": Kept("ffn", 80, (1,))}, alone.dropped)
    assert costs(space, alone) == costs(space, with_units)
