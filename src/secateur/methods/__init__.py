"""The named algorithms: one file each, one line each in the table."""

from collections.abc import Callable, Mapping

from secateur.methods.alps import alps
from secateur.methods.base import Decision
from secateur.methods.magnitude import magnitude
from secateur.methods.minitron import minitron
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.structural import structural
from secateur.methods.wanda import wanda

METHODS: Mapping[str, Callable[..., Decision]] = {
    "minitron": minitron,
    "structural": structural,
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
}

MASKING = ("magnitude", "wanda", "sparsegpt", "alps")
"""Methods that set single weights to zero and leave all sizes as they are."""

__all__ = ["MASKING", "METHODS", "Decision"]
