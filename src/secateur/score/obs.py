"""Structured optimal brain surgeon: in which order units go when what stays is fitted anew after each.

The loss of a set of columns S of W on inputs X is min over W' of ||(W - W') X||^2 with W' zero on S, and the greedy
order removes what adds least to it. All sizes of an axis come out of one pass. Kurtic et al. 2023, "ZipLM"
(arXiv:2302.04089); Ling et al. 2024, "SlimGPT" (arXiv:2412.18110); Meng et al. 2024, "OSSCAR" (arXiv:2403.12983).

With the second moment G of the gradients at the outputs the loss is measured in what the model loses, tr(G dW C dW')/2
(K-FAC; van der Ouderaa et al. 2024, "The LLM Surgeon", arXiv:2312.17244), so that orders of several consumers add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.errors import SecateurError


@dataclass(frozen=True)
class Consumed:
    """A matrix that reads an axis.

    Attributes:
        worth: W' G W, [columns, columns]: what an error at the columns costs; G = I where nothing is known.
        inverse: (C + damping)^-1 of the inputs' second moment C, [columns, columns].
        columns: of each unit, int64 [units, columns of one]; -1 pads units that have fewer here.
    """

    worth: torch.Tensor
    inverse: torch.Tensor
    columns: torch.Tensor


def eliminate(
    consumers: Sequence[Consumed], size: int, groups: int = 1, *, rounds_at_once: float = 0.0
) -> torch.Tensor:
    """Remove units one after the other, each time those that cost least.

    Args:
        consumers: all that read the axis; their costs add up.
        size: units of the axis.
        groups: runs of units of which each loses one in every round.
        rounds_at_once: share of what is left that goes together, at least one unit of each group; 0 = one by one.

    Returns:
        Units in the order in which they go, int64 [rounds, groups]; one unit of each group stays to the end.

    Raises:
        SecateurError: for costs that are not finite.
    """
    state = [_State(consumer) for consumer in consumers]
    alive = torch.ones(size, dtype=torch.bool)
    per_group = size // groups
    order: list[torch.Tensor] = []
    while (left := int(alive[:per_group].sum())) > 1:
        costs = torch.zeros(size, dtype=torch.float64)
        for one in state:
            costs += one.costs()
        if not bool(torch.isfinite(costs[alive]).all()):
            raise SecateurError("the costs of units are not finite: check the weights and the activations")
        costs[~alive] = torch.inf
        many = min(left - 1, max(1, int(rounds_at_once * left)))
        lowest = costs.reshape(groups, per_group).argsort(dim=1, stable=True)[:, :many]
        gone = (lowest + torch.arange(groups)[:, None] * per_group).T
        for one in state:
            one.remove(gone.flatten())
        alive[gone.flatten()] = False
        order.append(gone)
    return torch.cat(order) if order else torch.empty(0, groups, dtype=torch.int64)


def by_unit(units: torch.Tensor, size: int) -> torch.Tensor:
    """Columns of each unit, int64 [size, most that a unit has], -1 where it has fewer."""
    counts = torch.bincount(units[units >= 0], minlength=size)
    found = torch.full((size, max(1, int(counts.max()))), -1, dtype=torch.int64)
    for unit in range(size):
        own = (units == unit).nonzero().flatten()
        found[unit, : len(own)] = own
    return found


class _State:
    """A consumer while units go. What is gone leaves the matrices from time to time, so that they shrink."""

    def __init__(self, consumer: Consumed) -> None:
        self.worth, self.inverse = consumer.worth.double().clone(), consumer.inverse.double().clone()
        self.columns = consumer.columns.clone()
        """Places of each unit's columns in the matrices; -1 where there is none (any more)."""
        self.gone: list[torch.Tensor] = []

    def costs(self) -> torch.Tensor:
        """tr((H^-1_SS)^-1 worth_SS) of each unit's columns S, [units]; 0 for units without any."""
        found = torch.zeros(len(self.columns), dtype=torch.float64)
        counts = (self.columns >= 0).sum(1)
        for width in sorted({*counts.tolist()} - {0}):
            units = (counts == width).nonzero().flatten()
            own = self.columns[units, :width]
            if width == 1:
                at = own[:, 0]
                found[units] = (self.worth.diagonal()[at] / self.inverse.diagonal()[at]).cpu()
                continue
            rows, across = own[:, :, None], own[:, None, :]
            ratio = torch.linalg.solve(self.inverse[rows, across], self.worth[rows, across])
            found[units] = ratio.diagonal(0, 1, 2).sum(1).cpu()
        return found

    def remove(self, units: torch.Tensor) -> None:
        """Take the columns of units out, and let the others make up for them."""
        columns = self.columns[units].flatten()
        columns = columns[columns >= 0]
        self.columns[units] = -1
        if not len(columns):
            return
        rows = self.inverse[columns]
        gain = torch.linalg.solve(rows[:, columns], rows)  # [gone, columns]
        self.inverse.addmm_(rows.T, gain, alpha=-1)
        half = self.worth[columns] - 0.5 * self.worth[columns][:, columns] @ gain
        self.worth.addmm_(gain.T, half, alpha=-1).addmm_(half.T, gain, alpha=-1)
        self.gone.append(columns)
        if sum(map(len, self.gone)) > len(self.worth) / 5:
            self._shrink()

    def _shrink(self) -> None:
        stays = torch.ones(len(self.worth), dtype=torch.bool)
        stays[torch.cat(self.gone)] = False
        kept = stays.nonzero().flatten()
        self.worth, self.inverse = self.worth[kept][:, kept], self.inverse[kept][:, kept]
        moved = torch.cat([stays.cumsum(0) - 1, torch.tensor([-1])])
        self.columns, self.gone = moved[self.columns], []
