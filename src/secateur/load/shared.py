"""What each of several processes takes of calibration data."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, samples_of, size_of
from secateur.load.model import fingerprint_data

B = TypeVar("B", bound=Batch)


def check_enough(batches: Sequence[Batch], what: str = "the calibration data") -> None:
    """Raise SecateurError where there are more processes than samples."""
    if not world.splits_data() or not batches or len(batches) >= world.size():
        return
    count = sum(map(_pieces, batches))
    if count < world.size():
        raise SecateurError(
            f"{what} has {count} sample{'s' if count != 1 else ''} for {world.size()} processes, and each needs one: "
            f"give more samples, or start at most {max(1, count)} (--nproc_per_node)"
        )


def check_alike(batches: Sequence[Batch], what: str = "the calibration data") -> None:
    """Raise SecateurError, in all processes, unless all have read the same."""
    if world.split():
        leaves = [[x for x in pytree.tree_leaves(_plain(batch)) if isinstance(x, torch.Tensor)] for batch in batches]
        found = [{str(place): x for place, x in enumerate(tensors)} for tensors in leaves]
        world.check_same(fingerprint_data(found)[:16], f"{what} (the begin of its SHA-256)")


def shared(batches: Sequence[B], what: str = "the calibration data") -> list[B]:
    """What this process takes of the data; all of it where data is not split (see `world.splitting`).

    Whole batches, every n-th one of n processes. The samples of the batches that are left over, fewer than there are
    processes, are shared out by themselves, so that all have about as much to do.

    Args:
        batches: the same in all processes.
        what: is said of them where they are too few.

    Raises:
        SecateurError: in all processes, where there are more of them than samples.
    """
    if not world.splits_data():
        return list(batches)
    check_enough(batches, what)
    size, rank = world.size(), world.rank()
    whole = len(batches) // size * size
    rest = batches[whole:]
    counts = [_pieces(batch) for batch in rest]
    begin, end = (sum(counts) * place // size for place in (rank, rank + 1))
    found = list(batches[rank:whole:size])
    for batch, count in zip(rest, counts, strict=True):
        first, last = max(0, begin), min(count, end)
        if first < last:
            found.append(batch if last - first == count else some_samples(batch, slice(first, last)))
        begin, end = begin - count, end - count
    return found


def some_samples(batch: B, which: slice) -> B:
    """A part of a batch, in its form."""
    return pytree.tree_map(lambda x: x[which] if isinstance(x, torch.Tensor) else x, _plain(batch))  # type: ignore[no-any-return]


def _plain(batch: Batch) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _pieces(batch: Batch) -> int:
    """Samples that can be told apart."""
    return size_of(batch) if len(samples_of(batch)) > 1 else 1
