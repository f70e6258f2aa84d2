"""What MODEL, --inputs and --data mean: a folder or hub id, or ``module:callable`` in the user's own code."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.cli.options import check_data
from secateur.errors import SecateurError
from secateur.load.built import STRUCTURE
from secateur.load.constructor import build, load_weights
from secateur.load.functions import call, find_function, is_constructor, names_function
from secateur.load.model import Source, load_model, meta_model
from secateur.load.place import find_device, find_dtype
from secateur.load.store import made, store_of
from secateur.load.streamed import load_streamed
from secateur.ship import load


@dataclasses.dataclass(frozen=True)
class Building:
    """For a MODEL that is module:callable."""

    weights: Path | None = None
    """A .safetensors file of the model's state dict; without, the weights are those that the callable gives."""
    model_args: str | None = None
    """Keyword arguments of the callable, as JSON."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the callable."""
        try:
            found = json.loads(self.model_args or "{}")
        except json.JSONDecodeError as error:
            raise SecateurError(f"--model-args {self.model_args!r} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise SecateurError(
                f"--model-args must be a JSON object, such as '{{\"width\": 16}}', not {self.model_args}"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Making(Building):
    """For a MODEL that is module:callable, and for tracing any model."""

    input_shape: tuple[str, ...] = ()
    """Example inputs to trace the model with, by place: zeros of these shapes, such as 1,3,32,32."""
    inputs: str | None = None
    """module:function that returns the example inputs: a tensor, a tuple, or a mapping of arguments."""


def open_model(
    name: str,
    making: Building,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weights: bool = True,
    work: Path | None = None,
) -> tuple[nn.Module, Any | None, Source | None]:
    """The model, and of a folder or hub id its tokenizer and source.

    Args:
        name: a folder, a hub id, or module:callable.
        making: how a callable is called.
        device: where the weights go.
        dtype: of the weights; None is their own.
        weights: whether they are needed; a folder is read without where they are not.
        work: folder for what a streamed model writes on the way; None = the model is loaded into memory.

    Raises:
        SecateurError: where it cannot be opened, or options do not go with it.
    """
    if is_constructor(name):
        model = build(name, making.arguments)
        if making.weights is not None:
            load_weights(model, making.weights)
        return model.to(device=find_device(device), dtype=find_dtype(dtype)).eval(), None, None
    for option, value in (("--weights", making.weights), ("--model-args", making.model_args)):
        if value is not None:
            raise SecateurError(f"{option} goes with a MODEL that is module:callable, and {name} is none")
    if (Path(name).expanduser() / STRUCTURE).is_file():
        return load(name, device=device, dtype=dtype), None, None
    if work is not None:
        return load_streamed(name, work=work, dtype=dtype)
    return load_model(name, device=device, dtype=dtype) if weights else (meta_model(name), None, None)


def stored_as(model: nn.Module, source: Source | None) -> None:
    """Give parameters the checkpoint's own type again; buffers keep the precision that stock loading gives them."""
    if source is None or source.dtype is None:
        return
    kind, store = source.dtype, store_of(model)
    if store is None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind)
        return
    other = [name for name, parameter in store.parameters.items() if parameter.dtype != kind]
    for name in other:
        entry = store.entries[name]
        like = entry.rest.new_empty((), dtype=kind).expand(entry.rest.shape)
        store.entries[name] = made(lambda entry=entry: entry.load().to(kind), like)  # type: ignore[misc]
        store.parameters[name].data = store.entries[name].rest
    if other:  # its files keep the type that it was computed in, for a run that goes on from them
        store.folder = None


def inputs_of(model: nn.Module, making: Making, name: str, *, needed: bool = True) -> Any:
    """Example inputs on the model's device and of its type; None where none are given and the model does without.

    Args:
        model: what they are for.
        making: what the user said of them.
        name: of the model, for messages.
        needed: whether anything but a Hugging Face model must have them.

    Raises:
        SecateurError: for a shape that is none, for both options, or for neither where they are needed.
    """
    if making.inputs is not None and making.input_shape:
        raise SecateurError("give --input-shape or --inputs, not both")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if making.inputs is not None:
        found = call(making.inputs, "--inputs", "my_data:example")
        return pytree.tree_map(
            lambda x: (
                x.to(first.device, first.dtype if x.is_floating_point() else x.dtype)
                if isinstance(x, torch.Tensor)
                else x
            ),
            found,
        )
    if making.input_shape:
        shapes = [_shape(text) for text in making.input_shape]
        return tuple(torch.zeros(shape, dtype=first.dtype, device=first.device) for shape in shapes)
    if needed and not hasattr(getattr(model, "config", None), "to_dict"):
        raise SecateurError(
            f"{name} is no Hugging Face model: give example inputs, --input-shape 1,3,32,32 or --inputs module:function"
        )
    return None


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise SecateurError(f"--input-shape {text!r} is no shape, such as 1,3,32,32")
    return tuple(int(part) for part in parts)


def check_sources(model: str, **sources: str | None) -> None:
    """Say at once, before a model is loaded, what of the data cannot be.

    Args:
        model: MODEL.
        sources: option -> its value.
    """
    for option, text in sources.items():
        shown = f"--{option.replace('_', '-')}"
        if text is None:
            continue
        if names_function(text):
            find_function(text, shown, "my_data:batches")
        elif is_constructor(model):
            raise SecateurError(
                f"{shown} {text}: for a MODEL that is module:callable give module:function, which returns batches "
                "(inputs, targets)"
            )
        else:
            check_data(text)


def batches_from(text: str | None, option: str) -> Any:
    """What --data says, for `batches_of`: batches of a module:function, or the text itself."""
    if not names_function(text):
        return text
    found = call(str(text), option, "my_data:batches")
    if isinstance(found, torch.Tensor) or not hasattr(found, "__iter__"):
        raise SecateurError(f"{option} {text} returned a {type(found).__name__}, not batches that can be gone through")
    return found
