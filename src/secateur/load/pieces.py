"""The values of a model's tensors, a piece at a time: of a streamed model no more than a piece is in memory."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from secateur.load.store import store_of

_PIECE = 1 << 24  # elements

Pieces = Callable[[torch.Tensor], Iterator[torch.Tensor]]
"""Goes through the values of a tensor, as flat pieces."""


def plain_pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of a tensor in memory."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE]


def pieces_of(model: nn.Module) -> Pieces:
    """What goes through the parameters (and any other tensors) of a model, in memory or streamed."""
    store = store_of(model)
    if store is None:
        return plain_pieces
    first = {id(parameter): name for name, parameter in store.parameters.items()}

    def resting(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        name = first.get(id(tensor))
        made = [] if name is None or store.entries[name].is_view else [name]
        with store.hold(made):
            for piece in plain_pieces(tensor):
                yield piece
                store.forget()

    return resting
