"""The named algorithms: one file each, one line each in the table."""

from collections.abc import Callable, Mapping

from secateur.methods.alps import alps
from secateur.methods.base import Decision
from secateur.methods.depth import depth
from secateur.methods.fastnas import fastnas
from secateur.methods.flap import flap
from secateur.methods.gradnas import gradnas
from secateur.methods.magnitude import magnitude
from secateur.methods.minitron import minitron
from secateur.methods.obs import obs
from secateur.methods.search import search
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.structural import structural
from secateur.methods.wanda import wanda

METHODS: Mapping[str, Callable[..., Decision]] = {
    "minitron": minitron,
    "structural": structural,
    "flap": flap,
    "gradnas": gradnas,
    "fastnas": fastnas,
    "depth": depth,
    "search": search,
    "obs": obs,
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
}

MASKING = ("magnitude", "wanda", "sparsegpt", "alps")
"""Methods that set single weights to zero and leave all sizes as they are."""

__all__ = ["MASKING", "METHODS", "Decision"]
