"""ALPS: the support by ADMM on the l0-constrained least squares, then the weights on it by conjugate gradients.

Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models"
(arXiv:2406.07831).
"""

from collections.abc import Callable, Sequence

import torch

from secateur.choose.mask import Layout, mask_matrix
from secateur.mend.damping import damped

Project = Callable[[torch.Tensor], torch.Tensor]
"""[columns, rows] -> bool, what stays."""


def alps(
    matrices: Sequence[torch.Tensor],
    gram: torch.Tensor,
    zeros: Sequence[int],
    layout: Layout,
    *,
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
    refine: int = 10,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Masks and weights of matrices that read the same.

    Minimises |X W - X W_dense|^2 + damping over W with so many zeros. Columns are scaled so that X'X has a diagonal of
    ones. With one eigendecomposition of it, W = (H + rho)^-1 (H W_dense - V + rho D), D = the largest elements of
    W + V / rho, V += rho (W - D); rho grows every third step, the faster the more of the support still changes, until
    nothing does.

    Args:
        matrices: each [rows, columns].
        gram: X'X [columns, columns].
        zeros: how many elements (tiles) of each go.
        layout: what competes: ``row`` or ``tensor``, N:M, tiles.
        damping: share of the mean of the diagonal that is added to it.
        rho: at the start.
        iterations: at most.
        refine: steps of the conjugate gradients on the support.

    Returns:
        (bool masks, weights with zeros where they are False, what the masks were chosen by).
    """
    widths = [m.shape[0] for m in matrices]
    W0 = torch.cat([m.to(gram.dtype).T for m in matrices], 1)
    H, dead = damped(gram, damping)
    scale = H.diagonal().sqrt()
    H = H / scale / scale[:, None]
    B = W0 * scale[:, None]
    B[dead] = 0  # worth nothing; they go first

    def project(values: torch.Tensor) -> torch.Tensor:
        parts = [p.T.square() for p in torch.split(values, widths, 1)]
        return torch.cat([mask_matrix(p, n, layout) for p, n in zip(parts, zeros, strict=True)]).T

    keep, worth = _support(H, B, project, rho, iterations)
    W = _on_support(H, B, torch.where(keep, B, 0), keep, refine)
    W = W / scale[:, None]
    W[dead] = torch.where(keep[dead], W0[dead], 0)
    masks = [part.T for part in torch.split(keep, widths, 1)]
    return masks, [part.T for part in torch.split(W, widths, 1)], [part.T for part in torch.split(worth, widths, 1)]


def _support(
    H: torch.Tensor, B: torch.Tensor, project: Project, rho: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stays, bool [columns, rows], and what it was chosen by."""
    values, Q = torch.linalg.eigh(H)
    HB = H @ B
    keep = project(B)
    D, V = torch.where(keep, B, 0), torch.zeros_like(B)
    before, total, whole = keep, max(1, int(keep.sum())), B
    for step in range(1, iterations + 1):
        W = Q @ ((Q.T @ (HB - V + rho * D)) / (values + rho)[:, None])
        whole = W + V / rho
        keep = project(whole)
        D = torch.where(keep, whole, 0)
        V += rho * (W - D)
        if step % 3 == 0:
            changed = int((keep != before).sum())
            if changed == 0:
                break
            rho *= 1.3 if changed >= 0.1 * total else 1.2 if changed >= 0.005 * total else 1.1
            before = keep
    return keep, whole.square()


def _on_support(H: torch.Tensor, B: torch.Tensor, W: torch.Tensor, keep: torch.Tensor, steps: int) -> torch.Tensor:
    """Conjugate gradients for H W = H B with W zero outside of the support; H has ones on its diagonal."""
    R = torch.where(keep, H @ (B - W), 0)
    P = R.clone()
    size = R.square().sum(0)
    for _ in range(steps):
        HP = torch.where(keep, H @ P, 0)
        bend = (P * HP).sum(0)
        # a direction without curvature is left alone: H is damped, so that only rounding makes one
        length = torch.where(bend > 1e-7 * P.square().sum(0), size / bend.clamp_min(1e-30), 0.0)
        W = W + length * P
        R = R - length * HP
        new = R.square().sum(0)
        P = R + new / size.clamp_min(1e-30) * P
        size = new
    return W
