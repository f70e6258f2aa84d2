"""Keep what was measured, keyed by everything that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.errors import SecateurError

Entry = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors by name, and JSON values by name."""


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
        if path.exists():
            return _read(path, text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SecateurError(f"the cache folder {self.folder} cannot be made: {error}") from error
        tensors, values = compute()
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            save_file(tensors, partial, metadata={"key": text, "values": json.dumps(values)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return tensors, values


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
