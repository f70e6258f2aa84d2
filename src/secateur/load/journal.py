"""What a long walk through a model has finished, in a folder: it goes on from there when it was killed."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.files import read_json, write_json
from secateur.load.shards import Shard, read_bytes, write_shard, writing

_DTYPES = {str(kind): kind for kind in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies on disk."""

    file: str
    begin: int
    dtype: str
    shape: tuple[int, ...]


class Journal:
    """The stops of one walk that are done, what was found at each, and the activations that the next one needs.

    Attributes:
        folder: Of the walk.
        done: Stops that are finished.
        kept: Activations, as the walk named them, at the last finished stop.
        units: Units of the model whose weights the finished stops have changed.
        written: Bytes.
    """

    def __init__(self, folder: Path) -> None:
        """Go on from what is in a folder, or begin there.

        Raises:
            SecateurError: What is there cannot be read.
        """
        self.folder, self.done, self.written = folder, 0, 0
        self.kept: dict[str, list[Place | None]] = {}
        self.units: list[str] = []
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / "done.json").exists():
            try:
                content = read_json(folder / "done.json", "journal")
                self.done, self.units = int(content["done"]), [str(unit) for unit in content["units"]]
                self.kept = {
                    name: [None if p is None else Place(p[0], p[1], p[2], tuple(p[3])) for p in places]
                    for name, places in content["kept"].items()
                }
            except (SecateurError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise SecateurError(f"{folder / 'done.json'}: is damaged ({error}); begin anew (--restart)") from error
        self._clean()

    # --- what a stop found ---

    def keep(self, stop: int, tensors: Mapping[str, torch.Tensor], values: Any = None) -> None:
        """Write what was found at a stop; it counts once the stop is finished."""
        text = {"values": json.dumps(values)}
        self.written += write_shard(self.folder / f"stop-{stop:05d}.safetensors", tensors, text)

    def recall(self, stop: int) -> tuple[Shard, Any]:
        """What was found at a stop: its file of tensors, and the values."""
        shard = Shard(self.folder / f"stop-{stop:05d}.safetensors")
        return shard, json.loads(shard.metadata.get("values", "null"))

    def forget(self, stop: int) -> None:
        """Remove what was found at a stop, where a later one has it all."""
        (self.folder / f"stop-{stop:05d}.safetensors").unlink(missing_ok=True)

    # --- activations ---

    def writer(self, stop: int, what: str) -> "Spill":
        """A file for the activations that a stop gives."""
        return Spill(self.folder / f"acts-{stop:05d}-{what}.bin")

    def read(self, place: Place) -> torch.Tensor:
        """A copy of what lies there."""
        dtype = _DTYPES[place.dtype]
        size = math.prod(place.shape) * dtype.itemsize
        return read_bytes(self.folder / place.file, place.begin, size).view(dtype).reshape(place.shape)

    def finish(self, stop: int, kept: Mapping[str, list[Place | None]], units: Iterable[str] = ()) -> None:
        """Note that a stop is done, once and for all; let go of activations that are not needed any more.

        Args:
            stop: its number.
            kept: activations that later stops need.
            units: of the model, that were written since the last stop.
        """
        self.done = stop + 1
        self.units = list(dict.fromkeys([*self.units, *units]))
        self.kept = dict(kept)
        places = {
            n: [None if p is None else [p.file, p.begin, p.dtype, list(p.shape)] for p in own]
            for n, own in kept.items()
        }
        write_json(self.folder / "done.json", {"done": self.done, "units": self.units, "kept": places})
        self._clean()

    def _clean(self) -> None:
        needed = {place.file for places in self.kept.values() for place in places if place is not None}
        for path in self.folder.glob("acts-*.bin"):
            if path.name not in needed:
                path.unlink()


class Spill:
    """Tensors, one after the other in a file."""

    def __init__(self, path: Path) -> None:
        """Begin the file anew.

        Raises:
            SecateurError: It cannot be written.
        """
        self.path = path
        with writing(path):
            self._file = path.open("wb")
        self.written = 0

    def add(self, tensor: torch.Tensor) -> Place:
        """Write a tensor; returns where it lies.

        Raises:
            SecateurError: The disk is full.
        """
        begin = self.written
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        with writing(self.path):
            if flat.numel():
                self._file.write(flat.view(torch.uint8).numpy().data)
        self.written += flat.nbytes
        return Place(self.path.name, begin, str(tensor.dtype), tuple(tensor.shape))

    def close(self) -> None:
        """Have all of it on the disk for good.

        Raises:
            SecateurError: The disk is full.
        """
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def drop(self) -> None:
        """Remove the file, after an error that is under way already: closing it may only raise that again."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)
