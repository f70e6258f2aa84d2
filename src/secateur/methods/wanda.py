"""Wanda: |weight| times the norm of its input, compared within each output.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.mask import Layout, mask_matrix
from secateur.load.batches import Batch
from secateur.methods.base import Decision
from secateur.methods.masking import Solved, Which, block_by_block, matrix_scope, need_data, task
from secateur.progress import Track, quiet
from secateur.score import wanda as formula
from secateur.score.grams import Gram
from secateur.space.trace import Inputs


def wanda(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch] = (),
    *,
    inputs: Inputs = None,
    scope: str = "row",
    allocation: str | Mapping[str, float] = "uniform",
    owl_times: float = 5.0,
    owl_spread: float = 0.08,
    block: tuple[int, int] = (1, 1),
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep_scores: bool = False,
    track: Track = quiet,
) -> Decision:
    """Decide masks block by block, each calibrated on what the masked blocks before it give.

    Args:
        model: any module.
        budget: sparsity=50% (of the weights that are masked), or n:m=2:4 (N of every M stay).
        data: calibration batches.
        inputs: arguments of one forward pass, to find weights that no known module owns; the first batch by default.
        scope: what competes: row, each output; tensor, each weight as a whole.
        allocation: how much of each weight goes: uniform; magnitude, as global magnitude shares it out; owl; a .json
            file or JSON text of {pattern: share}, or a sensitivity table.
        owl_times: for owl, times the mean of a block from which a score is an outlier.
        owl_spread: for owl, how far a block's share may lie from the mean.
        block: rows and columns of tiles that go whole.
        only: names of weights or modules, or patterns, to which masks are confined.
        ignore: the same, of what stays dense.
        keep_scores: keep what the masks were chosen by, to choose another sparsity later.
        track: shows progress.

    Raises:
        SecateurError: without data, for options that contradict each other, or a pattern that does not fit.
    """
    need_data("wanda", data)
    which = Which(only, ignore, block, allocation, owl_times, owl_spread, inputs)

    def solve(matrices: Sequence[torch.Tensor], gram: Gram, zeros: Sequence[int], layout: Layout) -> Solved:
        scores = [formula.wanda(matrix, gram) for matrix in matrices]
        return Solved([mask_matrix(s, n, layout) for s, n in zip(scores, zeros, strict=True)], scores=scores)

    todo = task(model, budget, data, which, matrix_scope("wanda", scope), track)
    return block_by_block(model, data, todo, solve, full=False, keep=keep_scores, track=track)
