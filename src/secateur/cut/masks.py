"""Set weights to zero: masks need no trace, so they work on any module."""

from collections.abc import Mapping

import torch
from torch import nn

from secateur.choose.packed import kind_of
from secateur.errors import SecateurError, nearest
from secateur.load.store import copy_of, held, store_of


def check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Raise SecateurError unless every mask is a bool tensor of the shape of a parameter."""
    parameters = dict(model.named_parameters())
    for name in masks:
        if name not in parameters:
            raise SecateurError(f"there is a mask for {name!r}, which is not a parameter{nearest(name, parameters)}")
        dtype, shape = kind_of(masks, name)
        if dtype != torch.bool or shape != parameters[name].shape:
            raise SecateurError(
                f"the mask of {name} is {dtype} {list(shape)}, it must be torch.bool {list(parameters[name].shape)}"
            )


@torch.no_grad()
def masked(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the model with zeros where the masks are False.

    Raises:
        SecateurError: for a mask that fits no parameter.
    """
    check_masks(model, masks)
    new = copy_of(model, "masked")
    parameters, store = dict(new.named_parameters()), store_of(new)
    together = [list(masks)] if store is None else [[n for n in own if n in masks] for own in store.units.values()]
    for names in together:
        with held(new, names=names):
            for name in names:
                parameters[name].masked_fill_(~masks[name].to(parameters[name].device), 0)
    return new
