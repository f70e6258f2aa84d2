"""Which products of a dense and a cut model go with each other, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.methods.counterparts import Where
from secateur.methods.residual import Way
from secateur.space.products import Product
from secateur.space.weights import Part


def used(ways: Sequence[Way], name: str) -> list[tuple[Way, Product]]:
    """The products of a weight, each with the way of its result."""
    return [(way, p) for way in ways for p in way.products if p.weight == name and p.operand.numel()]


def matched(
    own: Sequence[tuple[Way, Product]], other: Sequence[tuple[Way, Product]], where: Mapping[Part, Where]
) -> list[tuple[tuple[Way, Product], tuple[Way, Product]]] | None:
    """Each product of the cut weight with that of the dense one; None where they do not go with each other."""
    by_part: dict[Part, list[tuple[Way, Product]]] = {}
    for found in other:
        by_part.setdefault(found[1].part, []).append(found)
    counts: dict[Part, int] = {}
    pairs = []
    for found in own:
        part = found[1].part
        candidates = by_part.get(where[part].part, []) if part in where else []
        place = counts.get(part, 0)
        counts[part] = place + 1
        if place >= len(candidates):
            return None
        pairs.append((found, candidates[place]))
    if any(len(by_part[where[part].part]) != count for part, count in counts.items()):
        return None
    same = all(_rows(a[1]) == _rows(b[1]) for a, b in pairs)
    return pairs if pairs and same else None


def _rows(product: Product) -> tuple[int, ...]:
    """The shape of what is read, but for what is summed over."""
    x = product.operand
    return (len(x), *x.shape[2:]) if product.form else tuple(x.shape[:-1])


def read_key(product: Product) -> tuple[Any, ...]:
    """What tells whether two products of one pass read the very same numbers."""
    x = product.operand
    version = 0 if x.is_inference() else x._version
    return (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version, product.form)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
