"""Structural pruning of any module: units of all axes are ranked by a criterion and go until the budget is met.

Groups of coupled weights go together, as in Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"
(arXiv:2301.12900); isomorphic ranking is that of Fang et al. 2024, "Isomorphic Pruning for Vision Models"
(arXiv:2407.04616).
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.choose.ladder import Ladder, Meter, in_order, plan_of
from secateur.choose.select import choose_axes
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, size_of
from secateur.load.model import sliding_window
from secateur.methods.base import Decision
from secateur.methods.ranking import (
    by_mean,
    check_finite,
    check_limits,
    is_pretrained,
    limited,
    range_of,
    settled,
    together,
)
from secateur.progress import Track, quiet
from secateur.score import gradients, reads, weights
from secateur.space import Axis, Space
from secateur.space.trace import Inputs

FROM_WEIGHTS = ("magnitude_l2", "magnitude_l1", "batch_norm", "lamp", "fpgm", "random")
FROM_DATA = ("taylor", "taylor_squared", "fisher", "activation")
COMPARABLE = ("lamp", "random")
"""Criteria whose scores mean the same in every axis."""
SCOPES = ("global", "isomorphic", "local")


def structural(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch] = (),
    *,
    inputs: Inputs = None,
    criterion: str = "magnitude_l2",
    scope: str = "global",
    normalize: bool | None = None,
    uniform: bool | None = None,
    keep_at_least: float = 0.1,
    limits: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    round_to: int | Mapping[str, int] | None = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    seed: int = 0,
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by ranking the units of all axes.

    Args:
        model: any module.
        budget: limits on params, macs, flops (two for each mac) and memory; all of several must hold. No unit more
            could stay. MACs are those of one sample of the example inputs.
        data: batches for the criteria that need data: tensors, mappings or (inputs, targets).
        inputs: arguments of one forward pass, to trace the model with: a tensor, a tuple or a mapping; not needed for
            Hugging Face models.
        criterion: what a unit is worth: magnitude_l1, magnitude_l2, batch_norm, lamp, fpgm, random; with data taylor,
            taylor_squared, fisher, activation.
        scope: what is ranked together: global, all units; isomorphic, those of axes with the same structure; local,
            those of each axis alone, so that every axis loses the same share.
        normalize: divide the scores of each axis by their mean before they are compared with other axes; by default
            with scope global, and not for lamp and random, which are comparable as they are.
        uniform: keep axes of one kind and size alike in all layers; by default for Hugging Face models, because stock
            loaders take only those.
        keep_at_least: share of every axis that stays.
        limits: kind, or pattern of axis or module names -> the largest share that may go.
        ignore: kinds, and patterns of axis or module names: their units stay. A module means every axis that runs
            through its parameters, on the side of its inputs too.
        only: kinds and patterns of what may go; everything by default but head_dim, ssm_head_dim and rank.
        round_to: of what the sizes that are cut are multiples, for all kinds or for each.
        loss: (model, batch) -> scalar for taylor, taylor_squared and fisher; by default the model's own loss, or cross
            entropy for (inputs, targets).
        seed: of the criterion random.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        track: shows progress.

    Raises:
        SecateurError: for unknown names, options that contradict, missing data, a budget that cannot be met.
    """
    _check(criterion, scope, budget, data, loss)
    begin = time.perf_counter()
    space = discover(model, inputs)
    traced = time.perf_counter()
    axes = choose_axes(space, [name for name, _ in model.named_modules()], only, ignore)
    within = range_of(model, space, axes, keep_at_least, limits, round_to)
    workload = Workload(kv_batch, kv_seq_len, sliding_window(getattr(model, "config", None)), stored_dtype)
    costs, allowed = limited(space, workload, budget)
    scores = criterion_scores(model, space, axes, data, criterion, loss, seed, track)
    scored = time.perf_counter()
    divide = scope == "global" and criterion not in COMPARABLE if normalize is None else normalize
    alike = uniform if uniform is not None else is_pretrained(model)
    compared = {name: by_mean(values) if divide else values for name, values in scores.items()}
    ladders = within.ladders(together(axes, alike), compared)
    order = in_order(ladders, _classes(ladders, space, model, scope))
    levels, reached = settled(order, Meter(space, ladders, costs), allowed)
    seconds = {"tracing": traced - begin, "scoring": scored - traced, "ranking": time.perf_counter() - scored}
    samples = sum(map(size_of, data)) if criterion in FROM_DATA else 0
    told = {"criterion": criterion, "scope": scope, "normalized": divide, "uniform": alike, "target": reached}
    details = {**told, "calibration": {"samples": samples}, "seconds": seconds}
    return Decision(plan_of(ladders, levels, scores), space, details)


def _check(criterion: str, scope: str, budget: Budget, data: Sequence[Batch], loss: Any) -> None:
    known = [*FROM_WEIGHTS, *FROM_DATA]
    if criterion not in known:
        raise SecateurError(f"there is no criterion {criterion!r}{nearest(criterion, known)}")
    if scope not in SCOPES:
        raise SecateurError(f"there is no scope {scope!r}{nearest(scope, SCOPES)}")
    if criterion in FROM_DATA and not data:
        raise SecateurError(
            f"criterion {criterion} needs data: give batches, or 'self' for a language model that writes its own"
        )
    if loss is not None and criterion not in ("taylor", "taylor_squared", "fisher"):
        raise SecateurError(f"criterion {criterion} takes no loss; taylor, taylor_squared and fisher do")
    check_limits("structural", budget)


def criterion_scores(
    model: nn.Module, space: Space, axes: Sequence[Axis], data: Sequence[Batch], criterion: str,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None, seed: int, track: Track,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What units are worth by a criterion of this name: axis -> [size].

    Raises:
        SecateurError: for scores that are not finite; see `score` for what else.
    """
    match criterion:
        case "magnitude_l1" | "magnitude_l2":
            found = weights.magnitude(model, space, axes, p=int(criterion[-1]))
        case "batch_norm":
            found = weights.batch_norm(model, space, axes)
        case "lamp":
            found = weights.lamp(model, space, axes)
        case "fpgm":
            found = weights.fpgm(model, space, axes)
        case "random":
            found = weights.random_scores(space, axes, seed=seed)
        case "activation":
            found = reads.activation(model, space, data, axes, track=track)
        case _:
            function = {"taylor": gradients.taylor, "taylor_squared": gradients.taylor_squared}
            found = function.get(criterion, gradients.fisher)(model, space, data, axes, loss=loss, track=track)
    check_finite(found, f"criterion {criterion}")
    return found


def _classes(ladders: Sequence[Ladder], space: Space, model: nn.Module, scope: str) -> list[Hashable]:
    """What is ranked together: everything; what has the same structure; or nothing."""
    if scope == "local":
        return list(range(len(ladders)))
    return [_structure(found.axes[0], space, model) if scope == "isomorphic" else None for found in ladders]


def _structure(axis: Axis, space: Space, model: nn.Module) -> Hashable:
    """What an axis runs through, without names and sizes: isomorphic axes have the same."""
    shapes = []
    for part in axis.slices:
        path, _, leaf = part.parameter.rpartition(".")
        module = model.get_submodule(path)
        kernel = tuple(getattr(module, "kernel_size", None) or ())
        rank = len(space.tensor(part.parameter).shape)
        shapes.append((type(module).__name__, leaf, part.dim, rank, kernel, len(part.outer)))
    return axis.kind, axis.groups > 1, tuple(sorted(shapes))
