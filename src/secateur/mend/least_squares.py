"""Least squares: the weights that give best what is wanted, from what a cut left of their inputs.

A ridge towards the weights as they are, so that what the data does not decide stays. He et al. 2017, "Channel Pruning
for Accelerating Very Deep Neural Networks" (arXiv:1707.06168), repair channels so; the mean alone, put into the bias,
is that of An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv:2312.11983).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.errors import SecateurError

_TRIES = 6


@dataclass
class Moments:
    """Sums over rows of inputs x [n] and of what is wanted of them, t [m]; all float64.

    Attributes:
        rows: How many.
        squares: Sum of x x', [n, n].
        cross: Sum of x t', [n, m].
        inputs: Sum of x, [n].
        targets: Sum of t, [m].
        energy: Sum of t^2, [m].
    """

    rows: int
    squares: torch.Tensor
    cross: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def zeros(cls, n: int, m: int, device: torch.device | str = "cpu") -> "Moments":
        """Nothing added up yet, for n inputs and m targets."""
        shapes = ((n, n), (n, m), (n,), (m,), (m,))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums, by name; those of several lots add up to those of all."""
        rows = torch.tensor(float(self.rows), dtype=torch.float64)
        named = {name: getattr(self, name) for name in ("squares", "cross", "inputs", "targets", "energy")}
        return {"rows": rows, **named}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Moments":
        """What `tensors` gave."""
        return cls(int(tensors["rows"]), **{name: x for name, x in tensors.items() if name != "rows"})

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """Take in rows x [k, n] and t [k, m]: products in their own type, sums over calls in float64."""
        self.rows += len(x)
        self.squares += x.T @ x
        self.cross += x.T @ t
        self.inputs += x.sum(0)
        self.targets += t.sum(0)
        self.energy += t.square().sum(0)

    def some(self, begin: int, end: int) -> "Moments":
        """The same for targets begin to end."""
        own = slice(begin, end)
        return Moments(
            self.rows, self.squares, self.cross[:, own], self.inputs, self.targets[own], self.energy[own]
        )  # fmt: skip

    def centred(self) -> "Moments":
        """Moments about the means."""
        k = max(1, self.rows)
        return Moments(
            self.rows,
            self.squares - torch.outer(self.inputs, self.inputs) / k,
            self.cross - torch.outer(self.inputs, self.targets) / k,
            torch.zeros_like(self.inputs),
            torch.zeros_like(self.targets),
            self.energy - self.targets.square() / k,
        )

    def error(self, weight: torch.Tensor) -> float:
        """Sum over rows and targets of (t - W x)^2, where W is [m, n]."""
        explained = (weight * (weight @ self.squares)).sum() - 2 * (weight * self.cross.T).sum()
        return float((self.energy.sum() + explained).clamp_min(0))


@dataclass(frozen=True)
class Fit:
    """Weights that were fitted.

    Attributes:
        weight: [m, n], float64.
        shift: [m], what the bias gains; None where there is none.
        damping: That it took.
        before: Sum of (t - W0 x)^2.
        after: Sum of (t - W x - shift)^2.
        total: Sum of t^2, with a shift about their mean.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None
    damping: float
    before: float
    after: float
    total: float


def least_squares(moments: Moments, start: torch.Tensor, *, damping: float = 1e-3, intercept: bool = False) -> Fit:
    """The W that minimises the sum of |t - W x|^2 + d |W - W0|^2, in float64; with an intercept, also over a shift.

    d is `damping` times the mean of the diagonal of X'X (about the means, with an intercept), so inputs that are always
    zero, and directions that too few rows leave open, keep what W0 does with them.

    Args:
        moments: of n inputs and m targets.
        start: W0 [m, n].
        damping: at least 0; ten times as much (from 1e-4) is tried where X'X + d is not positive definite.
        intercept: whether a shift may be added to W x.

    Returns:
        W, the shift, the damping that it took, and how much of the targets is missed before and after.

    Raises:
        SecateurError: where ten times the damping, five times over, is not enough.
    """
    start = start.double()
    about = moments.centred() if intercept else moments
    weight, used = _solve(about, start, damping)
    shift = None
    if intercept:
        shift = (moments.targets - weight @ moments.inputs) / max(1, moments.rows)
    return Fit(weight, shift, used, moments.error(start), about.error(weight), float(about.energy.sum()))


def _solve(moments: Moments, start: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    mean = moments.squares.diagonal().mean()
    if not bool(mean > 0):  # no row, or nothing but zeros: the data says nothing
        return start, damping
    for _ in range(_TRIES):
        ridge = damping * mean
        squares = moments.squares.clone()
        squares.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(squares)
        if not bool(failed):
            # The change alone is solved for, so that what the data does not touch stays to the last digit.
            change = torch.cholesky_solve(moments.cross - moments.squares @ start.T, factor).T
            if bool(torch.isfinite(change).all()):
                return start + change, damping
        damping = 10 * max(damping, 1e-4)
    raise SecateurError("X'X of the calibration data has no inverse, however much it is damped: check the activations")


def lost_mean(weight: torch.Tensor, gone: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What inputs that are gone gave on average: the bias that makes up for it.

    Args:
        weight: dense, [m, n].
        gone: bool [n].
        mean: of the inputs, [n].

    Returns:
        [m], float64.
    """
    return weight[:, gone].double() @ mean[gone].double()
