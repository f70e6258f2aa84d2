"""Whether a model fits into the memory that is free, before an hour is lost on it."""

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.model import find_source
from secateur.measure.bench_memory import available

COPIES = 3
"""Weights in memory at once while a model is exported: the model's, the graph's, the runtime's that checks it."""


def check_memory(model: nn.Module, what: str) -> None:
    """Check that the copies of a model's weights that an export makes fit into the memory that is free.

    Args:
        model: is in memory already.
        what: is done, for the message.

    Raises:
        SecateurError: they do not.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    _check(type(model).__name__, weights, COPIES - 1, what)


def check_folder_memory(name: str, what: str, *, dtype: torch.dtype | None = None) -> None:
    """The same for a model folder that is not read yet; its weights must fit too.

    Args:
        name: a model folder.
        what: will be done.
        dtype: of the weights in memory; None = that of the files.

    Raises:
        SecateurError: they do not, or it is no model folder.
    """
    source = find_source(name)
    times = 1.0 if dtype is None or source.dtype is None else dtype.itemsize / source.dtype.itemsize
    _check(name, int(times * sum(file.stat().st_size for file in source.files)), COPIES, what)


def _check(name: str, weights: int, copies: int, what: str) -> None:
    free = available_memory()
    if free is not None and copies * weights > free:
        raise SecateurError(
            f"{name}: {what} needs about {_gib(copies * weights)} ({copies} x its weights of {_gib(weights)}), and "
            f"{_gib(free)} of memory are free: take a machine with more, or a smaller model"
        )


def available_memory() -> int | None:
    """Bytes of memory that are free for this process; None where the system does not say."""
    return available(torch.device("cpu"))


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
