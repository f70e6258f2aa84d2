"""Outliers of a block: weights whose Wanda score stands far above the mean. What OWL shares sparsity out by."""

from collections.abc import Mapping, Sequence

import torch

from secateur.score.grams import Read
from secateur.score.wanda import wanda


def outliers(
    reads: Sequence[Sequence[Read]], parameters: Mapping[str, torch.Tensor], blocks: Mapping[str, str], times: float
) -> dict[str, float]:
    """Share of the elements of each block with |w| |x| above `times` the block's mean (arXiv:2310.05175).

    Args:
        reads: what the weights read.
        parameters: their tensors.
        blocks: weight -> the block that it lies in.
        times: what counts as an outlier.

    Returns:
        Weight -> the share of its block.
    """
    scores: dict[str, list[torch.Tensor]] = {}
    for read in (read for group in reads for read in group):
        matrix = read.weight.matrix(parameters[read.weight.name].detach(), read.part)
        scores.setdefault(blocks[read.weight.name], []).append(wanda(matrix, read.gram))
    share = {}
    for block, found in scores.items():
        total = sum(x.numel() for x in found)
        mean = sum(float(x.double().sum()) for x in found) / total
        share[block] = sum(int((x > times * mean).sum()) for x in found) / total
    return {weight: share[block] for weight, block in blocks.items()}
