"""Masks of exact counts: which elements of a weight stay, given a score for each.

Wherever scores are equal, the elements that come first stay. Counts are shared out by cumulative rounding, so that
the sum over all rows or tensors is exact: never fewer zeros than asked for, and never one more.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from secateur.errors import SecateurError, nearest
from secateur.space.weights import Weight

NM = tuple[int, int]
"""N of every M in a row stay."""
Block = tuple[int, int]
"""Rows and columns of a tile that stays or goes whole."""
_SLACK = Fraction(1, 10_000)
"""Of an element, by which shares that were worked out may be off."""
SCOPES = ("global", "tensor", "row")


def zeros_of(sizes: Sequence[int], sparsity: Sequence[float] | float) -> list[int]:
    """How many elements of each go, so that the total is the sum of size * sparsity, rounded up once.

    Args:
        sizes: elements of each.
        sparsity: share of each that goes, in [0, 1]; one for all, or one for each.
    """
    ratios = [sparsity] * len(sizes) if isinstance(sparsity, int | float) else list(sparsity)
    wanted, done, counts = Fraction(0), 0, []
    for size, ratio in zip(sizes, ratios, strict=True):
        wanted += size * Fraction(str(float(ratio)))  # .7 is seven tenths, and adds up as such
        count = min(size, math.ceil(wanted - _SLACK) - done)
        counts.append(count)
        done += count
    return counts


def largest(scores: torch.Tensor, zeros: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Bool mask [rows, n] that drops in each row so many of the smallest scores [rows, n]."""
    if scores.dim() != 2:
        raise ValueError(f"scores must be [rows, n], not {list(scores.shape)}")
    rows, n = scores.shape
    gone = torch.as_tensor(zeros, device=scores.device).expand(rows)
    keep = torch.ones_like(scores, dtype=torch.bool)
    for count in sorted(set(gone.tolist())):  # selecting is several times cheaper than sorting
        which = (gone == count).nonzero().flatten()
        if count:
            keep[which] = _without_smallest(scores if len(which) == rows else scores[which], min(count, n))
    return keep


def _without_smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    keep = scores > threshold
    room = scores.shape[1] - count - keep.sum(1)
    tied = room.nonzero().flatten()  # there, some of those that are equal to the last one that goes stay
    if len(tied):
        equal = scores[tied] == threshold[tied]
        keep[tied] |= equal & (equal.cumsum(1) <= room[tied, None])
    return keep


def n_of_m(scores: torch.Tensor, n_m: NM) -> torch.Tensor:
    """Bool mask [rows, columns] that keeps the N largest of every M columns in a row."""
    n, m = n_m
    groups = scores.reshape(-1, m)
    order = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, value=True).reshape(scores.shape)


def tiles(scores: torch.Tensor, block: Block) -> torch.Tensor:
    """Sums of scores [rows, columns] over tiles, [rows / r, columns / c]."""
    (rows, columns), (r, c) = scores.shape, block
    return scores.reshape(rows // r, r, columns // c, c).sum((1, 3))


def spread(mask: torch.Tensor, block: Block) -> torch.Tensor:
    """A mask of tiles as one of elements."""
    return mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def check_fits(name: str, rows: int, channels: int, columns: int, n_m: NM | None, block: Block) -> None:
    """Raise SecateurError where groups of M, or tiles, do not divide a weight.

    Args:
        name: of the weight.
        rows: of its matrix.
        channels: its innermost run of columns, which groups of M must divide.
        columns: of its matrix.
        n_m: N:M, if any.
        block: of tiles.
    """
    hint = f"ignore it (ignore: {name})"
    if n_m is not None and channels % n_m[1]:
        raise SecateurError(
            f"n:m={n_m[0]}:{n_m[1]} does not fit {name}: {n_m[1]} does not divide its {channels} inputs; {hint}"
        )
    if rows % block[0] or columns % block[1]:
        raise SecateurError(
            f"blocks of {block[0]}x{block[1]} do not fit {name}, a matrix of {rows}x{columns}: "
            f"choose sizes that divide it, or {hint}"
        )


@dataclass(frozen=True)
class Layout:
    """Which elements compete with which, and in what pattern they go.

    Attributes:
        scope: ``global``, all weights in one ranking; ``tensor``, each weight by itself; ``row``, each output of it.
        n_m: N of every M columns stay; then nothing else competes.
        block: rows and columns of tiles that go whole.
    """

    scope: str = "tensor"
    n_m: NM | None = None
    block: Block = (1, 1)

    def check(self, weights: Iterable[Weight]) -> None:
        """Raise SecateurError for options that contradict each other, or that do not fit a weight."""
        if self.scope not in SCOPES:
            raise SecateurError(f"there is no scope {self.scope!r}{nearest(self.scope, SCOPES)}")
        if min(self.block) < 1:
            raise SecateurError(f"block {self.block[0]}x{self.block[1]}: a tile has at least one row and one column")
        if self.scope == "global" and self.n_m is not None:
            raise SecateurError("n:m lets the elements of a group compete, and scope global those of all weights")
        if self.block != (1, 1) and self.n_m is not None:
            raise SecateurError("n:m and block contradict each other: each says which elements go together")
        if self.block[0] > 1 and self.scope == "row":
            raise SecateurError(f"scope row compares within a row, and tiles of {self.block[0]} rows lie in several")
        for weight in weights:
            for part in weight.parts()[:1]:
                rows, columns = _extent(part, weight.rows), _extent(part, weight.columns)
                check_fits(weight.name, rows, weight.channels, columns, self.n_m, self.block)


def mask_matrix(scores: torch.Tensor, zeros: int, layout: Layout) -> torch.Tensor:
    """Bool mask of one matrix of scores [rows, columns] with so many zeros (tiles of zeros, where there are tiles).

    Raises:
        ValueError: for scope global, which needs all matrices.
    """
    if layout.n_m is not None:
        return n_of_m(scores, layout.n_m)
    units = tiles(scores, layout.block) if layout.block != (1, 1) else scores
    if layout.scope == "row":
        ends = [-(-zeros * row // len(units)) for row in range(len(units) + 1)]
        counts = [end - begin for begin, end in itertools.pairwise(ends)]
        kept = largest(units, torch.tensor(counts, device=units.device))
    elif layout.scope == "tensor":
        kept = largest(units.reshape(1, -1), [zeros]).reshape(units.shape)
    else:
        raise ValueError(f"one matrix has no scope {layout.scope}")
    return spread(kept, layout.block) if layout.block != (1, 1) else kept


def masks_of(
    weights: Sequence[Weight],
    scores: Mapping[str, torch.Tensor],
    sparsity: float | Mapping[str, float],
    layout: Layout,
) -> dict[str, torch.Tensor]:
    """Masks of all weights: exactly the asked share of all their elements goes, rounded up once (by tiles, if any).

    Args:
        weights: which.
        scores: of each, a tensor of its shape; higher = keep.
        sparsity: share that goes; one for all, or one for each weight (not with scope global). N:M overrides it.
        layout: see `Layout`.

    Returns:
        Weight name -> bool tensor of its shape, True = keep.
    """
    if layout.scope != "global" or layout.n_m is not None:
        return dict(masks_each(weights, lambda w: scores[w.name], sparsity, layout))
    masks = {w.name: torch.ones(w.shape, dtype=torch.bool, device=scores[w.name].device) for w in weights}
    matrices = [(w, part, w.matrix(scores[w.name], part)) for w in weights for part in w.parts()]
    tile = layout.block[0] * layout.block[1]
    units = [tiles(m, layout.block) if tile > 1 else m for _, _, m in matrices]
    (count,) = zeros_of([sum(u.numel() for u in units)], _one(sparsity))
    ranked = largest(torch.cat([u.reshape(1, -1) for u in units], 1), [count])
    kept = torch.split(ranked.flatten(), [u.numel() for u in units])
    for (weight, part, _), mask, unit in zip(matrices, kept, units, strict=True):
        weight.put(masks[weight.name], part, spread(mask.reshape(unit.shape), layout.block))
    return masks


def masks_each(
    weights: Sequence[Weight],
    score: Callable[[Weight], torch.Tensor],
    sparsity: float | Mapping[str, float],
    layout: Layout,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `masks_of`, but the scores and the mask of one weight only are there at a time.

    Args:
        weights: which.
        score: makes the scores of a weight, float32 of its shape; asked once, or with scope global three times.
        sparsity: as for `masks_of`.
        layout: see `Layout`.

    Yields:
        Weight name and bool tensor of its shape, True = keep.
    """
    tile = layout.block[0] * layout.block[1]
    pieces = [(w, part) for w in weights for part in w.parts()]
    sizes = [math.prod(b - a for a, b in part) // tile for _, part in pieces]
    if layout.scope == "global" and layout.n_m is None:
        (count,) = zeros_of([sum(sizes)], _one(sparsity))
        choose = _Ranking(weights, score, count, layout).keep
        counts = [0] * len(sizes)
    else:
        counts = zeros_of(
            sizes, [sparsity if isinstance(sparsity, float | int) else sparsity[w.name] for w, _ in pieces]
        )
        choose = functools.partial(mask_matrix, layout=layout)
    left = iter(counts)
    for weight in weights:
        scores = score(weight)
        mask = torch.ones(weight.shape, dtype=torch.bool, device=scores.device)
        for part in weight.parts():
            weight.put(mask, part, choose(weight.matrix(scores, part), next(left)))
        del scores
        yield weight.name, mask


class _Ranking:
    """All elements (tiles) of all weights in one ranking that is never in memory: the place of the cut is counted out.

    Float32 numbers, read as whole ones, keep their order; a pass counts their upper halves, a second one the lower
    halves where the cut lies.
    """

    def __init__(
        self, weights: Sequence[Weight], score: Callable[[Weight], torch.Tensor], zeros: int, layout: Layout
    ) -> None:
        self.layout, self.zeros = layout, zeros
        if not zeros:
            return

        def keys() -> Iterator[torch.Tensor]:
            for weight in weights:
                scores = score(weight)
                for part in weight.parts():
                    yield from torch.split(self._keys(weight.matrix(scores, part)).flatten(), _PIECE)

        none = torch.zeros(2**16, dtype=torch.int64)
        upper = sum((torch.bincount((k >> 16) + 2**15, minlength=2**16).cpu() for k in keys()), none)
        place, before = _reached(upper, zeros)
        mine = (k[(k >> 16) + 2**15 == place] & 0xFFFF for k in keys())
        lower = sum((torch.bincount(k, minlength=2**16).cpu() for k in mine), none)
        rest, below = _reached(lower, zeros - before)
        self.last = ((place - 2**15) << 16) + rest
        """The key of the best element that goes."""
        self.room = int(lower[rest]) - (zeros - before - below)
        """How many of that key stay: those that come first."""

    def keep(self, scores: torch.Tensor, _: int) -> torch.Tensor:
        """The mask of the next matrix, in the order of the weights and their parts."""
        if not self.zeros:
            return torch.ones_like(scores, dtype=torch.bool)
        keys = self._keys(scores)
        equal = (keys == self.last).flatten()
        stay = equal & (equal.cumsum(0) <= self.room)
        self.room -= int(stay.sum())
        return spread((keys > self.last) | stay.reshape(keys.shape), self.layout.block)

    def _keys(self, scores: torch.Tensor) -> torch.Tensor:
        units = tiles(scores, self.layout.block) if self.layout.block != (1, 1) else scores
        bits = (units.float() + 0.0).view(torch.int32)  # + 0: there is one zero, without a sign
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


_PIECE = 1 << 22


def _reached(counts: torch.Tensor, number: int) -> tuple[int, int]:
    """The first place up to which there are so many, and how many there are before it."""
    total = counts.cumsum(0)
    place = int((total < number).sum())
    return place, int(total[place] - counts[place])


def _one(sparsity: float | Mapping[str, float]) -> float:
    if not isinstance(sparsity, float | int):
        raise SecateurError("scope global ranks all weights together, and allocation gives each its own share")
    return sparsity


def _extent(part: Sequence[tuple[int, int]], dims: Sequence[int]) -> int:
    return math.prod(part[d][1] - part[d][0] for d in dims)
