"""Structured OBS: a ladder of sizes for every axis from one pass, and the levels that lose least within a budget.

Kurtic et al. 2023, "ZipLM" (arXiv:2302.04089); Ling et al. 2024, "SlimGPT" (arXiv:2412.18110); Meng et al. 2024,
"OSSCAR" (arXiv:2403.12983). Gradients at the outputs make losses of different layers comparable
(K-FAC), as in van der Ouderaa et al. 2024, "The LLM Surgeon" (arXiv:2312.17244).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.load.batches import Batch
from secateur.methods.base import Decision
from secateur.methods.search import search
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs


def obs(
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
    score_samples: int = 48,
    gradients: bool = True,
    survey: Path | None = None,
    damping: float | None = None,
    seed: int = 0,
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by structured OBS: `search` without anything that is measured, refined or dropped whole.

    Args:
        model: any module.
        budget: limits on params, active_params, macs, flops and memory; all of several must hold.
        data: calibration batches; not needed with a `survey`, which then repairs the model too.
        inputs: arguments of one forward pass, to trace the model with; not needed for Hugging Face models.
        uniform: the same sizes in all layers, as stock loaders want them; by default for Hugging Face models.
        only: kinds and patterns of what may go; everything by default but hidden, head_dim, ssm_head_dim and rank.
        ignore: kinds, and patterns of axis or module names: their units stay.
        keep_at_least: share of every axis that stays.
        limits: kind, or pattern of axis or module names -> the largest share that may go.
        round_to: of what the sizes that are cut are multiples, for all kinds or for each.
        levels: sizes that are looked at for each axis; the last step to the budget is by single units.
        score_samples: calibration samples that gradients are taken on.
        gradients: errors count by what the model loses, which takes backward passes; without, all outputs of all layers
            count alike, and nothing but forward passes is needed.
        survey: folder of a saved survey, in place of making one.
        damping: share of the mean of the diagonal of X'X that is added to it; 1e-3, and more where rows are few.
        seed: of everything that is drawn.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        track: shows progress.

    Raises:
        SecateurError: as `search`.
    """
    return search(
        model, budget, data, inputs=inputs, uniform=uniform, only=only, ignore=ignore, keep_at_least=keep_at_least,
        limits=limits, round_to=round_to, levels=levels, drop=False, probes=0, trials=0, score_samples=score_samples,
        gradients=gradients, survey=survey, damping=damping, seed=seed, kv_batch=kv_batch, kv_seq_len=kv_seq_len,
        stored_dtype=stored_dtype, track=track,
    )  # fmt: skip
