"""Configs and attributes of a Megatron-Core model, worked out anew from the sizes of its tensors."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.errors import SecateurError

KINDS: Mapping[str, str] = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_query_groups",
    "experts": "num_moe_experts",
    "expert_ffn": "moe_ffn_hidden_size",
    "shared_expert_ffn": "moe_shared_expert_intermediate_size",
    "ssm_heads": "mamba_num_heads",
    "ssm_head_dim": "mamba_head_dim",
    "layers": "num_layers",
}
"""Kind of axis -> field of the `TransformerConfig`."""
_FFN = {"experts": "moe_ffn_hidden_size", "shared_experts": "moe_shared_expert_intermediate_size"}
"""Part of a mixture -> the field that its own config has as `ffn_hidden_size`."""


def fit(model: Any) -> None:
    """Make configs and attributes of a model agree with its tensors.

    All layers share one config where they have the same sizes; one that differs gets a copy with its own.

    Args:
        model: a whole `GPTModel` or `MambaModel`; experts may be stacked.

    Raises:
        SecateurError: for sizes that no config describes.
    """
    main, layers = model.config, list(model.decoder.layers)
    _keep_layers(model, [layer.layer_number - 1 for layer in layers])
    own = [_fields(layer) for layer in layers]
    _set(main, _agreed(own) | {"hidden_size": _hidden(model)} | ({"num_layers": len(layers)} if layers else {}))
    for number, (layer, fields) in enumerate(zip(layers, own, strict=True)):
        differs = any(getattr(main, name) != value for name, value in fields.items())
        config = copy.deepcopy(main) if differs else main
        _set(config, fields)
        _give_config(layer, config)
        _renumber(layer, number)
    for path, module in model.named_modules():
        if isinstance(getattr(module, "config", None), type(main)) and not path.startswith("decoder.layers."):
            module.config = main
        _fit_module(module)


def _keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Lists, patterns and specs with an entry for each layer lose those of the layers that are gone."""
    config, decoder, dense = model.config, model.decoder, model.config.num_layers
    if len(kept) == dense:
        return
    if getattr(config, "apply_query_key_layer_scaling", False):
        raise SecateurError("apply_query_key_layer_scaling scales by the number of a layer: no layer can be dropped")

    def cut(value: Any) -> Any:
        left = [value[number] for number in kept]
        return "".join(left) if isinstance(value, str) else type(value)(left)

    def cut_all(holder: Any, names: Sequence[str]) -> None:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, str | list | tuple) and len(value) == dense:
                setattr(holder, name, cut(value))

    cut_all(config, ("moe_layer_freq", "linear_attention_freq", "no_rope_freq", "window_attn_skip_freq"))
    cut_all(model, ("hybrid_override_pattern",))
    cut_all(decoder, ("hybrid_override_pattern", "layer_type_list"))
    for holder, name in ((decoder, "submodules"), (model, "transformer_layer_spec")):
        spec: Any = getattr(holder, name, None)
        if isinstance(getattr(spec, "layer_specs", None), list) and len(spec.layer_specs) == dense:
            setattr(holder, name, replace(spec, layer_specs=cut(spec.layer_specs)))
    decoder.num_layers_per_pipeline_rank = len(kept)


def _set(config: Any, fields: Mapping[str, int]) -> None:
    for name, value in fields.items():
        if getattr(config, name, None) != value:
            setattr(config, name, value)


def _agreed(every: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Fields that all layers which have them agree on."""
    values: dict[str, set[int]] = {}
    for fields in every:
        for name, value in fields.items():
            values.setdefault(name, set()).add(value)
    return {name: found.pop() for name, found in values.items() if len(found) == 1}


def _hidden(model: Any) -> int:
    embedding = getattr(model, "embedding", None)
    if embedding is not None:
        return int(embedding.word_embeddings.weight.shape[1])
    return next(int(m.weight.shape[0]) for m in model.decoder.modules() if _is_norm(m))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "normalized_shape", None), tuple) and getattr(module, "weight", None) is not None


def _fields(layer: nn.Module) -> dict[str, int]:
    """The sizes of one layer, by the config's names."""
    found: dict[str, int] = {}
    for path, module in layer.named_modules():
        part = next((name for name in _FFN if name in path.split(".")), None)
        if hasattr(module, "linear_qkv"):
            heads, groups = _heads(module)
            found |= {"num_attention_heads": heads, "num_query_groups": groups}
        elif hasattr(module, "linear_fc2"):
            found[_FFN[part] if part else "ffn_hidden_size"] = module.linear_fc2.weight.shape[1]
        elif type(module).__name__ == "StackedExperts":
            found |= {"num_moe_experts": len(module.fc2), "moe_ffn_hidden_size": module.fc2.shape[2]}
        elif hasattr(module, "local_experts"):
            found["num_moe_experts"] = len(module.local_experts)
        elif hasattr(module, "A_log"):
            heads = len(module.A_log)
            found |= {"mamba_num_heads": heads, "mamba_head_dim": module.out_proj.weight.shape[1] // heads}
    return found


def _heads(attention: Any) -> tuple[int, int]:
    """(heads, query groups) of an attention, from its weights and its fixed head dimension."""
    width = attention.config.kv_channels
    if attention.hidden_size_per_attention_head != width:
        raise SecateurError("kv_channels cannot be cut: Megatron-Core works the scale of its attention out from it")
    heads = attention.linear_proj.weight.shape[1] // width
    gated = 2 if getattr(attention.config, "attention_output_gate", False) else 1
    return heads, (attention.linear_qkv.weight.shape[0] // width - gated * heads) // 2


def _give_config(layer: nn.Module, config: Any) -> None:
    """Hand a config to a layer; parts of a mixture have one of their own, in which their width is the only one."""
    own: dict[str, Any] = {"": config}
    for path, module in layer.named_modules():
        if not isinstance(getattr(module, "config", None), type(config)):
            continue
        part = next((name for name in _FFN if name in path.split(".")), "")
        if part not in own:
            width = getattr(config, _FFN[part])
            own[part] = config if width == config.ffn_hidden_size and part == "experts" else copy.copy(config)
            own[part].ffn_hidden_size = width
        module.config = own[part]


def _renumber(layer: Any, number: int) -> None:
    """Layers count from 1, over all stages."""
    before = getattr(layer, "layer_number", None)
    module: Any
    for module in layer.modules():
        if before is not None and vars(module).get("layer_number") == before:
            module.layer_number = number + 1


def _fit_module(module: Any) -> None:
    """Set the attributes of one module that repeat sizes."""
    if "linear_qkv" in module._modules:
        _fit_attention(module)
    elif "linear_fc1" in module._modules:
        module.input_size = module.linear_fc1.weight.shape[1]
    elif "A_log" in module._parameters:
        _fit_mixer(module)
    elif type(module).__name__ == "StackedExperts":
        module.num_experts = len(module.fc2)
    else:
        _fit_weight(module, getattr(module, "weight", None))


def _fit_weight(module: Any, weight: Any) -> None:
    """The same for a module with one weight; with tied embeddings the last projection has none."""
    own = vars(module)
    if "output_size_per_partition" in own:  # ColumnParallelLinear
        if weight is not None:
            module.output_size = module.output_size_per_partition = weight.shape[0]
        module.input_size = module.config.hidden_size if weight is None else weight.shape[1]
    elif "input_size_per_partition" in own:  # RowParallelLinear
        module.output_size, module.input_size = weight.shape
        module.input_size_per_partition = module.input_size
    elif "num_embeddings_per_partition" in own or isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif _is_norm(module):
        module.normalized_shape = tuple(weight.shape)
    elif "routing_type" in own:
        module.num_experts = len(weight)
        for name in ("local_tokens_per_expert", "global_tokens_per_expert"):  # counts of one training step
            counts = getattr(module, name, None)
            if counts is not None and len(counts) != len(weight):
                setattr(module, name, counts.new_zeros(len(weight)))


def _fit_attention(module: Any) -> None:
    width = module.hidden_size_per_attention_head
    heads, groups = _heads(module)
    core = module.core_attention
    for holder in (module, core):
        holder.num_attention_heads_per_partition, holder.num_query_groups_per_partition = heads, groups
    core.hidden_size_per_partition = module.query_projection_size = heads * width
    module.kv_projection_size = groups * width
    if "linear_qkv_out_dim" in vars(module):
        module.linear_qkv_out_dim = len(module.linear_qkv.weight)


def _fit_mixer(module: Any) -> None:
    heads, inner = len(module.A_log), module.out_proj.weight.shape[1]
    module.d_model, module.headdim = module.out_proj.weight.shape[0], inner // heads
    for holder in (module, module.cp):
        for name, value in (("nheads", heads), ("d_inner", inner)):
            for key in (name, f"{name}_local_tp", f"{name}_local_tpcp"):
                if key in vars(holder):
                    setattr(holder, key, value)
    conv = module.conv1d
    conv.in_channels = conv.out_channels = conv.groups = len(conv.weight)
    if getattr(module, "norm", None) is not None:
        module.norm.group_size = inner // module.ngroups
