"""Megatron-Core's GPTModel: found, scored, cut; by its config's names; the same as a model built anew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_models as megatron
import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.choose.plan import Kept, Plan
from secateur.load.megatron import opened, token_batch

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (megatron.LLAMA, {}),
    "tied": (megatron.LLAMA, {"share_embeddings_and_output_weights": True}),
    "gpt": ({"num_query_groups": 9}, {}),
    "moe": ({**megatron.LLAMA, **megatron.MOE}, {}),
}
DATA = torch.randint(0, megatron.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with megatron.on_cpu(tmp_path_factory.mktemp("gloo")):
        yield


def build(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    sizes, given = KINDS[kind]
    model = megatron.gpt(megatron.config_of(params_dtype=dtype, **sizes), **given)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)  # every unit matters
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_the_dense_model_without_the_units_and_a_new_model_of_the_class(kind: str) -> None:
    model = build(kind)
    space = secateur.discover(model, DATA)
    plan = megatron.some_plan(space, "decoder.layers.1")
    found = {"hidden", "heads", "layers"} | (
        {"experts", "expert_ffn", "shared_expert_ffn"} if kind == "moe" else {"ffn"}
    )
    assert found <= set(space.kinds())
    assert ("kv_groups" in space.kinds()) == (kind != "gpt")
    cut: Any = secateur.apply(model, plan, space=space, inputs=DATA)
    assert type(cut) is type(model)
    logits, wanted = megatron.run(cut, DATA), megatron.expected(model, plan, DATA)
    assert float((logits - wanted).abs().max() / wanted.abs().max()) < (1e-6 if kind == "moe" else 1e-10)
    new = megatron.rebuilt(cut)
    assert torch.equal(megatron.run(new, DATA), logits)
    assert megatron.facts(cut) == megatron.facts(new)
    assert model.config.hidden_size == 60  # the dense model stays as it is
    assert megatron.facts(model) == megatron.facts(build(kind))


def test_dims_are_given_by_the_names_of_the_config() -> None:
    model = build("llama")
    dims = {"hidden_size": 44, "ffn_hidden_size": 18, "num_attention_heads": 4, "num_query_groups": 2, "num_layers": 2}
    batches = [{"input_ids": DATA, "position_ids": torch.arange(16).expand(4, 16)}]
    result = secateur.prune(model, dims, method="minitron", data=batches, mend="none")
    small: Any = result.model
    config = small.config
    assert {name: getattr(config, name) for name in dims} == dims
    assert (config.kv_channels, [layer.layer_number for layer in small.decoder.layers]) == (8, [1, 2])
    assert result.report["costs"]["params"]["pruned"] == sum(p.numel() for p in result.model.parameters())
    new = megatron.rebuilt(result.model)
    assert torch.equal(megatron.run(new, DATA), megatron.run(result.model, DATA))


def test_units_are_ranked_by_what_minitron_measures_heads_within_their_groups() -> None:
    model = build("llama")
    seen: dict[str, torch.Tensor] = {}

    def look(key: str, x: torch.Tensor) -> None:
        energy = x.float().abs().mean(0).square().sum(0)  # [sequence, batch, channels]
        seen[key] = energy.sqrt()

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.RMSNorm) and "final" not in path:
            module.register_forward_hook(lambda _, __, out, path=path: look(path, out))
        elif path.endswith("linear_proj"):
            module.register_forward_pre_hook(lambda _, args, path=path: look(path, args[0]))
    megatron.run(model, DATA)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    plan = secateur.plan(model, {"hidden_size": 44, "num_attention_heads": 3}, data=DATA)
    hidden = torch.stack([x for path, x in seen.items() if "norm" in path]).sum(0)
    assert set(plan.kept["hidden"].units) == set(hidden.topk(44).indices.tolist())
    heads = seen["decoder.layers.1.self_attention.linear_proj"].view(9, 8).norm(dim=1).view(3, 3)
    best = tuple(int(group * 3 + heads[group].argmax()) for group in range(3))
    assert plan.kept["decoder.layers.1.self_attention.heads"].units == best


def test_fused_projections_keep_each_groups_queries_keys_and_values_and_both_halves_of_the_gate() -> None:
    model = build("llama")
    space = secateur.discover(model)
    attention, mlp = "decoder.layers.0.self_attention", "decoder.layers.0.mlp"
    kept = {
        f"{attention}.kv_groups": Kept("kv_groups", 3, (0, 2)),
        f"{attention}.heads": Kept("heads", 9, (1, 2, 3, 4, 6, 8)),
        f"{mlp}.ffn": Kept("ffn", 28, (3, 5, 27)),
    }
    cut: Any = secateur.apply(model, Plan(kept), space=space)
    layer = cut.decoder.layers[0]
    qkv = model.decoder.layers[0].self_attention.linear_qkv.weight.view(3, 5, 8, 60)  # group: 3 queries, key, value
    wanted = torch.stack([qkv[0][[1, 2, 3, 4]], qkv[2][[0, 2, 3, 4]]]).view(64, 60)
    assert torch.equal(layer.self_attention.linear_qkv.weight, wanted)
    proj = model.decoder.layers[0].self_attention.linear_proj.weight.view(60, 9, 8)[:, [1, 2, 6, 8]].reshape(60, 32)
    assert torch.equal(layer.self_attention.linear_proj.weight, proj)
    fc1 = model.decoder.layers[0].mlp.linear_fc1.weight
    assert torch.equal(layer.mlp.linear_fc1.weight, fc1[[3, 5, 27, 31, 33, 55]])


def test_budgets_and_methods_for_any_model() -> None:
    model = build("llama", torch.float32)
    dense = sum(p.numel() for p in model.parameters())
    divisors = {"hidden_size": 4, "ffn_hidden_size": 4}
    skip = ["num_attention_heads", "num_query_groups"]
    small = secateur.prune(model, "params=70%", data=DATA, divisors=divisors, skip=skip, top_k=1, mend="none").model
    assert sum(p.numel() for p in small.parameters()) <= 0.7 * dense
    megatron.run(megatron.rebuilt(small), DATA)
    narrow = secateur.prune(model, "params=80%", method="structural", data=DATA).model
    assert sum(p.numel() for p in narrow.parameters()) <= 0.8 * dense
    megatron.run(narrow, DATA)
    sparse: Any = secateur.prune(model, "sparsity=0.5", method="wanda", data=DATA).model
    weight = sparse.decoder.layers[0].mlp.linear_fc2.weight
    assert float((weight == 0).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_mixtures_are_cut_by_the_names_of_the_config() -> None:
    model = build("moe")
    dims = {"num_moe_experts": 4, "moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 8}
    result = secateur.prune(model, dims, data=DATA, mend="none")
    small: Any = result.model
    assert {name: getattr(small.config, name) for name in dims} == dims
    mixture = small.decoder.layers[0].mlp
    assert (type(mixture).__name__, len(mixture.experts.local_experts)) == ("MoELayer", 4)
    routed = model.decoder.layers[0].mlp.router.weight
    kept = list(result.plan.kept["decoder.layers.0.mlp.experts"].units)
    assert torch.equal(mixture.router.weight, routed[kept])
    with pytest.raises(SecateurError, match="leaves fewer experts than the 2"):
        secateur.plan(model, {"num_moe_experts": 1}, data=DATA)


def test_an_opened_mixture_gives_what_the_layer_gives() -> None:
    model = build("moe")
    with torch.no_grad():
        logits = opened(model)(DATA)
    assert torch.allclose(logits, megatron.run(model, DATA), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"hiden_size": 44}, "no size 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": 64}, "hidden_size=64 is above the current size of 60"),
        ({"num_attention_heads": 4}, "4 heads are not divisible by 3 KV groups"),
        ({"mamba_num_heads": 2}, "the ssm_heads of this model cannot be cut"),
    ],
)
def test_wrong_dims_are_told_in_one_line(dims: dict[str, int], words: str) -> None:
    with pytest.raises(SecateurError, match=words) as error:
        secateur.plan(build("llama"), dims, data=DATA)
    assert "\n" not in str(error.value)


def test_what_is_not_supported_is_refused() -> None:
    model = build("llama")
    model.config.tensor_model_parallel_size = 2
    with pytest.raises(SecateurError, match="tensor_model_parallel_size is 2"):
        secateur.discover(model)
    with pytest.raises(SecateurError, match="position_ids must count from 0"):
        token_batch((DATA, torch.zeros_like(DATA), None))
    with pytest.raises(SecateurError, match="attention_mask must be the causal one"):
        token_batch({"input_ids": DATA, "attention_mask": torch.zeros(1, 1, 16, 16, dtype=torch.bool)})


def test_padding_counts_for_nothing(tmp_path: Path) -> None:
    model = build("llama")
    mask = torch.ones_like(DATA)
    mask[:, 11:] = 0
    padded = secateur.plan(model, {"hidden_size": 44}, data=[{"input_ids": DATA, "attention_mask": mask}])
    short = secateur.plan(model, {"hidden_size": 44}, data=DATA[:, :11])
    assert padded.kept == short.kept
