"""Batches of training: which rows, in which order, and the same ones wherever the run is entered."""

import random
from itertools import islice
from typing import Any

import heal
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from secateur.errors import SecateurError
from secateur.load.feed import Given, Loader, Rows, feed_of, used_numbers


def numbered(count: int, first: int = 0) -> torch.Tensor:
    """Rows that say their own number."""
    return torch.arange(first, first + count)[:, None].repeat(1, 3)


def taken(feed: Any, count: int, start: int = 0) -> list[Any]:
    return [batch for batch, _ in islice(feed.batches(start), count)]


def test_rows_are_a_new_permutation_in_every_epoch() -> None:
    feed = feed_of(numbered(10), batch_size=2, seed=3)
    assert isinstance(feed, Rows)
    assert (feed.per_epoch, feed.tokens) == (5, 6)
    seen = torch.cat(taken(feed, 15))[:, 0].tolist()
    epochs = [seen[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = torch.cat(taken(feed_of(numbered(10), batch_size=2, seed=4), 5))[:, 0].tolist()
    assert other != epochs[0]
    assert sorted(other) == list(range(10))


def test_numbers_are_those_of_the_rows() -> None:
    feed = feed_of(numbered(7), batch_size=3, seed=0)
    for batch, numbers in islice(feed.batches(0), 6):
        assert isinstance(batch, torch.Tensor)
        assert batch[:, 0].tolist() == list(numbers or ())
    assert isinstance(feed, Rows)
    assert used_numbers(feed, 2) == sorted(numbers for _, many in islice(feed.batches(0), 2) for numbers in many or ())


def mixed() -> Any:
    return feed_of({"a": (numbered(10), 0.7), "b": (numbered(5, 100), 0.3)}, batch_size=2, seed=1)


def test_shares_of_a_mix_are_exact_at_any_time() -> None:
    seen = torch.cat(taken(mixed(), 50))[:, 0].tolist()
    for length in range(1, 101):
        assert abs(sum(row < 100 for row in seen[:length]) - 0.7 * length) <= 1
    first, second = [r for r in seen if r < 100], [r for r in seen if r >= 100]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    assert sorted(second[:5]) == sorted(second[5:10]) == list(range(100, 105))


def samples(feed_batch: Any) -> list[torch.Tensor]:
    return list(feed_batch.values() if isinstance(feed_batch, dict) else feed_batch)


FEEDS: dict[str, Any] = {
    "rows": lambda: feed_of(numbered(10), batch_size=3, seed=5),
    "mix": mixed,
    "mapping batches": lambda: feed_of([heal.padded(heal.rows(4, seed=i)) for i in range(3)], batch_size=8, seed=2),
    "given": lambda: feed_of([numbered(2), numbered(3)[:, :2], numbered(4)[:, :1]], batch_size=8, seed=2),
    "loader": lambda: feed_of(heal.loader(), batch_size=8, seed=2),
    "noisy loader": lambda: feed_of(heal.loader(noisy=True), batch_size=8, seed=2),
}


@pytest.mark.parametrize("kind", FEEDS)
def test_a_run_that_is_entered_anywhere_gets_the_same_batches(kind: str) -> None:
    made = FEEDS[kind]()
    undisturbed = made.batches(0)
    states, batches = [], []
    for _ in range(9):
        states.append(torch.get_rng_state())
        batches.append(next(undisturbed)[0])
        torch.rand(3)  # as dropout takes them
    for start in range(1, 8):
        torch.manual_seed(start)
        entered = FEEDS[kind]().batches(start)
        torch.set_rng_state(states[start])  # as the state of a run keeps it
        for expected in batches[start:]:
            found = next(entered)[0]
            torch.rand(3)
            assert all(torch.equal(a, b) for a, b in zip(samples(found), samples(expected), strict=True))


def test_a_list_of_like_batches_is_mixed_anew() -> None:
    feed = feed_of([numbered(4), numbered(4, 4), numbered(2, 8)], batch_size=8, seed=0)
    assert isinstance(feed, Rows)
    assert (feed.batch_size, feed.per_epoch) == (4, 2)
    assert sorted(torch.cat(taken(feed, 5))[:, 0].tolist()) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize(
    "more",
    [
        {"return_dict": True},  # no tensor: it cannot be split into rows
        {"scale": torch.ones(())},
        {"other": torch.ones(3)},  # as many as there are rows in no batch
    ],
)
def test_batches_that_are_not_made_of_rows_stay_whole(more: dict[str, Any]) -> None:
    given = [{"input_ids": heal.rows(4, seed=i), **more} for i in range(3)]
    feed = feed_of(given, batch_size=8, seed=0)
    assert isinstance(feed, Given)
    assert feed.per_epoch == 3
    seen = [numbers for _, numbers in islice(feed.batches(0), 6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [(0,), (1,), (2,)]  # type: ignore[type-var]
    assert used_numbers(feed, 10) == [0, 1, 2]


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(numbered(5))


def test_loaders_that_do_not_know_their_length() -> None:
    feed = feed_of(DataLoader(Stream(), batch_size=2), batch_size=8, seed=0)
    assert isinstance(feed, Loader)
    assert feed.per_epoch is None
    assert [len(b) for b in taken(feed, 6)] == [2, 2, 1, 2, 2, 1]
    assert [b[0, 0].item() for b in taken(feed, 3, start=7)] == [2, 4, 0]


def test_an_iterator_is_read_once() -> None:
    feed = feed_of(iter([numbered(2), numbered(2, 2)]), batch_size=8, seed=0)
    assert len(torch.cat(taken(feed, 6))) == 12


def test_augmentation_of_other_libraries_is_seeded() -> None:
    class Draws:
        def __iter__(self) -> Any:
            return iter([torch.tensor([[random.random(), np.random.random(), torch.rand(()).item()]])])

        def __len__(self) -> int:
            return 1

    one, two = (taken(feed_of(Draws(), batch_size=1, seed=4), 3) for _ in range(2))
    assert torch.equal(torch.cat(one), torch.cat(two))
    assert len({tuple(row[0].tolist()) for row in one}) == 3


def test_large_seeds() -> None:
    for kind in (numbered(4), [numbered(2), numbered(2)[:, :1]], heal.loader()):
        assert taken(feed_of(kind, batch_size=2, seed=2**40), 3)


def test_what_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"rows of \[3\] and of \[2\]: for tokens, give seq_len"):
        feed_of({"a": (numbered(4), 1.0), "b": (numbered(4)[:, :2], 1.0)}, batch_size=2, seed=0)
    with pytest.raises(SecateurError, match="the data has 4 rows, fewer than one batch of 8"):
        feed_of(numbered(4), batch_size=8, seed=0)
    with pytest.raises(SecateurError, match="the data has no batch"):
        feed_of([], batch_size=8, seed=0)
    empty: Any = DataLoader(torch.utils.data.TensorDataset(torch.ones(0, 2)))
    for start in (0, 3):
        with pytest.raises(SecateurError, match="the data loader gives no batch"):
            next(feed_of(empty, batch_size=8, seed=0).batches(start))
