"""FLAP: units whose readers see little fluctuation go, because a bias could stand in for their mean.

An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv:2312.11983).
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.choose.ladder import Meter, in_order, plan_of
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, size_of
from secateur.load.model import sliding_window
from secateur.methods.base import Decision
from secateur.methods.ranking import (
    axes_inside,
    check_finite,
    check_limits,
    is_pretrained,
    limited,
    range_of,
    settled,
    together,
)
from secateur.progress import Track, quiet
from secateur.score.fluctuation import fluctuation, standardised
from secateur.space.trace import Inputs
from secateur.walk import way

SCOPES = ("global", "local")


def flap(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch],
    *,
    inputs: Inputs = None,
    scope: str = "global",
    uniform: bool | None = None,
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
    """Decide a plan by the fluctuation of what is read: Var(x_j) ||W_:j||^2, standardised within each axis.

    Args:
        model: any module.
        budget: limits on params, active_params, macs, flops and memory; all of several must hold.
        data: calibration batches: token rows, mappings or (inputs, targets).
        inputs: arguments of one forward pass, to trace the model with; not needed for Hugging Face models.
        scope: global, all units in one order (the paper's AL-AM); local, every axis loses the same share (UL-UM).
        uniform: keep axes of one kind and size alike in all layers; by default for Hugging Face models, because stock
            loaders take only those. The paper's method is without.
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
        SecateurError: for unknown names, missing data, an axis that no weight reads, a budget that cannot be met.
    """
    if scope not in SCOPES:
        raise SecateurError(f"there is no scope {scope!r}{nearest(scope, SCOPES)}")
    if not data:
        raise SecateurError("flap needs data: give batches, or 'self' for a language model that writes its own")
    check_limits("flap", budget)
    begin = time.perf_counter()
    space = discover(model, inputs)
    traced = time.perf_counter()
    axes = axes_inside(model, space, only, ignore)
    within = range_of(model, space, axes, keep_at_least, limits, round_to)
    workload = Workload(kv_batch, kv_seq_len, sliding_window(getattr(model, "config", None)), stored_dtype)
    costs, allowed = limited(space, workload, budget)
    scores = fluctuation(model, space, data, axes, track=track, through=way(model, "fluctuations", track))
    check_finite(scores, "flap")
    scored = time.perf_counter()
    alike = uniform if uniform is not None else is_pretrained(model)
    ladders = within.ladders(together(axes, alike), standardised(scores))
    classes = list(range(len(ladders))) if scope == "local" else [None] * len(ladders)
    levels, reached = settled(in_order(ladders, classes), Meter(space, ladders, costs), allowed)
    seconds = {"tracing": traced - begin, "scoring": scored - traced, "ranking": time.perf_counter() - scored}
    told = {"scope": scope, "uniform": alike, "target": reached, "seconds": seconds}
    details = {**told, "calibration": {"samples": sum(map(size_of, data))}}
    return Decision(plan_of(ladders, levels, scores), space, details, mend="bias")
