"""GradNAS: what each head and each FFN unit means to the loss, by the gradient of a mask on it.

The algorithm of NVIDIA ModelOpt (https://github.com/NVIDIA/Model-Optimizer), after Michel et al. 2019, "Are Sixteen
Heads Really Better than One?" (arXiv:1905.10650).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.choose.ladder import Ladder, Meter, in_order, plan_of
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, size_of
from secateur.load.model import sliding_window
from secateur.methods.base import Decision
from secateur.methods.ranking import (
    axes_inside,
    by_mean,
    check_finite,
    check_limits,
    limited,
    range_of,
    settled,
    together,
)
from secateur.progress import Track, quiet
from secateur.score.gradients import fisher
from secateur.space.trace import Inputs

PER = ("batch", "sample")
THRESHOLDS = ("axis", "unit")


def gradnas(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch],
    *,
    inputs: Inputs = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    per: str = "batch",
    threshold: str = "axis",
    normalize: bool = False,
    uniform: bool = False,
    keep_at_least: float = 0.1,
    limits: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    round_to: int | Mapping[str, int] | None = None,
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by the mean over the batches of (dL/dm)^2 for a mask m on each unit, where it is read.

    Args:
        model: any module; encoders and decoders above all.
        budget: limits on params, active_params, macs, flops and memory; all of several must hold.
        data: batches that the loss is taken of: token rows, mappings (with labels or without) or (inputs, targets).
        inputs: arguments of one forward pass, to trace the model with; not needed for Hugging Face models.
        loss: (model, batch) -> scalar; by default the model's own loss, or cross entropy for (inputs, targets). A
            model without labels needs one.
        per: what a gradient is squared of: batch, as published; sample, each by itself, however large batches are.
        threshold: what is compared with one threshold: axis, the scores that an axis loses in all, as published; unit,
            each score by itself.
        normalize: divide the scores of each axis by their mean before; ModelOpt does not.
        uniform: keep axes of one kind and size alike in all layers: what stock loaders of language models take.
        keep_at_least: share of every axis that stays.
        limits: kind, or pattern of axis or module names -> the largest share that may go.
        ignore: kinds, and patterns of axis or module names: their units stay.
        only: kinds and patterns of what may go; FFN units and heads by default (KV groups, where heads share keys and
            values), channels of CNNs.
        round_to: of what the sizes that are cut are multiples, for all kinds or for each.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        track: shows progress.

    Raises:
        SecateurError: for unknown names, missing data, a model without a loss, a budget that cannot be met.
    """
    for option, value, known in (("per", per, PER), ("threshold", threshold, THRESHOLDS)):
        if value not in known:
            raise SecateurError(f"{option}: there is no {value!r}{nearest(value, known)}")
    if not data:
        raise SecateurError("gradnas needs data: give batches, or 'self' for a language model that writes its own")
    check_limits("gradnas", budget)
    begin = time.perf_counter()
    space = discover(model, inputs)
    traced = time.perf_counter()
    axes = axes_inside(model, space, only, ignore)
    within = range_of(model, space, axes, keep_at_least, limits, round_to)
    workload = Workload(kv_batch, kv_seq_len, sliding_window(getattr(model, "config", None)), stored_dtype)
    costs, allowed = limited(space, workload, budget)
    scores = fisher(model, space, data, axes, loss=loss, whole=per == "batch", track=track)
    check_finite(scores, "gradnas")
    scored = time.perf_counter()
    compared = {name: by_mean(values) if normalize else values for name, values in scores.items()}
    ladders = within.ladders(together(axes, uniform), compared)
    if threshold == "axis":
        ladders = [_added_up(one) for one in ladders]
    levels, reached = settled(in_order(ladders, [None] * len(ladders)), Meter(space, ladders, costs), allowed)
    seconds = {"tracing": traced - begin, "scoring": scored - traced, "ranking": time.perf_counter() - scored}
    told = {"per": per, "threshold": threshold, "normalized": normalize, "uniform": uniform, "target": reached}
    details = {**told, "calibration": {"samples": sum(map(size_of, data))}, "seconds": seconds}
    return Decision(plan_of(ladders, levels, scores), space, details)


def _added_up(one: Ladder) -> Ladder:
    """The same with what the axis has lost after each rung."""
    return replace(one, scores=np.cumsum(one.scores * -np.diff(one.sizes)))
