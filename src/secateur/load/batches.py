"""Batches of any model: token rows, (inputs, targets) pairs, or mappings of arguments; and the loss of one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError

Batch = torch.Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any]
"""A tensor, a mapping of keyword arguments (with ``labels`` or without), or a pair (inputs, targets)."""

_IGNORED = -100


def is_pair(batch: Batch) -> bool:
    """Whether the batch is (inputs, targets), as data loaders of classifiers give it."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)


def size_of(batch: Batch) -> int:
    """Samples in a batch: the first size of its first tensor."""
    first = next((x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor) and x.dim()), None)
    if first is None:
        raise SecateurError(f"a batch of type {type(batch).__name__} holds no tensor")
    return len(first)


def samples_of(batch: Batch) -> list[Batch]:
    """The batch as batches of one sample; whole, where its tensors do not agree on how many there are."""
    leaves, structure = pytree.tree_flatten(batch if not isinstance(batch, Mapping) else dict(batch))
    counts = {len(x) if x.dim() else 0 for x in leaves if isinstance(x, torch.Tensor)}
    if len(counts) != 1 or counts == {0}:
        return [batch]
    return [
        pytree.tree_unflatten([x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in leaves], structure)
        for i in range(counts.pop())
    ]


def run(model: nn.Module, batch: Batch, *, labels: bool = False) -> Any:
    """What the model returns for a batch, on the model's device; Hugging Face models run without a cache.

    Args:
        model: any module.
        batch: see `Batch`; the targets of a pair are left out.
        labels: whether the ``labels`` of a mapping are handed to the model.

    Raises:
        SecateurError: for a batch of another form.
    """
    if isinstance(batch, tuple | list) and not is_pair(batch):
        raise SecateurError(f"a batch is a tensor, a mapping or a pair (inputs, targets), not {len(batch)} things")
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = pytree.tree_map(lambda x: x.to(place) if isinstance(x, torch.Tensor) else x, inputs)
    if isinstance(inputs, Mapping):
        named = {key: value for key, value in inputs.items() if labels or key != "labels"}
        return model(**{**_no_cache(model), **named})
    if isinstance(inputs, torch.Tensor) and hasattr(model, "config"):
        return model(**{str(getattr(model, "main_input_name", "input_ids")): inputs}, **_no_cache(model))
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {"use_cache": False} if getattr(text, "use_cache", None) is not None else {}


def output_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of a batch: the tensor that the model returns, or its ``.logits``.

    Raises:
        SecateurError: for another result.
    """
    result = run(model, batch)
    logits = getattr(result, "logits", result)
    if not isinstance(logits, torch.Tensor):
        raise SecateurError(
            f"{type(model).__name__} returns a {type(result).__name__}, not logits: give a loss of your own"
        )
    return logits


def default_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch.

    (inputs, targets): cross entropy with whole-number targets. Token rows of a Hugging Face language model: its own
    next-token loss, padding left out. Mappings with ``labels``: the model's own loss.

    Raises:
        SecateurError: where it is not clear what the loss is.
    """
    hint = "give a loss: a function (model, batch) -> tensor"
    if isinstance(batch, tuple | list):
        logits, targets = output_of(model, batch), batch[1].to(next(model.parameters()).device)
        return class_loss(logits, targets, hint)
    if not hasattr(model, "config"):
        raise SecateurError(f"a batch for {type(model).__name__} must be a pair (inputs, targets), or {hint}")
    named = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if "labels" not in named:
        if "input_ids" not in named or named["input_ids"].is_floating_point():
            raise SecateurError(f"the batches for {type(model).__name__} have no labels: add them, or {hint}")
        mask = named.get("attention_mask")
        ids = named["input_ids"]
        named["labels"] = ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)
    try:
        found = getattr(run(model, named, labels=True), "loss", None)
    except (TypeError, ValueError) as error:  # classes without a head take no labels
        raise SecateurError(f"{type(model).__name__} makes no loss of labels ({error}): {hint}") from error
    if not isinstance(found, torch.Tensor):
        raise SecateurError(f"{type(model).__name__} returns no loss for labels: {hint}")
    return found


def class_loss(logits: torch.Tensor, targets: torch.Tensor, hint: str, *, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy of class numbers; classes are the last dimension where that is what fits, else the second.

    Raises:
        SecateurError: for targets that are no class numbers of these logits.
    """
    if targets.is_floating_point() or targets.dim() != logits.dim() - 1:
        shapes = f"{targets.dtype} {list(targets.shape)} for outputs of shape {list(logits.shape)}"
        raise SecateurError(f"targets are {shapes}, no class numbers: {hint}")
    if targets.shape == logits.shape[:-1]:
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return functional.cross_entropy(logits.float(), targets, reduction=reduction)


def first_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first samples, in the batches that they come in; the last batch is cut where it holds too many."""
    found: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        size = size_of(batch)
        found.append(batch if size <= count else _some(batch, slice(count)))
        count -= size
    return found


def _some(batch: Batch, which: slice) -> Batch:
    if isinstance(batch, torch.Tensor):
        return batch[which]
    if len(samples_of(batch)) == 1:  # its tensors do not agree on how many samples there are
        return batch
    if isinstance(batch, Mapping):
        return {name: value[which] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return tuple(value[which] if isinstance(value, torch.Tensor) else value for value in batch)
