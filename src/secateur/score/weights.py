"""Importance read off the weights: magnitude, batch-norm scale, LAMP, geometric median; and random, to compare with.

Every function gives axis name -> float32 [size] on the CPU, higher = keep. A unit is scored over its whole group:
every parameter that loses rows when the unit goes, what makes the unit as well as what reads it (Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning", arXiv:2301.12900).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.space import Axis, Slice, Space

Scores = dict[str, torch.Tensor]
Reduce = Callable[[str, int], torch.Tensor]
"""(parameter, dimension) -> one number for each row of that dimension, summed over the others."""


def add_up(parts: Mapping[str, Sequence[Slice]], reduce: Reduce) -> Scores:
    """Sum for every axis, over its slices and the rows of each unit, what `reduce` makes of each tensor."""
    known: dict[tuple[str, int], torch.Tensor] = {}
    found = {}
    for name, slices in parts.items():
        total: torch.Tensor | float = 0.0
        for part in slices:
            place = part.parameter, part.dim
            if place not in known:
                known[place] = reduce(*place).float().cpu()
            total = total + known[place][part.rows()].sum(1)
        if isinstance(total, torch.Tensor):
            found[name] = total
    return found


def over_others(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over all dimensions but one, in float32."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others, dtype=torch.float32) if others else values.float()


def weight_slices(space: Space, axis: Axis) -> tuple[Slice, ...]:
    """Where the axis lies in parameters other than biases; buffers (running statistics) do not count."""
    return tuple(
        part
        for part in axis.slices
        if part.parameter in space.parameters and "bias" not in part.parameter.rpartition(".")[2]
    )


@torch.no_grad()
def magnitude(model: nn.Module, space: Space, axes: Sequence[Axis] | None = None, *, p: int = 2) -> Scores:
    """Sum of |w|^p over the whole group of each unit: Torch-Pruning's GroupMagnitudeImportance before its mean.

    Weights of what makes the unit, scales of its norms and the columns of what reads it count; biases do not. A
    weight that lies in two slices of one unit (a square matrix on the residual stream) counts in both.

    Args:
        model: the dense model.
        space: its Space.
        axes: which axes; None for all.
        p: 1 for absolute values, 2 for squares.
    """
    parameters = dict(model.named_parameters())

    def reduce(name: str, dim: int) -> torch.Tensor:
        weight = parameters[name].detach()
        others = [d for d in range(weight.dim()) if d != dim]
        if not others:
            return weight.float().abs().pow(p)
        norm: torch.Tensor = torch.linalg.vector_norm(weight, p, others, dtype=torch.float32)
        return norm.pow(p)

    wanted = space.axes if axes is None else axes
    return add_up({axis.name: weight_slices(space, axis) or axis.slices for axis in wanted}, reduce)


@torch.no_grad()
def lamp(model: nn.Module, space: Space, axes: Sequence[Axis] | None = None) -> Scores:
    """Layer-adaptive magnitude: m_u^2 over the sum of the m_v^2 that are not smaller, within the axis.

    m_u^2 is `magnitude` with p = 2. The best unit of every axis scores 1, so no axis is ever emptied. Lee et al. 2021,
    "Layer-adaptive sparsity for the Magnitude-based Pruning" (arXiv:2010.07611).
    """
    found = {}
    for name, squares in magnitude(model, space, axes).items():
        values = squares.double()
        ordered = values.sort().values
        above = ordered.flip(0).cumsum(0).flip(0)  # the sum of this one and of all larger ones
        first = torch.searchsorted(ordered, values)  # of equal ones, the first: all equals are in the sum
        found[name] = torch.where(values > 0, values / above[first].clamp_min(1e-300), 0.0).float()
    return found


@torch.no_grad()
def batch_norm(model: nn.Module, space: Space, axes: Sequence[Axis] | None = None) -> Scores:
    """|gamma| of the batch norms that scale each unit, averaged where there are several.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (arXiv:1708.06519).

    Raises:
        SecateurError: for an axis without a batch norm that scales; names it.
    """
    norms = {
        f"{name}.weight".lstrip("."): module.weight.detach().float().abs().cpu()
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None
    }
    found = {}
    for axis in space.axes if axes is None else axes:
        parts = [norms[part.parameter][part.rows()].mean(1) for part in axis.slices if part.parameter in norms]
        if not parts:
            raise SecateurError(
                f"criterion batch_norm: no batch norm scales the units of {axis.name}; ignore it, choose others with "
                "only, or take another criterion, such as magnitude_l2"
            )
        found[axis.name] = torch.stack(parts).mean(0)
    return found


@torch.no_grad()
def fpgm(model: nn.Module, space: Space, axes: Sequence[Axis] | None = None) -> Scores:
    """Sum of the distances from each unit's weights to those of all other units: what is near all is replaceable.

    A unit's weights are those that make it (the rows of every matrix or kernel that has the axis on a dimension that
    it does not read), side by side; where nothing makes it, all of its weights. He et al. 2019, "Filter Pruning via
    Geometric Median for Deep Convolutional Neural Networks Acceleration" (arXiv:1811.00250).
    """
    parameters = dict(model.named_parameters())
    read = {(reader.parameter, reader.in_dim) for reader in space.readers}
    found = {}
    for axis in space.axes if axes is None else axes:
        weights = weight_slices(space, axis) or axis.slices
        matrices = [part for part in weights if len(space.tensor(part.parameter).shape) > 1]
        made = [part for part in matrices if (part.parameter, part.dim) not in read]
        squares = torch.zeros(axis.size, axis.size, dtype=torch.float64)
        for part in made or matrices or weights:
            rows = parameters[part.parameter].detach().movedim(part.dim, 0)[part.rows().flatten()]
            vectors = rows.reshape(axis.size, -1).double().cpu()
            lengths = vectors.square().sum(1)
            squares += lengths[:, None] + lengths[None, :] - 2 * vectors @ vectors.T
        squares.fill_diagonal_(0)
        found[axis.name] = squares.clamp_min(0).sqrt().sum(1).float()
    return found


def random_scores(space: Space, axes: Sequence[Axis] | None = None, *, seed: int = 0) -> Scores:
    """Uniform numbers in [0, 1): what every criterion must beat. The same seed gives the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    wanted = space.axes if axes is None else axes
    return {axis.name: torch.rand(axis.size, generator=generator) for axis in wanted}
