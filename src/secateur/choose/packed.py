"""Masks in memory and in files at an eighth of the bytes: one bit for each weight.

Elements are taken in row-major order; element i is bit i % 8 of byte i // 8, the lowest bit first (numpy's
``packbits(bitorder="little")``), 1 = keep. Bits that are left over in the last byte are 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from secateur.errors import SecateurError

Shape = tuple[int, ...]


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask of any shape as uint8 [elements / 8, rounded up], on the CPU."""
    flat = mask.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def unpacked(bits: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The bool mask that `packed` took; a tensor of its own."""
    flat = np.unpackbits(bits.numpy(), count=prod(shape), bitorder="little")
    return torch.from_numpy(flat).view(torch.bool).reshape(shape)


def nothing() -> None:
    """Do nothing."""


class PackedMasks(Mapping[str, torch.Tensor]):
    """Weight name -> bool tensor of its shape, True = keep; held packed, and unpacked each time it is asked for.

    Go over it in a loop, and only one mask is there at a time.

    Args:
        forget: called after the bits of a mask were read; lets go of the pages of a mapped file.
    """

    def __init__(self, *, forget: Callable[[], None] = nothing) -> None:
        self._bits: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, Shape] = {}
        self._forget = forget

    @staticmethod
    def of(masks: Iterable[tuple[str, torch.Tensor]]) -> "PackedMasks":
        """Names and masks, each packed as it comes."""
        found = PackedMasks()
        for name, mask in masks:
            found.put(name, mask)
        return found

    def ordered(self, names: Iterable[str]) -> "PackedMasks":
        """The same masks, in the order of these names, which are all of them."""
        found = PackedMasks(forget=self._forget)
        for name in names:
            found.take(name, self._bits[name], self._shapes[name])
        return found

    def put(self, name: str, mask: torch.Tensor) -> None:
        """Pack a mask and hold it.

        Raises:
            SecateurError: It is not of type bool.
        """
        if mask.dtype != torch.bool:
            raise SecateurError(f"the mask of {name} is {mask.dtype}, it must be torch.bool")
        self.take(name, packed(mask), tuple(mask.shape))

    def take(self, name: str, bits: torch.Tensor, shape: Shape) -> None:
        """Hold a mask that is packed already; it may be a view of a file.

        Args:
            name: of the weight.
            bits: uint8 [elements / 8, rounded up].
            shape: of the weight.

        Raises:
            SecateurError: The bits do not fit the shape.
        """
        size = prod(shape)
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-size // 8),):
            raise SecateurError(
                f"the packed mask of {name} is {bits.dtype} {list(bits.shape)}, a weight of {list(shape)} needs "
                f"torch.uint8 [{-(-size // 8)}]"
            )
        if size % 8 and int(bits[-1]) >> size % 8:
            raise SecateurError(f"the packed mask of {name} has bits beyond the {size} elements of {list(shape)}")
        self._bits[name], self._shapes[name] = bits, shape

    def bits(self, name: str) -> torch.Tensor:
        """The mask of a weight as it is held: uint8 [elements / 8, rounded up]; not to be written to."""
        return self._bits[name]

    def shape(self, name: str) -> Shape:
        """The shape of a weight."""
        return self._shapes[name]

    def zeros(self, name: str) -> int:
        """How many elements of a weight go."""
        kept = int(np.bitwise_count(self._bits[name].numpy()).sum(dtype=np.int64))
        self._forget()
        return prod(self._shapes[name]) - kept

    def __getitem__(self, name: str) -> torch.Tensor:
        found = unpacked(self._bits[name], self._shapes[name])
        self._forget()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: bits in memory, no file."""
        return {"_bits": {n: b.clone() for n, b in self._bits.items()}, "_shapes": self._shapes, "_forget": nothing}

    def __repr__(self) -> str:
        return f"PackedMasks({', '.join(f'{name}: {list(shape)}' for name, shape in self._shapes.items())})"


def kind_of(masks: Mapping[str, torch.Tensor], name: str) -> tuple[torch.dtype, Shape]:
    """Type and shape of a mask; none is unpacked for it."""
    if isinstance(masks, PackedMasks):
        return torch.bool, masks.shape(name)
    return masks[name].dtype, tuple(masks[name].shape)


def zeros_in(masks: Mapping[str, torch.Tensor], name: str) -> int:
    """How many elements of a weight go; none is unpacked for it."""
    if isinstance(masks, PackedMasks):
        return masks.zeros(name)
    return masks[name].numel() - int(masks[name].count_nonzero())


def bits_of(masks: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A mask as uint8 [elements / 8, rounded up]."""
    return masks.bits(name) if isinstance(masks, PackedMasks) else packed(masks[name])
