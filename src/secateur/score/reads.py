"""Activation importance of any axis: how strongly its units fire where they are read.

The reduction is that of `score.activation` (Minitron, arXiv:2407.14679), for channels that may stand anywhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet
from secateur.score.weights import Scores
from secateur.space import Axis, Slice, Space


def activation(
    model: nn.Module,
    space: Space,
    batches: Sequence[Batch],
    axes: Sequence[Axis] | None = None,
    *,
    track: Track = quiet,
) -> Scores:
    """For what reads a unit: sqrt(sum over samples of (mean over positions of |x|)^2); L2 over a unit's columns.

    Averaged over the layers that read it. Positions are all dimensions but the batch and the channels; padding counts.

    Args:
        model: the dense model; it runs in evaluation mode.
        space: its Space.
        batches: calibration data; targets and labels are left out.
        axes: which axes; None for all.
        track: shows progress.

    Raises:
        SecateurError: without batches, for activations that are not finite, and for an axis that no linear layer or
            convolution reads (names it).
    """
    if not batches:
        raise SecateurError("there is no calibration batch to measure activations on")
    wanted = space.axes if axes is None else axes
    readers = {axis.name: readers_of(model, space, axis) for axis in wanted}
    energy: dict[str, torch.Tensor] = {}
    handles = []
    for path in dict.fromkeys(path for found in readers.values() for path, _ in found):

        def see(module: nn.Module, args: tuple[Any, ...], *, key: str = path) -> None:
            total = _energy(args[0].detach(), _channels_dim(module, args[0]))
            energy[key] = energy[key] + total if key in energy else total

        handles.append(model.get_submodule(path).register_forward_pre_hook(see))
    try:
        with evaluating(model), torch.no_grad():
            for batch in track(batches, "activations"):
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, total in energy.items():
        if not bool(torch.isfinite(total).all()):
            raise SecateurError(f"NaN or infinite activations at the input of {path}: check the weights and dtype")
    found = {}
    for axis in wanted:
        parts = [energy[path][part.rows()].sum(1).sqrt() for path, part in readers[axis.name] if path in energy]
        if not parts:
            read = ", ".join(r.module for r, _ in space.consumers(axis)) or "nothing"
            raise SecateurError(
                f"criterion activation: {axis.name} is read by {read}, and only the inputs of linear layers and "
                "convolutions are seen; ignore it, or take another criterion, such as magnitude_l2 or taylor"
            )
        found[axis.name] = torch.stack(parts).mean(0)
    return found


def readers_of(model: nn.Module, space: Space, axis: Axis) -> list[tuple[str, Slice]]:
    """(path, slice) of linear layers (also transposed ones, as Hugging Face's Conv1D) and convolutions that read it."""
    found = []
    for reader, part in space.consumers(axis):
        module = model.get_submodule(reader.module)
        own = getattr(module, "weight", None)
        whole = isinstance(own, nn.Parameter) and tuple(own.shape) == space.tensor(reader.parameter).shape
        plain = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D"
        if plain and whole and getattr(module, "groups", 1) == 1:
            found.append((reader.module, part))
    return found


def _channels_dim(module: nn.Module, x: torch.Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return x.dim() - len(module.kernel_size) - 1
    return x.dim() - 1


def _energy(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over samples of (mean over positions of |x|)^2, float32 [channels]."""
    if x.dim() == 1 or dim == 0:  # no batch: one sample
        x, dim = x[None], dim + 1
    positions = [d for d in range(1, x.dim()) if d != dim]
    mean = x.abs().mean(positions, dtype=torch.float32) if positions else x.abs().float()
    return mean.square().sum(0).cpu()
