"""WHAT matters: one pure function for each criterion."""

from secateur.score.activation import Scores, activation_scores

__all__ = ["Scores", "activation_scores"]
