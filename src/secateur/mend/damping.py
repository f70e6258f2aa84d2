"""Inverses of X'X that exist: dead inputs set apart, the diagonal raised until the Cholesky factor is there."""

import torch

from secateur.errors import SecateurError

_TRIES = 6


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
