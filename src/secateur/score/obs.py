"""Structured optimal brain surgeon: in which order units go when what stays is fitted anew after each.

The loss of a set of columns S of W on inputs X is min over W' of ||(W - W') X||^2 with W' zero on S, and the greedy
order removes what adds least to it. All sizes of an axis come out of one pass, and what each of them loses. Kurtic et
al. 2023, "ZipLM" (arXiv:2302.04089); Ling et al. 2024, "SlimGPT" (arXiv:2412.18110); Meng et al. 2024, "OSSCAR"
(arXiv:2403.12983).

With the second moment G of the gradients at the outputs the loss is measured in what the model loses, tr(G dW C dW')/2
(K-FAC; van der Ouderaa et al. 2024, "The LLM Surgeon", arXiv:2312.17244), so that orders of several consumers add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.errors import SecateurError

ROWS = 512
"""Of a large matrix that are copied or multiplied at a time, so that no second one is ever there."""
GATHERED = 2**24
"""Numbers of columns of several units that are copied at a time."""


@dataclass(frozen=True)
class Consumed:
    """A matrix that reads an axis.

    Attributes:
        matrix: W, [rows, columns]; it is worked with in its own type.
        inverse: (C + damping)^-1 of the inputs' second moment C, [columns, columns].
        columns: of each unit, int64 [units, columns of one]; -1 pads units that have fewer here.
        graded: G W, [rows, columns]: what an error costs; None where G = I.
        spare: the matrices may be used up, since nobody needs them afterwards: no copy is made of them.
    """

    matrix: torch.Tensor
    inverse: torch.Tensor
    columns: torch.Tensor
    graded: torch.Tensor | None = None
    spare: bool = False


@dataclass(frozen=True)
class Ladder:
    """All sizes of an axis.

    Attributes:
        order: units in the order in which they go, int64 [rounds, groups]; one of each group stays to the end.
        lost: what it costs that the units of so many rounds are gone, with all else fitted anew: the sum over consumers
            of tr(G dW (C + damping) dW'), float64 [rounds + 1], from 0 up.
    """

    order: torch.Tensor
    lost: torch.Tensor


def ladder(consumers: Sequence[Consumed], size: int, groups: int = 1, *, rounds_at_once: float = 0.0) -> Ladder:
    """Remove units one after the other, each time those that cost least.

    Args:
        consumers: all that read the axis; their costs add up.
        size: units of the axis.
        groups: runs of units of which each loses one in every round.
        rounds_at_once: share of what is left that goes together, at least one unit of each group; 0 = one by one. What
            the sizes between lose is exact all the same.

    Raises:
        SecateurError: for costs that are not finite, and an inverse that is none any more.
    """
    state = [_State(consumer) for consumer in consumers]
    alive = torch.ones(size, dtype=torch.bool)
    per_group = size // groups
    order, lost = [torch.empty(0, groups, dtype=torch.int64)], [torch.zeros(1, dtype=torch.float64)]
    while (left := int(alive[:per_group].sum())) > 1:
        costs = torch.zeros(size, dtype=torch.float64)
        for one, consumer in zip(state, consumers, strict=True):
            costs += one.costs(consumer.columns)
        if not bool(torch.isfinite(costs[alive]).all()):
            raise SecateurError("the costs of units are not finite: check the weights and the activations")
        costs[~alive] = torch.inf
        many = min(left - 1, max(1, int(rounds_at_once * left)))
        lowest = costs.reshape(groups, per_group).argsort(dim=1, stable=True)[:, :many]
        gone = (lowest + torch.arange(groups)[:, None] * per_group).T
        lost.append(_removed(state, [consumer.columns for consumer in consumers], gone))
        alive[gone.flatten()] = False
        order.append(gone)
    return Ladder(torch.cat(order), torch.cat(lost).cumsum(0))


def eliminate(
    consumers: Sequence[Consumed], size: int, groups: int = 1, *, rounds_at_once: float = 0.0
) -> torch.Tensor:
    """The order of `ladder` alone, int64 [rounds, groups]."""
    return ladder(consumers, size, groups, rounds_at_once=rounds_at_once).order


def together(
    consumers: Sequence[Consumed], inner: Sequence[torch.Tensor], outer_order: torch.Tensor, inner_order: torch.Tensor
) -> torch.Tensor:
    """What sizes of two axes that the same matrices read lose together; the sum of two ladders is no more than a guess.

    Args:
        consumers: all that read either, with the columns of the outer axis (the KV groups).
        inner: the columns of the inner axis (the heads) in each of them, as in `Consumed.columns`.
        outer_order: rounds of the outer axis, [rounds, groups].
        inner_order: those of the inner one.

    Returns:
        float64 [outer rounds + 1, inner rounds + 1]; `Ladder.lost` of the outer axis is its first column.
    """
    state = [_State(consumer) for consumer in consumers]
    columns = [consumer.columns for consumer in consumers]
    found = torch.zeros(len(outer_order) + 1, len(inner_order) + 1, dtype=torch.float64)
    for row in range(len(found)):
        if row:
            found[row, 0] = found[row - 1, 0] + _removed(state, columns, outer_order[row - 1 : row]).sum()
        here = [_State(one.consumed()) for one in state]
        places = [one.place[own] for one, own in zip(state, inner, strict=True)]
        found[row, 1:] = found[row, 0] + _removed(here, places, inner_order).cumsum(0)
    return found


def _removed(state: Sequence["_State"], columns: Sequence[torch.Tensor], rounds: torch.Tensor) -> torch.Tensor:
    """Take the units of some rounds [rounds, groups] out; what each round adds to the costs, float64 [rounds]."""
    added = torch.zeros(rounds.numel(), dtype=torch.float64)
    for one, own in zip(state, columns, strict=True):
        added += one.remove(own[rounds.flatten()])
    return added.reshape(rounds.shape).sum(1)


def by_unit(units: torch.Tensor, size: int) -> torch.Tensor:
    """Columns of each unit, int64 [size, most that a unit has], -1 where it has fewer."""
    counts = torch.bincount(units[units >= 0], minlength=size)
    found = torch.full((size, max(1, int(counts.max()))), -1, dtype=torch.int64)
    owned = (units >= 0).nonzero().flatten()
    owned = owned[units[owned].argsort(stable=True)]
    within = torch.arange(len(owned)) - (counts.cumsum(0) - counts)[units[owned]]
    found[units[owned], within] = owned
    return found


def inverted(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a symmetric positive definite matrix [n, n], in the memory that the matrix was in.

    Raises:
        SecateurError: where it is not positive definite.
    """
    own = matrix.mT  # the order of LAPACK, which then works in place; the numbers are the same
    failed = torch.zeros((), dtype=torch.int32)
    torch.linalg.cholesky_ex(own, out=(own, failed))
    if bool(failed):
        raise SecateurError(
            "the second moments of the calibration data have no inverse: give a larger damping, such as damping=0.1"
        )
    torch.cholesky_inverse(own, out=own)
    return matrix


class _State:
    """A consumer while units go. What is gone leaves the matrices from time to time, so that they shrink."""

    def __init__(self, consumer: Consumed) -> None:
        def own(x: torch.Tensor) -> torch.Tensor:
            return x if consumer.spare and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)

        self.matrix, self.inverse = own(consumer.matrix), own(consumer.inverse)
        self.graded = None if consumer.graded is None else own(consumer.graded)
        self.place = torch.arange(len(self.inverse) + 1)
        """Where each column is now; -1 where it is gone, and for -1, which is no column."""
        self.place[-1] = -1
        self.gone: list[torch.Tensor] = []

    def consumed(self) -> Consumed:
        """What is left, of which a copy may be made."""
        return Consumed(self.matrix, self.inverse, self.place, self.graded)

    def costs(self, columns: torch.Tensor) -> torch.Tensor:
        """tr((H^-1_SS)^-1 W_S' G W_S) of each unit's columns S, float64 [units]; 0 for units without any."""
        own = self.place[columns]
        found = torch.zeros(len(own), dtype=torch.float64)
        counts = (own >= 0).sum(1)
        for width in sorted({*counts.tolist()} - {0}):
            units = (counts == width).nonzero().flatten()
            if width == 1:
                at = own[units, 0]
                found[units] = (self._squares()[at] / self.inverse.diagonal()[at]).double()
                continue
            for some in torch.split(units, max(1, GATHERED // (width * len(self.matrix)))):
                found[some] = self._blocks(own[some, :width])
        return found

    def _squares(self) -> torch.Tensor:
        """W_j' G W_j of each column."""
        total = self.matrix.new_zeros(self.matrix.shape[1])
        graded = self.matrix if self.graded is None else self.graded
        for x, y in zip(torch.split(self.matrix, ROWS), torch.split(graded, ROWS), strict=True):
            total += (x * y).sum(0)
        return total

    def _blocks(self, own: torch.Tensor) -> torch.Tensor:
        """The cost of units of several columns [units, width]."""
        left = self.matrix[:, own].permute(1, 2, 0)  # [units, width, rows]
        right = left if self.graded is None else self.graded[:, own].permute(1, 2, 0)
        worth = left @ right.mT
        ratio: torch.Tensor = torch.linalg.solve(self.inverse[own[:, :, None], own[:, None, :]], worth)
        return ratio.diagonal(0, 1, 2).sum(1).double()

    def remove(self, columns: torch.Tensor) -> torch.Tensor:
        """Take the columns of units out, let the others make up for them, and say what each unit adds to the cost.

        With H^-1_SS = L L', the diagonal of L^-1 W_S' G W_S L^-1' is what each column adds after those before it, since
        L and L^-1 of the first so many columns are the first parts of these.
        """
        at = self.place[columns]
        there = at >= 0
        found = torch.zeros(len(columns), dtype=torch.float64)
        own = at[there]
        if not len(own):
            return found
        rows = self.inverse[own]  # [gone, columns]
        factor, failed = torch.linalg.cholesky_ex(rows[:, own])
        if bool(failed):
            raise SecateurError("the fit of what stays broke down by rounding: give a larger damping")
        left = torch.linalg.solve_triangular(factor, self.matrix[:, own].T, upper=False)  # [gone, rows]
        right = left
        gain = torch.linalg.solve_triangular(factor, rows, upper=False)
        if self.graded is not None:
            right = torch.linalg.solve_triangular(factor, self.graded[:, own].T, upper=False)
            self.graded.addmm_(right.T, gain, alpha=-1)
        unit = torch.arange(len(columns))[:, None].expand_as(at)[there]
        found.index_add_(0, unit, (left * right).sum(1).double())
        self.matrix.addmm_(left.T, gain, alpha=-1)
        self.inverse.addmm_(gain.T, gain, alpha=-1)
        self.place[columns[there]] = -1
        self.gone.append(own)
        if sum(map(len, self.gone)) > len(self.inverse) / 5:
            self._shrink()
        return found

    def _shrink(self) -> None:
        stays = torch.ones(len(self.inverse), dtype=torch.bool)
        stays[torch.cat(self.gone)] = False
        kept = stays.nonzero().flatten()
        self.inverse = _narrowed(self.inverse, kept, kept)
        every = torch.arange(len(self.matrix))
        self.matrix = _narrowed(self.matrix, every, kept)
        self.graded = None if self.graded is None else _narrowed(self.graded, every, kept)
        moved = torch.cat([stays.cumsum(0) - 1, torch.tensor([-1])])
        self.place, self.gone = moved[self.place], []


def _narrowed(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix[rows][:, columns], both ascending, in the memory of the matrix, which is used up."""
    flat, width = matrix.view(-1), len(columns)
    for begin in range(0, len(rows), ROWS):
        some = rows[begin : begin + ROWS]  # what they are written over was read before: they lie further on
        flat[begin * width : (begin + len(some)) * width] = matrix[some][:, columns].flatten()
    return flat[: len(rows) * width].view(len(rows), width)
