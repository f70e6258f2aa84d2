"""Safetensors files: read a tensor at a time, mapped or copied; written a tensor at a time, whole or not at all."""

import contextlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGN = 64
_CHUNK = 1 << 26


class Shard:
    """One safetensors file. Nothing of it is in memory until it is asked for.

    Attributes:
        path: of the file.
        entries: Tensor name -> (dtype, shape, first byte, bytes).
        metadata: Texts of the header.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            SecateurError: It is no whole safetensors file, or holds a type that is not known.
        """
        self.path = path
        self._map: mmap.mmap | None = None
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        self.metadata: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            size = path.stat().st_size
            for name, entry in header.items():
                if name == "__metadata__":
                    self.metadata = dict(entry)
                    continue
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in _DTYPES:
                    raise SecateurError(f"{path}: {name} is of type {entry['dtype']}, which cannot be pruned")
                if 8 + length + end > size:
                    raise SecateurError(f"{path}: is cut short at {size:,} bytes: {name} ends at {8 + length + end:,}")
                dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                    raise SecateurError(
                        f"{path}: is damaged: {name} is {entry['dtype']} {list(shape)}, and has {end - begin:,} bytes"
                    )
                self.entries[name] = dtype, shape, 8 + length + begin, end - begin
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"{path}: is no readable safetensors file ({error})") from error

    def mapped(self, name: str) -> torch.Tensor:
        """A view of the file; its pages come when they are read, and go with `forget`. Not to be written to."""
        dtype, shape, begin, size = self.entries[name]
        if not size:
            return torch.empty(shape, dtype=dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # that it cannot be written to is meant
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=begin)
        if begin % dtype.itemsize:  # a foreign writer's file
            return self.read(name)
        return raw.view(dtype).reshape(shape)

    def read(self, name: str) -> torch.Tensor:
        """A copy, in memory of its own.

        Raises:
            SecateurError: The file cannot be read, or has become shorter.
        """
        dtype, shape, begin, size = self.entries[name]
        return read_bytes(self.path, begin, size).view(dtype).reshape(shape)

    def forget(self) -> None:
        """Let go of the pages that were read; they come back from the file when they are needed."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)


def read_bytes(path: Path, begin: int, size: int) -> torch.Tensor:
    """A part of a file, uint8 [size].

    Raises:
        SecateurError: The file cannot be read, or ends before.
    """
    found = torch.empty(size, dtype=torch.uint8)
    place, done = found.numpy().data, 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while done < size:
                count = file.readinto(place[done : done + _CHUNK])
                if not count:
                    raise SecateurError(f"{path}: has become shorter than it was: run again from the beginning")
                done += count
    except OSError as error:
        raise SecateurError(f"{path}: cannot be read ({error.strerror})") from error
    return found


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write a safetensors file, a tensor at a time: on the disk for good, or not there at all.

    Args:
        path: of the file; an old one is replaced.
        tensors: any Mapping; it is asked for each tensor twice, for its shape and for its values, so it may make them.
        metadata: texts for the header.

    Returns:
        Bytes written.

    Raises:
        SecateurError: The disk is full, or cannot be written to.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    kinds = {}
    for name in tensors:
        tensor = tensors[name]
        kinds[name] = tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.dtype.itemsize
        if tensor.dtype not in _NAMES:
            raise SecateurError(f"{path}: {name} is of type {tensor.dtype}, which safetensors files do not hold")
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    at = 0
    for name in order:
        dtype, shape, size = kinds[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with writing(path):
            with partial.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in order:
                    flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                    if flat.numel():
                        file.write(flat.view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return 8 + len(text) + at


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise SecateurError where a file or folder of a streamed run cannot be written."""
    try:
        yield
    except OSError as error:
        raise SecateurError(
            f"{path}: cannot be written ({error.strerror}); what was finished before stays, and a run that is started "
            "again goes on from there"
        ) from error
