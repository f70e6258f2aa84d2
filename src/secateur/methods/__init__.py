"""The named algorithms: one file each, one line each in the table."""

from collections.abc import Callable, Mapping

from secateur.methods.base import Decision
from secateur.methods.minitron import minitron

METHODS: Mapping[str, Callable[..., Decision]] = {"minitron": minitron}

__all__ = ["METHODS", "Decision"]
