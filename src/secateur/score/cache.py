"""Keep what was measured, keyed by everything that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur import world
from secateur.errors import SecateurError

Entry = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by name, and JSON values by name."""
T = TypeVar("T")


class Cache:
    """A folder of safetensors files, one for each key; without a folder nothing is kept.

    An entry is written whole or not at all, so that runs at the same time do no harm.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, parts: Mapping[str, Any], compute: Callable[[], Entry]) -> Entry:
        """The entry for a key, computed where it is not there.

        Args:
            parts: everything that the result depends on (model, data, options, versions), as JSON values.
            compute: makes the entry.

        Raises:
            SecateurError: where the file of the key is damaged or is not about the same parts.
        """
        if self.folder is None:
            return compute()
        text = json.dumps(parts, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        # Several processes compute together or not at all, whatever each of them finds.
        look = world.from_first if world.split() else _just
        found = look(lambda: self._known(path, text))
        if found is not None:
            return found
        tensors, values = compute()
        look(lambda: _write(path, text, tensors, values))
        return tensors, values

    def _known(self, path: Path, text: str) -> Entry | None:
        """What is kept; where there is nothing, the folder is made."""
        if path.exists():
            return _read(path, text)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SecateurError(f"the cache folder {self.folder} cannot be made: {error}") from error
        return None


def _just(make: Callable[[], T]) -> T:
    return make()


def _write(path: Path, text: str, tensors: dict[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"key": text, "values": json.dumps(values)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, text: str) -> Entry:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise SecateurError(f"the cache file {path} is damaged ({error}): delete it") from error
    if metadata.get("key") != text:
        raise SecateurError(f"the cache file {path} belongs to another key: delete it")
    return tensors, json.loads(metadata["values"])
