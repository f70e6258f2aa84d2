"""Secateur: prune trained PyTorch models to a budget, with measured proof of what the cut cost and saved."""

from secateur.choose import Budget, Plan, diff
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.measure.sparsity import statistics
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.iterative import iterative
from secateur.methods.verbs import evaluate, plan, prune
from secateur.ship import load, save
from secateur.train import sparsify, strip

__all__ = [
    "Budget",
    "Plan",
    "SecateurError",
    "adapt_batch_norm",
    "apply",
    "diff",
    "discover",
    "evaluate",
    "iterative",
    "load",
    "plan",
    "prune",
    "save",
    "sparsify",
    "statistics",
    "strip",
]
