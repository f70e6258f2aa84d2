"""What a cut cost: the pruned model against the dense one, on held-out data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.load.shared import shared
from secateur.load.store import store_of
from secateur.measure.classify import compare_classes, labelled
from secateur.measure.quality import SUMS, Reference, compare, row_sums
from secateur.progress import Track
from secateur.space.products import plain_attention
from secateur.walk import outputs


def compared(pruned: nn.Module, dense: nn.Module, batches: Sequence[Any], track: Track) -> dict[str, Any]:
    """What the cut cost, in the measures of the kind of model that the batches are for.

    Streamed models are run block by block, so that each block is loaded once for all of the data.
    """
    if labelled(batches):
        return compare_classes(pruned, dense, batches, track)
    if store_of(pruned) is not None and store_of(dense) is not None:
        return _block_by_block(pruned, dense, batches, track)
    found = compare(pruned, Reference(dense, batches, track=track), track)
    return {
        "tokens": found.tokens,
        "perplexity": {"dense": found.dense_perplexity, "pruned": found.perplexity},
        "kl": found.kl,
        "top1": found.top1,
    }


def _block_by_block(pruned: nn.Module, dense: nn.Module, batches: Sequence[Any], track: Track) -> dict[str, Any]:
    own = shared(batches, "the evaluation data")
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    before = outputs(dense, own, name="eval-dense", track=track, what="the dense model, block by block")
    after = outputs(pruned, own, name="eval", track=track, what="the pruned model, block by block")
    with torch.no_grad(), plain_attention():  # the first walk ends before the second: neither leaves what it found
        for index, (batch, one, two) in enumerate(zip(own, before, after, strict=True)):
            total += row_sums(pruned, batch, index, two.logits, one.logits).sum(0)
    if world.split():
        world.add_up([total])
    sums = dict(zip(SUMS, total.tolist(), strict=True))
    count = sums["count"]
    return {
        "tokens": int(count),
        "perplexity": {"dense": math.exp(sums["dense_loss"] / count), "pruned": math.exp(sums["loss"] / count)},
        "kl": sums["kl"] / count,
        "top1": sums["agree"] / count,
    }
