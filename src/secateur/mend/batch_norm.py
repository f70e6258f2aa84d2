"""Batch norm after a cut: the running statistics of the dense model do not fit what is left, so they are taken anew."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet


def adapt_batch_norm(model: nn.Module, batches: Iterable[Batch], *, track: Track = quiet) -> int:
    """Re-estimate running mean and variance of every batch norm, in place: this repairs the model that it is given.

    Each becomes the mean over the batches of the batch's own mean and (unbiased) variance, every batch counting alike,
    as in `torch.optim.swa_utils.update_bn`. Only the batch norms run in training mode, all else as in evaluation; no
    weight changes. Momentum and modes are as before afterwards, and `num_batches_tracked` counts these batches. A layer
    that no batch reaches keeps what it had.

    Args:
        model: any module; where this fails, it is as it was.
        batches: tensors, mappings of arguments or (inputs, targets), whose targets are left out. Dozens of batches of
            the size of training are enough.
        track: shows progress, where `batches` is a sequence.

    Returns:
        The number of layers that were re-estimated.

    Raises:
        SecateurError: for a model without batch norm that keeps running statistics, no batches, a batch with one value
            for a channel, and statistics that are not finite.
    """
    if isinstance(batches, torch.Tensor | str | Path):
        raise SecateurError(f"batch norm needs batches, such as [tensor] or a data loader, not one {_kind(batches)}")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise SecateurError(f"{type(model).__name__} has no batch norm that keeps running statistics: nothing to adapt")
    items: Iterable[Batch] = track(batches, "batch norm") if isinstance(batches, Sequence) else batches
    with _starting_anew(model, norms) as seen, torch.no_grad():
        count = -1
        for count, batch in enumerate(items):
            run(model, batch)
            for name, norm in norms.items():
                if not all(bool(torch.isfinite(x).all()) for x in norm.buffers(recurse=False)):
                    raise SecateurError(
                        f"the statistics of {name} are not finite after batch {count}: look at its inputs and weights"
                    )
        if count < 0:
            raise SecateurError("there are no batches to take the statistics of batch norm from: give at least one")
        if not seen:
            raise SecateurError("no batch reaches a batch norm: give batches that run through the model's layers")
    return len(seen)


def _kind(batches: Any) -> str:
    return "tensor" if isinstance(batches, torch.Tensor) else type(batches).__name__


@contextmanager
def _starting_anew(model: nn.Module, norms: dict[str, _BatchNorm]) -> Iterator[set[str]]:
    """Batch norms that average from nothing, and the names of those that something came through.

    Afterwards, modes and momentum are as before; so are the statistics of layers that saw nothing, and of all where an
    error ended it.
    """
    kept = {name: {key: b.clone() for key, b in norm.named_buffers(recurse=False)} for name, norm in norms.items()}
    momentum = {name: norm.momentum for name, norm in norms.items()}
    seen: set[str] = set()
    hooks = [norm.register_forward_pre_hook(_watch(name, seen)) for name, norm in norms.items()]
    done = False
    try:
        with evaluating(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            yield seen
        done = True
    finally:
        for hook in hooks:
            hook.remove()
        for name, norm in norms.items():
            norm.momentum = momentum[name]
            for key, buffer in norm.named_buffers(recurse=False):
                if not (done and name in seen):
                    buffer.copy_(kept[name][key])


def _watch(name: str, seen: set[str]) -> Any:
    """A hook that notes that a layer is reached, and that there is something to take a variance of."""

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        x = arguments[0]
        if x.dim() > 1 and x.numel() == x.shape[1]:
            raise SecateurError(
                f"{name} gets one value for each channel, {list(x.shape)}, and one value has no variance: give "
                "batches of more samples (drop_last=True of a DataLoader leaves out a last small one)"
            )
        seen.add(name)

    return look
