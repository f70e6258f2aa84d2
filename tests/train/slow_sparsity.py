"""Slow and independent implementations of training-time sparsity, small nets, and a loop to train them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from secateur.train import Constant, Cubic, Exponential, Linear, Sparsity, sparsify

RUNS: dict[str, dict[str, Any]] = {
    "magnitude": {"budget": "sparsity=70%", "schedule": Cubic(begin=2, end=8, frequency=2)},
    "magnitude-global": {
        "budget": "sparsity=70%",
        "schedule": Linear(begin=0, end=6, initial=0.1),
        "scope": "global",
        "normalize": True,
    },
    "magnitude-n:m": {"budget": "n:m=2:4", "schedule": Linear(begin=1, end=7, frequency=3)},
    "magnitude-block": {"budget": "sparsity=50%", "schedule": Cubic(begin=1, end=3, per="epoch"), "block": (2, 4)},
    "movement": {"budget": "sparsity=60%", "schedule": Cubic(begin=2, end=8)},
    "movement-global": {"budget": "sparsity=60%", "schedule": Cubic(begin=2, end=8, frequency=3), "scope": "global"},
    "movement-n:m": {"budget": "n:m=1:4", "schedule": Cubic(begin=2, end=8)},
    "movement-soft": {"mode": "soft", "penalty": 30.0, "schedule": Linear(begin=0, end=5)},
    "weight_change": {"budget": "sparsity=60%", "schedule": Cubic(begin=2, end=9, frequency=3)},
    "weight_change-n:m": {"budget": "n:m=2:4", "schedule": Constant(begin=3)},
    "rb": {"budget": "sparsity=50%", "schedule": Exponential(begin=0, end=6), "seed": 3},
    "sr_ste": {"budget": "n:m=2:4", "decay": 0.01},
    "fixed": {},
}
"""Options of `sparsify` for one run of every method and variant; 12 batches in 4 epochs."""


def net(seed: int = 0) -> nn.Sequential:
    """A small classifier: 8 numbers in, 4 out."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 4))


def start(run: str, model: nn.Module, **options: Any) -> Sparsity:
    """Sparsify a model as RUNS says; `fixed` holds some masks."""
    method = run.split("-", maxsplit=1)[0]
    given = {**RUNS[run], **options}
    if method == "fixed" and "masks" not in given:
        given["masks"] = {n: torch.arange(p.numel()).reshape(p.shape) % 3 > 0 for n, p in weights_of(model).items()}
    return sparsify(model, given.pop("budget", None), method=method, **given)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with two dimensions."""
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [16, 8] and targets [16, 4] of batch i."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 + i))
    return x, x[:, :4].abs() - x[:, 4:]


def train(
    model: nn.Module,
    s: Sparsity,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[int],
    see: Callable[[], None] | None = None,
) -> None:
    """The loop of the documentation; three batches make an epoch."""
    for i in batches:
        x, y = (t.to(next(model.parameters()).dtype) for t in batch(i))
        loss = (model(x) - y).square().mean() + s.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        s.step()
        if i % 3 == 2:
            s.epoch()
        if see is not None:
            see()


def adam(s: Sparsity) -> torch.optim.Optimizer:
    """With momentum and weight decay; scores learn fast, so that a few steps show."""
    return torch.optim.AdamW(s.parameter_groups(lr_scores=0.3), lr=0.02, weight_decay=0.1)


# Formulas, one element at a time, in float64


def kept_of(scores: Sequence[Sequence[float]], zeros: int) -> list[list[bool]]:
    """Masks of lists that are ranked together: the smallest go; of equal ones, those that come last."""
    order = [(value, -i, -j) for i, row in enumerate(scores) for j, value in enumerate(row)]
    gone = {(-i, -j) for _, i, j in sorted(order)[:zeros]}
    return [[(i, j) not in gone for j in range(len(row))] for i, row in enumerate(scores)]


def n_of_m(row: Sequence[float], n: int, m: int) -> list[bool]:
    """The n largest of every m in a row, the first of equal ones."""
    result = []
    for at in range(0, len(row), m):
        group = row[at : at + m]
        best = sorted(range(m), key=lambda j: (-group[j], j))[:n]
        result += [j in best for j in range(m)]
    return result


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x))


def cubic(t: int, begin: int, end: int, frequency: int, first: float, final: float) -> float:
    """Zhu & Gupta, equation 1, with the updates counted one by one."""
    value = first
    for now in range(t + 1):
        if now >= end:
            value = final
        elif now >= begin and (now - begin) % frequency == 0:
            value = final + (first - final) * (1 - (now - begin) / (end - begin)) ** 3
    return value
