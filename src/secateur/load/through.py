"""How data goes through a model while somebody watches: whole passes, a batch after the other, or block by block.

Whoever watches hooks into the model and adds up what it sees. `Watcher` is how it is told which batch runs, and how its
sums are kept and put back where a run is killed; `Through` is a way to run all batches (`walk.through` is another).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from secateur.load.batches import Batch, run
from secateur.progress import Track


class Watcher(Protocol):
    """Somebody who adds up what passes by, in the order of batches."""

    def at(self, index: int | None) -> None:
        """Say that what runs next is of this batch; None: it has been seen already, and must not count again."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """The sums until now, as tensors by name; all that a new watcher needs to go on."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up sums that `state` gave."""
        ...


Through = Callable[[nn.Module, Sequence[Batch], Watcher], None]
"""Runs all batches through a model in evaluation mode, without gradients."""


def whole_passes(model: nn.Module, batches: Sequence[Batch], watcher: Watcher) -> None:
    """A forward pass of the whole model for each batch."""
    for index, batch in enumerate(batches):
        watcher.at(index)
        run(model, batch)


def shown(through: Through, track: Track, what: str) -> Through:
    """Whole passes with their progress; any other way shows its own."""
    if through is not whole_passes:
        return through

    def passes(model: nn.Module, batches: Sequence[Batch], watcher: Watcher) -> None:
        for index, batch in enumerate(track(batches, what)):
            watcher.at(index)
            run(model, batch)

    return passes
