"""SparseGPT: prune a matrix column by column, and let the columns to the right make up for each loss.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv:2301.00774).
"""

from collections.abc import Sequence

import torch

from secateur.choose.mask import Layout, mask_matrix
from secateur.mend.damping import damped_inverse


def sparsegpt(
    matrices: Sequence[torch.Tensor],
    gram: torch.Tensor,
    zeros: Sequence[int],
    layout: Layout,
    *,
    damping: float = 0.01,
    columns_at_once: int = 128,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], float]:
    """Masks and repaired weights of matrices that read the same.

    A column's elements are worth w^2 / d^2, where d^2 is the diagonal of the inverse of X'X without the columns before
    it (by its Cholesky factor). The mask of so many columns is chosen at once, each with its share of the zeros; N:M
    chooses group by group, by what the weights are by then.

    Args:
        matrices: each [rows, columns].
        gram: X'X [columns, columns].
        zeros: how many elements (tiles) of each go.
        layout: what competes within a block of columns: its scope ``row`` or ``tensor``, N:M, tiles.
        damping: share of the mean of the diagonal that is added to it.
        columns_at_once: how many columns' masks are chosen together; a multiple of M and of a tile's width is taken.

    Returns:
        (bool masks, weights with zeros where they are False, what the masks were chosen by, damping that it took).
    """
    step = layout.block[1] * max(1, columns_at_once // layout.block[1])
    if layout.n_m is not None:
        step = layout.n_m[1] * max(1, columns_at_once // layout.n_m[1])
    factor, dead, used = damped_inverse(gram, damping)
    W = torch.cat([m.to(gram.dtype).T for m in matrices], 1)  # [columns, rows of all]: columns are then contiguous
    keep, worths = torch.ones_like(W, dtype=torch.bool), torch.zeros_like(W)
    widths = [m.shape[0] for m in matrices]
    spans = [(i, min(i + step, len(W))) for i in range(0, len(W), step)]
    counts = [_shares(n, m.shape[1], spans) for n, m in zip(zeros, matrices, strict=True)]
    for place, (begin, end) in enumerate(spans):
        block, inverse = W[begin:end], factor[begin:end, begin:end]
        errors = torch.zeros_like(block)
        together = layout.n_m[1] if layout.n_m else end - begin
        for i in range(end - begin):
            if i % together == 0:
                now = slice(i, i + together)
                worth = (block[now] / inverse.diagonal()[now, None]).square()
                worth[dead[begin:end][now]] = 0
                worths[begin:end][now] = worth
                chosen = [
                    mask_matrix(p, c[place], layout) for p, c in zip(torch.split(worth.T, widths), counts, strict=True)
                ]
                keep[begin:end][now] = torch.cat(chosen).T
            lost = torch.where(keep[begin + i], 0.0, block[i])
            errors[i] = lost / inverse[i, i]
            block[i] -= lost
            block[i + 1 :].addr_(inverse[i, i + 1 :], errors[i], alpha=-1)
        W[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    masks = [part.T for part in torch.split(keep, widths, 1)]
    weights = [part.T * mask for part, mask in zip(torch.split(W, widths, 1), masks, strict=True)]
    return masks, weights, [part.T for part in torch.split(worths, widths, 1)], used


def _shares(zeros: int, columns: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The zeros of a matrix by blocks of columns, in proportion to their widths."""
    ends = [zeros * end // columns for _, end in spans]
    return [b - a for a, b in zip([0, *ends], ends, strict=False)]
