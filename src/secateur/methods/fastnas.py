"""FastNAS: what each size of each axis alone does to the score, and the smallest greatest harm that meets a budget.

The algorithm of NVIDIA ModelOpt (https://github.com/NVIDIA/Model-Optimizer), in the line of Molchanov et al. 2021,
"LANA: Latency Aware Network Acceleration" (arXiv:2107.10624).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.choose.ladder import in_order, plan_of
from secateur.choose.plan import Plan
from secateur.choose.select import choose_axes
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, size_of
from secateur.load.model import sliding_window
from secateur.measure.clock import Clock
from secateur.measure.quality import Metric
from secateur.methods.base import Decision
from secateur.methods.probing import Prober, Reach, sensitivities
from secateur.methods.ranking import MEASURES, check_limits, is_pretrained, range_of, together
from secateur.methods.structural import FROM_DATA, FROM_WEIGHTS, criterion_scores
from secateur.methods.timing import timed, timing_inputs
from secateur.progress import Track, quiet
from secateur.space import Space
from secateur.space.trace import Inputs


def fastnas(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch],
    *,
    inputs: Inputs = None,
    score: Metric | Callable[[nn.Module], float] | None = None,
    score_samples: int = 1024,
    adapt_batches: int = 10,
    levels: int = 8,
    criterion: str = "magnitude_l2",
    uniform: bool | None = None,
    keep_at_least: float = 0.1,
    limits: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    round_to: int | Mapping[str, int] | None = None,
    clock: Callable[[Plan], float] | None = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    seed: int = 0,
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by the measured sensitivity of each axis, cut by itself to a few sizes.

    Args:
        model: any module; CNNs above all.
        budget: limits on params, active_params, macs, flops, memory and latency; all of several must hold.
        data: batches to score on, and to estimate the statistics of batch norm from: (inputs, targets), tensors,
            mappings.
        inputs: arguments of one forward pass, to trace the model with; not needed for Hugging Face models.
        score: (model) -> number, higher is better, or a metric. By default how close the outputs are to the dense
            model's: minus the KL where they are logits, else minus the squared error.
        score_samples: how many samples of the data the default score takes; whole batches.
        adapt_batches: from how many batches the statistics of batch norm are estimated anew for each candidate; 0 =
            they stay as they are.
        levels: to how many sizes each axis is cut for a trial; sizes between them are interpolated.
        criterion: which units of an axis go first; see the method structural.
        uniform: the same sizes in all layers, as stock loaders want them; by default for Hugging Face models.
        keep_at_least: share of every axis that stays.
        limits: kind, or pattern of axis or module names -> the largest share that may go.
        ignore: kinds, and patterns of axis or module names: their units stay.
        only: kinds and patterns of what may go; everything by default but head_dim, ssm_head_dim and rank.
        round_to: of what the sizes that are cut are multiples, for all kinds or for each.
        clock: plan -> seconds, for a budget of latency; by default the model's parts are timed (`measure.clock`).
        loss: (model, batch) -> scalar, for the criteria taylor, taylor_squared and fisher.
        seed: of the criterion random.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        track: shows progress.

    Raises:
        SecateurError: for unknown names, missing data, a score that fails, is no finite number or looks turned round,
            and a budget that cannot be met, before anything is measured.
    """
    _check(budget, data, criterion, levels, score_samples, adapt_batches, clock)
    begin = time.perf_counter()
    space = discover(model, inputs)
    axes = choose_axes(space, [name for name, _ in model.named_modules()], only, ignore)
    within = range_of(model, space, axes, keep_at_least, limits, round_to)
    workload = Workload(kv_batch, kv_seq_len, sliding_window(getattr(model, "config", None)), stored_dtype)
    traced = time.perf_counter()
    units = criterion_scores(model, space, axes, data, criterion, loss, seed, track)
    alike = uniform if uniform is not None else is_pretrained(model)
    ladders = within.ladders(together(axes, alike), units)
    own = _clock(model, space, data, inputs, track) if "latency" in budget.limits and clock is None else None
    goal = Reach(space, workload, budget, ladders, units, clock if own is None else own.predict)
    profiled = time.perf_counter()
    prober = Prober(model, space, inputs, data, score, score_samples, adapt_batches, track)
    measured = sensitivities(prober, ladders, units, levels, track)
    found, reached = goal.settled(in_order(measured.ladders, [None] * len(ladders)))
    seconds = {"tracing": traced - begin, "profile": profiled - traced, "search": time.perf_counter() - profiled}
    told = {"criterion": criterion, "uniform": alike, "space": goal.profile, "target": reached, "seconds": seconds}
    details = {**told, **measured.told, "calibration": {"samples": sum(map(size_of, data))}}
    plan = plan_of(ladders, found, units)
    return Decision(plan, space, details | _latency(own, plan, reached, inputs, track))


def _clock(model: nn.Module, space: Space, data: Sequence[Batch], inputs: Inputs, track: Track) -> Clock:
    return Clock(model, space, timing_inputs(model, data, inputs), traced=inputs, track=track)


def _latency(
    clock: Clock | None, plan: Plan, reached: Mapping[str, Mapping[str, float]], inputs: Inputs, track: Track
) -> dict[str, Any]:
    """What the result takes, beside what was predicted of it."""
    if clock is None:
        return {}
    told = {"predicted": reached["latency"]["reached"], "limit": reached["latency"]["limit"]}
    return {"latency": told | timed(clock, plan, inputs, track=track)}


def _check(
    budget: Budget,
    data: Sequence[Batch],
    criterion: str,
    levels: int,
    score_samples: int,
    adapt_batches: int,
    clock: Any,
) -> None:
    known = [*FROM_WEIGHTS, *FROM_DATA]
    if criterion not in known:
        raise SecateurError(f"there is no criterion {criterion!r}{nearest(criterion, known)}")
    for option, value, least in (
        ("levels", levels, 1),
        ("score_samples", score_samples, 1),
        ("adapt_batches", adapt_batches, 0),
    ):
        if value < least:
            raise SecateurError(f"{option} must be at least {least}, not {value}")
    if not data:
        raise SecateurError("fastnas needs data to score on: give batches")
    check_limits("fastnas", budget, (*MEASURES, "latency"))
    if "latency" not in budget.limits and clock is not None:
        raise SecateurError("a clock is given, and the budget does not limit latency: add latency=..., or leave it out")
