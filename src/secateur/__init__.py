"""Secateur: prune trained PyTorch models to a budget, with measured proof of what the cut cost and saved."""

from secateur.choose import Budget, Plan, diff
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.methods.verbs import evaluate, plan, prune
from secateur.ship import load, save

__all__ = ["Budget", "Plan", "SecateurError", "apply", "diff", "discover", "evaluate", "load", "plan", "prune", "save"]
