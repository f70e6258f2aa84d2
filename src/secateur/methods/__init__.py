"""The named algorithms: one file each, one line each in the table."""

from collections.abc import Callable, Mapping

from secateur.methods.base import Decision
from secateur.methods.minitron import minitron
from secateur.methods.structural import structural

METHODS: Mapping[str, Callable[..., Decision]] = {"minitron": minitron, "structural": structural}

__all__ = ["METHODS", "Decision"]
