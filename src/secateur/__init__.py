"""Secateur: prune trained PyTorch models to a budget, with measured proof of what the cut cost and saved."""

from typing import TYPE_CHECKING, Any

from secateur.choose import Budget, Plan, diff
from secateur.cut import apply
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.measure.sparsity import statistics
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.healing import distill, finetune
from secateur.methods.iterative import iterative
from secateur.methods.verbs import evaluate, plan, prune
from secateur.ship import load, save
from secateur.train import sparsify, strip

if TYPE_CHECKING:
    from secateur.recipe import Pipeline

__all__ = [
    "Budget",
    "Pipeline",
    "Plan",
    "SecateurError",
    "adapt_batch_norm",
    "apply",
    "diff",
    "discover",
    "distill",
    "evaluate",
    "finetune",
    "iterative",
    "load",
    "plan",
    "prune",
    "save",
    "sparsify",
    "statistics",
    "strip",
]


if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """`Pipeline` comes with all steps of recipes, which take long to import: only where it is used."""
        if name == "Pipeline":
            from secateur.recipe import Pipeline

            return Pipeline
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
