"""Recipes: a pipeline in YAML, read strictly before anything heavy starts, run step by step, saved as a whole."""

from secateur.recipe.estimate import estimate
from secateur.recipe.notebook import Pipeline
from secateur.recipe.pipeline import Finished, Recipe
from secateur.recipe.read import load
from secateur.recipe.steps import STEPS

__all__ = ["STEPS", "Finished", "Pipeline", "Recipe", "estimate", "load"]
