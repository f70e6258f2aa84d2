"""SparseGPT: the survivors of each row make up for what goes.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv:2301.00774).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.mask import Layout
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.mend.sparsegpt import sparsegpt as sweep
from secateur.methods.base import Decision
from secateur.methods.masking import Solved, Which, block_by_block, matrix_scope, need_data, task
from secateur.progress import Track, quiet
from secateur.score.grams import Gram
from secateur.space.trace import Inputs


def sparsegpt(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch] = (),
    *,
    inputs: Inputs = None,
    scope: str = "tensor",
    damping: float = 0.01,
    columns_at_once: int = 128,
    allocation: str | Mapping[str, float] = "uniform",
    owl_times: float = 5.0,
    owl_spread: float = 0.08,
    block: tuple[int, int] = (1, 1),
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    keep_scores: bool = False,
    track: Track = quiet,
) -> Decision:
    """Decide masks and repaired weights block by block, each calibrated on what the blocks before it now give.

    Args:
        model: any module.
        budget: sparsity=50% (of the weights that are masked), or n:m=2:4 (N of every M stay).
        data: calibration batches.
        inputs: arguments of one forward pass, to find weights that no known module owns; the first batch by default.
        scope: what competes within the columns whose masks are chosen together: tensor, all; row, each output.
        damping: share of the mean of the diagonal of X'X that is added to it.
        columns_at_once: how many columns' masks are chosen together.
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
    need_data("sparsegpt", data)
    if not 0 < damping < math.inf or columns_at_once < 1:
        raise SecateurError(
            f"damping {damping} must be above 0 and finite, and columns_at_once {columns_at_once} at least 1"
        )
    which = Which(only, ignore, block, allocation, owl_times, owl_spread, inputs)

    def solve(matrices: Sequence[torch.Tensor], gram: Gram, zeros: Sequence[int], layout: Layout) -> Solved:
        masks, weights, scores, used = sweep(
            matrices, gram.full(), zeros, layout, damping=damping, columns_at_once=columns_at_once
        )
        return Solved(masks, weights, scores, damping=used if used > damping else 0.0)

    todo = task(model, budget, data, which, matrix_scope("sparsegpt", scope), track)
    return block_by_block(model, data, todo, solve, full=True, keep=keep_scores, track=track)
