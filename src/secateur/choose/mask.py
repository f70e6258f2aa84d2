"""Masks of exact counts: which elements of a weight stay, given a score for each.

Wherever scores are equal, the elements that come first stay. Counts are shared out by cumulative rounding, so that
the sum over all rows or tensors is exact: never fewer zeros than asked for, and never one more.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
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
    if rows == 1 and 0 < int(gone[0]) < n:  # one long row: selecting is cheaper than sorting
        threshold = scores.kthvalue(int(gone[0]), dim=1, keepdim=True).values
    else:
        ordered = scores.sort(dim=1).values
        threshold = ordered.gather(1, (gone - 1).clamp_min(0)[:, None])
    above = scores > threshold
    equal = scores == threshold
    room = (n - gone)[:, None] - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= room))
    return torch.where((gone == 0)[:, None], torch.ones_like(keep), keep)


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
    masks = {w.name: torch.ones(w.shape, dtype=torch.bool, device=scores[w.name].device) for w in weights}
    matrices = [(w, part, w.matrix(scores[w.name], part)) for w in weights for part in w.parts()]
    tile = layout.block[0] * layout.block[1]
    sizes = [m.numel() // tile for _, _, m in matrices]
    if layout.scope == "global" and layout.n_m is None:
        if not isinstance(sparsity, float | int):
            raise SecateurError("scope global ranks all weights together, and allocation gives each its own share")
        units = [tiles(m, layout.block) if tile > 1 else m for _, _, m in matrices]
        (count,) = zeros_of([sum(sizes)], sparsity)
        ranked = largest(torch.cat([u.reshape(1, -1) for u in units], 1), [count])
        kept = torch.split(ranked.flatten(), sizes)
        found = [spread(k.reshape(u.shape), layout.block) for k, u in zip(kept, units, strict=True)]
    else:
        ratios = [sparsity if isinstance(sparsity, float | int) else sparsity[w.name] for w, _, _ in matrices]
        counts = zeros_of(sizes, ratios)
        found = [mask_matrix(m, count, layout) for (_, _, m), count in zip(matrices, counts, strict=True)]
    for (weight, part, _), mask in zip(matrices, found, strict=True):
        weight.put(masks[weight.name], part, mask)
    return masks


def _extent(part: Sequence[tuple[int, int]], dims: Sequence[int]) -> int:
    return math.prod(part[d][1] - part[d][0] for d in dims)
