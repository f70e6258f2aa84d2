"""Importance from gradients of the loss: Taylor expansions and the Fisher information of a mask on each unit.

A mask m on a unit scales what every reader of the unit reads, and that is to scale the reader's columns. So the
derivative by the mask at m = 1 is dL/dm = sum of w * dL/dw over the unit's columns in its readers: exact, without a
hook in the model. An axis that no weight reads (the dimensions of queries and keys) is masked where it is made.

Gradients are taken for each sample by itself, however large the batches are: at the end of training their mean is
close to zero and says little. A batch whose tensors do not agree on the number of samples counts as one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, default_loss, samples_of
from secateur.load.mode import evaluating
from secateur.load.shared import shared
from secateur.progress import Track, quiet
from secateur.score.weights import Scores, add_up, over_others
from secateur.space import Axis, Slice, Space

Loss = Callable[[nn.Module, Batch], torch.Tensor]
"""The mean loss of a model on a batch."""


def taylor(
    model: nn.Module,
    space: Space,
    batches: Sequence[Batch],
    axes: Sequence[Axis] | None = None,
    *,
    loss: Loss | None = None,
    track: Track = quiet,
) -> Scores:
    """First order: mean over the samples of |dL/dm|, what the loss would change if the unit were masked.

    Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference" (arXiv:1611.06440).

    Args:
        model: the dense model; it runs in evaluation mode.
        space: its Space.
        batches: calibration data.
        axes: which axes; None for all.
        loss: (model, batch) -> scalar; None for `load.batches.default_loss`.
        track: shows progress.

    Raises:
        SecateurError: without batches, or where the loss is not a finite scalar that depends on the weights.
    """
    found = _mask_gradients(model, space, _samples(batches), axes, loss, track)
    return _mean({name: x.abs() for name, x in sample.items()} for sample in found)


def fisher(
    model: nn.Module,
    space: Space,
    batches: Sequence[Batch],
    axes: Sequence[Axis] | None = None,
    *,
    loss: Loss | None = None,
    whole: bool = False,
    track: Track = quiet,
) -> Scores:
    """Empirical Fisher information of the mask: mean over the samples of (dL/dm)^2.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv:1801.05787). With `whole`
    the mean over the batches, of the gradient of each as a whole: the score of ModelOpt's GradNAS over their number.
    Other arguments and errors as for `taylor`.
    """
    found = _mask_gradients(model, space, _own(batches) if whole else _samples(batches), axes, loss, track)
    return _mean({name: x.square() for name, x in sample.items()} for sample in found)


def taylor_squared(
    model: nn.Module,
    space: Space,
    batches: Sequence[Batch],
    axes: Sequence[Axis] | None = None,
    *,
    loss: Loss | None = None,
    track: Track = quiet,
) -> Scores:
    """Sum over the unit's columns in its readers of (w * g)^2, where g is the mean gradient over the batches.

    Weights count one by one, so that opposite signs do not cancel. Molchanov et al. 2019 (arXiv:1906.10771), with
    weights that are summed over a unit. Arguments and errors as for `taylor`.
    """
    parts = _read_slices(space, axes)
    mean: dict[str, torch.Tensor] = {}
    own = _own(batches)
    with world.as_one(), _differentiable(model, parts) as weights:
        for gradients in _gradients(model, own, weights, loss, track):
            for name, gradient in gradients.items():
                mean[name] = mean[name] + gradient if name in mean else gradient
    if world.split():
        mean = world.add_up_named(mean)

    def reduce(name: str, dim: int) -> torch.Tensor:
        if name not in mean:  # the loss does not depend on it
            return torch.zeros(space.parameters[name].shape[dim])
        return over_others((weights[name].detach().float() * mean[name] / len(batches)).square(), dim)

    return add_up(parts, reduce)


def _own(batches: Sequence[Batch]) -> list[Batch]:
    """Whole batches of this process's share, because the gradient of each is looked at as a whole.

    Raises:
        SecateurError: in all processes, where there are more of them than batches.
    """
    if world.split() and 0 < len(batches) < world.size():
        raise SecateurError(
            f"the gradient of each batch is looked at as a whole, and there are {len(batches)} for {world.size()} "
            "processes: give a smaller batch_size, or start fewer (--nproc_per_node)"
        )
    return world.share(batches) if world.split() else list(batches)


def _samples(batches: Sequence[Batch]) -> list[Batch]:
    """The samples of this process's share, one by one."""
    return [sample for batch in shared(batches) for sample in samples_of(batch)] if batches else []


def _mask_gradients(
    model: nn.Module,
    space: Space,
    samples: Sequence[Batch],
    axes: Sequence[Axis] | None,
    loss: Loss | None,
    track: Track,
) -> Iterator[Scores]:
    """dL/dm of every unit, for one sample after the other, or one batch after the other."""
    parts = _read_slices(space, axes)
    with _differentiable(model, parts) as weights:
        for gradients in _gradients(model, samples, weights, loss, track):

            def reduce(name: str, dim: int, found: Mapping[str, torch.Tensor] = gradients) -> torch.Tensor:
                if name not in found:  # the loss does not depend on it
                    return torch.zeros(space.parameters[name].shape[dim])
                return over_others(weights[name].detach().float() * found[name], dim)

            yield add_up(parts, reduce)


def _mean(samples: Iterable[Scores]) -> Scores:
    total: Scores = {}
    count = 0
    with world.as_one():
        for found in samples:
            total = {name: total[name] + value for name, value in found.items()} if count else found
            count += 1
    if world.split():
        total, count = world.add_up_named(total), sum(world.gathered(count))
    return {name: value / count for name, value in total.items()}


def _read_slices(space: Space, axes: Sequence[Axis] | None) -> dict[str, tuple[Slice, ...]]:
    """The columns that a mask on each unit scales: those of its readers, or else the rows that make it."""
    found = {}
    for axis in space.axes if axes is None else axes:
        read = tuple(dict.fromkeys(part for _, part in space.consumers(axis) if part.parameter in space.parameters))
        found[axis.name] = read or tuple(part for part in axis.slices if part.parameter in space.parameters)
    return found


@contextmanager
def _differentiable(model: nn.Module, parts: Mapping[str, Sequence[Slice]]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to take gradients of; frozen ones are unfrozen for the time, all others frozen."""
    parameters = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    used = {part.parameter for slices in parts.values() for part in slices}
    wanted = {name for name in used if parameters[name].is_floating_point()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in wanted)
        yield {name: parameters[name] for name in parameters if name in wanted}
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])


def _gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Mapping[str, nn.Parameter],
    loss: Loss | None,
    track: Track,
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients in float32 for one batch after the other; `.grad` of the parameters is left alone."""
    if not batches:
        raise SecateurError("there is no calibration batch to take gradients on")
    function = loss or default_loss
    for index, batch in enumerate(track(batches, "gradients")):
        with evaluating(model), torch.enable_grad():
            value = function(model, batch)
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                shown = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise SecateurError(f"the loss of batch {index} is no scalar tensor but {shown}")
            if not value.requires_grad:
                raise SecateurError(f"the loss of batch {index} does not depend on the weights: is it detached?")
            if not bool(torch.isfinite(value)):
                raise SecateurError(f"the loss of batch {index} is {value.item()}: check the data, weights and dtype")
            found = torch.autograd.grad(value.squeeze(), list(weights.values()), allow_unused=True)
        yield {name: g.detach().float() for name, g in zip(weights, found, strict=True) if g is not None}
