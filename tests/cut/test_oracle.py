"""The oracle, for every architecture and kind: the cut model is the dense one with the removed units zeroed.

Beside it: the dense model is untouched, ties hold, counts are exact, and the result can be trained and saved.
"""

import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import ARCHITECTURES, VOCAB, logits, random_plan, random_units, tiny, tokens, zeroed
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.choose.cost import costs
from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.space import Space, discover

APPLY = importlib.import_module("secateur.cut.apply")  # the package's attribute of that name is the function
GROUPED = ("hidden", "kv_groups", "heads", "ffn", "layers", "attention", "mlp")
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text"), GROUPED),
    "gpt2": ("hidden", "heads", "head_dim", "ffn", "layers", "attention", "mlp"),
    # The part of GPT-J's head dimension that is not rotated can be cut.
    "gptj": ("hidden", "heads", "head_dim", "ffn", "layers", "attention", "mlp"),
}
CASES = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]
SURGERY_ONLY = {
    *((name, kind) for name in ARCHITECTURES for kind in ("attention", "mlp")),
    # Their classes derive the head dimension from hidden and heads, so neither can be cut alone.
    *((name, kind) for name in ("gpt2", "gptj") for kind in ("hidden", "heads", "head_dim")),
}
"""(architecture, kind) whose cut no stock config describes."""


@dataclass(frozen=True)
class Subject:
    """A dense model with its Space and a bitwise copy of its state."""

    model: Any
    space: Space
    state: dict[str, torch.Tensor]
    tolerance: float


@cache
def subject(name: str, options: tuple[tuple[str, Any], ...] = ()) -> Subject:
    lists: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in options}
    model = tiny(name, **lists)
    # Gemma's norms compute in float32 whatever the dtype of the model.
    tolerance = 1e-5 if name.startswith("gemma") else 1e-9
    return Subject(model, discover(model), copy.deepcopy(model.state_dict()), tolerance)


@dataclass(frozen=True)
class Result:
    """What a random plan made of a subject."""

    plan: Plan
    model: Any
    by_surgery: bool


@cache
def cut_of(name: str, kind: str) -> Result:
    dense = subject(name)
    plan = random_plan(dense.space, [kind])
    with mock.patch.object(APPLY, "operate", wraps=APPLY.operate) as surgery:
        model = apply(dense.model, plan, space=dense.space)
    return Result(plan, model, surgery.called)


def check_oracle(dense: Subject, plan: Plan, new: Any) -> None:
    """The cut model computes what the zeroed dense model does, and not what the dense model does."""
    ids = tokens()
    found = logits(new, ids)
    expected = logits(zeroed(dense.model, dense.space, plan), ids)
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) <= dense.tolerance
    assert float((found - logits(dense.model, ids)).abs().max()) > 1e-3


def check_count(dense: Subject, plan: Plan, new: Any) -> None:
    """Analytic parameters are those counted, and fewer than before; tied ones count once."""
    counted = sum(p.numel() for p in new.parameters())
    assert costs(dense.space, plan).params == counted
    assert counted < sum(p.numel() for p in dense.model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_is_found(name: str) -> None:
    assert set(subject(name).space.kinds()) == set(KINDS[name])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cut_equals_zeroed(name: str, kind: str) -> None:
    result = cut_of(name, kind)
    check_oracle(subject(name), result.plan, result.model)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_count_is_exact(name: str, kind: str) -> None:
    result = cut_of(name, kind)
    check_count(subject(name), result.plan, result.model)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_stays_as_it_was(name: str, kind: str) -> None:
    """Ties, dtype and mode carry over; the dense model keeps every bit and shares no memory with the new one."""
    dense, new = subject(name), cut_of(name, kind).model
    after = dense.model.state_dict()
    assert after.keys() == dense.state.keys()
    assert all(torch.equal(after[key], value) for key, value in dense.state.items())
    assert type(new) is type(dense.model)
    assert not any(module.training for module in new.modules())
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in new.parameters())
    old_tied = dense.model.get_input_embeddings().weight is dense.model.get_output_embeddings().weight
    new_tied = new.get_input_embeddings().weight is new.get_output_embeddings().weight
    assert new_tied == old_tied
    taken = {p.untyped_storage().data_ptr() for p in dense.model.parameters()}
    assert not any(p.untyped_storage().data_ptr() in taken for p in new.parameters())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_backward_reaches_every_parameter(name: str, kind: str) -> None:
    new = cut_of(name, kind).model
    new.zero_grad()
    ids = tokens()
    new(ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in new.parameters())
    new.zero_grad()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_stock_or_surgery(name: str, kind: str) -> None:
    """Which cuts the stock loader can express, so that a checkpoint of them needs no code of ours."""
    assert cut_of(name, kind).by_surgery == ((name, kind) in SURGERY_ONLY)


@pytest.mark.parametrize("kind", ["hidden", "kv_groups", "heads", "ffn", "layers"])
def test_stock_cut_survives_a_save(kind: str, tmp_path: Path) -> None:
    """Transformers alone loads the saved folder and computes the same."""
    new = cut_of("llama", kind).model
    new.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(loaded, tokens()), logits(new, tokens()))


@cache
def large(name: str) -> Subject:
    """Three layers, and enough heads that a cut leaves several of everything."""
    if name in ("gpt2", "gptj"):
        return subject(name, (("n_layer", 3),))
    options: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 6}
    options["num_hidden_layers"] = 3
    if name == "phi3":
        options["num_attention_heads"] = 8
        del options["head_dim"]  # this model derives it
    if name == "gemma2":
        options["layer_types"] = ("sliding_attention", "full_attention", "sliding_attention")
    return subject(name, tuple(options.items()))


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_all_widths_and_layers_at_once(name: str) -> None:
    dense = large(name)
    plan = random_plan(dense.space, [k for k in KINDS[name] if k not in ("attention", "mlp")], seed=3)
    assert len(plan.dropped) == 1
    new: Any = apply(dense.model, plan, space=dense.space)
    check_oracle(dense, plan, new)
    check_count(dense, plan, new)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_kinds_at_once(name: str) -> None:
    """One layer goes, one loses its attention, one its MLP, and every width is cut."""
    dense = large(name)
    plan = random_plan(dense.space, KINDS[name], seed=3)
    assert len(plan.dropped) == 3
    new: Any = apply(dense.model, plan, space=dense.space)
    check_oracle(dense, plan, new)
    check_count(dense, plan, new)


@pytest.mark.parametrize("kind", ["heads", "kv_groups"])
def test_surgery_down_to_one_unit(kind: str) -> None:
    """One query head a group, or one key-value head, beside a dropped MLP: sizes of one are sizes too."""
    dense = subject("llama")
    plan = random_plan(dense.space, [kind, "mlp"])
    new: Any = apply(dense.model, plan, space=dense.space)
    check_oracle(dense, plan, new)
    check_count(dense, plan, new)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_layers_keep_their_type_in_surgery(name: str) -> None:
    """A layer that moves down brings its mask (and rotary table) along: layer_types is read by position."""
    dense = subject(name)
    plan = Plan(dropped=("model.layers.0", f"model.layers.{len(dense.space.layers()) - 1}.mlp"))
    check_oracle(dense, plan, apply(dense.model, plan, space=dense.space))


def test_last_layer_of_a_type_goes() -> None:
    """Gemma-3 computes a rotary table for each type of layer: without the type there is no table."""
    dense = subject("gemma3_text")
    plan = Plan(dropped=("model.layers.1",))
    new: Any = apply(dense.model, plan, space=dense.space)
    check_oracle(dense, plan, new)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention bias": ("llama", {"attention_bias": True}),
    "mlp bias": ("llama", {"mlp_bias": True}),
    "both biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "as many keys as queries": ("llama", {"num_key_value_heads": 4}),
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "explicit head_dim": ("llama", {"head_dim": 20}),
    "explicit head_dim, Mistral": ("mistral", {"head_dim": 8}),
    "4 groups of 4": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 6}),
    "heads of as many units": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}),
    "ffn as wide as hidden": ("llama", {"intermediate_size": 48}),
    "hidden as wide as the heads together": ("qwen3", {"head_dim": 12}),
    "vocabulary as wide as hidden": ("llama", {"hidden_size": VOCAB // 8 * 8, "intermediate_size": VOCAB}),
    "GPT-2, ffn as wide as three heads' worth": ("gpt2", {"n_inner": 144}),
    "GPT-2, as many heads as units in one": ("gpt2", {"n_embd": 36, "n_head": 6}),
    "GPT-2 eager": ("gpt2", {"attn_implementation": "eager"}),
    "Llama eager": ("llama", {"attn_implementation": "eager"}),
    "untied Gemma 2": ("gemma2", {"tie_word_embeddings": False}),
    "untied Gemma 3": ("gemma3_text", {"tie_word_embeddings": False}),
    "tied Qwen 2": ("qwen2", {"tie_word_embeddings": True}),
    "untied GPT-2": ("gpt2", {"tie_word_embeddings": False}),
}
WIDTHS = ("hidden", "kv_groups", "heads", "head_dim", "ffn")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_every_width(variant: str) -> None:
    """All widths at once: equal numbers of different meaning must not be taken for each other."""
    name, options = VARIANTS[variant]
    dense = subject(name, tuple(options.items()))
    plan = random_plan(dense.space, WIDTHS, seed=2)
    new: Any = apply(dense.model, plan, space=dense.space)
    check_oracle(dense, plan, new)
    check_count(dense, plan, new)


def _each_width() -> Iterator[tuple[str, str]]:
    for variant in ("4 groups of 4", "heads of as many units", "as many keys as queries", "one key-value head"):
        for kind in ("kv_groups", "heads"):
            if (variant, kind) not in (("as many keys as queries", "kv_groups"), ("one key-value head", "kv_groups")):
                yield variant, kind
    for kind in ("heads", "head_dim", "ffn"):
        yield "GPT-2, as many heads as units in one", kind
    for variant in ("untied Gemma 2", "untied Gemma 3", "hidden as wide as the heads together"):
        yield variant, "hidden"


@pytest.mark.parametrize(("variant", "kind"), list(_each_width()))
def test_variants_in_one_width(variant: str, kind: str) -> None:
    name, options = VARIANTS[variant]
    dense = subject(name, tuple(options.items()))
    assert dense.space.of_kind(kind)
    plan = random_plan(dense.space, [kind], seed=4)
    new: Any = apply(dense.model, plan, space=dense.space)
    check_oracle(dense, plan, new)
    check_count(dense, plan, new)


def test_layers_of_different_widths() -> None:
    """Each layer keeps another number of units, which no stock config describes."""
    dense = subject("llama")
    generator = torch.Generator().manual_seed(0)
    shares = {"model.layers.0": 0.75, "model.layers.1": 0.3}
    kept = {
        a.name: Kept(a.kind, a.size, random_units(a, generator, shares[str(a.block)]))
        for a in dense.space.of_kind("ffn")
    }
    plan = Plan(kept)
    new: Any = apply(dense.model, plan, space=dense.space)
    assert [layer.mlp.up_proj.out_features for layer in new.model.layers] == [60, 24]
    check_oracle(dense, plan, new)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scale_that_counts_layers_is_never_silently_wrong(implementation: str) -> None:
    """GPT-2's scale_attn_by_inverse_layer_idx: a layer that moves down would change its scale."""
    options = (("scale_attn_by_inverse_layer_idx", True), ("attn_implementation", implementation))
    dense = subject("gpt2", options)
    plan = Plan(dropped=("transformer.h.0",))
    try:
        new: Any = apply(dense.model, plan, space=dense.space)
    except SecateurError as error:
        assert "constant" in str(error) or "transformer.h" in str(error)
        return
    check_oracle(dense, plan, new)


def test_last_layer_goes_where_scales_count_layers() -> None:
    """No layer moves, so this cut is right, and must not be refused."""
    dense = subject("gpt2", (("scale_attn_by_inverse_layer_idx", True),))
    plan = Plan(dropped=("transformer.h.1",))
    check_oracle(dense, plan, apply(dense.model, plan, space=dense.space))


def test_generation_with_a_cache_after_surgery() -> None:
    """Layer numbers index the KV cache: after a drop they must be dense again, with sub-layers missing too."""
    dense = subject("llama", (("num_hidden_layers", 3),))
    plan = Plan(dropped=("model.layers.0", "model.layers.2.mlp"))
    new: Any = apply(dense.model, plan, space=dense.space)
    ids = tokens(1, 7)
    with torch.no_grad():
        first = new(ids[:, :5], use_cache=True)
        second = new(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), logits(new, ids), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dropped", ["model.layers.0", "model.layers.0.mlp"])
def test_requires_grad_moves_with_its_layer(dropped: str) -> None:
    """Frozen parameters stay frozen, also where the layer gets another number, and no others become so."""
    model = tiny("llama")
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)
    new: Any = apply(model, Plan(dropped=(dropped,)))
    *others, last = new.model.layers
    assert not any(p.requires_grad for p in last.parameters())
    assert all(p.requires_grad for layer in others for p in layer.parameters())
    assert all(p.requires_grad for p in (new.lm_head.weight, new.model.norm.weight, new.model.embed_tokens.weight))


@pytest.mark.parametrize("kind", ["ffn", "mlp"])
def test_training_mode_is_kept(kind: str) -> None:
    model = tiny("llama").train()
    new: Any = apply(model, random_plan(discover(model), [kind]))
    assert all(module.training for module in new.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["ffn", "mlp"])
def test_mode_of_a_submodule_is_kept(kind: str) -> None:
    """A part that the user put into eval mode inside a training model stays in it."""
    model = tiny("llama").train()
    model.model.layers[1].eval()
    new: Any = apply(model, random_plan(discover(model), [kind]))
    assert not any(m.training for m in model.model.layers[1].modules())
    assert new.training
    assert new.model.layers[0].self_attn.training
    assert not new.model.layers[1].self_attn.training


@pytest.mark.parametrize("kind", ["ffn", "mlp"])
def test_mixed_dtypes_keep_every_bit(kind: str) -> None:
    """Norms in bfloat16 beside float32 matrices: nothing is rounded on the way."""
    model = tiny("llama", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.bfloat16()
    before = dict(model.named_parameters())
    new: Any = apply(model, random_plan(discover(model), [kind]))
    for name, parameter in new.named_parameters():
        assert parameter.dtype == before[name].dtype
        if parameter.shape == before[name].shape:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", ["ffn", "mlp"])
def test_buffers_keep_every_bit(kind: str) -> None:
    """A buffer that someone changed is copied, not computed again."""
    model = tiny("llama", dtype=torch.float32)
    model.model.rotary_emb.inv_freq.mul_(0.9)
    plan = random_plan(discover(model), [kind])
    new: Any = apply(model, plan)
    space = discover(model)
    found, expected = logits(new, tokens()), logits(zeroed(model, space, plan), tokens())
    assert torch.equal(new.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)


def test_generation_settings_are_kept() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = 7
    model.generation_config.max_new_tokens = 9
    for kind in ("ffn", "mlp"):
        new: Any = apply(model, random_plan(discover(model), [kind]))
        assert (new.generation_config.eos_token_id, new.generation_config.max_new_tokens) == (7, 9)


def test_meta_model_is_cut_without_weights() -> None:
    model = tiny("llama", device="meta")
    space = discover(model)
    plan = random_plan(space, ["hidden", "ffn"])
    new: Any = apply(model, plan, space=space)
    assert all(p.is_meta for p in new.parameters())
    assert sum(p.numel() for p in new.parameters()) == costs(space, plan).params


def test_masks_set_zeros_and_nothing_else() -> None:
    dense = subject("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    before = dict(dense.model.named_parameters())
    mask = torch.rand(before[name].shape, generator=torch.Generator().manual_seed(1)) > 0.5
    new = dict(apply(dense.model, Plan(masks={name: mask}), space=dense.space).named_parameters())
    assert torch.equal(new[name], before[name] * mask)
    assert all(torch.equal(new[n], before[n]) for n in before if n != name)


def test_masks_are_sliced_with_their_weights() -> None:
    dense = subject("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(dense.model.named_parameters())[name]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    plan = random_plan(dense.space, ["ffn"])
    units = list(plan.kept["model.layers.1.mlp.ffn"].units)
    new: Any = apply(dense.model, Plan(plan.kept, masks={name: mask}), space=dense.space)
    assert torch.equal(dict(new.named_parameters())[name], (weight * mask)[units])


def ffn(units: tuple[int, ...], size: int = 80, name: str = "model.layers.0.mlp.ffn") -> Plan:
    return Plan({name: Kept("ffn", size, units)})


HEADS = "model.layers.0.self_attn.heads"
BAD_PLANS: dict[str, tuple[Plan, str]] = {
    "nothing": (Plan(), "removes no parameter"),
    "all units kept": (ffn(tuple(range(80))), "removes no parameter"),
    "unknown axis": (ffn((0,), name="model.layers.0.mlp.fnn"), r"mlp\.fnn.*did you mean 'model\.layers\.0\.mlp\.ffn'"),
    "another size": (ffn((0,), 81), "81 units, but the model has 80"),
    "no units": (ffn(()), "at least one must stay"),
    "not ascending": (ffn((3, 1)), "ascending"),
    "twice the same": (ffn((1, 1, 3)), "ascending"),
    "negative": (ffn((-1, 3)), r"within 0\.\.79"),
    "past the end": (ffn((3, 80)), r"within 0\.\.79"),
    "uneven groups": (Plan({HEADS: Kept("heads", 4, (0, 1, 2))}), r"same number .* 2 groups, not \[2, 1\]"),
    "an empty group": (Plan({HEADS: Kept("heads", 4, (0, 1))}), r"not \[2, 0\]"),
    "all layers": (Plan(dropped=("model.layers.0", "model.layers.1")), "all 2 layers of model.layers"),
    "unknown block": (Plan(dropped=("model.layer.0",)), r"model\.layer\.0.*did you mean 'model\.layers\.0'"),
    "mask of nothing": (Plan(masks={"model.nothing": torch.ones(2, 2, dtype=torch.bool)}), r"model\.nothing"),
    "mask of another shape": (
        Plan(masks={"model.layers.0.mlp.up_proj.weight": torch.zeros(1, 48, dtype=torch.bool)}),
        r"model\.layers\.0\.mlp\.up_proj\.weight",
    ),
}


@pytest.mark.parametrize("mistake", BAD_PLANS)
def test_bad_plan_says_what_is_wrong(mistake: str) -> None:
    plan, message = BAD_PLANS[mistake]
    dense = subject("llama")
    with pytest.raises(SecateurError, match=message):
        apply(dense.model, plan, space=dense.space)


def test_oracle_would_see_a_wrong_unit() -> None:
    """The oracle itself can fail: cutting other units than those zeroed shows."""
    dense = subject("llama")
    plan = random_plan(dense.space, ["ffn"], seed=1)
    other = random_plan(dense.space, ["ffn"], seed=2)
    wrong = apply(dense.model, other, space=dense.space)
    reference: nn.Module = zeroed(dense.model, dense.space, plan)
    assert float((logits(wrong, tokens()) - logits(reference, tokens())).abs().max()) > 1e-3
