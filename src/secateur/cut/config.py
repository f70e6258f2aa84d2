"""What a Hugging Face config calls the sizes, and which config describes a cut model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.choose.plan import Plan
from secateur.errors import SecateurError, nearest
from secateur.space import Space
from secateur.space.provenance import holders

# Names of one size over the configs of the field, first match wins; Minitron's own names come last.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": (
        *("intermediate_size", "n_inner", "ffn_dim", "d_ff", "shared_intermediate_size", "intermediate_size_mlp"),
        "ffn_hidden_size",
    ),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_groups": ("num_key_value_heads", "num_kv_heads", "num_query_groups"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    "expert_ffn": (
        *("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_dim"),
        *("ffn_hidden_size", "moe_ffn_hidden_size"),
    ),
    "shared_expert_ffn": (
        *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    ),
    "ssm_heads": ("mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "num_heads"),
    "ssm_head_dim": ("mamba_head_dim", "mamba_d_head", "mamba_headdim", "head_dim"),
    "ssm_channels": ("mamba_d_ssm", "intermediate_size"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that all layers share, by kind; heads are counted over all groups."""

    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_groups: int | None = None
    experts: int | None = None
    expert_ffn: int | None = None
    shared_expert_ffn: int | None = None
    ssm_heads: int | None = None
    ssm_head_dim: int | None = None
    ssm_channels: int | None = None
    layers: int | None = None

    def get(self, kind: str) -> int | None:
        """Size of a kind, None where the model has none or its layers differ."""
        size: int | None = getattr(self, kind)
        return size


def field_of(config: Any, kind: str, size: int | None = None) -> str | None:
    """The config's own name for the size of a kind (GPT-2 stores hidden_size as n_embd).

    With the model's `size`, only a name that has that value, or none yet: one word may mean another size elsewhere.
    """
    own = getattr(config, "size_names", None)
    if own is not None:  # a config that knows
        return str(own[kind]) if kind in own else None
    for name in FIELDS[kind]:
        if hasattr(config, name) and (size is None or getattr(config, name) in (size, None)):
            return str(getattr(config, "attribute_map", {}).get(name, name))
    return None


def kinds_of(config: Any, name: str, dense: Sizes) -> tuple[str, ...]:
    """The kinds that a config integer, or Minitron's name for it, sets; `dense` are the model's sizes.

    Raises:
        SecateurError: for a name that is none of them; names the nearest.
    """
    if name in FIELDS:
        return (name,)
    own = {kind: field_of(config, kind, dense.get(kind)) for kind in FIELDS if dense.get(kind) is not None}
    stored = getattr(config, "attribute_map", {}).get(name, name)
    found = [kind for kind, field in own.items() if field == stored]
    known = [kind for kind, names in FIELDS.items() if name in names]
    found = found or [kind for kind in known if kind in own and not hasattr(config, name)][:1] or known[:1]
    if not found:
        words = [n for n in own.values() if n] + ["ffn_hidden_size", "num_query_groups", "num_layers"]
        raise SecateurError(f"dims: the config has no size {name!r}{nearest(name, words)}")
    return tuple(found)


def sizes_of(space: Space, plan: Plan | None = None) -> Sizes:
    """The sizes of a model, or of what a plan makes of it; None where layers differ."""
    plan = plan or Plan()
    found: dict[str, int | None] = {}
    for kind in (kind for kind in FIELDS if kind != "layers"):
        axes = space.of_kind(kind)
        left = [axis for axis in axes if axis.block not in plan.dropped]
        values = {_kept_size(space, plan, axis.name) for axis in left or axes}
        found[kind] = values.pop() if len(values) == 1 else None
    stacks = list(space.gone_layers(plan.dropped).values())
    found["layers"] = stacks[0].count(False) if len(stacks) == 1 else None
    return Sizes(**found)


def _kept_size(space: Space, plan: Plan, name: str) -> int:
    axis = space.axis(name)
    kept = plan.kept.get(name)
    size = axis.size if kept is None else len(kept.units)
    if axis.parent is not None:
        # Heads of a group that goes, go with it.
        groups = plan.kept.get(axis.parent)
        size = size // axis.groups * (axis.groups if groups is None else len(groups.units))
    return size


def cut_config(config: Any, space: Space, plan: Plan) -> Any:
    """The stock config of a cut model, or None where no setting of its sizes can describe the cut.

    Raises:
        SecateurError: where the config class itself rejects the sizes; the message is the class's own.
    """
    before, after = sizes_of(space), sizes_of(space, plan)
    if any(before.get(kind) is not None and after.get(kind) is None for kind in FIELDS):
        return None
    if any(block.name in plan.dropped and block.kind != "layers" for block in space.blocks):
        return None
    if len(space.stacks) > 1 and any(any(gone) for gone in space.gone_layers(plan.dropped).values()):
        return None  # each list of layers has a number of its own
    return resized_config(config, before, after, next(iter(space.gone_layers(plan.dropped).values()), []))


def resized_config(config: Any, before: Sizes, after: Sizes, gone: Sequence[bool]) -> Any:
    """The config with other sizes.

    Args:
        config: the dense model's.
        before: its sizes.
        after: the sizes to set.
        gone: for each layer, whether it is dropped.

    Raises:
        SecateurError: where the config class itself rejects the sizes.
    """
    changed = {kind: after.get(kind) for kind in FIELDS if before.get(kind) != after.get(kind)}
    head_dim = getattr(config, "head_dim", None) or _implied_head_dim(config)
    values = copy.deepcopy(config).to_dict()
    if {"hidden", "heads"} & set(changed) and head_dim is not None and _takes_head_dim(config):
        values["head_dim"] = head_dim
    for kind, size in changed.items():
        name = field_of(config, kind, before.get(kind))
        if name is None:
            continue  # the class may derive it from another number: whoever uses the config compares shapes
        values[name] = size
        if kind == "heads" and before.kv_groups is None and hasattr(config, "num_key_value_heads"):
            values["num_key_value_heads"] = size
    ffn = field_of(config, "ffn")
    if ffn is not None and values.get(ffn, 0) is None:
        values[ffn] = after.ffn  # GPT-2 derives it from the hidden size where it is not said
    if "layers" in changed:
        values |= cut_lists(values, gone)
    values.pop("transformers_version", None)
    return build_config(config, values)


def build_config(config: Any, values: Mapping[str, Any]) -> Any:
    """A config of the same class with other values.

    Raises:
        SecateurError: with the class's own words, where it rejects them.
    """
    try:
        new = type(config).from_dict(dict(values))
    except Exception as error:  # huggingface_hub's strict dataclasses raise types of their own
        text = " ".join(str(error).split())
        raise SecateurError(f"{type(config).__name__} rejects these sizes: {text}") from error
    for name in ("_attn_implementation", "_name_or_path"):
        if getattr(config, name, None) is not None:
            setattr(new, name, getattr(config, name))
    return new


def with_head_dim(config: Any) -> Any:
    """A copy that says its head_dim, where the class takes one: it may then differ from hidden / heads."""
    new = copy.deepcopy(config)
    if _takes_head_dim(config) and getattr(config, "head_dim", None) is None:
        head_dim = _implied_head_dim(config)
        if head_dim is not None:
            vars(new)["head_dim"] = head_dim
    return new


def _implied_head_dim(config: Any) -> int | None:
    hidden, heads = (getattr(config, field_of(config, kind) or "", None) for kind in ("hidden", "heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _takes_head_dim(config: Any) -> bool:
    """Models read an explicit head_dim wherever their config knows one, or knows grouped keys (Phi-3)."""
    return hasattr(config, "head_dim") or hasattr(config, "num_key_value_heads")


def cut_lists(values: Mapping[str, Any], gone: Sequence[bool]) -> dict[str, Any]:
    """Lists of a config that speak of layers, after some are dropped.

    A list with one entry for each layer (layer_types...) loses theirs, a pattern of one letter for each (Nemotron-H's
    "M-M*") too; a list of layer numbers is renumbered.
    """
    kept = [i for i, out in enumerate(gone) if not out]
    cut: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, str) and len(value) == len(gone) and str(key).endswith("pattern"):
            cut[key] = "".join(value[i] for i in kept)
        if "layer" not in str(key) or not isinstance(value, list) or not value:
            continue
        if _are_layer_numbers(value, len(gone)):
            cut[key] = [kept.index(i) for i in value if i in kept]
        elif len(value) == len(gone):
            cut[key] = [value[i] for i in kept]
    return cut


def config_of(model: Any, stack: str) -> str:
    """Path of the config that speaks of a list of layers: that of the innermost module around it which has one."""
    paths = {id(holder): path for path, holder, is_config in holders(model) if is_config}
    path = stack
    while path:
        path = path.rpartition(".")[0]
        own = getattr(model.get_submodule(path), "config", None)
        if id(own) in paths:
            return str(paths[id(own)])
    return "config"


def _are_layer_numbers(value: list[Any], layers: int) -> bool:
    """Ascending whole numbers below the number of layers, and not one flag of 0 or 1 for each layer."""
    numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    ascending = numbers and value == sorted(set(value)) and value[0] >= 0 and value[-1] < layers
    return ascending and not (len(value) == layers and set(value) <= {0, 1})
