"""Least squares by several processes: sums over all of them, and fits that are shared out among them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur import world
from secateur.load.batches import Batch, samples_of
from secateur.load.shared import shared
from secateur.mend.least_squares import Fit, Moments, least_squares
from secateur.methods.counterparts import Pair
from secateur.methods.rows import wide
from secateur.space.products import Product
from secateur.space.weights import Part


def with_probe(batches: Sequence[Batch]) -> tuple[list[Batch], int]:
    """This process's share of the data, and how many batches at its begin only show how the model runs.

    What the first batch tells (who reads the same, what goes with what) must be the same in all processes: where data
    is split, all begin with the first sample, which does not count.
    """
    if not world.split():
        return list(batches), 0
    return [samples_of(batches[0])[0], *shared(batches)], 1


def over_all(moments: Mapping[Part, Moments], parts: Sequence[Part]) -> dict[Part, Moments]:
    """Sums over all processes; `parts` are all that there may be, in the same order in all."""
    if not world.split():
        return dict(moments)
    own = {f"{i}:{name}": x for i, p in enumerate(parts) if p in moments for name, x in moments[p].tensors().items()}
    summed = world.add_up_named(own)
    found: dict[Part, Moments] = {}
    for i, part in enumerate(parts):
        tensors = {name.partition(":")[2]: x for name, x in summed.items() if name.startswith(f"{i}:")}
        if tensors:
            found[part] = Moments.of(tensors)
    return found


class Means:
    """Sums of what weights read, and over how many rows; see `load.through.Watcher`."""

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self.pairs, self.seeing = pairs, True
        self.sums: dict[tuple[str, Part], tuple[torch.Tensor, int]] = {}

    def see(self, product: Product) -> None:
        """Take in one product."""
        own = product.columns == self.pairs[product.weight].dense.columns
        if self.seeing and own and product.operand.numel():
            x = product.read()
            total, rows = self.sums.get((product.weight, product.part), (torch.zeros((), dtype=torch.float64), 0))
            self.sums[product.weight, product.part] = total.to(x.device) + wide(x).sum(0), rows + len(x)

    def at(self, index: int | None) -> None:
        """Say whether what runs is to be taken in."""
        self.seeing = index is not None

    def state(self) -> dict[str, torch.Tensor]:
        """All sums, by name."""
        found: dict[str, torch.Tensor] = {}
        for (name, part), (total, rows) in self.sums.items():
            key = json.dumps([name, part])
            found |= {key: total, f"{key}#": torch.tensor(rows)}
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        for key, total in state.items():
            if not key.endswith("#"):
                name, part = json.loads(key)
                self.sums[name, tuple((a, b) for a, b in part)] = total, int(state[f"{key}#"])

    def join(self) -> None:
        """Add up over all processes, where data is split among them."""
        if world.split():
            self.restore(world.add_up_named(self.state()))


@dataclass(frozen=True)
class Job:
    """One fit; see `mend.least_squares.least_squares`."""

    moments: Moments
    start: torch.Tensor
    damping: float
    intercept: bool

    def fit(self) -> Fit:
        """Do it."""
        return least_squares(self.moments, self.start, damping=self.damping, intercept=self.intercept)


def fitted(jobs: Sequence[Job]) -> Iterator[Fit]:
    """Fits, in the order of the jobs; several processes share them out and tell each other."""
    if not world.split():
        yield from (job.fit() for job in jobs)
        return
    owners = world.dealt([len(job.moments.squares) ** 2 * float(sum(job.start.shape)) for job in jobs])
    own: dict[int, list[torch.Tensor]] = {}
    with world.as_one():
        for number, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            if owner == world.rank():
                fit = job.fit()
                told = torch.tensor([fit.damping, fit.before, fit.after, fit.total], dtype=torch.float64)
                own[number] = [told, fit.weight, *([] if fit.shift is None else [fit.shift])]
    for told, weight, *shift in world.handed_out(own, owners):
        damping, before, after, total = told.tolist()
        yield Fit(weight, shift[0] if shift else None, damping, before, after, total)
