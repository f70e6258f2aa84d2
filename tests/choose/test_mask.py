"""Masks: exact counts, ties, N:M, tiles, and what does not fit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.choose.mask import Layout, largest, mask_matrix, masks_of, n_of_m, spread, tiles, zeros_of
from secateur.errors import SecateurError
from secateur.space.weights import Weight


def linear(name: str, rows: int, columns: int) -> Weight:
    return Weight(name, (rows, columns), (0,), (1,))


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    per_mille=st.integers(0, 1000),
)
def test_the_total_of_zeros_is_exact(sizes: list[int], per_mille: int) -> None:
    counts = zeros_of(sizes, per_mille / 1000)
    assert sum(counts) == -(-sum(sizes) * per_mille // 1000)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(abs(c - s * per_mille / 1000) <= 1 for c, s in zip(counts, sizes, strict=True))


def test_counts_stay_exact_where_there_are_billions() -> None:
    assert sum(zeros_of([8192] * 28672, 0.7)) == -(-8192 * 28672 * 7 // 10)
    assert sum(zeros_of([128256 * 16384, 3], 1 / 3)) == (128256 * 16384 + 3) // 3
    assert sum(zeros_of([100] * 10**5, 0.333)) == 3_330_000
    thirds = [0.25, 1 / 3, 5 / 12]  # shares that were worked out, about a mean of a third
    assert sum(zeros_of([12 * 10**6] * 3, thirds)) == 12 * 10**6


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=4),
    zeros=st.integers(0, 7),
)
def test_the_largest_stay_and_of_equals_the_first(scores: list[list[int]], zeros: int) -> None:
    mask = largest(torch.tensor(scores, dtype=torch.float32), [zeros] * len(scores))
    for row, kept in zip(scores, mask.tolist(), strict=True):
        order = sorted(range(7), key=lambda i: (-row[i], i))  # slow and plain
        assert [i for i in range(7) if kept[i]] == sorted(order[: 7 - zeros])


def test_rows_may_lose_different_numbers() -> None:
    mask = largest(torch.tensor([[3.0, 1, 2], [1, 1, 1], [1, 2, 3]]), torch.tensor([1, 2, 0]))
    assert mask.tolist() == [[True, False, True], [True, False, False], [True, True, True]]


@pytest.mark.parametrize(("zeros", "kept"), [(0, 6), (6, 0), (1, 5)])
def test_all_none_and_a_constant_tensor(zeros: int, kept: int) -> None:
    mask = largest(torch.ones(1, 6), [zeros])
    assert mask.tolist() == [[i < kept for i in range(6)]]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_n_of_m_holds_in_every_group(m: int, groups: int, seed: int) -> None:
    scores = torch.randint(0, 4, (3, m * groups), generator=torch.Generator().manual_seed(seed)).float()
    for n in range(1, m):
        mask = n_of_m(scores, (n, m)).reshape(-1, m)
        assert set(mask.sum(1).tolist()) == {n}
        for row, kept in zip(scores.reshape(-1, m).tolist(), mask.tolist(), strict=True):
            order = sorted(range(m), key=lambda i: (-row[i], i))
            assert [i for i in range(m) if kept[i]] == sorted(order[:n])


def test_tiles_go_whole_by_their_sums() -> None:
    scores = torch.tensor([[1.0, 0, 5, 0], [0, 0, 0, 0], [9, 0, 0, 2], [0, 0, 0, 2]])
    assert tiles(scores, (2, 2)).tolist() == [[1, 5], [9, 4]]
    mask = mask_matrix(scores, 2, Layout(block=(2, 2)))
    assert torch.equal(mask, spread(torch.tensor([[False, True], [True, False]]), (2, 2)))


def test_a_row_scope_shares_the_zeros_out_exactly() -> None:
    scores = torch.rand(7, 10, generator=torch.Generator().manual_seed(0))
    mask = mask_matrix(scores, 24, Layout("row"))
    gone = (~mask).sum(1)
    assert int(gone.sum()) == 24
    assert set(gone.tolist()) == {3, 4}


WEIGHTS = [
    linear("a", 4, 6),
    linear("b", 3, 8),
    Weight("c", (2, 3, 4), (1,), (2,)),
    Weight("d", (4, 3, 2), (0,), (2, 1), 2),
]


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {w.name: torch.rand(w.shape, generator=generator) for w in WEIGHTS}


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
def test_masks_of_all_weights_have_exactly_the_asked_zeros(scope: str, sparsity: float) -> None:
    found = scores()
    masks = masks_of(WEIGHTS, found, sparsity, Layout(scope))
    total = sum(w.size for w in WEIGHTS)
    assert sum(int((~m).sum()) for m in masks.values()) == math.ceil(total * sparsity - 1e-9)
    assert {n: m.shape for n, m in masks.items()} == {w.name: torch.Size(w.shape) for w in WEIGHTS}
    if scope == "global" and sparsity > 0:
        kept = torch.cat([found[n][m] for n, m in masks.items()])
        gone = torch.cat([found[n][~m] for n, m in masks.items()])
        assert bool((kept[:, None] > gone[None]).all())
    if scope == "tensor" and sparsity == 0.5:
        for n, m in masks.items():
            assert int((~m).sum()) == WEIGHTS[[w.name for w in WEIGHTS].index(n)].size // 2
            assert found[n][m].min() >= found[n][~m].min()


def test_each_weight_may_have_a_share_of_its_own() -> None:
    shares = {"a": 0.0, "b": 0.25, "c": 0.5, "d": 0.75}
    masks = masks_of(WEIGHTS, scores(), shares, Layout())
    assert {n: int((~m).sum()) for n, m in masks.items()} == {"a": 0, "b": 6, "c": 12, "d": 18}
    with pytest.raises(SecateurError, match="scope global ranks all weights together"):
        masks_of(WEIGHTS, scores(), shares, Layout("global"))


def test_n_m_runs_along_the_innermost_input_channels() -> None:
    weight = Weight("conv", (2, 4, 3, 3), (0,), (2, 3, 1))
    values = {"conv": torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))}
    masks = masks_of([weight], values, 0.5, Layout(n_m=(2, 4)))
    assert set(masks["conv"].sum(1).flatten().tolist()) == {2}  # of the four channels at every place of the kernel


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("rows"), "there is no scope 'rows'; did you mean 'row'"),
        (Layout(n_m=(2, 4), block=(1, 2)), "n:m and block contradict each other"),
        (Layout("row", block=(2, 1)), "scope row compares within a row"),
        (Layout(block=(0, 1)), "a tile has at least one row"),
        (Layout(n_m=(2, 4)), "n:m=2:4 does not fit a: 4 does not divide its 6 inputs; ignore it"),
        (Layout(block=(2, 1)), "blocks of 2x1 do not fit b, a matrix of 3x8"),
        (Layout(n_m=(1, 16)), "16 does not divide its 6 inputs"),
    ],
)
def test_what_does_not_fit(layout: Layout, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        layout.check(WEIGHTS)
