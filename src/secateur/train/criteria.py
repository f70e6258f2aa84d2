"""The arithmetic of training-time sparsity: what is kept, which gradient goes where, what is penalised."""

from collections.abc import Sequence

import torch

LOGIT = 4.59511985013459  # logit(0.99)
WIDTH = 0.05
_EDGE = 1e-6


def magnitude(weight: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    """|W|, or |W| / ||W||_2 (as NNCF ranks weights of all tensors together).

    Weights that are masked count with the value that they had (Zhu & Gupta 2017, arXiv:1710.01878): they return when
    the others have shrunk below it.

    Args:
        weight: of any shape.
        normalize: divide by the norm of the tensor; one of zeros stays one of zeros.
    """
    size = _wide(weight).abs()
    norm = size.norm()
    return size / norm if normalize and norm > 0 else size


def weight_change(weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """|W - W at the start|: what tutorials call movement pruning, and is another thing than the paper's."""
    return (_wide(weight) - start).abs()


def masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """W where the mask keeps it, and zero elsewhere; gradients of the rest are zero."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def learned(weight: torch.Tensor, mask: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """W * M, where the gradient of M goes straight through to `soft`: dL/dsoft = dL/dW' * W, dL/dW = dL/dW' * M.

    With `soft` the scores S this is movement pruning (Sanh et al. 2020, arXiv:2005.07683).
    """
    gate = mask.to(soft.dtype) + (soft - soft.detach())
    return (weight * gate).to(weight.dtype)


def dense_gradient(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """W * M with the gradient of all of W: dL/dW = dL/dW' (straight-through estimator)."""
    return masked(weight, mask) + torch.where(mask, torch.zeros_like(weight), weight - weight.detach())


def above(scores: torch.Tensor, tau: float) -> torch.Tensor:
    """Soft movement's mask: sigmoid(S) > tau."""
    return torch.sigmoid(scores) > tau


def score_penalty(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of sigmoid(S) over all elements of all tensors (Sanh et al. 2020; their code averages tensor means)."""
    total = sum(s.numel() for s in scores)
    device = scores[0].device
    return torch.stack([torch.sigmoid(s).sum().to(device) for s in scores]).sum() / total


def gate_noise(like: torch.Tensor, seed: int, step: int, index: int) -> torch.Tensor:
    """logit(u), u uniform: the noise of one tensor at one step.

    It depends on nothing else, so it is the same again when a run is resumed or activations are recomputed, on all
    ranks, and in every micro-batch of a step.

    Args:
        like: a tensor of the shape, type and device wanted.
        seed: of the run.
        step: batches that are over.
        index: of the tensor.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + index) % 2**63)
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return torch.logit(uniform.clamp(_EDGE, 1 - _EDGE)).to(like.dtype)


def gated(weight: torch.Tensor, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """W * 1[sigmoid(s + noise) > 0.5]; the gradient of the step goes straight to the sigmoid.

    NNCF's regularisation-based sparsity, a form of L0 regularisation (Louizos et al. 2017, arXiv:1712.01312).

    Args:
        weight: of any shape.
        logits: s, of its shape.
        noise: of `gate_noise`, of its shape; None in evaluation.
    """
    noisy = logits if noise is None else logits + noise
    return learned(weight, noisy.detach() > 0, torch.sigmoid(noisy))


def gate_penalty(logits: Sequence[torch.Tensor], sparsity: float) -> torch.Tensor:
    """((kept / N - (1 - target)) / p)^2 with p = 0.05, as in NNCF: `kept` counts the gates that are open without noise.

    Its gradient goes straight through the count, to sigmoid(s).

    Args:
        logits: s of every tensor.
        sparsity: target, over all of them.
    """
    total = sum(s.numel() for s in logits)
    device = logits[0].device
    counts = []
    for s in logits:
        soft = torch.sigmoid(s)
        counts.append(((s.detach() > 0).to(s.dtype) + (soft - soft.detach())).sum().to(device))
    return ((torch.stack(counts).sum() / total - (1 - sparsity)) / WIDTH).square()


def masked_decay(weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], decay: float) -> torch.Tensor:
    """SR-STE's decay as a loss: decay / 2 * ||(1 - M) W||^2, whose gradient is decay * (1 - M) * W.

    Zhou et al. 2021, arXiv:2102.04010.

    As a loss, unlike as a term inside the backward pass, it counts once for each optimiser step, also where gradients
    are accumulated or scaled and where a module is used twice.
    """
    device = weights[0].device
    parts = [masked(_wide(w), ~m).square().sum().to(device) for w, m in zip(weights, masks, strict=True)]
    return torch.stack(parts).sum() * (decay / 2)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: sums of scores in half precision would make ties."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
