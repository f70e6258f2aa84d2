"""Weights of a cut model beside those of the dense one that they were cut from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.cut.names import new_name, renumbered
from secateur.cut.tensors import kept_rows
from secateur.load.batches import Batch, run, samples_of
from secateur.space import Space
from secateur.space.products import Dims
from secateur.space.weights import Part, Weight, multiplied


@dataclass(frozen=True)
class Where:
    """Where a matrix of the cut weight lay.

    Attributes:
        part: Of the dense weight.
        rows: That stayed, in the order of the matrix of that part.
        columns: Likewise.
    """

    part: Part
    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """A weight before and after the cut.

    Attributes:
        dense: Before.
        pruned: After.
        kept: For each dimension of the tensor the places that stayed.
        lossy: Some of what it is summed over is gone.
        late: Something was lost before it, or at it, in the order of the forward pass.
        bias: The parameter that is added to its result; of the cut model.
    """

    dense: Weight
    pruned: Weight
    kept: tuple[torch.Tensor, ...]
    lossy: bool
    late: bool
    bias: str | None

    def where(self, part: Part, dense: Iterable[Part]) -> Where | None:
        """Where a part of the cut tensor lay; None where it lay in none of these parts of the dense one."""
        own = [kept[a:b] for kept, (a, b) in zip(self.kept, part, strict=True)]
        spans = [(int(places.min()), int(places.max()) + 1) for places in own]
        for candidate in dense:
            if all(x[0] <= y[0] and y[1] <= x[1] for x, y in zip(candidate, spans, strict=True)):
                local = [places - first for places, (first, _) in zip(own, candidate, strict=True)]
                sizes = [b - a for a, b in candidate]
                return Where(candidate, _flat(local, sizes, self.dense.rows), _flat(local, sizes, self.dense.columns))
        return None

    def bias_places(self, part: Part) -> tuple[slice | int, ...]:
        """Where the numbers lie in the bias, or in a batch norm, that go with the rows of a part of the cut weight."""
        return bias_places(self.pruned, part)


def _flat(local: Sequence[torch.Tensor], sizes: Sequence[int], dims: Dims) -> torch.Tensor:
    """Numbers of rows (columns) of a matrix that several dimensions are laid out in."""
    total = torch.zeros(1, dtype=torch.int64)
    for d in dims:
        total = (total[:, None] * sizes[d] + local[d][None, :]).flatten()
    return total


def counterparts(
    dense: nn.Module, pruned: nn.Module, plan: Plan, space: Space, batch: Batch
) -> tuple[list[Pair], dict[str, str]]:
    """All weights that both models multiply with, in the order of use.

    Args:
        dense: before the cut.
        pruned: after it.
        plan: the cut.
        space: what it cuts.
        batch: what both run on, for one sample of it.

    Returns:
        The pairs, and weights that lost columns and cannot be changed -> why.
    """
    one = samples_of(batch)[0]
    before = multiplied(dense, lambda: run(dense, one))
    after = multiplied(pruned, lambda: run(pruned, one))
    moved, rows = renumbered(space, plan), kept_rows(space, plan)
    gone = {name for block in space.blocks if block.name in plan.dropped for name in block.parameters}
    cut = [space.axis(name) for name in plan.kept]
    # What loses units that nothing sums over (experts, what queries and keys share) gives something else from there on.
    unread = {part.parameter for axis in cut if not any(space.consumers(axis)) for part in axis.slices}
    tied = _tied(pruned)
    biases = dict(pruned.named_parameters())
    pairs, left, late = [], {}, False
    for name, weight in before.items():
        late = late or name in gone or name in unread
        new = new_name(name, moved)
        found = after.get(str(new))
        if name in gone or new is None:
            continue
        kept = tuple(rows.get((name, d), torch.arange(n)) for d, n in enumerate(weight.shape))
        shape = tuple(map(len, kept))
        lossy = _width(weight.columns, weight.shape, weight.groups) != _width(
            weight.columns, shape, _groups(weight, kept)
        )
        if found is None or found.shape != shape or (found.rows, found.columns) != (weight.rows, weight.columns):
            why = "no calibration data reaches it" if found is None else "its counterpart is used in another way"
        else:
            why = "tied" if new in tied else "masked" if name in plan.masks else ""
        late = late or lossy
        if why and lossy:
            left[name] = why
        elif not why and found is not None:
            pairs.append(Pair(weight, found, kept, lossy, late, bias_of(found, biases)))
    return pairs, left


def _width(columns: Dims, shape: Sequence[int], groups: int) -> int:
    size = torch.Size([shape[d] for d in columns]).numel()
    return size // groups if 0 in columns else size


def _groups(weight: Weight, kept: Sequence[torch.Tensor]) -> int:
    """Groups of a convolution that anything is left of."""
    if weight.groups == 1:
        return 1
    return len(set((kept[0] // (weight.shape[0] // weight.groups)).tolist()))


def _tied(model: nn.Module) -> set[str]:
    """Parameters that several modules share, or that something is looked up in."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    return {name for key, own in names.items() for name in own if len(own) > 1 or key in tables}


def bias_of(weight: Weight, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """The parameter that is named as the bias of a weight, and has a number for each of its rows."""
    if len(weight.rows) != 1:
        return None
    path, _, leaf = weight.name.rpartition(".")
    end = "bias" if leaf == "weight" else f"{leaf[:-6]}bias" if leaf.endswith("_weight") else f"{leaf}_bias"
    bias = parameters.get(f"{path}.{end}".lstrip("."))
    if bias is None:
        return None
    stack = [n for d, n in enumerate(weight.shape) if d not in weight.rows and d not in weight.columns]
    transposed = weight.groups if 0 in weight.columns else 1
    fits = tuple(bias.shape) == (*stack, weight.shape[weight.rows[0]] * transposed)
    return f"{path}.{end}".lstrip(".") if fits else None


def bias_places(weight: Weight, part: Part) -> tuple[slice | int, ...]:
    """Where the numbers lie in the bias of a weight that go with the rows of a part of it."""
    if weight.groups > 1 and 0 in weight.columns:  # a transposed convolution: its groups share dimension 1
        group, per = part[0][0] // (weight.shape[0] // weight.groups), weight.shape[1]
        return (slice(group * per, (group + 1) * per),)
    stack = [d for d in range(len(weight.shape)) if d not in weight.rows and d not in weight.columns]
    return (*(part[d][0] for d in stack), slice(*part[weight.rows[0]]))
