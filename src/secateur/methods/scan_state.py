"""Measurements of a scan that was stopped: one line each, so that the same command goes on from there."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.model import fingerprint, fingerprint_data

_KIND = "sensitivity-partial"


def identity(model: nn.Module, batches: Sequence[Batch], criterion: str | None, masks: str) -> dict[str, str]:
    """All that a measurement depends on beside what is cut; ratios and the measure are free to change."""
    named = [
        {str(i): x for i, x in enumerate(pytree.tree_leaves(batch)) if isinstance(x, torch.Tensor)} for batch in batches
    ]
    first = next(iter(model.parameters()), torch.empty(0))
    parts = {
        "model": fingerprint(model),
        "data": fingerprint_data(named),
        "criterion": str(criterion),
        "masks": masks,
        "device": first.device.type,
        "secateur": importlib.metadata.version("secateur"),
        "torch": str(torch.__version__),
    }
    return {**parts, "key": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}


class State:
    """What has been measured, in memory and, where there is a path, in a file of JSON lines.

    Attributes:
        found: Key of a measurement -> values by measure.
        passes: Key -> passes of the data that it took.
        seconds: That the measurements of runs before took.
        before: Keys that were in the file already.

    Args:
        path: of the file; None = nothing is kept.
        identity: what all measurements in it depend on.

    Raises:
        SecateurError: The file is of something else, or cannot be read or written.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, str]) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = {}
        self.passes: dict[str, float] = {}
        self.seconds = 0.0
        if path is not None:
            self._open(path, identity)
        self.before = frozenset(self.found)

    def _open(self, path: Path, identity: Mapping[str, str]) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except OSError as error:
            raise SecateurError(f"{path}: cannot be read: {error}") from error
        entries = [entry for entry in map(_parsed, lines) if entry is not None]  # the last line may be torn
        if lines and (not entries or entries[0].get("kind") != _KIND):
            raise SecateurError(f"{path}: is no state of a stopped scan; move it away, or choose another output")
        header = {"kind": _KIND, "format": 1, **identity}
        if entries and entries[0] != header:
            differ = [k for k in header if k != "key" and entries[0].get(k) != header[k]]
            raise SecateurError(
                f"{path}: was left by a scan whose {' and '.join(differ)} differ; delete it, or run that scan again"
            )
        for entry in entries[1:]:
            if not entry.keys() >= {"key", "values", "passes", "seconds"}:
                raise SecateurError(f"{path}: is damaged, {entry} is no measurement; delete it")
            self.found[entry["key"]] = entry["values"]
            self.passes[entry["key"]] = entry["passes"]
            self.seconds += entry["seconds"]
        self._write([header, *entries[1:]])

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """The file anew: a torn line goes."""
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise SecateurError(f"{self.path}: cannot be written: {error}") from error

    def add(self, key: str, values: dict[str, float], passes: float, seconds: float) -> None:
        """Keep one measurement.

        Args:
            key: of it.
            values: by measure.
            passes: of the data that it took.
            seconds: that it took.

        Raises:
            SecateurError: The file cannot be written.
        """
        self.found[key], self.passes[key] = values, passes
        if self.path is None:
            return
        entry = {"key": key, "values": values, "passes": passes, "seconds": seconds}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise SecateurError(f"{self.path}: cannot be written: {error}") from error


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
