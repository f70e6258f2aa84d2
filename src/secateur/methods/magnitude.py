"""Magnitude: the smallest weights go (Han et al. 2015, "Learning both Weights and Connections", arXiv:1506.02626)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.methods.base import Decision
from secateur.methods.masking import Which, from_weights, relative_size, task
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs


def magnitude(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch] = (),
    *,
    inputs: Inputs = None,
    scope: str = "tensor",
    normalize: bool = False,
    allocation: str | Mapping[str, float] = "uniform",
    owl_times: float = 5.0,
    owl_spread: float = 0.08,
    block: tuple[int, int] = (1, 1),
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep_scores: bool = False,
    track: Track = quiet,
) -> Decision:
    """Decide masks by the size of each weight alone.

    Args:
        model: any module.
        budget: sparsity=50% (of the weights that are masked), or n:m=2:4 (N of every M stay).
        data: for allocation owl; nothing else needs any.
        inputs: arguments of one forward pass, to find weights that no known module owns, and routers.
        scope: what competes: tensor, each weight by itself (local); row, each output of it; global, all together.
        normalize: with scope global, divide each weight by its norm first, as NNCF does.
        allocation: how much of each weight goes: uniform; magnitude, as global magnitude shares it out; owl; a .json
            file or JSON text of {pattern: share}, or a sensitivity table.
        owl_times: for owl, times the mean of a block from which a score is an outlier.
        owl_spread: for owl, how far a block's share may lie from the mean.
        block: rows and columns of tiles that go whole; a tile is worth the sum of its elements.
        only: names of weights or modules, or patterns, to which masks are confined.
        ignore: the same, of what stays dense.
        keep_scores: keep what the masks were chosen by, to choose another sparsity later.
        track: shows progress.

    Raises:
        SecateurError: for unknown names, options that contradict each other, or a pattern that does not fit.
    """
    if normalize and scope != "global":
        raise SecateurError(f"normalize makes weights of different tensors comparable, and scope {scope} compares none")
    which = Which(only, ignore, block, allocation, owl_times, owl_spread, inputs)

    def score(weight: torch.Tensor) -> torch.Tensor:
        return relative_size(weight) if normalize else weight.abs().float()

    return from_weights(model, task(model, budget, data, which, scope, track), score, keep=keep_scores)
