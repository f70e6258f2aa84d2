"""Slice parameters: which rows of each tensor a plan keeps."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

from secateur.choose.cost import gone_parameters
from secateur.choose.plan import Plan
from secateur.space import Space


def kept_rows(space: Space, plan: Plan) -> dict[tuple[str, int], torch.Tensor]:
    """Row numbers, ascending, that stay of every (parameter, dimension) that the plan touches."""
    masks: dict[tuple[str, int], torch.Tensor] = {}
    for name, kept in plan.kept.items():
        axis = space.axis(name)
        gone = torch.ones(axis.size, dtype=torch.bool)
        gone[list(kept.units)] = False
        for part in axis.slices:
            place = part.parameter, part.dim
            if place not in masks:
                masks[place] = torch.ones(space.tensor(part.parameter).shape[part.dim], dtype=torch.bool)
            masks[place][part.rows()[gone].flatten()] = False
    return {place: mask.nonzero().flatten() for place, mask in masks.items()}


def cutter(space: Space, plan: Plan) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """What makes of the name and the value of a parameter or buffer its sliced and masked self; None where it goes."""
    rows: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for (name, dim), kept in kept_rows(space, plan).items():
        rows[name].append((dim, kept))
    gone = gone_parameters(space, plan)

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if name in gone:
            return None
        new = tensor.detach()
        if name in plan.masks:
            new = new * plan.masks[name].to(new.device)
        for dim, kept in rows.get(name, ()):
            new = new.index_select(dim, kept.to(new.device))
        return new

    return cut


def cut_tensors(parameters: Mapping[str, torch.Tensor], space: Space, plan: Plan) -> dict[str, torch.Tensor]:
    """Every tensor that stays, sliced and masked; those that lose nothing are shared, not copied.

    `parameters` may be the model's buffers as well.
    """
    cut = cutter(space, plan)
    found = {name: cut(name, tensor) for name, tensor in parameters.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
