"""What weights read on calibration data: X'X of the inputs of every product, or only its diagonal.

Weights that read the same tensor (query, key and value; gate and up) share one sum, which is worked out once.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.mode import evaluating
from secateur.load.shared import shared
from secateur.load.through import Through, whole_passes
from secateur.space.products import Product, Products, plain_attention
from secateur.space.weights import Part, Weight


@dataclass
class Gram:
    """Sums over all rows x that the columns of a weight met.

    Attributes:
        rows: How many.
        squares: Sum of x^2, [columns].
        matrix: Sum of x x', [columns, columns]; None where only squares were asked for.
        sums: How many tensors were added up.
        total: Sum of x, [columns]; None where only squares were asked for.
    """

    rows: int
    squares: torch.Tensor
    matrix: torch.Tensor | None = None
    sums: int = 0
    total: torch.Tensor | None = None

    def full(self) -> torch.Tensor:
        """X'X.

        Raises:
            ValueError: where only squares were asked for.
        """
        if self.matrix is None:
            raise ValueError("only the squares were added up")
        return self.matrix

    def add(self, x: torch.Tensor) -> None:
        """Take in rows [n, columns]; float32, or float64 where they are."""
        exact = x.dtype == torch.bfloat16
        x = x if x.dtype == torch.float64 else x.float()
        self.rows += len(x)
        self.sums += 1
        if self.matrix is None:
            self.squares += x.square().sum(0)  # vector_norm(dim=0) takes ten times as long on a CPU
        else:
            with _short_products() if exact else contextlib.nullcontext():
                self.matrix.addmm_(x.T, x)
            self.squares = self.matrix.diagonal()
            own = x.sum(0)
            self.total = own if self.total is None else self.total + own


@dataclass(frozen=True)
class Read:
    """A part of a weight and what it reads.

    Attributes:
        weight: Which.
        part: Of its tensor.
        gram: Shared with all parts that read the same; None where no calibration data came by.
    """

    weight: Weight
    part: Part
    gram: Gram | None


def grams(
    run: Callable[[], None],
    weights: Sequence[Weight],
    parameters: Mapping[str, torch.Tensor],
    *,
    full: bool,
    last: str | None = None,
) -> list[list[Read]]:
    """Watch a forward pass of all calibration data; where data is split, the sums are those over all processes.

    Args:
        run: makes it, of this process's share of the data.
        weights: which to watch.
        parameters: their tensors, by name.
        full: X'X, or only its diagonal.
        last: the weight at whose product a pass may end (see `Products`).

    Returns:
        Every part of every weight, those together that read the same.

    Raises:
        SecateurError: for activations that are not finite, and for a weight that is used in ways that do not agree.
    """
    return _summed(lambda _: run(), weights, parameters, full=full, last=last)


def grams_through(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: Sequence[Weight],
    parameters: Mapping[str, torch.Tensor],
    *,
    full: bool,
    through: Through = whole_passes,
) -> list[list[Read]]:
    """The same of the whole model, whichever way all data goes through it; see `grams`.

    Raises:
        SecateurError: also with more processes than samples.
    """
    own = shared(batches)

    def run(watch: _Watch) -> None:
        watch.counts = False
        with evaluating(model), torch.no_grad(), plain_attention():
            through(model, own, watch)

    return _summed(run, weights, parameters, full=full)


def _summed(
    run: Callable[["_Watch"], None],
    weights: Sequence[Weight],
    parameters: Mapping[str, torch.Tensor],
    *,
    full: bool,
    last: str | None = None,
) -> list[list[Read]]:
    named = {w.name: w for w in weights}
    watched = {name: parameters[name] for name in named}
    for share in (True, False):
        watch = _Watch(named, full, share=share)
        apart = False
        with world.as_one():
            try:
                with Products(watched, watch.see, last):
                    run(watch)
                watch.settle()
            except _Apart:  # some read the same at first and not always: each gets a sum of its own
                apart = True
        if watch.join(apart=apart) if world.split() else not apart:
            return watch.reads()
    raise SecateurError("what weights read is summed in other ways than before: remove what was kept of the last run")


class _Apart(BaseException):
    """Weights share a sum, and one of them reads something that another does not."""


class _Watch:
    """Adds up, and finds out who reads the same."""

    def __init__(self, weights: Mapping[str, Weight], full: bool, *, share: bool) -> None:
        self.weights, self.full, self.share = weights, full, share
        self.grams: dict[tuple[str, Part], Gram] = {}
        self.leaders: dict[int, tuple[str, Part]] = {}
        self.last: tuple[Product, tuple[str, Part], set[tuple[str, Part]]] | None = None
        self.counts = True

    def at(self, index: int | None) -> None:
        """Say whether what runs is to be taken in."""
        self.settle()
        self.last = None  # another pass may use the same memory
        self.counts = index is not None

    def see(self, product: Product) -> None:
        """Take in one product. What follows at once and reads the very same tensor shares the sum."""
        if not self.counts:
            return
        key = (product.weight, product.part)
        weight = self.weights[product.weight]
        if set(product.columns) != set(weight.columns):
            raise SecateurError(
                f"{weight.name} is multiplied along dimensions {product.columns}, and elsewhere along "
                f"{weight.columns}: ignore it (ignore: {weight.name})"
            )
        if not product.operand.numel():  # an expert that is called without a token
            return
        if self.share and self.last is not None and _same(self.last[0], product):
            _, leader, done = self.last
            shared = self.grams[leader]
            if key not in self.grams and shared.sums == 1:
                self.grams[key] = shared
            if key not in done and self.grams.get(key) is shared:
                done.add(key)
                return
        self.settle()
        if key in self.grams and self.leaders[id(self.grams[key])] != key:
            raise _Apart
        x = product.read()
        if key not in self.grams:
            columns = x.shape[1]
            kind = torch.float64 if x.dtype == torch.float64 else torch.float32
            matrix = torch.zeros(columns, columns, dtype=kind, device=x.device) if self.full else None
            self.grams[key] = Gram(0, torch.zeros(columns, dtype=kind, device=x.device), matrix)
            self.leaders[id(self.grams[key])] = key
        self.grams[key].add(x)
        self.last = (product, key, {key})

    def settle(self) -> None:
        """What was added up last must have been read by all that share the sum."""
        if self.last is None:
            return
        _, leader, done = self.last
        gram = self.grams[leader]
        if gram.sums > 1 and any(shared is gram and key not in done for key, shared in self.grams.items()):
            raise _Apart

    def state(self) -> dict[str, torch.Tensor]:
        """All sums; who shares each of them, and over how many rows, is in its name."""
        members: dict[int, list[tuple[str, Part]]] = {}
        for key, gram in self.grams.items():
            members.setdefault(id(gram), []).append(key)
        found: dict[str, torch.Tensor] = {}
        for keys in members.values():
            gram = self.grams[keys[0]]
            text = json.dumps([gram.rows, gram.sums, keys])
            parts = {"squares": gram.squares, "matrix": gram.matrix, "total": gram.total}
            found |= {f"{kind}:{text}": x.clone() for kind, x in parts.items() if x is not None}
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        self.grams, self.leaders, self.last = {}, {}, None
        for name, squares in state.items():
            kind, _, text = name.partition(":")
            if kind != "squares":
                continue
            rows, sums, keys = json.loads(text)
            matrix, total = state.get(f"matrix:{text}"), state.get(f"total:{text}")
            gram = Gram(rows, squares.clone(), None if matrix is None else matrix.clone(), sums)
            gram.total = None if total is None else total.clone()
            found = [(weight, tuple((a, b) for a, b in part)) for weight, part in keys]
            self.grams |= dict.fromkeys(found, gram)
            self.leaders[id(gram)] = found[0]

    def join(self, *, apart: bool) -> bool:
        """Add up over all processes; False where they do not agree on what reads the same."""
        lead = {id(gram): self.leaders[id(gram)] for gram in self.grams.values()}
        own = {key: (lead[id(gram)], _facts(gram)) for key, gram in self.grams.items()}
        every = world.gathered((apart, own))
        if any(found[0] for found in every):
            return False
        known: dict[tuple[str, Part], tuple[tuple[str, Part], _Facts]] = {}
        for _, found in every:
            if any(known[key][0] != place[0] for key, place in found.items() if key in known):
                return False
            known |= {key: place for key, place in found.items() if key not in known}
        if any(known[leader][0] != leader for leader, _ in known.values()):
            return False
        summed = {leader: self.grams.get(leader) or facts.zeros() for leader, facts in known.values()}
        rows = torch.tensor([[gram.rows, gram.sums] for gram in summed.values()], dtype=torch.int64)
        world.add_up([rows])
        for gram, (count, sums) in zip(summed.values(), rows.tolist(), strict=True):
            gram.rows, gram.sums = count, sums
            if gram.matrix is None:
                world.add_up([gram.squares])
            else:
                gram.total = gram.matrix.new_zeros(len(gram.matrix)) if gram.total is None else gram.total
                world.add_up([gram.matrix, gram.total])
                gram.squares = gram.matrix.diagonal()
        self.grams = {key: summed[leader] for key, (leader, _) in known.items()}
        self.leaders = {id(gram): leader for leader, gram in summed.items()}
        return True

    def reads(self) -> list[list[Read]]:
        """All parts, grouped by what they read; those that nothing came by are one group each."""
        groups: dict[int, list[Read]] = {}
        for (name, part), gram in self.grams.items():
            if not bool(torch.isfinite(gram.squares).all()):
                raise SecateurError(f"NaN or infinite activations at the input of {name}: check the weights and dtype")
            groups.setdefault(id(gram), []).append(Read(self.weights[name], part, gram))
        found = list(groups.values())
        for weight in self.weights.values():
            seen = [part for name, part in self.grams if name == weight.name]
            _check_apart(weight, seen)
            found += [[Read(weight, p, None)] for p in weight.parts() if not any(_overlap(p, s) for s in seen)]
        return found


@dataclass(frozen=True)
class _Facts:
    """What a sum of zeros is made by, where another process has met what this one has not."""

    columns: int
    kind: torch.dtype
    place: str
    full: bool

    def zeros(self) -> Gram:
        """Nothing added up."""
        matrix = torch.zeros(self.columns, self.columns, dtype=self.kind, device=self.place) if self.full else None
        return Gram(0, torch.zeros(self.columns, dtype=self.kind, device=self.place), matrix)


def _facts(gram: Gram) -> _Facts:
    return _Facts(len(gram.squares), gram.squares.dtype, gram.squares.device.type, gram.matrix is not None)


@contextlib.contextmanager
def _short_products() -> Iterator[None]:
    """Multiply numbers of bfloat16 as such, and add up in float32: the same result, several times as fast."""
    places: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place, short in zip(places, ("bf16", "tf32"), strict=True):
        place.fp32_precision = short
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = old


def _same(one: Product, other: Product) -> bool:
    """Whether two products read the very same numbers. The first is held, so that its memory is not another's yet."""
    a, b = one.operand, other.operand
    place = (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    return place and a._version == b._version and one.form == other.form


def _overlap(a: Part, b: Part) -> bool:
    return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b, strict=True))


def _check_apart(weight: Weight, parts: Sequence[Part]) -> None:
    for i, a in enumerate(parts):
        if any(_overlap(a, b) for b in parts[i + 1 :]):
            raise SecateurError(
                f"{weight.name} is used whole in one place and in part in another: ignore it (ignore: {weight.name})"
            )
