"""What has to be otherwise in Megatron-Core while a model of it is traced: no kernels, no buffers that are kept."""

import copy
import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from secateur.load.megatron import Opened

_FUSED = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "moe_router_fusion",
    "moe_permute_fusion",
)


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Let torch.export go through an `Opened` model; the caller gives modules their attributes back in the end.

    Fused kernels are off, caches that would keep fake tensors are passed by, and the scan of state-space layers is the
    plain one below. For any other model nothing happens.
    """
    if not isinstance(model, Opened):
        yield
        return
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "hidden_size")}
    kept: list[tuple[Any, str, Any]] = []

    def put(holder: Any, name: str, value: Any) -> None:
        kept.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    device = next(model.parameters()).device
    for config in configs.values():
        for name in _FUSED:
            if getattr(config, name, False):
                put(config, name, False)
    put(_module("megatron.core.parallel_state"), "get_global_memory_buffer", lambda: _Fresh(device))
    put(_module("megatron.core.tensor_parallel.random"), "_CUDA_RNG_STATE_TRACKER", _NoTracker())
    for code in [m for name, m in list(sys.modules.items()) if name.startswith("megatron.core.")]:
        if hasattr(code, "make_viewless_tensor"):
            put(code, "make_viewless_tensor", _as_is)
    mixers = sys.modules.get("megatron.core.ssm.mamba_mixer")
    if mixers is not None:
        put(mixers, "causal_conv1d_fn", None)
        put(mixers, "mamba_chunk_scan_combined", chunk_scan)
    try:
        for module in model.modules():
            _plain(module, device)
        yield
    finally:
        for holder, name, value in reversed(kept):
            setattr(holder, name, value)


def unheld(model: nn.Module, arguments: Any) -> tuple[nn.Module, Any]:
    """A model of which this process holds one stage, and arguments for it, as meta tensors; else both as they are."""
    if not isinstance(model, Opened) or model.stages is None:
        return model, arguments
    moved = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, arguments)
    return model.hollow(), moved


def _module(name: str) -> Any:
    return sys.modules[name]


def _own_tensors(mixer: Any) -> Any:
    """The mixer's helper, which keeps parameters outside of the mixer, where torch.export does not find them."""
    helper = copy.copy(mixer.cp)
    for name in ("A_log", "D", "dt_bias"):
        setattr(helper, f"get_{name}", functools.partial(getattr, mixer, name))
    return helper


def _as_is(inp: torch.Tensor, requires_grad: bool, keep_graph: bool) -> torch.Tensor:
    return inp


def _plain(module: Any, device: torch.device) -> None:
    """Attributes of one module, for as long as it is traced."""
    name = type(module).__name__
    if name.endswith("RotaryEmbedding"):
        forward = getattr(type(module).forward, "__wrapped__", type(module).forward)  # a cache of the class's own
        module.forward = forward.__get__(module)
        for key in ("inv_freq", "inv_freq_fast", "inv_freq_extra", "inv_freq_inter"):
            if isinstance(getattr(module, key, None), torch.Tensor):
                setattr(module, key, getattr(module, key).to(device))
    elif "routing_type" in vars(module):
        module.gating = lambda x: _gating(module, x)
        module._maintain_float32_expert_bias = lambda: None
    elif hasattr(module, "bias_dropout_add_exec_handler"):
        module.bias_dropout_add_exec_handler = nullcontext  # turns gradients on, which would hide its operators
    elif name == "FusedScaleMaskSoftmax":
        module.scaled_masked_softmax_fusion = False
    elif "A_log" in module._parameters:
        module.use_mem_eff_path = False
        module.cp = _own_tensors(module)
        if getattr(module, "norm", None) is not None:
            norm, groups = module.norm, module.ngroups
            norm.forward = lambda x, z=None: gated_norm(x, z, norm.weight, groups, norm.eps)


def _gating(router: Any, x: torch.Tensor) -> torch.Tensor:
    """The logits of a router, without the move of its weights to the current GPU."""
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(router.config.moe_router_dtype, x.dtype)
    bias = None if router.bias is None else router.bias.to(dtype)
    return functional.linear(x.to(dtype), router.weight.to(dtype), bias)


class _Fresh:
    """In place of Megatron's global buffers: a new tensor each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def get_tensor(self, shape: Any, dtype: torch.dtype, name: str, *_: Any) -> torch.Tensor:
        """A tensor that is not set."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


class _NoTracker:
    """In place of Megatron's random states, which a model in evaluation mode does not draw from."""

    def fork(self, *_: Any) -> Any:
        """Nothing."""
        return nullcontext()


def chunk_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chunk_size: int, **given: Any
) -> torch.Tensor:
    """What `mamba_ssm`'s kernel of that name computes, in one chunk of plain operators.

    Args:
        x: [batch, length, heads, head_dim].
        dt: [batch, length, heads].
        a: [heads], negative.
        b: [batch, length, groups, state].
        c: the same.
        chunk_size: not used.
        given: D [heads] or [heads, head_dim], z, dt_bias, dt_softplus.
    """
    dt = functional.softplus(dt + given["dt_bias"]) if given.get("dt_softplus") else dt + given["dt_bias"]
    length, heads, groups = x.shape[1], x.shape[2], b.shape[2]
    decay = torch.cumsum(dt * a, 1)
    gap = (decay[:, :, None] - decay[:, None]).permute(0, 3, 1, 2)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    weight = torch.exp(gap.masked_fill(later, -math.inf))
    b, c = (v.repeat_interleave(heads // groups, dim=2) for v in (b, c))
    scores = torch.einsum("bthn,bshn->bhts", c, b) * weight * dt.transpose(1, 2)[:, :, None]
    y: torch.Tensor = torch.einsum("bhts,bshp->bthp", scores.to(x.dtype), x)
    skip: torch.Tensor = given["D"]
    y = y + x * (skip[:, None] if skip.dim() == 1 else skip)
    return y if given.get("z") is None else y * functional.silu(given["z"])


def gated_norm(x: torch.Tensor, z: torch.Tensor | None, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """`mamba_ssm`'s gated RMS norm: the gate first, a statistic for each group."""
    x = x if z is None else x * functional.silu(z)
    parts = torch.unflatten(x, -1, (groups, -1))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return parts.flatten(-2) * weight
