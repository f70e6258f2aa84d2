"""What each of several processes takes of a training run, so that together they do what one alone would do."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils import _pytree as pytree

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, size_of
from secateur.load.feed import Feed, Given, Item, Loader, Rows

_FIX = "give larger batches, or fewer processes (--nproc_per_node)"


class Shared:
    """The rows of each batch of a feed that are this process's: a batch stays what it is for one process."""

    def __init__(self, feed: Feed) -> None:
        """Take the feed, the same in all processes. A data loader is gone through by the first process alone."""
        self._feed = feed

    @property
    def per_epoch(self) -> int | None:
        """As of the feed."""
        return self._feed.per_epoch

    @property
    def tokens(self) -> int | None:
        """As of the feed: of whole batches."""
        return self._feed.tokens

    def batches(self, start: int) -> Iterator[Item]:
        """This process's part of batch number `start` of the run and of all that follow."""
        if isinstance(self._feed, Rows):
            while True:
                numbers = self._feed.numbers(start)
                numbers = numbers[_own(len(numbers))]
                yield self._feed.rows(numbers), numbers
                start += 1
        if not isinstance(self._feed, Loader):
            for batch, _ in self._feed.batches(start):
                yield _part_of(batch), None
        # What it draws may hang on random numbers, which dropout moves on otherwise in each process.
        drawn = self._feed.batches(start) if world.first() else iter(())
        while True:
            yield _part_of(world.from_first(lambda: next(drawn)[0])), None


def shared(feed: Feed) -> Feed:
    """What this process takes of a feed; the feed itself where there is one process."""
    return feed if world.size() == 1 else Shared(feed)


def check_shares(feed: Feed) -> None:
    """Raise SecateurError where a process would have no row of a batch."""
    if world.size() == 1:
        return
    if isinstance(feed, Rows):
        check_rows(feed.batch_size)
    elif isinstance(feed, Given):
        for batch in feed.given:
            _part_of(batch)


def check_rows(rows: int) -> None:
    """Raise SecateurError for batches of fewer rows than there are processes."""
    if rows < world.size():
        raise SecateurError(
            f"a batch of {rows} row{'s' * (rows != 1)} is smaller than the number of processes, {world.size()}, and "
            f"each of them needs a row: {_FIX}"
        )


def _own(count: int) -> slice:
    """Which of the rows of a batch this process takes: they are dealt out in order, as evenly as it goes."""
    return slice(*((world.rank() + i) * count // world.size() for i in (0, 1)))


def _part_of(batch: Batch) -> Batch:
    leaves = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    if len({len(x) if x.dim() else 0 for x in leaves}) != 1 or not leaves[0].dim():
        raise SecateurError(
            "a batch has tensors that do not agree on how many rows it has, so it cannot be shared among processes: "
            "train in one process"
        )
    check_rows(size_of(batch))
    found: Batch = pytree.tree_map(lambda x: x[_own(len(x))] if isinstance(x, torch.Tensor) else x, batch)
    return found


def rounds(count: int) -> list[tuple[int, bool]]:
    """Which of so many batches this process looks at: (number, whether it counts).

    A sharded model runs in all processes at once, so all look at as many; what is short is filled up with the last
    batch, which does not count.
    """
    numbers = range(world.rank(), -(-count // world.size()) * world.size(), world.size())
    return [(min(number, count - 1), number < count) for number in numbers]


def total(count: int, device: torch.device) -> int:
    """The sum of a count over all processes."""
    if world.size() == 1:
        return count
    found = torch.tensor(count, device=device)
    world.add_up([found])
    return int(found)


def summed_up(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sums of numbers over all processes."""
    if world.size() == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    world.add_up([found])
    return [float(number) for number in found]
