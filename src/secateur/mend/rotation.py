"""Which directions of a residual stream stay when its width is cut, and how a tied head reads what is left.

Every norm s of a model reads its own u_s = h / rms(h) off one stream. One basis A [d, k] serves them all: whoever reads
u_s gets the best linear guess of it from A'u_s, and what the guess misses costs tr(M_s ...). Ashkboos et al. 2024,
"SliceGPT" (arXiv:2401.15024), cut a rotated stream too; their basis is the PCA of each stream by itself.
"""

from collections.abc import Callable, Sequence

import torch

from secateur.errors import SecateurError

_JITTER = 1e-9
"""Share of the mean of the diagonal of A'CA that is added to it: directions that no row has are nobody's loss."""


def missed(basis: torch.Tensor, seconds: Sequence[torch.Tensor], metrics: Sequence[torch.Tensor]) -> float:
    """Sum over norms of tr(M C) - tr[(A'CA)^-1 A'C M C A]: what the best linear guess of u from A'u misses.

    With the second moments of the gradients as M, half of it is the expected KL to second order.

    Args:
        basis: A [d, k] of full rank; only the space that it spans matters.
        seconds: C = E[u u'] of each norm, [d, d] float64.
        metrics: M of each norm, likewise.
    """
    total = 0.0
    for C, M in zip(seconds, metrics, strict=True):
        CA = C @ basis
        guess = torch.cholesky_solve(CA.T @ M @ CA, _factor(basis.T @ CA))
        total += float((M * C).sum() - guess.diagonal().sum())
    return max(0.0, total)


def subspace(
    seconds: Sequence[torch.Tensor], metrics: Sequence[torch.Tensor], k: int, *, iterations: int = 60
) -> torch.Tensor:
    """The A [d, k] that misses least (see `missed`), its columns orthonormal.

    L-BFGS on the statistics alone, from the best A there would be if all norms saw the same second moments.

    Args:
        seconds: C of each norm, [d, d] float64.
        metrics: M of each norm, likewise.
        k: directions that stay, 1 to d.
        iterations: of L-BFGS, at most.
    """
    mean = torch.stack(list(seconds)).mean(0)
    root = _power(mean, 0.5)
    start = _power(mean, -0.5) @ torch.linalg.eigh(root @ sum(metrics, torch.zeros_like(mean)) @ root)[1][:, -k:]
    if k == len(mean):
        return _orthonormal(start)
    A = start.contiguous().clone().requires_grad_()
    energies = [C @ M @ C for C, M in zip(seconds, metrics, strict=True)]
    solver = torch.optim.LBFGS([A], max_iter=iterations, line_search_fn="strong_wolfe", history_size=20)
    solver.step(  # type: ignore[no-untyped-call]
        _closure(A, seconds, energies, sum(float((m * c).sum()) for m, c in zip(metrics, seconds, strict=True)))
    )
    found = A.detach()
    if not bool(torch.isfinite(found).all()):
        raise SecateurError(f"the search for {k} directions of the stream diverged: give more calibration data")
    return _orthonormal(found)


def _closure(
    A: torch.Tensor, seconds: Sequence[torch.Tensor], energies: Sequence[torch.Tensor], whole: float
) -> Callable[[], float]:
    """Sets the gradient and gives the loss; by hand, at less than half the price of autograd."""

    def closure() -> float:
        now = A.detach()
        gradient, kept = torch.zeros_like(now), 0.0
        for C, B in zip(seconds, energies, strict=True):
            CA, BA = C @ now, B @ now
            factor = _factor(now.T @ CA)
            inner = torch.cholesky_solve(now.T @ BA, factor)  # (A'CA)^-1 A'BA
            kept += float(inner.diagonal().sum())
            gradient -= 2 * torch.cholesky_solve((BA - CA @ inner).T, factor).T
        A.grad = gradient
        return whole - kept

    return closure


def guess(basis: torch.Tensor, others: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The best linear guess of other directions from those that stay: B'CA (A'CA)^-1, [others, k].

    Args:
        basis: A [d, k].
        others: B [d, others].
        second: C [d, d].
    """
    CA = second @ basis
    return torch.cholesky_solve(CA.T @ others, _factor(basis.T @ CA)).T


def complete(basis: torch.Tensor) -> torch.Tensor:
    """An orthonormal A [d, k] and its complement, [d, d]."""
    k = basis.shape[1]
    return torch.cat([basis, torch.linalg.qr(basis, mode="complete")[0][:, k:]], 1)


def tie_rotation(basis: torch.Tensor, outer: torch.Tensor, weight: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A turned so that a head tied to the rotated embedding E A can read it with a norm weight alone.

    The head wants E diag(g) u and can give E A diag(w) A'u. The symmetric N for which A N A'u comes closest to
    diag(g) u in the head's metric F solves H N S + S N H = T + T' (H = A'FA, S = A'CA,
    T = A'F diag(g) C A); its eigenvectors are the rotation that makes it diagonal.

    Args:
        basis: A [d, k], orthonormal.
        outer: F [d, d], second moments of the gradients at the norm's result.
        weight: g [d], what the last norm scales by.
        second: C [d, d] of the last norm.
    """
    H, S = basis.T @ outer @ basis, basis.T @ second @ basis
    T = basis.T @ (outer * weight) @ second @ basis
    low = _cholesky(H, 1e-6)
    half = torch.linalg.solve_triangular(low, torch.linalg.solve_triangular(low, S, upper=False).T, upper=False)
    values, vectors = torch.linalg.eigh((half + half.T) / 2)
    V = torch.linalg.solve_triangular(low.T, vectors, upper=True)  # V'HV = 1, V'SV = diag(values)
    sums = values[:, None] + values[None, :]
    N = V @ (V.T @ (T + T.T) @ V / sums.clamp_min(1e-12 * float(sums.max()))) @ V.T
    turned: torch.Tensor = torch.linalg.eigh((N + N.T) / 2)[1]
    return basis @ turned


def tied_weight(
    pull: torch.Tensor, push: torch.Tensor, second: torch.Tensor, cross: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The last norm's weight w for which E A diag(w) x comes closest to E diag(g) u, in the head's metric F.

    Args:
        pull: A'FA [k, k].
        push: A'F diag(g) [k, d].
        second: E[x x'] [k, k], x what the last norm makes of the narrow stream, before its weight.
        cross: E[u x'] [d, k].

    Returns:
        w [k], and w'Nw - 2 b'w: what it takes off tr(diag(g) F diag(g) C), negative.
    """
    N, b = pull * second, (push * cross.T).sum(1)
    w = torch.linalg.solve(_damped(N, 1e-6), b)
    return w, gained(pull, push, second, cross, w)


def gained(pull: torch.Tensor, push: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, w: torch.Tensor) -> float:
    """The same w'Nw - 2 b'w of any weight w (see `tied_weight`)."""
    return float(w @ (pull * second) @ w - 2 * (push * cross.T).sum(1) @ w)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.qr(columns)[0]
    return found


def _factor(square: torch.Tensor) -> torch.Tensor:
    return _cholesky(square, _JITTER)


def _cholesky(square: torch.Tensor, damping: float) -> torch.Tensor:
    found, failed = torch.linalg.cholesky_ex(_damped(square, damping))
    if bool(failed):
        raise SecateurError(
            "the second moments of a residual stream have no inverse: give more calibration data, or leave rotate out"
        )
    return found  # type: ignore[no-any-return]


def _damped(square: torch.Tensor, share: float) -> torch.Tensor:
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    return square + share * square.diagonal().mean() * eye


def _power(square: torch.Tensor, power: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(square)
    result: torch.Tensor = vectors * values.clamp_min(float(values.max()) * 1e-9) ** power @ vectors.T
    return result
