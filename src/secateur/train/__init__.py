"""LEARNING it back: sparsity that grows while a model trains."""

from secateur.train.masked import strip
from secateur.train.schedule import Constant, Cubic, Exponential, Linear, MultiStep, Schedule
from secateur.train.sparsity import Sparsity, sparsify

__all__ = ["Constant", "Cubic", "Exponential", "Linear", "MultiStep", "Schedule", "Sparsity", "sparsify", "strip"]
