"""How much the model minds an error at the output of a module: second moments of gradients.

For a model that gives probabilities, KL(dense || changed) is to second order E[(g' d)^2] / 2, where d is the change and
g the gradient of log p(y) for y drawn from the model itself; for one that gives numbers, the squared error likewise,
with g the gradient of a random projection. Positions count as independent. Martens and Grosse 2015 (K-FAC,
arXiv:1503.05671).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.batches import Batch, is_pair, run
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet
from secateur.space.products import plain_attention


def outputs_and_kind(result: Any) -> tuple[torch.Tensor, bool]:
    """The tensor that a model's result is judged by, and whether it is logits.

    Raises:
        SecateurError: where there is no floating-point tensor in it.
    """
    logits = getattr(result, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits, True
    for name in ("last_hidden_state", "sample"):
        if isinstance(getattr(result, name, None), torch.Tensor):
            return getattr(result, name), False
    first = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise SecateurError(f"the model returns a {type(result).__name__}, of which no tensor can be compared")
    return first, False


def are_logits(batch: Batch, *, said: bool) -> bool:
    """Whether outputs are logits: the result says so, or the batch is (inputs, class numbers)."""
    return said or (isinstance(batch, tuple | list) and is_pair(batch) and not batch[1].is_floating_point())


def output_gradients(
    model: nn.Module,
    modules: Sequence[str],
    batches: Sequence[Batch],
    *,
    logits: bool | None = None,
    seed: int = 0,
    track: Track = quiet,
) -> dict[str, torch.Tensor]:
    """Second moment G of the gradients at the outputs of modules, so that tr(G D)/2 is what a change costs.

    D is the mean over positions of d d', d the change of the output. G is summed over positions and divided by the
    number of predictions: tokens of [B, S, V], samples of [B, C]; of other outputs by that of their elements.

    Args:
        model: the dense model; it runs in evaluation mode.
        modules: their paths. Those that no gradient reaches are left out of the result.
        batches: calibration data; targets are left out.
        logits: whether the outputs are logits; None = where the result says so, or batches are (inputs, class numbers).
        seed: what y (or the projection) is drawn with.
        track: shows progress.

    Returns:
        Path -> float32 [features, features]; features are the last dimension, of convolutions the second.

    Raises:
        SecateurError: for outputs that are not finite.
    """
    found: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    handles = []
    for path in modules:

        def keep(_: nn.Module, __: Any, output: Any, *, path: str = path) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, torch.Tensor) or not first.requires_grad:
                return output
            kept[path] = first
            handed = first.clone()  # what follows may change it in place, and the gradient would be that behind
            return (handed, *output[1:]) if type(output) is tuple else handed if output is first else output

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    predictions = 0
    try:
        model.requires_grad_(requires_grad=True)
        with evaluating(model), torch.enable_grad(), plain_attention():
            for batch in track(batches, "what the outputs are worth"):
                kept.clear()
                target, count = _log_likelihood(model, batch, logits, draw)
                predictions += count
                gradients = torch.autograd.grad(target, list(kept.values()), allow_unused=True) if kept else ()
                for path, gradient in zip(kept, gradients, strict=True):
                    if gradient is not None:
                        rows = _rows(model.get_submodule(path), gradient).float()
                        found[path] = found.get(path, torch.zeros(())) + (rows.T @ rows).cpu()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
    return {path: total / predictions for path, total in found.items()}


def _log_likelihood(
    model: nn.Module, batch: Batch, logits: bool | None, draw: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Log p(y) of what the model itself would draw, summed; or a random projection of what it gives."""
    output, said = outputs_and_kind(run(model, batch))
    if not bool(torch.isfinite(output).all()):
        raise SecateurError("the model's outputs are not finite: check the weights, the data and the dtype")
    if are_logits(batch, said=said) if logits is None else logits:
        scores = output.float().log_softmax(-1).flatten(0, -2)
        chosen = torch.multinomial(scores.detach().exp().cpu(), 1, generator=draw).to(scores.device)
        return scores.gather(1, chosen).sum(), len(scores)
    flat = output.float()
    size = flat.detach().square().mean().sqrt().clamp(min=1e-30)  # the error is relative to the output
    signs = torch.randn(flat.shape, generator=draw).to(flat.device)
    return (flat * signs).sum() / size, flat.numel()


def _rows(module: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Gradients as rows of features."""
    if isinstance(module, nn.modules.conv._ConvNd):
        dim = gradient.dim() - len(module.kernel_size) - 1
        return gradient.movedim(dim, -1).flatten(0, -2)
    return gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[None]
