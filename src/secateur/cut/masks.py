"""Set weights to zero: masks need no trace, so they work on any module."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from secateur.errors import SecateurError, nearest


def check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Raise SecateurError unless every mask is a bool tensor of the shape of a parameter."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise SecateurError(f"there is a mask for {name!r}, which is not a parameter{nearest(name, parameters)}")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise SecateurError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}, it must be torch.bool "
                f"{list(parameters[name].shape)}"
            )


@torch.no_grad()
def masked(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the model with zeros where the masks are False.

    Raises:
        SecateurError: for a mask that fits no parameter.
    """
    check_masks(model, masks)
    new = copy.deepcopy(model)
    parameters = dict(new.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
    return new
