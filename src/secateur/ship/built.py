"""Models that are no Hugging Face models: saved as tensors, what was cut, and the name of what builds them."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from secateur.cut.record import describe, origin
from secateur.errors import SecateurError
from secateur.load.built import WEIGHTS, Built
from secateur.load.constructor import build


def save_built(model: nn.Module, folder: Path, constructor: str, arguments: Mapping[str, Any]) -> None:
    """Write structure.json and the tensors of a model, once they are known to give it back.

    Args:
        model: the pruned model, or a dense one.
        folder: an existing one.
        constructor: ``module:callable`` that builds the dense model.
        arguments: its keyword arguments.

    Raises:
        SecateurError: The arguments are no JSON; the constructor fails or builds another model; what was cut cannot
            be recorded.
    """
    given = _through_json(constructor, arguments)
    layers = origin(model)["layers"]
    dense = _dense(constructor, given)
    structure = describe(model, dense, layers)
    tensors, tied = _tensors(model)
    built = Built(constructor, given, structure, tied)
    again = built.restore(tensors, str(folder.name))
    if describe(again, dense, layers) != structure:
        raise SecateurError(
            f"{type(model).__name__}: {constructor} builds it in another way each time; it cannot be saved"
        )
    built.save(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _through_json(constructor: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        given: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SecateurError(f"the arguments of {constructor} are stored as JSON, and cannot be: {error}") from error
    return given


def _dense(constructor: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The dense model, without values if its constructor can do without."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "for .* copying from a non-meta parameter"
            )  # weights that it loads itself
            return build(constructor, arguments)
    except SecateurError:
        return build(constructor, arguments)  # it reads values, which the meta device has not


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every parameter and buffer once, by its first name, and the names of those that are the same as another."""
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise SecateurError(
                f"{path or 'the model'} keeps extra state, which may be anything; only tensors are saved"
            )
    tensors: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied
