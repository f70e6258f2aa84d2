"""Tiny Megatron-Core models on the CPU, what has to be replaced for that, and what a cut of one must equal."""

import copy
import dataclasses
import importlib
import itertools
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional

from secateur.choose.plan import Kept, Plan
from secateur.space import Space

VOCABULARY, LENGTH = 101, 64
LLAMA: dict[str, Any] = {"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": functional.silu}
LLAMA |= {"add_bias_linear": False}
MOE: dict[str, Any] = {
    "num_moe_experts": 7,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 12,
}
MOE |= {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather"}
MOE |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
MAMBA: dict[str, Any] = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "mamba_num_groups": 2,
    "mamba_state_dim": 7,
    "num_layers": 5,
}
PATTERN = "M*-M-"


def core(path: str) -> Any:
    """A module of Megatron-Core."""
    return importlib.import_module(f"megatron.core.{path}")


@contextmanager
def on_cpu(folder: Path, rank: int = 0, stages: int = 1) -> Iterator[None]:
    """Megatron-Core without a GPU: one process group over gloo, and no CUDA where it asks for it all the same."""
    before, cuda = torch.cuda.current_device, torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=stages)
    parallel = core("parallel_state")
    parallel.initialize_model_parallel(1, stages)
    random = core("tensor_parallel.random")
    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    # Without Transformer Engine a router looks for a name that there is not.
    core("transformer.moe.moe_utils").te_general_gemm = None
    try:
        yield
    finally:
        parallel.destroy_model_parallel()
        parallel.destroy_global_memory_buffer()
        distributed.destroy_process_group()
        torch.cuda.current_device, torch.Tensor.cuda = before, cuda  # type: ignore[method-assign]


def config_of(**changes: Any) -> Any:
    """A `TransformerConfig` of a tiny model; its sizes are all different."""
    TransformerConfig = core("transformer").TransformerConfig

    sizes = {"num_layers": 3, "hidden_size": 60, "num_attention_heads": 9, "num_query_groups": 3, "kv_channels": 8}
    plain = {"use_cpu_initialization": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "ffn_hidden_size": 28}
    return TransformerConfig(**{**sizes, **plain, "params_dtype": torch.float64, **changes})


def gpt(config: Any, rank: int = 0, stages: int = 1, **given: Any) -> Any:
    """A `GPTModel`, or one stage of it."""
    GPTModel = core("models.gpt").GPTModel
    get_gpt_layer_local_spec = core("models.gpt.gpt_layer_specs").get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    position = "rope" if config.normalization == "RMSNorm" else "learned_absolute"
    model = GPTModel(
        config,
        spec,
        VOCABULARY,
        LENGTH,
        position_embedding_type=position,
        pre_process=rank == 0,
        post_process=rank == stages - 1,
        **given,
    )
    return model.to(config.params_dtype).eval()


def mamba(config: Any, pattern: str = PATTERN) -> Any:
    """A hybrid `MambaModel` of local modules."""
    with _stand_ins():
        block = core("ssm.mamba_block")
        mixer = core("ssm.mamba_mixer")
    get_bias_dropout_add = core("fusions.fused_bias_dropout").get_bias_dropout_add
    MambaModel = core("models.mamba").MambaModel
    MambaLayer = core("ssm.mamba_layer").MambaLayer
    MambaLayerSubmodules = core("ssm.mamba_layer").MambaLayerSubmodules
    MLPLayer = core("ssm.mlp_layer").MLPLayer
    ColumnParallelLinear = core("tensor_parallel").ColumnParallelLinear
    RowParallelLinear = core("tensor_parallel").RowParallelLinear
    SelfAttention = core("transformer.attention").SelfAttention
    SelfAttentionSubmodules = core("transformer.attention").SelfAttentionSubmodules
    DotProductAttention = core("transformer.dot_product_attention").DotProductAttention
    AttnMaskType = core("transformer.enums").AttnMaskType
    MLP = core("transformer.mlp").MLP
    MLPSubmodules = core("transformer.mlp").MLPSubmodules
    ModuleSpec = core("transformer.spec_utils").ModuleSpec
    WrappedTorchNorm = core("transformer.torch_norm").WrappedTorchNorm
    TransformerLayer = core("transformer.transformer_layer").TransformerLayer
    TransformerLayerSubmodules = core("transformer.transformer_layer").TransformerLayerSubmodules

    block.TENorm = WrappedTorchNorm  # the last norm, which the spec cannot choose
    mixing = mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    attending = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    attention = ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attending)
    mlp = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    layers = block.MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(mixer.MambaMixer, submodules=mixing),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
            ),
        ),
        mlp_layer=ModuleSpec(
            MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm, mlp=mlp, mlp_bda=get_bias_dropout_add
            ),
        ),
    )
    spec = ModuleSpec(block.MambaStack, submodules=layers)
    model = MambaModel(config, spec, VOCABULARY, LENGTH, hybrid_override_pattern=pattern)
    return model.to(config.params_dtype).eval()


def rebuilt(model: Any) -> Any:
    """A new model of the class, from the config of `model` alone, with its weights."""
    names = [field.name for field in dataclasses.fields(model.config) if field.init]
    config = type(model.config)(**{name: getattr(model.config, name) for name in names})
    given = {"share_embeddings_and_output_weights": model.share_embeddings_and_output_weights}
    pattern = getattr(model, "hybrid_override_pattern", None)
    new = gpt(config, **given) if pattern is None else mamba(config, pattern)
    new.load_state_dict(model.state_dict())
    return new


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, by Megatron's own arguments."""
    positions, mask = torch.arange(ids.shape[1]).expand_as(ids), torch.ones(1, 1, *[ids.shape[1]] * 2).triu(1) > 0
    with torch.no_grad():
        return model(ids, positions, mask)  # type: ignore[no-any-return]


def facts(model: nn.Module) -> dict[str, Any]:
    """All plain attributes of all modules, of their configs and helpers; shape and notes of all tensors."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(path: str, thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        for name, value in vars(thing).items():
            where = f"{path}.{name}"
            if name.startswith("_"):
                continue
            if isinstance(value, int | float | str | tuple | list):
                found[where] = value if not isinstance(value, tuple | list) else str(value)
            elif type(value).__module__.startswith("megatron.core") and not isinstance(value, nn.Module):
                seen.discard(id(value)) if name == "config" else None
                look(where, value) if hasattr(value, "__dict__") else None

    for path, module in model.named_modules():
        look(path, module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        notes = {key: value for key, value in vars(tensor).items() if not key.startswith("_")}
        found[name] = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad, str(notes))
    return found


def some_plan(space: Space, layer: str | None) -> Plan:
    """About a quarter less of every axis, as many of each group, not the last ones; and one layer."""
    kept = {}
    generator = torch.Generator().manual_seed(3)
    for axis in space.axes:
        stay = max(axis.per_group - max(1, axis.per_group // 4), 1)
        draws = [torch.randperm(axis.per_group, generator=generator)[:stay] for _ in range(axis.groups)]
        units = sorted(int(u) + g * axis.per_group for g, draw in enumerate(draws) for u in draw)
        kept[axis.name] = Kept(axis.kind, axis.size, tuple(units))
    return Plan(kept, (layer,) if layer else ())


# --- the oracle: what is gone is zero where it is read; written from Megatron's layouts, not from the Space ---


def expected(dense: Any, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the dense model without the units that a plan takes."""
    model = copy.deepcopy(dense, {id(g): g for g in _groups(dense)})
    units = {name: list(kept.units) for name, kept in plan.kept.items()}
    if "hidden" in units:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.register_forward_hook(_Norm(units["hidden"]))
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers):
            path = f"decoder.layers.{number}"
            _without_units(layer, path, units)
            if path in plan.dropped:
                layer.register_forward_hook(_skip, with_kwargs=True)
    return run(model, ids)


def _without_units(layer: Any, path: str, units: Mapping[str, Sequence[int]]) -> None:
    for name, module in layer.named_modules():
        where = f"{path}.{name}"
        if hasattr(module, "linear_qkv"):
            _only(module.linear_proj.weight, _head_columns(where, module, units))
        elif hasattr(module, "linear_fc2"):
            inside = where.partition(".local_experts")[0].removesuffix(".experts")
            kind = "expert_ffn" if "local_experts" in where else "ffn"
            kind = "shared_expert_ffn" if "shared" in where else kind
            _only(module.linear_fc2.weight, units.get(f"{inside}.{kind}"))
        elif hasattr(module, "A_log"):
            _mixer(where, module, units)
        elif hasattr(module, "gating") and f"{where.removesuffix('.router')}.experts" in units:
            module.gating = _Gating(module.gating, units[f"{where.removesuffix('.router')}.experts"])


def _only(weight: torch.Tensor, columns: Sequence[int] | None) -> None:
    if columns is not None:
        weight[:, [c for c in range(weight.shape[1]) if c not in set(columns)]] = 0


def _head_columns(where: str, module: Any, units: Mapping[str, Sequence[int]]) -> list[int]:
    width, groups = module.hidden_size_per_attention_head, module.num_query_groups_per_partition
    each = module.num_attention_heads_per_partition // groups
    kept_groups = units.get(f"{where}.kv_groups", range(groups))
    heads = units.get(f"{where}.heads", range(groups * each))
    if f"{where}.kv_groups" not in units and f"{where}.heads" not in units:
        heads = range(groups * each)
    return [h * width + i for h in heads if h // each in set(kept_groups) for i in range(width)]


def _mixer(where: str, module: Any, units: Mapping[str, Sequence[int]]) -> None:
    heads = units.get(f"{where}.ssm_heads", range(module.nheads))
    inside = units.get(f"{where}.ssm_head_dim", range(module.headdim))
    columns = [h * module.headdim + i for h in heads for i in inside]
    _only(module.out_proj.weight, columns)
    module.norm.forward = _GatedNorm(module.norm, columns, module.ngroups)


class _Norm:
    """A norm that sees the kept channels alone."""

    def __init__(self, kept: Sequence[int]) -> None:
        self.kept = list(kept)

    def __call__(self, module: Any, args: Any, _: Any) -> torch.Tensor:
        x, size = args[0][..., self.kept], [len(self.kept)]
        if isinstance(module, nn.LayerNorm):
            y = functional.layer_norm(x, size, module.weight[self.kept], module.bias[self.kept], module.eps)
        else:
            y = functional.rms_norm(x, size, module.weight[self.kept], module.eps)
        return torch.zeros_like(args[0]).index_copy(-1, torch.tensor(self.kept), y)


class _GatedNorm:
    """The same inside of a state-space layer."""

    def __init__(self, norm: Any, kept: Sequence[int], groups: int) -> None:
        self.norm, self.kept, self.groups = norm, list(kept), groups

    def __call__(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        gated = x if z is None else x * functional.silu(z)
        parts = torch.unflatten(gated[..., self.kept], -1, (self.groups, -1))
        parts = parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + self.norm.eps)
        y = parts.flatten(-2) * self.norm.weight[self.kept]
        return torch.zeros_like(x).index_copy(-1, torch.tensor(self.kept), y)


class _Gating:
    """A router that cannot choose removed experts."""

    def __init__(self, gating: Any, kept: Sequence[int]) -> None:
        self.gating, self.kept = gating, list(kept)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.gating(x)
        return torch.full_like(logits, -1e4).index_copy(-1, torch.tensor(self.kept), logits[..., self.kept])


def _skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _groups(model: nn.Module) -> list[Any]:
    helpers = [v for m in model.modules() for v in vars(m).values() if type(v).__module__.startswith("megatron.core")]
    values = [v for thing in (*model.modules(), *helpers) for v in vars(thing).values() if hasattr(thing, "__dict__")]
    return [v for v in values if "ProcessGroup" in type(v).__name__]


# --- pure torch in place of mamba_ssm, einops and Triton ---


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let `megatron.core.ssm` be imported: it takes what it finds, and keeps it."""
    norms, scans = "mamba_ssm.ops.triton.layernorm_gated", "mamba_ssm.ops.triton.ssd_combined"
    triton = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"
    modules: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")},
        norms: {"RMSNorm": GatedRMSNorm},
        scans: {"mamba_chunk_scan_combined": chunk_scan, "mamba_split_conv1d_scan_combined": split_conv1d_scan},
        "einops": {"rearrange": rearrange, "repeat": None},
        triton: dict.fromkeys(("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")),
    }
    before = {name: sys.modules.get(name) for name in modules}
    for name, content in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name, old in before.items():
            sys.modules.pop(name) if old is None else sys.modules.update({name: old})


def rearrange(x: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """`einops.rearrange`, as far as Megatron uses it."""
    left, right = (_dims(side) for side in pattern.split("->"))
    for names, size in zip(left, x.shape, strict=True):
        for name in names:
            rest = size
            for other in names:
                rest //= sizes.get(other, 1) if other != name else 1
            sizes.setdefault(name, 1 if name == "1" else rest)
    flat, order = list(itertools.chain(*left)), list(itertools.chain(*right))
    x = x.reshape([sizes[name] for name in flat])
    x = x.permute([flat.index(name) for name in (*order, *(n for n in flat if n not in order))])
    return x.reshape([math.prod(sizes[n] for n in names) for names in right])


def _dims(side: str) -> list[list[str]]:
    found: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            found += [[]] if inside else []
        elif inside:
            found[-1].append(word)
        else:
            found.append([word])
    return found


def chunk_scan(x: Any, dt: Any, a: Any, b: Any, c: Any, chunk_size: int, **given: Any) -> torch.Tensor:
    """The scan of Mamba-2, one step of time after the other."""
    dt = functional.softplus(dt + given["dt_bias"])
    state, each, steps = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[3]), x.shape[2] // b.shape[2], []
    for t in range(x.shape[1]):
        own_b, own_c = (v[:, t].repeat_interleave(each, 1)[:, :, None] for v in (b, c))
        state = state * torch.exp(dt[:, t] * a)[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * own_b
        steps.append((state * own_c).sum(-1) + given["D"][:, None] * x[:, t])
    y = torch.stack(steps, 1).to(x.dtype)
    return y if given.get("z") is None else y * functional.silu(given["z"])


def split_conv1d_scan(zxbcdt: Any, weight: Any, bias: Any, dt_bias: Any, a: Any, **given: Any) -> torch.Tensor:
    """The fused kernel that Megatron trains with: split, convolution, scan, gate."""
    width, groups = given["headdim"], given["ngroups"]
    inner = len(a) * width
    z, xbc, dt = torch.split(zxbcdt, [inner, len(weight), len(a)], -1)
    xbc = functional.conv1d(xbc.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
    xbc = functional.silu(xbc[..., : zxbcdt.shape[1]]).mT
    x, b, c = torch.split(xbc, [inner, *[(len(weight) - inner) // 2] * 2], -1)
    x, z = (torch.unflatten(v, -1, (-1, width)) for v in (x, z))
    b, c = (torch.unflatten(v, -1, (groups, -1)) for v in (b, c))
    return chunk_scan(x, dt, a, b, c, 0, D=given["D"], z=z, dt_bias=dt_bias).flatten(-2)


class GatedRMSNorm(nn.Module):
    """`mamba_ssm`'s norm of that kind."""

    def __init__(self, size: int, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        x = x if z is None else x * functional.silu(z)
        y = x.reshape(*x.shape[:-1], -1, self.group_size)
        return (y / torch.sqrt((y**2).mean(-1, keepdim=True) + self.eps)).reshape(x.shape) * self.weight
