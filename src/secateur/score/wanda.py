"""Wanda's score of single weights."""

import torch

from secateur.score.grams import Gram


def wanda(matrix: torch.Tensor, gram: Gram | None) -> torch.Tensor:
    """|w| times the norm of what it meets, by the square root of how many rows it met.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695).

    Args:
        matrix: weights [rows, columns].
        gram: of what the columns read; None = nothing was seen, and only |w| counts.

    Returns:
        float32 [rows, columns]; float64 where activations are.
    """
    if gram is None:
        return matrix.abs().float()
    return matrix.abs().to(gram.squares.dtype) * (gram.squares / max(1, gram.rows)).sqrt()
