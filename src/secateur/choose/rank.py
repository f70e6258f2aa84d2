"""From scores and sizes to a plan: keep the best units of every axis."""

from collections.abc import Mapping, Sequence

import torch

from secateur.choose.plan import Kept, Plan
from secateur.errors import SecateurError
from secateur.space import Axis, Space


def keep_best(axis: Axis, scores: torch.Tensor, size: int) -> Kept:
    """The `size` best units (the same number in each group); equal scores keep the lower number.

    Args:
        axis: the axis to cut.
        scores: float [axis.size], higher = keep.
        size: how many units stay, over all groups.

    Raises:
        SecateurError: for a size outside 1..axis.size, or one that the groups do not divide.
    """
    if not 1 <= size <= axis.size:
        raise SecateurError(f"{axis.name} has {axis.size} units: {size} cannot be kept")
    if size % axis.groups:
        raise SecateurError(f"{axis.name}: {size} units cannot be shared evenly by its {axis.groups} groups")
    grouped = scores.reshape(axis.groups, axis.per_group)
    order = torch.sort(grouped, dim=1, descending=True, stable=True).indices[:, : size // axis.groups]
    units = (order + torch.arange(axis.groups)[:, None] * axis.per_group).flatten().sort().values
    return Kept(axis.kind, axis.size, tuple(units.tolist()))


def plan_for_sizes(
    space: Space, scores: Mapping[str, torch.Tensor], sizes: Mapping[str, int], dropped: Sequence[str] = ()
) -> Plan:
    """The same size for every axis of a kind; `sizes` counts heads over all the groups that stay.

    Axes in dropped layers are left out, and so are kinds that keep their size.
    """
    kept: dict[str, Kept] = {}
    for axis in space.axes:
        size = sizes.get(axis.kind)
        if size is None or axis.block in dropped:
            continue
        if axis.parent is not None:
            groups = sizes.get("kv_groups", axis.groups)
            if size % groups:
                raise SecateurError(f"{size} heads cannot be shared evenly by {groups} KV groups")
            size = size // groups * axis.groups
        if size != axis.size:
            kept[axis.name] = keep_best(axis, scores[axis.name], size)
    return Plan(kept, tuple(dropped))


def lost_energy(space: Space, scores: Mapping[str, torch.Tensor], kind: str, size: int) -> float:
    """Share of the squared importance that goes when every axis of a kind keeps its best `size` units.

    Averaged over the axes; 0 where nothing goes, towards 1 where all does.
    """
    losses = [axis_loss(axis, scores[axis.name], size) for axis in space.of_kind(kind)]
    return sum(losses) / len(losses) if losses else 0.0


def axis_loss(axis: Axis, scores: torch.Tensor, size: int) -> float:
    """The same of one axis."""
    energy = scores.double().square()
    kept = torch.tensor(keep_best(axis, scores, size).units)
    total = float(energy.sum())
    return 1 - float(energy[kept].sum()) / total if total > 0 else 1 - size / axis.size
