"""Batches of training, without end, in an order that a seed fixes and that can be entered anywhere."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, size_of

_EMPTY = "the data loader gives no batch"
Item = tuple[Batch, tuple[int, ...] | None]
"""A batch, and the numbers of its rows (or its own), by which things about them can be kept; None without numbers."""


class Feed(Protocol):
    """Where a training run gets its batches."""

    @property
    def per_epoch(self) -> int | None:
        """Batches in a pass over the data; None where that is not known."""
        ...

    @property
    def tokens(self) -> int | None:
        """Tokens in a batch, where all are alike."""
        ...

    def batches(self, start: int) -> Iterator[Item]:
        """Batch number `start` of the run and all that follow."""
        ...


class Rows:
    """Rows of tokens, or samples of any kind, drawn anew in every epoch, from one source or from several by weight.

    With several, each row comes from the source that is furthest behind its weight: shares are exact at any time. A
    source that is used up begins again, in another order.
    """

    def __init__(self, sources: Sequence[Batch], weights: Sequence[float], batch_size: int, seed: int) -> None:
        """Take the sources.

        Args:
            sources: each all of its rows as one batch; equal in all but the number of rows.
            weights: of the sources, above 0.
            batch_size: rows in a batch.
            seed: of the order.

        Raises:
            SecateurError: for sources whose rows differ in length, or fewer rows than one batch.
        """
        for source in sources:
            mine, first = _lengths(source), _lengths(sources[0])
            if mine != first:
                raise SecateurError(
                    f"the sources have rows of {first} and of {mine}: for tokens, give seq_len, at most the smaller"
                )
        rows = sum(map(size_of, sources))
        if rows < batch_size:
            raise SecateurError(
                f"the data has {rows} rows, fewer than one batch of {batch_size}: give more, or a smaller batch_size"
            )
        self.sources, self.batch_size = tuple(sources), batch_size
        self._shares = np.array(weights, dtype=np.float64) / sum(weights)
        self._first = np.cumsum([0, *map(size_of, sources)])
        self._seed = seed
        self._orders: dict[tuple[int, int], torch.Tensor] = {}
        self._taken = np.zeros(len(sources), dtype=np.int64)
        self._order: list[int] = []

    @property
    def shares(self) -> list[float]:
        """Of the sources; they make 1."""
        return [float(share) for share in self._shares]

    @property
    def per_epoch(self) -> int:
        """Batches until the rows of all sources have been drawn as often as there are rows."""
        return int(self._first[-1]) // self.batch_size

    @property
    def tokens(self) -> int | None:
        """Tokens in a batch; None where rows are no tokens."""
        first: Any = self.sources[0]
        first = first.get("input_ids") if isinstance(first, Mapping) else first
        if not isinstance(first, torch.Tensor) or first.dim() != 2 or first.is_floating_point():
            return None
        return self.batch_size * first.shape[1]

    def batches(self, start: int) -> Iterator[Item]:
        """Batch number `start` of the run and all that follow."""
        while True:
            numbers = self.numbers(start)
            yield self.rows(numbers), numbers
            start += 1

    def numbers(self, batch: int) -> tuple[int, ...]:
        """The rows of a batch, numbered through all sources."""
        end = (batch + 1) * self.batch_size
        while len(self._order) < end:
            self._order.append(self._next())
        return tuple(self._order[end - self.batch_size : end])

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Rows by their numbers, as one batch."""
        return pytree.tree_map(lambda *every: torch.stack(every), *map(self._row, numbers))  # type: ignore[no-any-return]

    def _row(self, number: int) -> Any:
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        place = number - int(self._first[source])
        return pytree.tree_map(lambda tensor: tensor[place], self.sources[source])

    def _next(self) -> int:
        source = int(np.argmax(self._shares * (len(self._order) + 1) - self._taken))
        epoch, place = divmod(int(self._taken[source]), size_of(self.sources[source]))
        self._taken[source] += 1
        if (source, epoch) not in self._orders:
            draw = _generator(self._seed * 1_000_003 + source, epoch)
            self._orders.pop((source, epoch - 1), None)
            self._orders[source, epoch] = torch.randperm(size_of(self.sources[source]), generator=draw)
        return int(self._first[source]) + int(self._orders[source, epoch][place])


class Given:
    """Batches that are there, in another order in every epoch."""

    tokens = None

    def __init__(self, given: Sequence[Batch], seed: int) -> None:
        """Take at least one batch."""
        self.given, self._seed = given, seed

    @property
    def per_epoch(self) -> int:
        """Batches in a pass."""
        return len(self.given)

    def batches(self, start: int) -> Iterator[Item]:
        """Batch number `start` of the run and all that follow."""
        while True:
            epoch, place = divmod(start, len(self.given))
            draw = _generator(self._seed, epoch)
            for number in torch.randperm(len(self.given), generator=draw)[place:].tolist():
                yield self.given[number], (number,)
            start = (epoch + 1) * len(self.given)


class Loader:
    """A data loader, which is gone through again in every epoch, the random numbers of torch, NumPy and Python seeded.

    To enter it in the middle of an epoch, the batches before are drawn and left aside.
    """

    tokens = None

    def __init__(self, loader: Iterable[Batch], seed: int) -> None:
        """Take something that can be gone through more than once."""
        self._loader, self._seed = loader, seed

    @property
    def per_epoch(self) -> int | None:
        """Batches in a pass, where the loader says so."""
        try:
            return len(self._loader) if isinstance(self._loader, Sized) else None
        except TypeError:  # a DataLoader over an IterableDataset has a length that it does not know
            return None

    def batches(self, start: int) -> Iterator[Item]:
        """Batch number `start` of the run and all that follow; those of its epoch before it are drawn at once."""
        epoch, skip = divmod(start, self.per_epoch) if self.per_epoch else (0, start)
        source: Iterator[Batch] | None = None
        while skip:
            source = self._begun(epoch)
            drawn = sum(1 for _ in islice(source, skip))
            skip -= drawn
            epoch += 1
            if not drawn:
                raise SecateurError(_EMPTY)
        return self._go(epoch, source)

    def _go(self, epoch: int, source: Iterator[Batch] | None) -> Iterator[Item]:
        while True:
            seen = source is not None
            if source is None:
                source = self._begun(epoch)
                epoch += 1
            for batch in source:
                seen = True
                yield dict(batch) if isinstance(batch, Mapping) else batch, None
            if not seen:
                raise SecateurError(_EMPTY)
            source = None

    def _begun(self, epoch: int) -> Iterator[Batch]:
        _seed_all((self._seed * 1_000_003 + epoch) % 2**63)
        return iter(self._loader)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # what transforms of other libraries draw from


def feed_of(data: Any, *, batch_size: int, seed: int) -> Feed:
    """A feed from tensors, batches or a loader.

    Args:
        data: a tensor [N, ...]; a mapping from names to (tensor, weight); a list of batches, whose samples are mixed
            anew in every epoch where all are alike; a loader or another iterable of batches (one that can be gone
            through only once is read into memory).
        batch_size: rows in a batch, of tensors; a list of batches has its own.
        seed: of the order.

    Raises:
        SecateurError: for data without a batch.
    """
    if isinstance(data, torch.Tensor):
        return Rows([data], [1.0], batch_size, seed)
    if isinstance(data, Mapping):
        return Rows([rows for rows, _ in data.values()], [weight for _, weight in data.values()], batch_size, seed)
    if not isinstance(data, Sequence) and iter(data) is not data:
        return Loader(data, seed)
    given = [dict(batch) if isinstance(batch, Mapping) else batch for batch in data]
    if not given:
        raise SecateurError("the data has no batch")
    if all(_splits(batch) and _lengths(batch) == _lengths(given[0]) for batch in given):
        joined = pytree.tree_map(lambda *every: torch.cat(every), *given)
        return Rows([joined], [1.0], size_of(given[0]), seed)
    return Given(given, seed)


def _splits(batch: Batch) -> bool:
    """Whether a batch is of tensors alone that have as many samples."""
    leaves = pytree.tree_leaves(batch)
    return all(isinstance(x, torch.Tensor) and x.dim() for x in leaves) and len({len(x) for x in leaves}) == 1


def _lengths(batch: Batch) -> Any:
    """Names and shapes of what a batch is made of, but for the number of samples."""
    leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    if len(leaves) == 1 and isinstance(leaves[0], torch.Tensor):
        return list(leaves[0].shape[1:])
    return str(structure), [list(leaf.shape[1:]) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def used_numbers(feed: Rows | Given, batches: int) -> list[int]:
    """The numbers of all rows (or batches) that the first batches of a run need, in order."""
    needed: set[int] = set()
    if isinstance(feed, Rows):
        for batch in range(batches):
            needed.update(feed.numbers(batch))
    else:
        for _, numbers in islice(feed.batches(0), min(batches, feed.per_epoch)):
            needed.update(numbers or ())
    return sorted(needed)
