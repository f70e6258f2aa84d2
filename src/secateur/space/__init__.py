"""WHAT can be cut: trace a model and name its axes."""

from secateur.space.discover import discover
from secateur.space.types import Axis, Block, Norm, Parameter, Polynomial, Reader, Slice, Space, evaluate

__all__ = ["Axis", "Block", "Norm", "Parameter", "Polynomial", "Reader", "Slice", "Space", "discover", "evaluate"]
