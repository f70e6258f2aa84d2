"""TAKING it away: (model, plan) -> a smaller model."""

from secateur.cut.apply import apply

__all__ = ["apply"]
