"""Export a model to an ATen graph on fake tensors: no weight is read, no memory is taken for it."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from secateur.errors import SecateurError
from secateur.load.mode import evaluating

_PRIMES = (13, 11, 17, 7, 19, 23, 29, 31, 37, 41, 43)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Token ids [batch, positions] for a Hugging Face language model.

    Both sizes are primes that divide no dimension of the model, so that no size can be taken for another.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "vocab_size"):
        raise SecateurError("only Hugging Face language models have default inputs: pass `inputs`, a dict of arguments")
    sizes = {n for p in model.parameters() for n in p.shape}
    free = [p for p in _PRIMES if all(n % p for n in sizes)] or list(_PRIMES)
    device = next(model.parameters()).device
    batch = 3 if all(n % 3 for n in sizes) else 5 if free[0] != 5 else 3
    ids = torch.zeros(batch, free[0], dtype=torch.long, device=device)
    return {"input_ids": ids, "use_cache": False}


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes and buffers back: some forward passes set them (rotary tables of longrope)."""
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def export(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> ExportedProgram:
    """Trace `model` in eval mode.

    Args:
        model: any module; its parameters may be on the meta device.
        inputs: keyword arguments of its forward; None for a Hugging Face language model.

    Raises:
        SecateurError: when torch.export cannot follow the forward pass.
    """
    kwargs = dict(example_inputs(model) if inputs is None else inputs)
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch prints graphs and tracebacks of errors that we report in a line
    try:
        with evaluating(model), _untouched(model), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (), kwargs, strict=False)
    except Exception as error:  # torch.export raises whatever the user's own code raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise SecateurError(
            f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {first}"
        ) from error
    finally:
        logging.disable(silenced)
