"""Models that are no Hugging Face models, saved as the name of what builds them, what was cut, and the tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.constructor import build, read_tensors
from secateur.load.model import check_finite
from secateur.load.modeling_secateur import replay
from secateur.load.place import find_device, find_dtype

FORMAT = 1
STRUCTURE = "structure.json"
"""What the folder has in place of config.json."""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Built:
    """What structure.json says: how to build the dense model, and what was cut of it."""

    constructor: str
    """``module:callable``."""
    arguments: Mapping[str, Any]
    """Keyword arguments of the constructor."""
    structure: Mapping[str, Any]
    """As `modeling_secateur.replay` takes it."""
    tied: Mapping[str, str]
    """Name of a tensor -> the name that it is stored under."""

    def save(self, folder: Path) -> None:
        """Write structure.json into an existing folder."""
        content = {"format": FORMAT, **vars(self)}
        (folder / STRUCTURE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "Built":
        """Read what `save` wrote.

        Raises:
            SecateurError: The file is missing, damaged or of another format.
        """
        path = folder / STRUCTURE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SecateurError(f"{path}: cannot be read ({error})") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise SecateurError(f"{path}: this is no structure of format {FORMAT}")
        try:
            built = Built(**content)
        except TypeError as error:
            raise SecateurError(f"{path}: damaged ({error})") from error
        if not isinstance(built.constructor, str) or not all(
            isinstance(part, dict) for part in (built.arguments, built.structure, built.tied)
        ):
            raise SecateurError(f"{path}: damaged (constructor is no text, or a mapping is missing)")
        return built

    def restore(self, tensors: Mapping[str, torch.Tensor], name: str) -> nn.Module:
        """Build the dense model, cut it, and give it its tensors.

        Args:
            tensors: every parameter and buffer by name, aliases left out.
            name: what to call the tensors in errors.

        Raises:
            SecateurError: The constructor fails or builds another model; a tensor is missing, left over or of
                another shape.
        """
        model = build(self.constructor, self.arguments)
        where = f"{name}: the model of {self.constructor} is not the one that was saved"
        try:
            replay(model, self.structure)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SecateurError(f"{where}: it cannot be cut as recorded ({error}); was the code changed?") from error
        own = {**dict(_parameters(model)), **dict(model.named_buffers(remove_duplicate=False))}
        wanted = [key for key in own if key not in self.tied]
        for key in [*wanted, *self.tied.values(), *self.tied]:
            if key not in own or (key not in self.tied and key not in tensors):
                holder = "the constructor's model" if key not in own else "the file"
                raise SecateurError(f"{where}: {key} is missing in {holder}; was the code changed?")
        extra = next((key for key in tensors if key not in own), None)
        if extra is not None:
            raise SecateurError(f"{where}: it has no tensor {extra}; was the code changed?")
        for key in wanted:
            if own[key].shape != tensors[key].shape:
                there = f"{list(tensors[key].shape)} in the file and {list(own[key].shape)} in the model"
                raise SecateurError(f"{where}: {key} is {there}; was the code changed?")
        for key in wanted:
            old = own[key]
            trained = old.requires_grad and tensors[key].is_floating_point()
            _set(model, key, nn.Parameter(tensors[key], trained) if isinstance(old, nn.Parameter) else tensors[key])
        for alias, key in self.tied.items():
            _set(model, alias, _get(model, key))
        return model.eval()


def load_built(folder: Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> nn.Module:
    """Load a model that its constructor builds.

    Args:
        folder: with structure.json and model.safetensors.
        device: where the tensors go.
        dtype: of the floating-point tensors; None keeps each one's own.

    Returns:
        The model in evaluation mode.

    Raises:
        SecateurError: As `Built.load` and `Built.restore`; the weight file is missing or damaged, or not finite; the
            dtype or device is unknown or not there.
    """
    place, kind = find_device(device), find_dtype(dtype)
    built = Built.load(folder)
    model = built.restore(read_tensors(folder / WEIGHTS), str(folder))
    check_finite(model, str(folder))
    return model.to(device=place, dtype=kind)


def _parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.named_parameters(remove_duplicate=False))


def _get(model: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _set(model: nn.Module, name: str, tensor: Any) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)
