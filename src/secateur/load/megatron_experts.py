"""Mixtures of experts of Megatron-Core with the experts' weights stacked, and back to one module for each."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError

_HIDDEN = ("moe_latent_size", "moe_apply_probs_on_input", "moe_shared_expert_overlap", "use_te_activation_func")


@torch.library.custom_op("secateur::grouped_product", mutates_args=())
def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of `x`, sorted by expert, times that expert's own matrix: [rows, in] x [experts, in, out] -> [rows, out].

    Args:
        x: rows, those of the first expert first.
        weight: a matrix for each expert.
        ends: int [experts], the row after each expert's last one.
    """
    out = x.new_zeros(len(x), weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end] @ weight[expert]
        start = end
    return out


@grouped_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    of_weight, start = torch.zeros_like(weight), 0
    for expert, end in enumerate(ends.tolist()):
        of_weight[expert] = x[start:end].T @ grad[start:end]
        start = end
    return grouped_product(grad, weight.transpose(1, 2), ends), of_weight, None


grouped_product.register_autograd(_backward, setup_context=_save)


class StackedExperts(nn.Module):
    """The experts of one layer, their weights in one tensor each."""

    def __init__(self, experts: Any, config: Any) -> None:
        super().__init__()
        self.config, self.num_experts = config, len(experts.local_experts)
        for name in ("linear_fc1", "linear_fc2"):
            linears = [getattr(expert, name) for expert in experts.local_experts]
            stack = torch.stack([linear.weight.detach() for linear in linears])
            setattr(self, name.removeprefix("linear_"), nn.Parameter(stack, linears[0].weight.requires_grad))
            bias = None if linears[0].bias is None else torch.stack([linear.bias.detach() for linear in linears])
            self.register_parameter(
                f"{name.removeprefix('linear_')}_bias", bias if bias is None else nn.Parameter(bias)
            )

    fc1_bias: nn.Parameter | None
    fc2_bias: nn.Parameter | None
    fc1: nn.Parameter
    """[experts, inner (twice where gated), hidden]"""
    fc2: nn.Parameter
    """[experts, hidden, inner]"""

    def forward(self, x: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Sum over each token's experts of gate times result [tokens, hidden].

        Args:
            x: [tokens, hidden].
            index: the numbers of each token's experts [tokens, k].
            gate: [tokens, k].
        """
        top_k = index.shape[1]
        sorted_experts, order = torch.sort(index.reshape(-1))
        counts = torch.histc(sorted_experts.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = x[order // top_k]
        made = grouped_product(rows, self.fc1.transpose(1, 2), ends)
        if self.fc1_bias is not None:
            made = made + self.fc1_bias[sorted_experts]
        out = grouped_product(self._activated(made), self.fc2.transpose(1, 2), ends)
        if self.fc2_bias is not None:
            out = out + self.fc2_bias[sorted_experts]
        out = out * gate.reshape(-1)[order].to(out.dtype)[:, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        summed: torch.Tensor = out[back].view(x.shape[0], top_k, x.shape[1]).sum(1)
        return summed

    def _activated(self, made: torch.Tensor) -> torch.Tensor:
        if not self.config.gated_linear_unit:
            return self.config.activation_func(made)  # type: ignore[no-any-return]
        gate, up = torch.chunk(made, 2, dim=-1)
        limit = getattr(self.config, "activation_func_clamp_value", None)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        offset = getattr(self.config, "glu_linear_offset", 0.0)
        return self.config.activation_func(gate) * (up + offset)  # type: ignore[no-any-return]


class OpenMixture(nn.Module):
    """A `MoELayer` with stacked experts: the same router and shared experts, no dispatching.

    Raises:
        SecateurError: for a layer that does more than route, run its experts and add them up.
    """

    def __init__(self, layer: Any, path: str) -> None:
        super().__init__()
        config = layer.config
        odd = next((name for name in _HIDDEN if getattr(config, name, None)), None)
        if type(layer.experts).__name__ != "SequentialMLP" or odd is not None:
            what = f"{odd} is set" if odd else f"its experts are a {type(layer.experts).__name__}, not a SequentialMLP"
            raise SecateurError(f"{path} cannot be worked on: {what}")
        self.config = config
        self.router = layer.router
        self.experts = StackedExperts(layer.experts, config)
        if layer.shared_experts is not None:
            self.shared_experts = layer.shared_experts
        self.training, self.experts.training = layer.training, layer.experts.training
        self._layer = (layer,)  # its shell, for the way back
        first = layer.experts.local_experts[0]
        self._notes = {  # what Megatron has noted on each parameter; a copy of it would forget
            (name, own): dict(vars(parameter))
            for name in ("linear_fc1", "linear_fc2")
            for own, parameter in getattr(first, name).named_parameters()
        }
        layer.router = layer.shared_experts = None
        for module in layer.experts.modules():
            for name in ("weight", "bias"):
                if isinstance(getattr(module, name, None), nn.Parameter):
                    setattr(module, name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        """What the layer gives for [sequence, batch, hidden], and no bias."""
        length, batch, width = hidden_states.shape
        rows = hidden_states.transpose(0, 1).contiguous()
        gates, _ = self.router(rows)
        gate, index = gates.topk(self.router.topk, dim=-1)
        mixed = self.experts(rows.reshape(batch * length, width), index, gate)
        mixed = mixed.view(batch, length, width).transpose(0, 1)
        shared = getattr(self, "shared_experts", None)
        return (mixed if shared is None else mixed + shared(hidden_states)), None

    def unopened(self) -> Any:
        """The `MoELayer` that this was made of, with its experts as they are now."""
        return _unopened(self)


def _unopened(mixture: OpenMixture) -> Any:
    layer, stacked = mixture._layer[0], mixture.experts
    layer.router = mixture.router
    layer.shared_experts = getattr(mixture, "shared_experts", None)
    layer.layer_number = layer.router.layer_number
    experts = list(layer.experts.local_experts)[: len(stacked.fc1)]
    for number, expert in enumerate(experts):
        for name in ("fc1", "fc2"):
            linear = getattr(expert, f"linear_{name}")
            trained = getattr(stacked, name).requires_grad
            for own, stack in (("weight", getattr(stacked, name)), ("bias", getattr(stacked, f"{name}_bias"))):
                if stack is not None:
                    new = nn.Parameter(stack[number].detach().clone(), trained)
                    vars(new).update(mixture._notes[f"linear_{name}", own])
                    setattr(linear, own, new)
    layer.experts.local_experts = nn.ModuleList(experts)
    layer.experts.train(stacked.training)
    layer.training = mixture.training
    layer.num_local_experts = layer.experts.num_local_experts = len(experts)
    layer.local_expert_indices = list(range(len(experts)))
    layer.token_dispatcher = _dispatcher(layer)
    return layer


def _dispatcher(layer: Any) -> Any:
    """A dispatcher of tokens for as many experts as the layer has."""
    old = layer.token_dispatcher
    config = copy.copy(layer.config)
    config.num_moe_experts = layer.num_local_experts
    groups = SimpleNamespace(ep=old.ep_group, expt_tp=old.tp_group, tp_ep=old.tp_ep_group)
    new = type(old)(layer.num_local_experts, layer.local_expert_indices, config=config, pg_collection=groups)
    new.config = layer.config
    return new
