"""Tiny random models, random plans for them, and the oracle: the original with the removed units zeroed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.choose.plan import Kept, Plan
from secateur.space import Axis, Space

VOCAB = 320
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gpt2", "gptj")
_BLOCK_KINDS = ("layers", "attention", "mlp")


def tiny(name: str, *, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0, **options: Any) -> Any:
    """A random causal language model of an architecture; options go to its config.

    Every parameter is away from its initial value, so that a norm's ones and a bias's zeros hide nothing.
    """
    config = AutoConfig.for_model(name, **_sizes(name, options))
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if device != "meta":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _sizes(name: str, options: dict[str, Any]) -> dict[str, Any]:
    sizes: dict[str, Any]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name in ("gpt2", "gptj"):
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80, "n_positions": 64}
    else:
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 80}
    if name == "gptj":
        sizes["rotary_dim"] = 4
    if name in ("gemma2", "gemma3_text", "qwen3"):
        sizes["head_dim"] = 20
    if name in ("gemma2", "gemma3_text"):
        # A window shorter than the test sequences, and layers that are not alike.
        sizes |= {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    if name == "gemma3_text":
        # Each type of layer has a rotary table of its own, so both types must be left after a drop.
        sizes |= {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return {"vocab_size": VOCAB, **special, **sizes, **options}


def tokens(batch: int = 2, length: int = 11, seed: int = 5) -> torch.Tensor:
    """Random token ids, int64 [batch, length]."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [batch, length, vocabulary], without gradient."""
    with torch.no_grad():
        result: torch.Tensor = model(ids, use_cache=False, **options).logits
    return result


def random_units(axis: Axis, generator: torch.Generator, share: float = 0.5) -> tuple[int, ...]:
    """About `share` of an axis, chosen anew in each group."""
    count = max(1, int(axis.per_group * share))
    units: list[int] = []
    for group in range(axis.groups):
        chosen = torch.randperm(axis.per_group, generator=generator)[:count] + group * axis.per_group
        units += chosen.tolist()
    return tuple(sorted(units))


def random_plan(space: Space, kinds: Sequence[str], seed: int = 1, share: float = 0.5) -> Plan:
    """Cut every axis of these kinds, each in its own way, and drop one block of each block kind."""
    generator = torch.Generator().manual_seed(seed)
    kept = {a.name: Kept(a.kind, a.size, random_units(a, generator, share)) for a in space.axes if a.kind in kinds}
    dropped: list[str] = []
    for kind in kinds:
        if kind in _BLOCK_KINDS:
            own = [b.name for b in space.blocks if b.kind == kind and not b.name.startswith(tuple(dropped) or "\0")]
            dropped.append(own[-1 if kind == "mlp" else 0])
    return Plan(kept, tuple(dropped))


class MaskedNorm(nn.Module):
    """A norm over the kept units alone; the others come out as zeros."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor) -> None:
        super().__init__()
        self.kept = kept
        self.norm = copy.deepcopy(norm)
        for name, parameter in list(self.norm.named_parameters(recurse=False)):
            setattr(self.norm, name, nn.Parameter(parameter.detach()[kept]))
        if hasattr(self.norm, "normalized_shape"):
            setattr(self.norm, "normalized_shape", (len(kept),))  # noqa: B010  # typed as a tensor or a module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        result[..., self.kept] = self.norm(x[..., self.kept])
        return result


def zeroed(model: Any, space: Space, plan: Plan) -> Any:
    """A copy of the dense model, with the shapes of the dense model, that computes what the cut model should.

    Removed units are zeros in the weights that read them; norms see the kept units alone; dropped blocks add nothing.
    What keys and queries share has no weight that reads it, so removed head dimensions are zeroed where they are made.
    """
    reference = copy.deepcopy(model)
    parameters = dict(reference.named_parameters())
    for name, kept in plan.kept.items():
        axis = space.axis(name)
        gone = torch.tensor([u for u in range(axis.size) if u not in kept.units], dtype=torch.int64)
        places = axis.slices if axis.kind == "head_dim" else [part for _, part in space.consumers(axis)]
        for part in places:
            with torch.no_grad():
                parameters[part.parameter].index_fill_(part.dim, part.rows()[gone].flatten(), 0)
        for norm in space.norms:
            if norm.axis == name:
                masked = MaskedNorm(reference.get_submodule(norm.module), torch.tensor(kept.units))
                reference.set_submodule(norm.module, masked)
    for block in space.blocks:
        if block.name in plan.dropped:
            hook = _pass_through if block.kind == "layers" else _add_nothing
            reference.get_submodule(block.name).register_forward_hook(hook, with_kwargs=True)
    for block in space.blocks:
        if block.name in plan.dropped:
            for idle in block.idle:
                _without_statistics(reference, idle)
    return reference


def _without_statistics(reference: Any, module: str) -> None:
    """The norm of a dropped sub-layer: zeros go in, and a norm of zeros with a bias would not give zeros."""

    def zeros(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    reference.get_submodule(module).register_forward_hook(zeros)


def _pass_through(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _add_nothing(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
