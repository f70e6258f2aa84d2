"""The Space of real architectures: names, groups, who reads whom, what is frozen and why."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.space import Axis, Space, discover, evaluate


@cache
def space_of(name: str) -> Space:
    return discover(tiny(name, device="meta"))


def rows(axis: Axis) -> dict[tuple[str, int, int], list[list[int]]]:
    """(parameter, dimension, first row) -> rows of each unit."""
    return {(s.parameter, s.dim, s.offset): s.rows().tolist() for s in axis.slices}


def runs(count: int, width: int, offset: int = 0) -> list[list[int]]:
    """`count` units of `width` neighbouring rows."""
    return [list(range(offset + u * width, offset + (u + 1) * width)) for u in range(count)]


LLAMA_LAYER = "model.layers.1."
LLAMA_AXES = [
    "hidden",
    *(f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.kv_groups", "self_attn.heads", "mlp.ffn")),
]
GPT2_AXES = ["hidden", *(f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.heads", "attn.head_dim", "mlp.ffn"))]


def test_names_and_order_follow_the_forward_pass() -> None:
    assert [a.name for a in space_of("llama").axes] == LLAMA_AXES
    assert [a.name for a in space_of("gpt2").axes] == GPT2_AXES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_unique_and_found(name: str) -> None:
    space = space_of(name)
    names = [a.name for a in space.axes]
    assert len(set(names)) == len(names)
    assert all(space.axis(n).name == n for n in names)
    with pytest.raises(KeyError):
        space.axis("nothing")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_is_one_axis_of_the_whole_model(name: str) -> None:
    (hidden,) = space_of(name).of_kind("hidden")
    assert (hidden.name, hidden.size, hidden.groups, hidden.block) == ("hidden", 48, 1, None)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text"])
def test_heads_lie_in_groups(name: str) -> None:
    space = space_of(name)
    for i, layer in enumerate(space.layers()):
        (heads,) = (a for a in space.of_kind("heads") if a.block == layer.name)
        (groups,) = (a for a in space.of_kind("kv_groups") if a.block == layer.name)
        assert groups.name == f"model.layers.{i}.self_attn.kv_groups"
        assert (heads.size, heads.groups, heads.per_group, heads.parent) == (4, 2, 2, groups.name)
        assert (groups.size, groups.groups, groups.parent) == (2, 1, None)


def test_slices_of_llama() -> None:
    space = space_of("llama")
    attention = f"{LLAMA_LAYER}self_attn"
    assert rows(space.axis(f"{attention}.heads")) == {
        (f"{attention}.q_proj.weight", 0, 0): runs(4, 12),
        (f"{attention}.o_proj.weight", 1, 0): runs(4, 12),
    }
    assert rows(space.axis(f"{attention}.kv_groups")) == {
        (f"{attention}.q_proj.weight", 0, 0): runs(2, 24),
        (f"{attention}.k_proj.weight", 0, 0): runs(2, 12),
        (f"{attention}.v_proj.weight", 0, 0): runs(2, 12),
        (f"{attention}.o_proj.weight", 1, 0): runs(2, 24),
    }
    mlp = f"{LLAMA_LAYER}mlp"
    assert rows(space.axis(f"{mlp}.ffn")) == {
        (f"{mlp}.{p}_proj.weight", d, 0): runs(80, 1) for p, d in (("gate", 0), ("up", 0), ("down", 1))
    }
    names = {"model.embed_tokens.weight": 1, "lm_head.weight": 1, "model.norm.weight": 0}
    for i in (0, 1):
        prefix = f"model.layers.{i}"
        names |= {f"{prefix}.self_attn.{p}_proj.weight": 1 for p in "qkv"} | {f"{prefix}.self_attn.o_proj.weight": 0}
        names |= {f"{prefix}.mlp.{p}_proj.weight": 1 for p in ("gate", "up")} | {f"{prefix}.mlp.down_proj.weight": 0}
        names |= {f"{prefix}.{norm}_layernorm.weight": 0 for norm in ("input", "post_attention")}
    assert rows(space.axis("hidden")) == {(n, d, 0): runs(48, 1) for n, d in names.items()}


def test_slices_of_fused_projections() -> None:
    phi, gpt = space_of("phi3"), space_of("gpt2")
    attention = "model.layers.0.self_attn"
    assert rows(phi.axis(f"{attention}.heads")) == {
        (f"{attention}.qkv_proj.weight", 0, 0): runs(4, 12),
        (f"{attention}.o_proj.weight", 1, 0): runs(4, 12),
    }
    assert rows(phi.axis(f"{attention}.kv_groups")) == {
        (f"{attention}.qkv_proj.weight", 0, 0): runs(2, 24),
        (f"{attention}.qkv_proj.weight", 0, 48): runs(2, 12, 48),
        (f"{attention}.qkv_proj.weight", 0, 72): runs(2, 12, 72),
        (f"{attention}.o_proj.weight", 1, 0): runs(2, 24),
    }
    assert rows(phi.axis("model.layers.0.mlp.ffn")) == {
        ("model.layers.0.mlp.gate_up_proj.weight", 0, 0): runs(80, 1),
        ("model.layers.0.mlp.gate_up_proj.weight", 0, 80): runs(80, 1, 80),
        ("model.layers.0.mlp.down_proj.weight", 1, 0): runs(80, 1),
    }
    attention = "transformer.h.0.attn"
    assert rows(gpt.axis(f"{attention}.heads")) == {
        **{(f"{attention}.c_attn.weight", 1, 48 * i): runs(4, 12, 48 * i) for i in range(3)},
        **{(f"{attention}.c_attn.bias", 0, 48 * i): runs(4, 12, 48 * i) for i in range(3)},
        (f"{attention}.c_proj.weight", 0, 0): runs(4, 12),
    }
    spread = [[u + 12 * h for h in range(4)] for u in range(12)]
    assert rows(gpt.axis(f"{attention}.head_dim"))[f"{attention}.c_proj.weight", 0, 0] == spread


def read_by(space: Space, name: str) -> list[tuple[str, str, int, int | None]]:
    found = space.consumers(space.axis(name))
    return [(r.module, r.parameter, r.in_dim, r.out_dim) for r, _ in found]


def test_who_reads_this_axis() -> None:
    llama, gpt = space_of("llama"), space_of("gpt2")
    down, o = f"{LLAMA_LAYER}mlp.down_proj", f"{LLAMA_LAYER}self_attn.o_proj"
    assert read_by(llama, f"{LLAMA_LAYER}mlp.ffn") == [(down, f"{down}.weight", 1, 0)]
    assert read_by(llama, f"{LLAMA_LAYER}self_attn.heads") == [(o, f"{o}.weight", 1, 0)]
    assert read_by(llama, f"{LLAMA_LAYER}self_attn.kv_groups") == [(o, f"{o}.weight", 1, 0)]
    modules = [f"model.layers.{i}.{m}" for i in (0, 1) for m in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")]  # fmt: skip
    assert read_by(llama, "hidden") == [(m, f"{m}.weight", 1, 0) for m in [*modules, "lm_head"]]
    # Conv1D keeps [in, out]; the head is the embedding under another name.
    c_proj = "transformer.h.1.mlp.c_proj"
    assert read_by(gpt, "transformer.h.1.mlp.ffn") == [(c_proj, f"{c_proj}.weight", 0, 1)]
    assert read_by(gpt, "hidden")[-1] == ("lm_head", "transformer.wte.weight", 1, 0)


def test_norms_in_the_order_of_the_forward_pass() -> None:
    llama = [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    assert [n.module for n in space_of("llama").norms] == [*llama, "model.norm"]
    assert {n.axis for n in space_of("llama").norms} == {"hidden"}
    assert (space_of("llama").norms[-1].weight, space_of("llama").norms[-1].weight_offset) == ("model.norm.weight", 0.0)
    gemma = [
        f"model.layers.{i}.{n}_layernorm"
        for i in (0, 1)
        for n in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ]
    assert [n.module for n in space_of("gemma2").norms] == [*gemma, "model.norm"]
    assert {n.weight_offset for n in space_of("gemma2").norms} == {1.0}
    gpt = [f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]
    assert [n.module for n in space_of("gpt2").norms] == [*gpt, "transformer.ln_f"]
    assert space_of("gpt2").norms[0].weight == "transformer.h.0.ln_1.weight"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks(name: str) -> None:
    space = space_of(name)
    stack, attention = ("transformer.h", "attn") if name in ("gpt2", "gptj") else ("model.layers", "self_attn")
    count = len(space.layers())
    assert count == (3 if name == "gemma3_text" else 2)
    expected = [
        (f"{stack}.{i}{part}", kind, i, stack)
        for i in range(count)
        for part, kind in (("", "layers"), (f".{attention}", "attention"), (".mlp", "mlp"))
    ]
    assert [(b.name, b.kind, b.index, b.stack) for b in space.blocks] == expected
    for block in space.layers():
        assert block.parameters == {n for n in space.parameters if n.startswith(f"{block.name}.")}


def test_idle_norms_go_with_their_sublayer() -> None:
    def idle(name: str, block: str) -> tuple[str, ...]:
        found = {b.name: b for b in space_of(name).blocks}[block]
        assert found.parameters >= {n for n in space_of(name).parameters if n.startswith(f"{block}.")}
        return found.idle

    assert idle("llama", "model.layers.0.self_attn") == ("model.layers.0.input_layernorm",)
    assert idle("llama", "model.layers.0.mlp") == ("model.layers.0.post_attention_layernorm",)
    assert idle("gpt2", "transformer.h.1.attn") == ("transformer.h.1.ln_1",)
    before_and_after = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    assert idle("gemma2", "model.layers.0.self_attn") == before_and_after
    # GPT-J's one norm feeds both sub-layers: it stays while either does.
    assert idle("gptj", "transformer.h.0.attn") == idle("gptj", "transformer.h.0.mlp") == ()


def test_frozen_says_why() -> None:
    reasons = {(f.parameter, f.dim): f.reason for f in space_of("llama").frozen}
    assert "rotary_emb.inv_freq" in reasons["model.layers.0.self_attn.q_proj.weight", 0]
    assert "rotary_emb.inv_freq" in reasons["model.layers.0.self_attn.o_proj.weight", 1]
    assert "looked up by number" in reasons["model.embed_tokens.weight", 0]
    assert reasons["lm_head.weight", 0] == "an output of the model"
    assert (
        "looked up by number"
        in {(f.parameter, f.dim): f.reason for f in space_of("gpt2").frozen}["transformer.wpe.weight", 0]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_priced_and_every_dimension_accounted_for(name: str) -> None:
    model = tiny(name, device="meta")
    space = space_of(name)
    assert set(space.parameters) == {n for n, _ in model.named_parameters()}
    whole = {a.name: a.per_group for a in space.axes}
    frozen = {(f.parameter, f.dim) for f in space.frozen}
    for parameter in space.parameters.values():
        assert tuple(evaluate(d, whole) for d in parameter.dims) == parameter.shape
        assert evaluate(parameter.size, whole) == model.get_parameter(parameter.name).numel()
        for dim, polynomial in enumerate(parameter.dims):
            named = any(names for names in polynomial)
            assert named or (parameter.name, dim) in frozen or parameter.shape[dim] == 1


def test_tied_parameters_have_one_entry() -> None:
    tied = discover(tiny("llama", device="meta", tie_word_embeddings=True))
    assert tied.parameters["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in tied.parameters
    assert space_of("llama").parameters["model.embed_tokens.weight"].aliases == ()


def test_one_key_value_head() -> None:
    """Multi-query attention: the query heads can be cut freely, the one key-value head cannot."""
    space = discover(tiny("llama", device="meta", num_key_value_heads=1))
    assert not space.of_kind("kv_groups")
    heads = space.of_kind("heads")
    assert [(a.name, a.size, a.groups, a.parent) for a in heads] == [
        (f"model.layers.{i}.self_attn.heads", 4, 1, None) for i in (0, 1)
    ]


def test_as_many_keys_as_queries() -> None:
    space = discover(tiny("llama", device="meta", num_key_value_heads=4))
    assert not space.of_kind("kv_groups")
    assert [(a.size, a.groups, len(a.slices)) for a in space.of_kind("heads")] == [(4, 1, 4)] * 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_and_real_weights_give_the_same_space(name: str) -> None:
    real = discover(tiny(name, dtype=torch.float64))
    for field in fields(Space):
        if field.name != "parameters":  # the others do not depend on the dtype either
            assert getattr(real, field.name) == getattr(space_of(name), field.name), field.name
    assert {n: (p.size, p.dims) for n, p in real.parameters.items()} == {
        n: (p.size, p.dims) for n, p in space_of(name).parameters.items()
    }


def test_batch_and_positions_of_the_example_do_not_matter() -> None:
    model = tiny("llama", device="meta")
    other = discover(model, {"input_ids": torch.zeros(2, 6, dtype=torch.long, device="meta"), "use_cache": False})
    assert other.axes == space_of("llama").axes
    assert other.blocks == space_of("llama").blocks
    assert {n: p.size for n, p in other.parameters.items()} == {
        n: p.size for n, p in space_of("llama").parameters.items()
    }


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_training_flags_are_left_alone(mode: str) -> None:
    model = tiny("llama", device="meta").train(mode != "eval")
    if mode == "mixed":
        model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    discover(model)
    assert [m.training for m in model.modules()] == before


def test_weights_and_gradients_are_left_alone() -> None:
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    discover(model)
    assert all(torch.equal(p, before[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())


class Branching(nn.Module):
    """Its Python code asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Branching(), {"x": torch.ones(2, 6)}),
        (Branching(), {"y": torch.ones(2, 6)}),
        (nn.Linear(6, 4), {"input": torch.ones(2, 5)}),
    ],
    ids=["data dependent", "wrong argument", "wrong shape"],
)
def test_what_cannot_be_traced_is_an_error_of_ours(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    model.train()
    with pytest.raises(SecateurError, match=f"cannot trace {type(model).__name__}"):
        discover(model, inputs)
    assert all(m.training for m in model.modules())


def test_inputs_are_needed_for_a_plain_module() -> None:
    with pytest.raises(SecateurError, match="pass `inputs`"):
        discover(nn.Linear(3, 4))


def test_module_without_parameters() -> None:
    space = discover(nn.ReLU(), {"input": torch.ones(2, 3)})
    assert (space.axes, space.blocks, dict(space.parameters)) == ((), (), {})


def test_untouched_parameters_are_known_and_priced() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(4, 2)))
    space = discover(model, {"input": torch.ones(2, 6)})
    assert space.idle_parameters == ("unused",)
    assert space.parameters["unused"].size == {(): 8}
    assert [a.name for a in space.axes] == ["0.ffn"]


def test_discovery_is_deterministic() -> None:
    model = tiny("phi3", device="meta")
    assert discover(model) == discover(model)
    assert tokens().equal(tokens())
