"""Search: the levels of everything that can be cut, by a mixed-integer program over measured losses, then refined.

A survey tells in closed form what every size of every axis would lose once it is repaired; a few levels of each are
measured; `scipy.optimize.milp` picks the best levels under all limits; switches under the true loss of the whole model
(Sieberling et al. 2024, "EvoPress", arXiv:2410.14649) do the rest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.load.batches import Batch
from secateur.measure.quality import Metric
from secateur.methods.base import Decision
from secateur.methods.narrowing import decide_with_width
from secateur.methods.searching import Asked, decide_levels
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs


def search(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch] = (),
    *,
    inputs: Inputs = None,
    uniform: bool | None = None,
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep_at_least: float = 0.05,
    limits: Mapping[str, float] | None = None,
    round_to: int | Mapping[str, int] | None = None,
    levels: int = 17,
    drop: bool = True,
    rotate: bool = False,
    probes: int = 3,
    trials: int = 64,
    score: Metric | None = None,
    score_samples: int = 48,
    adapt_samples: int = 1024,
    gradients: bool = True,
    survey: Path | None = None,
    damping: float | None = None,
    latency_table: Path | None = None,
    latency_batch: int = 1,
    latency_seq_len: int | None = None,
    seed: int = 0,
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by a search over the sizes of all axes and the blocks that may go.

    Args:
        model: any module.
        budget: limits on params, active_params, macs, flops, memory and latency; all of several must hold.
        data: calibration batches; not needed with a `survey`, but without data nothing is measured or refined.
        inputs: arguments of one forward pass, to trace the model with; not needed for Hugging Face models.
        uniform: the same sizes in all layers, as stock loaders want them; by default for Hugging Face models.
        only: kinds and patterns of what may go; everything by default but hidden, head_dim, ssm_head_dim and rank.
        ignore: kinds, and patterns of axis or module names: their units stay.
        keep_at_least: share of every axis that stays, unless its whole sub-layer goes.
        limits: kind, or pattern of axis or module names -> the largest share that may go.
        round_to: of what the sizes that are cut are multiples, for all kinds or for each.
        levels: sizes that are looked at for each axis; the last step to the budget is by single units.
        drop: whole layers may go where sizes are uniform, whole attention and MLP sub-layers where they are free.
        rotate: the hidden size may go too: the residual stream is turned into a basis of its own and cut there. Only
            for streams between RMS norms; the plan then needs the weights of the result.
        probes: levels of each slot whose loss is measured; the others follow the estimate. 0 = none.
        trials: models that are tried in the refinement. 0 = none.
        score: what is measured, in place of the distance to the dense model (KL, or the error of the outputs).
        score_samples: calibration samples that are measured on.
        adapt_samples: samples for batch norm statistics before each measurement, where the model has batch norm.
        gradients: the survey weighs errors by what the model loses, which takes backward passes; without, all outputs
            of all layers count alike.
        survey: folder of a saved survey, in place of making one.
        damping: share of the mean of the diagonal of X'X that is added to it; 1e-3, and more where rows are few.
        latency_table: what `secateur profile` measured; what it lacks is measured now.
        latency_batch: rows of what is timed, of a Hugging Face model; others are timed on `inputs`.
        latency_seq_len: tokens in a row of it; those of the data by default.
        seed: of everything that is drawn.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        track: shows progress.

    Raises:
        SecateurError: for options that contradict, missing data, a budget that cannot be met (says the smallest
            reachable values), a survey of another model.
    """
    asked = Asked(
        inputs, uniform, only, ignore, keep_at_least, limits, round_to, levels, drop, probes, trials, score,
        score_samples, adapt_samples, gradients, survey, damping, latency_table, latency_batch, latency_seq_len, seed,
        Workload(kv_batch, kv_seq_len, stored=stored_dtype),
    )  # fmt: skip
    return (decide_with_width if rotate else decide_levels)(model, budget, data, asked, track)
