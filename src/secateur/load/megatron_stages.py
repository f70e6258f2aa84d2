"""Pipeline parallelism of Megatron-Core: every process knows the whole model, and holds the tensors of its own stage.

The other stages' layers stand in their places without memory (on the meta device), so a plan is one for the whole
model, made of the same Space as in a single process. A forward pass hands activations from stage to stage; the last
one gives its logits to all, so that every process measures, and decides, the same.
"""

import copy
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from secateur import world
from secateur.errors import SecateurError

_LAST = (("decoder", "final_layernorm"), ("decoder", "final_norm"), ("", "output_layer"))
"""Parts that the last stage has alone: (where, name)."""


@dataclass(frozen=True)
class Stages:
    """Which stage of how many this process holds."""

    number: int
    count: int
    tied: bool
    """Whether the projection to the vocabulary is the embedding, of which the last stage has a copy."""

    @property
    def first(self) -> bool:
        """Whether tokens come in here."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether logits come out here."""
        return self.number == self.count - 1

    def run(self, inner: Any, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One forward pass through all stages: the logits [batch, sequence, vocabulary], in every process.

        All processes must call this in the same order with the same arguments.
        """
        decoder, batch, length = inner.decoder, *arguments[0].shape
        whole = (decoder._modules["layers"], _parts(inner), inner.pre_process, inner.post_process)
        weight = next(p for p in inner.parameters() if not p.is_meta)
        self._only_own(inner)
        try:
            if not self.first:
                width, like = inner.config.hidden_size, inner.config
                dtype = torch.float32 if getattr(like, "fp32_residual_connection", False) else weight.dtype
                hidden = torch.empty(length, batch, width, dtype=dtype, device=weight.device)
                distributed.recv(hidden, self.number - 1)
                inner.set_input_tensor(hidden)
            out: torch.Tensor = inner(*arguments)
            if not self.last:
                distributed.send(out.contiguous(), self.number + 1)
                out = torch.empty(batch, length, inner.vocab_size, dtype=weight.dtype, device=weight.device)
        finally:
            decoder._modules["layers"] = whole[0]
            inner.pre_process = decoder.pre_process = whole[2]
            inner.post_process = decoder.post_process = whole[3]
            for (where, name), part in whole[1].items():
                setattr(_at(inner, where), name, part)
            decoder.input_tensor = None
            if self.tied:
                inner.output_layer.weight = None
        out = out.contiguous()
        world.send([out], self.count - 1)
        return out

    def _only_own(self, inner: Any) -> None:
        """Leave this stage's parts alone in a model."""
        decoder = inner.decoder
        own = [layer for layer in decoder.layers if layer.pipeline_stage == self.number]
        decoder._modules["layers"] = nn.ModuleList(own)
        inner.pre_process = decoder.pre_process = self.first
        inner.post_process = decoder.post_process = self.last
        if self.tied and self.last:
            inner.output_layer.weight = inner.embedding.word_embeddings.weight
        for where, name in _LAST if not self.last else ():
            if name in _at(inner, where)._modules:
                setattr(_at(inner, where), name, None)

    def parted(self, inner: Any) -> None:
        """Make of a whole model this stage of it, in place; its layers keep their numbers."""
        decoder, config = inner.decoder, inner.config
        counts = [sum(layer.pipeline_stage == stage for layer in decoder.layers) for stage in range(self.count)]
        self._only_own(inner)
        for where, name in _LAST if not self.last else ():
            holder = _at(inner, where)
            if name in holder._modules:
                delattr(holder, name)
        if not self.last and hasattr(type(decoder), "_build_layers"):
            decoder.final_layernorm = None
        if not self.first:
            del inner.embedding
        places = [layer.__dict__.pop("place_in_stage") for layer in decoder.layers]
        for layer in decoder.layers:
            del layer.pipeline_stage
        _cut_lists(inner, places)
        decoder.num_layers_per_pipeline_rank = len(places)
        if len(set(counts)) > 1 or getattr(config, "num_layers_in_first_pipeline_stage", None) is not None:
            config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage = counts[0], counts[-1]


def stage_count(model: Any) -> int:
    """Pipeline stages of a model; 1 without pipeline parallelism."""
    group = getattr(getattr(model, "pg_collection", None), "pp", None)
    return group.size() if group is not None else 1


def joined(shell: Any) -> tuple[Any, Stages]:
    """The whole model around one stage of it, in place: the other stages' parts on the meta device. A collective call.

    Raises:
        SecateurError: where the processes are more than the stages.
    """
    count, number = stage_count(shell), shell.pg_collection.pp.rank()
    if count != world.size():
        raise SecateurError(
            f"{world.size()} processes for {count} pipeline stages: prune with one process for each stage, without "
            "data, tensor or expert parallelism"
        )
    tied = bool(shell.share_embeddings_and_output_weights)
    stages = Stages(number, count, tied)
    for place, layer in enumerate(shell.decoder.layers):
        layer.pipeline_stage, layer.place_in_stage = number, place
    shell.decoder.own_layer_count = len(shell.decoder.layers)
    own = list(shell.decoder.layers)
    found = world.gathered(_packed(shell, (own, _parts(shell))))
    every = [(own, _parts(shell)) if stage == number else _unpacked(shell, text) for stage, text in enumerate(found)]
    shell.decoder.layers = nn.ModuleList([layer for layers, _ in every for layer in layers])
    if not stages.first:
        shell.add_module("embedding", every[0][1]["", "embedding"])
        shell._modules = {"embedding": shell._modules.pop("embedding"), **shell._modules}
    if not stages.last:
        for (where, name), part in every[-1][1].items():
            if (where, name) in _LAST:
                setattr(_at(shell, where), name, part)
    elif tied:
        shell.embedding.word_embeddings.weight = shell.output_layer.weight
    if tied:
        shell.output_layer.weight = None
    for holder in (shell, shell.decoder):
        holder.pre_process = holder.post_process = True
    return shell, stages


def _at(model: Any, where: str) -> Any:
    return getattr(model, where) if where else model


def _parts(model: Any) -> dict[Any, Any]:
    """Parts outside of the layers that only some stages have."""
    return {
        (where, name): _at(model, where)._modules[name]
        for where, name in (("", "embedding"), *_LAST)
        if _at(model, where)._modules.get(name) is not None
    }


def _cut_lists(inner: Any, places: Sequence[int]) -> None:
    """Lists with an entry for each layer of the stage lose those that are gone."""
    decoder = inner.decoder
    dense = decoder.__dict__.pop("own_layer_count")
    if isinstance(getattr(decoder, "layer_type_list", None), list) and len(decoder.layer_type_list) == dense:
        decoder.layer_type_list = [decoder.layer_type_list[place] for place in places]
    specs = getattr(getattr(decoder, "submodules", None), "layer_specs", None)
    if isinstance(specs, list) and len(specs) == dense:
        decoder.submodules = copy.copy(decoder.submodules)
        decoder.submodules.layer_specs = [specs[place] for place in places]


def _packed(shell: Any, parts: Any) -> bytes:
    """Parts of a model without their tensors' values, as bytes."""
    file = io.BytesIO()
    _Pickler(file, shell).dump(parts)
    return file.getvalue()


def _unpacked(shell: Any, data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data), shell).load()


class _Pickler(pickle.Pickler):
    """Leaves out what every process has of its own, or nobody needs for a trace."""

    def __init__(self, file: Any, shell: Any) -> None:
        super().__init__(file)
        self.config = type(shell.config)

    def persistent_id(self, thing: Any) -> Any:
        """A name for what is not written."""
        if isinstance(thing, self.config):
            return "config"
        if isinstance(thing, distributed.ProcessGroup):
            return "group"
        if type(thing).__name__ == "ProcessGroupCollection":
            return "groups"
        if type(thing).__module__ == "torch.nn.modules.module" and type(thing).__name__ == "_WrappedHook":
            return "nothing"
        if callable(thing) and getattr(thing, "__qualname__", "").endswith("<lambda>"):
            return "nothing"
        return None

    def reducer_override(self, thing: Any) -> Any:
        """Tensors are written as those without values."""
        if isinstance(thing, torch.Tensor):
            kind = "parameter" if isinstance(thing, nn.Parameter) else "tensor"
            return _hollow, (kind, tuple(thing.shape), str(thing.dtype), thing.requires_grad)
        return NotImplemented


def _hollow(kind: str, shape: tuple[int, ...], dtype: str, trained: bool) -> torch.Tensor:
    new = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
    return nn.Parameter(new, trained) if kind == "parameter" else new


class _Unpickler(pickle.Unpickler):
    """Puts in this process's own things."""

    def __init__(self, file: Any, shell: Any) -> None:
        super().__init__(file)
        groups = shell.pg_collection
        self.own = {"config": shell.config, "groups": groups, "group": groups.tp, "nothing": None}

    def persistent_load(self, name: Any) -> Any:
        """What stands for a name here."""
        return self.own[name]
