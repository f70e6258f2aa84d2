"""Follow what a product makes to where it is added to a residual stream, and see what it is added to.

What is added says what the weight would have to give for the sum to be right: y + r of the dense model, less the r that
there is by then. Only what keeps each element apart is followed: views, copies, additions of constants, factors for
each channel (layer scale, batch norm). Anything else ends the way, and no sum is known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from secateur.space.products import Enough, Product, Products

_ATEN = torch.ops.aten
_SHAPED = (_ATEN.view, _ATEN._unsafe_view, _ATEN.reshape)
_MOVED = (_ATEN.transpose, _ATEN.permute, _ATEN.t, _ATEN.unsqueeze, _ATEN.squeeze)
_SAME = (_ATEN.clone, _ATEN._to_copy, _ATEN.alias, _ATEN.detach, _ATEN.lift_fresh, _ATEN.contiguous)
_SUMS = (_ATEN.add, _ATEN.add_)
_FACTORS = (_ATEN.mul, _ATEN.mul_)
_BATCH_NORMS = tuple(
    getattr(_ATEN, name)
    for name in ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")
)
_SMALL = 1e-3
"""Channels whose factor is below this share of the largest are not corrected."""


@dataclass
class Way:
    """What became of one operator's result.

    Attributes:
        products: That were made by it.
        shape: Of the result.
        norm: Running mean of the batch norm that follows at once.
        added: What the result was added to, one after the other, each in the shape of the result.
        factor: What it was multiplied with before, in that shape; None for nothing.
        astray: Some sum was not what was thought.
    """

    products: list[Product]
    shape: torch.Size
    norm: torch.Tensor | None = None
    added: list[torch.Tensor] = field(default_factory=list)
    factor: torch.Tensor | None = None
    astray: bool = False
    value: torch.Tensor | None = None

    def residual(self, product: Product, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the first `count` sums add to a product's result, [rows, out], and its factors [out]."""
        rows = product.made(self.added[0])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        for more in self.added[1:count]:
            rows = rows + product.made(more)
        return rows, None if self.factor is None else product.made(self.factor)[0].to(rows.dtype)


@dataclass(frozen=True)
class _At:
    """Where a tensor lies on a way: which element of the result each of its own is."""

    way: Way
    index: torch.Tensor | None
    """None where they are in the same order."""
    shape: torch.Size
    factor: torch.Tensor | None = None
    """Of the tensor's shape."""
    sums: int = 0
    constants: int = 0

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """Values in this tensor's order, in the order and shape of the way's result; a copy."""
        if self.index is None:
            return values.reshape(self.way.shape).clone()
        result = torch.empty(self.way.shape.numel(), dtype=values.dtype, device=values.device)
        result[self.index.flatten()] = values.flatten()
        return result.reshape(self.way.shape)

    def moved(self, act: Callable[[torch.Tensor], torch.Tensor], *, order: bool) -> "_At":
        """After a view; `order` tells whether elements may change places."""
        index = self.index
        if index is None and order:
            device = self.way.products[0].operand.device
            index = torch.arange(self.shape.numel(), device=device).reshape(self.shape)
        index = None if index is None else act(index)
        factor = None if self.factor is None else act(self.factor)
        shape = act(torch.empty(self.shape, device="meta")).shape if index is None else index.shape
        return replace(self, index=index, factor=factor, shape=shape)


class Followed(Products):  # type: ignore[no-untyped-call]
    """While it is on, products are noted, and the ways of their results.

    Args:
        weights: parameters by name.
        check: compare what is added with the product, once for each sum.
        products: end the pass after so many...
        sums: ...and when every way has come through so many sums; None = never.

    Attributes:
        ways: In the order of the products.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], *, check: bool = False, products: int | None = None, sums: int = 0
    ) -> None:
        super().__init__(weights, self._note)
        self.check, self.limit, self.sums = check, products, sums
        self.ways: list[Way] = []
        self._now: list[Product] = []
        self._at: Any = WeakIdKeyDictionary()
        self._from: Any = WeakIdKeyDictionary()
        """Tensor -> the ways that it depends on."""

    def _note(self, product: Product) -> None:
        self._now.append(product)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and follow what goes in and comes out."""
        self._now = []
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        sources: frozenset[int] = frozenset().union(*(self._from.get(x, ()) for x in given))
        next_ats = self._followed(func, args, kwargs or {}) if sources else []
        result = super().__torch_dispatch__(func, types, args, kwargs)
        products = self._now
        outcome = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if sources and func._schema.is_mutable:
            written = [a for a, own in zip(args, func._schema.arguments, strict=False) if _is_written(own)]
            outcome += [x for x in pytree.tree_leaves(written) if isinstance(x, torch.Tensor)]
        if products and outcome:
            way = Way(products, outcome[0].shape)
            way.value = outcome[0].clone() if self.check else None
            next_ats = [_At(way, None, way.shape)]
            sources |= {id(way)}
            self.ways.append(way)
        for x in outcome if sources else ():
            self._from[x] = sources
            self._at.pop(x, None)
        if next_ats:
            self._at[outcome[0]] = next_ats
        if self.limit is not None and self._done(self.limit):
            raise Enough
        return result

    def _done(self, products: int) -> bool:
        met = sum(len(way.products) for way in self.ways) >= products
        return met and all(len(way.added) >= self.sums for way in self.ways)

    def _followed(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[_At]:
        """Where the result will lie on the ways of what goes in."""
        kind = func.overloadpacket
        ats: Sequence[_At] = self._at.get(args[0], ()) if args and isinstance(args[0], torch.Tensor) else ()
        if kind in _SUMS or kind in _FACTORS:
            return self._combined(kind, args, kwargs)
        if kind in _SHAPED and isinstance(args[1], list | tuple):  # and no view as another type
            return [at.moved(lambda x: x.reshape(args[1]), order=False) for at in ats]
        if kind in _MOVED:
            return [at.moved(lambda x: func(x, *args[1:]), order=True) for at in ats]
        if kind in _BATCH_NORMS:
            return [after for at in ats if (after := _normed(at, args)) is not None]
        return list(ats) if kind in _SAME else []

    def _combined(self, kind: Any, args: Any, kwargs: Mapping[str, Any]) -> list[_At]:
        if len(args) < 2 or kwargs.get("alpha", 1) != 1:
            return []
        step = self._added if kind in _SUMS else self._scaled
        both = [(args[0], args[1]), (args[1], args[0])]
        found = [(at, x, other) for x, other in both if isinstance(x, torch.Tensor) for at in self._at.get(x, ())]
        return [after for at, x, other in found if (after := step(at, x, other)) is not None]

    def _added(self, at: _At, x: torch.Tensor, other: Any) -> _At | None:
        if isinstance(other, torch.Tensor):
            if id(at.way) in self._from.get(other, ()):
                return None
            if other.shape == x.shape:
                if self.check and not at.sums and not _agrees(at, x):
                    at.way.astray = True
                if not at.sums:
                    at.way.factor = None if at.factor is None else at.back(at.factor)
                at.way.added.append(at.back(other))
                return replace(at, sums=at.sums + 1)
            if not _for_channels(other, x):
                return None
        return replace(at, constants=at.constants + 1)

    def _scaled(self, at: _At, x: torch.Tensor, other: Any) -> _At | None:
        if at.sums:
            return None
        if not isinstance(other, torch.Tensor):
            other = torch.tensor(float(other), dtype=x.dtype if x.is_floating_point() else torch.float32)
        if self._from.get(other, ()) or not _for_channels(other, x):
            return None
        factor = other.to(x.device).expand(x.shape)
        return replace(at, factor=factor if at.factor is None else at.factor * factor)


def _for_channels(other: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether it is a number, or numbers along one dimension, that do not change the shape."""
    long = [n for n in other.shape if n > 1]
    return len(long) < 2 and _fits(other.shape, x.shape)


def _fits(small: torch.Size, large: torch.Size) -> bool:
    """Whether a shape is spread over another without changing it."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)


def _normed(at: _At, args: Any) -> _At | None:
    """Through a batch norm that uses its running statistics."""
    x, weight, _, mean, variance, training = args[:6] if len(args) > 7 else (*args[:5], False)
    if at.sums or training or mean is None or variance is None:
        return None
    if at.factor is None and at.index is None and not at.constants and at.way.norm is None:
        at.way.norm = mean
    factor = (variance + args[-1]).rsqrt() * (1 if weight is None else weight)
    factor = factor.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape)
    return replace(at, factor=factor if at.factor is None else at.factor * factor)


def _agrees(at: _At, x: torch.Tensor) -> bool:
    """Whether x is the product's result times the factor, but for a constant in each channel."""
    way = at.way
    if way.value is None:
        return False
    for product in way.products:
        seen, y = product.made(at.back(x)).double(), product.made(way.value).double()
        if at.factor is not None:
            factor = product.made(at.back(at.factor)).double()
            if not bool((factor == factor[:1]).all()):  # one for each row is no factor of a channel
                return False
            y = y * factor
        apart = seen - y
        precision = torch.finfo(x.dtype).eps ** 0.5 if x.is_floating_point() else 0
        if bool((apart - apart[:1]).abs().max() > precision * (1e-30 + max(seen.abs().max(), apart.abs().max()))):
            return False
    return True


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def correction(dense: torch.Tensor, pruned: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """What a weight's result must give beside its own target, for the sum to be that of the dense model.

    Args:
        dense: what the dense model adds, [rows, out].
        pruned: what the pruned model adds, likewise.
        factor: of each channel before the sum; those close to zero are not corrected.
    """
    error = dense - pruned
    if factor is None:
        return error
    open_ = factor.abs() > _SMALL * factor.abs().max()
    return torch.where(open_, error / torch.where(open_, factor, 1), 0)
