"""The algebra of dimensions, and its meaning: what it says about rows against what torch does with them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.space import Slice, discover
from secateur.space.dims import (
    Cat,
    Prod,
    Term,
    Var,
    _bind,
    add_role,
    align,
    concat,
    freeze,
    is_live,
    leaves,
    narrow,
    product,
    resolve,
    size_of,
    split,
    unify,
)

WHY = "because"


def var(size: int) -> Var:
    return Var(size)


# --- examples ---------------------------------------------------------------------------------------------------


def test_a_view_splits_a_dimension() -> None:
    whole, heads, width = var(12), var(3), var(4)
    align([whole], [heads, width], WHY)
    assert resolve(whole) == Prod((heads, width))
    assert is_live(heads)
    assert is_live(width)


def test_a_view_merges_dimensions() -> None:
    heads, width, whole = var(3), var(4), var(12)
    align([heads, width], [whole], WHY)
    assert resolve(whole) == resolve(Prod((heads, width)))
    assert [leaf.size for leaf in leaves(whole)] == [3, 4]
    assert is_live(whole)


def test_split_and_merge_come_back_to_the_same() -> None:
    whole, again = var(12), var(12)
    parts = var(3), var(4)
    align([whole], parts, WHY)
    align(parts, [again], WHY)
    assert resolve(whole) == resolve(again)


def test_boundaries_that_do_not_line_up_freeze() -> None:
    left, right = [var(4), var(6)], [var(6), var(4)]
    align(left, right, WHY)
    # 4 x 6 = 2 x 2 x ... has no common refinement with 6 x 4.
    assert not any(is_live(t) for t in (*left, *right))
    assert {leaf.frozen for t in left for leaf in leaves(t)} == {WHY}


def test_boundaries_that_refine_each_other() -> None:
    a, b, c, d = var(2), var(12), var(6), var(4)
    align([a, b], [c, d], WHY)
    first, second, third = (leaf for t in (a, b) for leaf in leaves(t))
    assert (first.size, second.size, third.size) == (2, 3, 4)
    assert resolve(c) == Prod((first, second))
    assert resolve(d) is third


def test_frozen_parts_freeze_what_they_are_unified_with() -> None:
    free, fixed = var(5), Var(5, frozen="an output")
    unify(free, fixed, WHY)
    assert resolve(free) is resolve(fixed)
    assert not is_live(free)
    assert [leaf.frozen for leaf in leaves(free)] == ["an output"]


@pytest.mark.parametrize("order", [0, 1])
def test_freezing_reaches_into_products_and_the_first_reason_stays(order: int) -> None:
    whole, parts = var(12), (var(3), var(4))
    if order:
        freeze(whole, "first")
    align([whole], parts, WHY)
    if not order:
        freeze(whole, "first")
    freeze(parts[0], "second")
    assert [leaf.frozen for leaf in leaves(whole)] == ["first", "first"]


def test_different_sizes_freeze_both() -> None:
    a, b = var(3), var(4)
    unify(a, b, WHY)
    assert (a.frozen, b.frozen) == (WHY, WHY)


def test_a_term_is_never_bound_to_something_that_holds_it() -> None:
    """Normal forms have no ones and no empty segments, so that equal sizes leave x = x alone, or freeze."""
    x, one = var(4), var(1)
    unify(x, Cat((x, Var(0))), WHY)
    align([one, x], [x], WHY)
    assert resolve(x) is x
    assert is_live(x)
    _bind(x, Cat((x, var(2))), WHY)
    assert x.bound is None
    assert x.frozen == WHY


def test_a_product_and_its_own_reversal() -> None:
    """[a, b] = [b, a] of 2 and 4 holds only where all three factors of two are one variable."""
    a, b = var(2), var(4)
    align([a, b], [b, a], WHY)
    assert size_of(resolve(b)) == 4
    end = resolve(a)
    assert list(leaves(b)) == [end, end]
    assert isinstance(end, Var)


def test_roles_and_tiles_survive_a_binding() -> None:
    a, b = Var(5, tile=True), var(5)
    add_role(a, "heads")
    add_role(b, "head_dim")
    unify(a, b, WHY)
    end = resolve(a)
    assert isinstance(end, Var)
    assert end is resolve(b)
    assert end.tile
    assert end.roles == {"heads", "head_dim"}


def test_product_distributes_over_a_leading_concatenation() -> None:
    a, b, c = var(2), var(3), var(4)
    assert product([Cat((a, b)), c]) == Cat((Prod((a, c)), Prod((b, c))))
    assert product([var(1), a]) is a
    assert size_of(product([])) == 1


def test_concat_is_flat() -> None:
    a, b, c = var(2), var(3), var(4)
    assert concat([Cat((a, b)), Var(0), c]) == Cat((a, b, c))
    assert concat([a]) is a
    assert size_of(concat([])) == 0


def test_narrow_selects_segments() -> None:
    whole = var(10)
    first = narrow(whole, 0, 3, WHY)
    rest = narrow(whole, 3, 10, WHY)
    assert resolve(whole) == Cat((first, rest))
    assert narrow(whole, 0, 10, WHY) == resolve(whole)
    assert (narrow(whole, 0, 3, WHY), narrow(whole, 3, 10, WHY)) == (first, rest)
    assert size_of(narrow(whole, 4, 4, WHY)) == 0
    assert is_live(whole)


def test_narrow_across_a_product_freezes_what_it_cannot_cut() -> None:
    heads, width = var(3), var(4)
    whole = Prod((heads, width))
    part = narrow(whole, 0, 6, WHY)  # one head and a half
    assert size_of(part) == 6
    assert not is_live(part)
    assert not is_live(whole)


def test_narrow_of_whole_rows_of_a_product() -> None:
    heads, width = var(3), var(4)
    part = narrow(Prod((heads, width)), 4, 12, WHY)
    first, rest = leaves(heads)
    assert part == Prod((rest, width))
    assert (first.size, rest.size) == (1, 2)


def test_product_with_concatenation_is_the_same_cut_in_each_segment() -> None:
    """A GLU's [2, n] flattened, against two halves."""
    two, n, gate, up = var(2), var(5), var(5), var(5)
    unify(Prod((two, n)), Cat((gate, up)), WHY)
    assert resolve(gate) is resolve(up) is resolve(n)
    assert is_live(n)
    assert two.frozen == WHY


def test_product_with_uneven_concatenation_freezes() -> None:
    parts = var(2), var(5), var(4), var(6)
    unify(Prod(parts[:2]), Cat(parts[2:]), WHY)
    assert all(p.frozen == WHY for p in parts)


def test_concatenations_are_cut_at_each_others_boundaries() -> None:
    a, b, c, d = var(2), var(8), var(5), var(5)
    unify(Cat((a, b)), Cat((c, d)), WHY)
    assert [leaf.size for leaf in leaves(Cat((a, b)))] == [2, 3, 5]
    assert list(leaves(Cat((a, b)))) == list(leaves(Cat((c, d))))
    assert is_live(a)


def test_split_of_a_concatenation_shares_the_inner_part() -> None:
    """Fused q, k, v of 3, 2 and 2 heads of 4: one head_dim, three counts of heads."""
    q, k, v = var(12), var(8), var(8)
    parts = split(Cat((q, k, v)), 7, WHY)
    assert parts is not None
    assert [size_of(t) for t in parts] == [7, 4]
    assert [leaf.size for leaf in leaves(q)] == [3, 4]
    assert resolve(list(leaves(q))[1]) is resolve(list(leaves(k))[1]) is resolve(parts[1])
    assert split(var(12), 5, WHY) is None
    assert split(Cat((var(6), var(9))), 5, WHY) is not None
    assert split(Cat((var(5), var(10))), 2, WHY) is None


# --- properties -------------------------------------------------------------------------------------------------


def terms(pool: list[Var], depth: int = 2) -> st.SearchStrategy[Term]:
    """Terms over fresh variables, which are noted in `pool`."""

    def fresh(size: int) -> Var:
        pool.append(Var(size))
        return pool[-1]

    base: st.SearchStrategy[Term] = st.integers(1, 6).map(fresh)
    for _ in range(depth):
        parts = st.lists(base, min_size=1, max_size=3).map(tuple)
        base = st.one_of(base, parts.map(product), parts.map(concat))
    return base


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_sizes_are_kept_and_resolve_is_idempotent(data: st.DataObject) -> None:
    pool: list[Var] = []
    drawn = data.draw(st.lists(terms(pool), min_size=2, max_size=4))
    sizes = [size_of(t) for t in drawn]
    pairs = data.draw(st.lists(st.tuples(*[st.sampled_from(range(len(drawn)))] * 2), max_size=4))
    for i, j in pairs:
        unify(drawn[i], drawn[j], WHY)
    narrowed = data.draw(st.sampled_from(drawn))
    start = data.draw(st.integers(0, size_of(narrowed)))
    stop = data.draw(st.integers(start, size_of(narrowed)))
    assert size_of(narrow(narrowed, start, stop, WHY)) == stop - start
    for term, size in zip(drawn, sizes, strict=True):
        assert size_of(resolve(term)) == size
        assert resolve(resolve(term)) == resolve(term)
    for v in pool:
        assert size_of(resolve(v)) == v.size
        assert all(leaf.bound is None for leaf in leaves(v))
        assert v not in list(leaves(v)) or resolve(v) is v


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_after_unify_two_terms_agree_or_are_frozen(data: st.DataObject) -> None:
    """Either the two sides are one list of variables in the same places, or nothing of them may be cut."""
    pool: list[Var] = []
    a, b = data.draw(terms(pool)), data.draw(terms(pool))
    unify(a, b, WHY)
    found, other = places(a), places(b)
    for key in found.keys() | other.keys():
        if size_of(a) == size_of(b):
            assert found.get(key) == other.get(key)
    if size_of(a) != size_of(b):
        assert not is_live(a)
        assert not is_live(b)


def places(term: Term) -> dict[int, list[tuple[int, ...]]]:
    """For every variable that can be cut, the rows of each of its units, computed by counting."""
    found: dict[int, list[tuple[int, ...]]] = {}

    def walk(term: Term) -> list[frozenset[tuple[int, int]]]:
        """For each row, the (variable, unit) pairs that it belongs to."""
        term = resolve(term)
        if isinstance(term, Var):
            return [frozenset([(id(term), u)]) for u in range(term.size)]
        if isinstance(term, Cat):
            return [row for segment in term.segments for row in walk(segment)]
        rows = [frozenset[tuple[int, int]]()]
        for factor in term.factors:
            rows = [before | after for before in rows for after in walk(factor)]
        return rows

    alive = {id(leaf): leaf for leaf in leaves(term) if leaf.frozen is None and leaf.size > 1}
    table = walk(term)
    for key, leaf in alive.items():
        found[key] = [tuple(i for i, row in enumerate(table) if (key, u) in row) for u in range(leaf.size)]
    return found


# --- meaning: rows against torch --------------------------------------------------------------------------------


def test_rows_of_a_slice() -> None:
    """Offset + o*size*inner + u*inner + i, as in the contributing guide."""
    part = Slice("w", 0, 5, ((3, 4),), ((2, 12),), 4)
    assert part.rows().tolist() == [[5 + o * 12 + u * 4 + i for o in range(2) for i in range(4)] for u in range(3)]
    grouped = Slice("w", 0, 0, ((2, 6), (3, 2)), (), 2)
    assert grouped.rows().tolist() == [[6 * g + 2 * u, 6 * g + 2 * u + 1] for g in range(2) for u in range(3)]


class Chain(nn.Module):
    """A projection whose outputs go through reshapes before something elementwise and a second projection."""

    def __init__(self, steps: list[tuple[Any, ...]], width: int, out: int) -> None:
        super().__init__()
        self.steps = steps
        self.first, self.second = nn.Linear(3, width), nn.Linear(out, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(torch.tanh(run(self.first(x), self.steps)))


def run(x: torch.Tensor, steps: list[tuple[Any, ...]]) -> torch.Tensor:
    """Steps on the dimensions after the first, which come back as one."""
    for kind, *rest in steps:
        if kind == "view":
            x = x.reshape(x.shape[0], *rest[0])
        elif kind == "permute":
            x = x.permute(0, *(i + 1 for i in rest[0]))
        elif kind == "narrow":
            dim, start, stop = rest
            x = x[(slice(None),) * (dim + 1) + (slice(start, stop),)]
        else:
            dim, at = rest
            first, second = torch.split(x, [at, x.shape[dim + 1] - at], dim + 1)
            x = torch.cat([second, first], dim + 1)
    return x.flatten(1)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[tuple[Any, ...]], int]:
    """Steps for a width of 24, 36 or 60."""
    width = draw(st.sampled_from([24, 36, 60]))
    shape, steps = [width], []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["view", "permute", "narrow", "roll"]))
        step: tuple[Any, ...]
        if kind == "view":
            total, shape = torch.Size(shape).numel(), []
            for factor in draw(st.permutations([2, 3, 4, 5])):
                if total % factor == 0 and draw(st.booleans()):
                    shape.append(factor)
                    total //= factor
            shape.append(total)
            step = ("view", tuple(shape))
        elif kind == "permute":
            order = tuple(draw(st.permutations(range(len(shape)))))
            shape = [shape[i] for i in order]
            step = ("permute", order)
        else:
            dim = draw(st.integers(0, len(shape) - 1))
            if shape[dim] < 2:
                continue
            at = draw(st.integers(1, shape[dim] - 1))
            step = ("roll", dim, at)
            if kind == "narrow":
                start = draw(st.integers(0, at - 1))
                step, shape[dim] = ("narrow", dim, start, at), at - start
        steps.append(step)
    return steps, width


@settings(max_examples=40, deadline=None)
@given(chains())
def test_units_stay_together_through_random_reshapes(case: tuple[list[tuple[Any, ...]], int]) -> None:
    """Rows of unit u in the first weight, pushed through the real operations, land on its columns of the second.

    This needs no rule of ours: `run` moves an arange of row numbers.
    """
    steps, width = case
    arrived = run(torch.arange(width)[None], steps)[0]
    model = Chain(steps, width, len(arrived)).double()
    space = discover(model, {"x": torch.randn(7, 3, dtype=torch.float64)})
    for axis in space.axes:
        made = [s for s in axis.slices if s.parameter == "first.weight"]
        read = [s for s in axis.slices if s.parameter == "second.weight"]
        assert {s.parameter for s in axis.slices} <= {"first.weight", "first.bias", "second.weight"}
        for unit in range(axis.size):
            rows = {r for s in made for r in s.rows()[unit].tolist()}
            columns = {c for s in read for c in s.rows()[unit].tolist()}
            assert columns == {c for c, origin in enumerate(arrived.tolist()) if origin in rows}
