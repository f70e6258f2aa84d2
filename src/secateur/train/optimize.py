"""Optimisers, their learning rate over the steps, and which rate to begin with."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.train.settings import Training

WARMUP = 100


def proposed_rate(params: int, cut: float) -> float:
    """A learning rate for a model that lost a share of its parameters.

    3e-3 (N / 1e6)^(-1/4) is near what models of 1e6 to 1e11 parameters are pre-trained with; healing takes the share of
    it that was cut, within a twentieth and a half. For a model of 8e9 that lost 30-50% that is 1e-4 to 1.6e-4, where
    Minitron takes 1e-4 (Muralidharan et al. 2024, arXiv:2407.14679).

    Args:
        params: of the model that is trained.
        cut: share of the parameters that is gone, in [0, 1).
    """
    return 3e-3 * float((max(params, 1) / 1e6) ** -0.25) * min(0.5, max(0.05, cut))


def rate_at(step: int, steps: int, settings: Training) -> float:
    """The learning rate of a step, counted from 0, as a share of the highest."""
    warmup = settings.warmup if settings.warmup is not None else min(WARMUP, math.ceil(steps / 10))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    gone = (step - warmup) / max(1, steps - 1 - warmup)
    if settings.decay == "constant":
        return 1.0
    shape = 1 - gone if settings.decay == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return settings.lr_end + (1 - settings.lr_end) * shape


def optimizers_of(
    model: nn.Module, extra: nn.Module | None, scores: Sequence[nn.Parameter], settings: Training, rate: float,
    rate_of_scores: float,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimisers of a run; each group has its highest learning rate as ``peak``.

    Args:
        model: its parameters that take gradients are trained.
        extra: what is trained beside it, likewise.
        scores: learned scores of masks among the model's parameters: never decayed, with a rate of their own.
        settings: which.
        rate: the highest learning rate.
        rate_of_scores: of the scores.

    Raises:
        SecateurError: nothing takes gradients.
    """
    own = {id(p) for p in scores}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    tables |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    if not trained and not scores:
        raise SecateurError("no parameter of the model takes gradients: there is nothing to train")
    matrices = [p for p in trained if p.dim() > 1 and id(p) not in tables]
    rest = [p for p in trained if p.dim() <= 1 or id(p) in tables]
    rest += [] if extra is None else list(extra.parameters())
    decay = settings.weight_decay
    groups = [_group(matrices, rate, decay), _group(rest, rate, 0.0), _group(scores, rate_of_scores, 0.0)]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)]
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))]
    flat = [p for p in matrices if p.dim() == 2]
    if not flat:
        raise SecateurError("optimizer muon is for matrices, and none takes gradients here: take adamw")
    others = [_group([p for p in matrices if p.dim() != 2], rate, decay), *groups[1:]]
    groups = [group for group in others if group["params"]]
    # Its updates are scaled to the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon([_group(flat, rate, decay)], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, *([torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))] if groups else [])]


def _group(params: Iterable[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {"params": list(params), "lr": rate, "peak": rate, "weight_decay": decay}
