"""Inverses of X'X that exist: dead inputs set apart, the diagonal raised until the Cholesky factor is there."""

import math

import torch

from secateur.errors import SecateurError

_TRIES = 6
FEW = 0.02
"""Columns for each row from which rows are few."""


def enough(damping: float, rows: int, columns: int) -> float:
    """The damping of a least-squares fit: more than was asked for where there are few rows for its columns.

    What a fit of p columns on n rows gets wrong on other rows grows with p/n. With less than 50 rows for each column,
    half of the root of p/n is added to the mean square of the inputs, as a share: about the best on 256 sentences.
    """
    share = columns / max(1, rows)
    return damping if share < FEW else max(damping, 0.5 * math.sqrt(share))


def damped(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """X'X with more on its diagonal, and which inputs are dead (always zero; they get a one there)."""
    dead = gram.diagonal() <= 0
    H = gram.clone()
    diagonal = H.diagonal()
    more = damping * diagonal.sum() / (~dead).sum().clamp_min(1)
    diagonal += more
    diagonal[dead] = 1
    return H, dead


def damped_inverse(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The upper Cholesky factor of the damped inverse of X'X; ten times the damping where there is none.

    Args:
        gram: X'X [n, n].
        damping: share of the mean of the diagonal.

    Returns:
        (factor [n, n], dead inputs bool [n], damping that it took).

    Raises:
        SecateurError: where ten times more, five times over, is not enough.
    """
    for _ in range(_TRIES):
        H, dead = damped(gram, damping)
        L, failed = torch.linalg.cholesky_ex(H)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not bool(failed):
                return upper, dead, damping
        damping = 10 * max(damping, 1e-4)
    raise SecateurError("X'X of the calibration data has no inverse, however much it is damped: check the activations")
