"""Megatron-Core models, in a form that all of secateur works on, and back.

A `GPTModel` or `MambaModel` wants positions and a mask beside its tokens, keeps each expert in modules of its own, and
under pipeline parallelism is one stage of a model. `opened` makes one module of it that takes token ids and returns
logits, with the experts' weights stacked and the other stages in their places; `closed` gives the model back, of the
same class, whose configs and attributes say the sizes of its tensors. Nothing here imports Megatron: the model's own
modules are there already.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.megatron_sizes import KINDS, fit
from secateur.load.megatron_stages import Stages, joined, stage_count

CLASSES = ("GPTModel", "MambaModel")


def is_megatron(model: Any) -> bool:
    """Whether a model is one of Megatron-Core's language models, by the names of its classes."""
    return any(c.__module__.startswith("megatron.core.models.") and c.__name__ in CLASSES for c in type(model).__mro__)


def opened(model: nn.Module) -> nn.Module:
    """A Megatron-Core model as an `Opened` one that shares its tensors; any other model as it is.

    Stacked experts are copies of the experts' weights. Under pipeline parallelism all stages must call this.

    Raises:
        SecateurError: for tensor, context or expert parallelism, and parts of other than the local layer specs.
    """
    if not is_megatron(model):
        return model
    _check(model)
    shell = copy.deepcopy(model, _shared(model))
    for parameter, old in zip(shell.parameters(), model.parameters(), strict=True):
        if parameter is not old:
            raise SecateurError(f"{type(model).__name__} copies its parameters: it cannot be worked on")
    for path, module in list(shell.named_modules()):
        if type(module).__name__ == "MoELayer":
            from secateur.load.megatron_experts import OpenMixture  # makes an operator, which few need

            shell.set_submodule(path, OpenMixture(module, path))
    return Opened(*joined(shell)) if stage_count(model) > 1 else Opened(shell, None)


def closed(model: nn.Module) -> nn.Module:
    """What `opened` was given, or what has been made of it since; any other model as it is."""
    if not isinstance(model, Opened):
        return model
    own: nn.Module = copy.deepcopy(model, _shared(model)).inner
    own.training = model.training
    for path, module in list(own.named_modules()):
        if hasattr(module, "unopened"):
            own.set_submodule(path, module.unopened())
    fit(own)
    if model.stages is not None:
        model.stages.parted(own)
    return own


class Opened(nn.Module):
    """A whole language model of Megatron-Core: token ids in, logits out, names as in the model itself.

    Attributes:
        config: the model's `TransformerConfig`, with the names that secateur asks for.
        stages: who has which layers; None without pipeline parallelism.
    """

    sequence_first = True
    """Activations are [sequence, batch, channels]."""

    def __init__(self, inner: nn.Module, stages: Stages | None) -> None:
        super().__init__()
        self._inner = (inner,)  # a tuple: its parts are registered under their own names
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.config, self.stages = Names(inner), stages
        self.training = inner.training

    @property
    def inner(self) -> Any:
        """The model of Megatron-Core; its parts are this one's."""
        return self._inner[0]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool | None = None
    ) -> torch.Tensor:
        """Logits [batch, sequence, vocabulary] of token ids [batch, sequence]; of the last stage, in every process.

        Args:
            input_ids: token ids.
            attention_mask: [batch, sequence], zeros where a position is padding; None = there is none.
            use_cache: not used; Hugging Face models take it.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = (positions[:, None] < positions)[None, None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None, None]
        arguments = (input_ids, positions.expand_as(input_ids), hidden)
        if self.stages is not None and not input_ids.is_meta and not torch.compiler.is_exporting():
            return self.stages.run(self.inner, arguments)
        return self.inner(*arguments)  # type: ignore[no-any-return]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters; those that this process holds come first, since the first tells where inputs belong."""
        yield from sorted(super().parameters(recurse), key=lambda parameter: parameter.is_meta)

    def hollow(self) -> "Opened":
        """A copy without values, all on the meta device: that is how a stage knows the others."""
        memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in self.buffers()}
        memo |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in self.parameters()}
        return copy.deepcopy(self, memo)

    def fit(self) -> None:
        """Make configs and attributes agree with the sizes that the tensors have."""
        fit(self.inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Opened":
        """Process groups are not copied."""
        memo |= {id(group): group for group in _groups(self)}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new


class Names:
    """A `TransformerConfig` as the rest of secateur asks for it: the model's lengths beside, sizes by its own names."""

    size_names = KINDS
    """Kind -> field of the config."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._model.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence."""
        return int(self._model.max_sequence_length)

    def __getattr__(self, name: str) -> Any:
        """The config's own fields."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model.config, name)


def token_batch(batch: Any) -> dict[str, torch.Tensor]:
    """What an `Opened` model takes, from what Megatron's forward does or from plain tokens.

    Args:
        batch: token ids [batch, sequence]; (ids, positions, mask); or a mapping with ``input_ids``.

    Raises:
        SecateurError: for positions that do not count from 0, and masks that are not causal or of padding.
    """
    if isinstance(batch, torch.Tensor):
        return {"input_ids": batch}
    named = dict(batch) if isinstance(batch, Mapping) else dict(zip(_ARGUMENTS, batch, strict=False))
    ids = named.pop("input_ids", named.pop("tokens", None))
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise SecateurError("a batch for a Megatron model has token ids [batch, sequence] as input_ids")
    positions, mask = named.pop("position_ids", None), named.pop("attention_mask", None)
    if positions is not None and not bool((positions == torch.arange(ids.shape[1], device=positions.device)).all()):
        raise SecateurError("position_ids must count from 0 in every row: packed sequences are not supported")
    result = {"input_ids": ids, **{k: v for k, v in named.items() if k == "labels" and v is not None}}
    if mask is not None and mask.dim() == 2:
        result["attention_mask"] = mask
    elif mask is not None:
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
        if mask.dtype != torch.bool or not bool((mask == causal).all()):
            raise SecateurError("attention_mask must be the causal one, or [batch, sequence] with zeros for padding")
    return result


def token_inputs(inputs: Any) -> Any:
    """Arguments of one forward pass for an `Opened` model; None stays None."""
    return None if inputs is None else token_batch(inputs)


def token_batches(data: Any) -> Any:
    """Data for an `Opened` model: batches are turned with `token_batch`, anything else stays."""
    if data is None or isinstance(data, str | Path | torch.Tensor):
        return data
    return [token_batch(batch) for batch in data]


_ARGUMENTS = ("input_ids", "position_ids", "attention_mask")


def _check(model: Any) -> None:
    config = model.config
    for field in ("tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"):
        if getattr(config, field, 1) > 1:
            raise SecateurError(f"{field} is {getattr(config, field)}: a Megatron model is pruned with 1; load it so")
    if getattr(config, "virtual_pipeline_model_parallel_size", None) is not None or hasattr(model, "mtp"):
        raise SecateurError("virtual pipeline stages and multi-token prediction are not supported")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("transformer_engine", "megatron.core.extensions.transformer_engine")):
            raise SecateurError(
                f"{path} is a {type(module).__name__} of Transformer Engine: build the model with the local layer spec"
            )


def _groups(model: nn.Module) -> Iterator[Any]:
    """Process groups, and what holds them: neither can be copied."""
    waiting: list[Any] = [model]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, torch.Tensor):
            continue
        seen.add(id(found))
        if isinstance(found, torch.distributed.ProcessGroup) or type(found).__name__ == "ProcessGroupCollection":
            yield found
        elif isinstance(found, dict | list | tuple):
            waiting += found.values() if isinstance(found, dict) else found
        elif isinstance(found, nn.Module) or type(found).__module__.startswith("megatron.core"):
            waiting.append(getattr(found, "__dict__", None))


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a copy of a model has in common with it: its tensors and process groups."""
    tensors = [*model.parameters(), *model.buffers()]
    return {id(shared): shared for shared in (*tensors, *_groups(model))}
