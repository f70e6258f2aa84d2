"""The algebra of tensor dimensions: what an axis of one tensor has to do with an axis of another.

A dimension is a term: a variable, an ordered product of terms (row-major, what ``view`` makes), or a
concatenation of terms (what ``cat`` and ``split`` make). Operators state equations between terms; `Dims.unify`
solves them by binding variables, as in first-order unification. What has no solution that a cut could respect is
frozen, with the reason. Nothing is guessed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod


@dataclass(eq=False)
class Var:
    """An indivisible dimension of `size` units, as far as is known; `bound` once it is known better."""

    size: int
    frozen: str | None = None
    """Why no unit may be removed, or None."""
    roles: set[str] = field(default_factory=set)
    tile: bool = False
    """Made by ``expand`` or ``repeat``: the same values for each index."""
    bound: "Term | None" = None


@dataclass(frozen=True)
class Prod:
    """Row-major product: index = (...(i0 * n1 + i1) * n2 + i2...)."""

    factors: "tuple[Term, ...]"


@dataclass(frozen=True)
class Cat:
    """Segments one after the other."""

    segments: "tuple[Term, ...]"


Term = Var | Prod | Cat


def size_of(term: Term) -> int:
    """Number of units of a term."""
    if isinstance(term, Var):
        return term.size
    if isinstance(term, Prod):
        return prod(size_of(f) for f in term.factors)
    return sum(size_of(s) for s in term.segments)


def product(terms: Sequence[Term]) -> Term:
    """Row-major product in normal form: flat, without factors of one unit, a leading concatenation distributed."""
    flat: list[Term] = []
    for term in map(resolve, terms):
        if isinstance(term, Prod):
            flat.extend(term.factors)
        elif size_of(term) != 1:
            flat.append(term)
    if not flat:
        return Var(1, frozen="a dimension of one unit")
    if len(flat) == 1:
        return flat[0]
    if isinstance(flat[0], Cat):
        return concat([product([segment, *flat[1:]]) for segment in flat[0].segments])
    return Prod(tuple(flat))


def concat(terms: Sequence[Term]) -> Term:
    """Concatenation in normal form: flat, without empty segments."""
    flat: list[Term] = []
    for term in map(resolve, terms):
        if isinstance(term, Cat):
            flat.extend(term.segments)
        elif size_of(term) != 0:
            flat.append(term)
    if not flat:
        return Var(0, frozen="an empty dimension")
    return flat[0] if len(flat) == 1 else Cat(tuple(flat))


def resolve(term: Term) -> Term:
    """The term in normal form, with every binding followed."""
    if isinstance(term, Var):
        if term.bound is None:
            return term
        term.bound = resolve(term.bound)
        return term.bound
    return product(term.factors) if isinstance(term, Prod) else concat(term.segments)


def leaves(term: Term) -> Iterator[Var]:
    """Every unbound variable of the term, in order, repeated where it stands twice."""
    term = resolve(term)
    if isinstance(term, Var):
        yield term
    else:
        for part in term.factors if isinstance(term, Prod) else term.segments:
            yield from leaves(part)


def is_live(term: Term) -> bool:
    """Whether some unit of the term could still be cut."""
    return any(leaf.frozen is None and leaf.size > 1 for leaf in leaves(term))


def freeze(term: Term, reason: str) -> None:
    """Forbid cuts of every variable in the term; the first reason stays."""
    for leaf in leaves(term):
        leaf.frozen = leaf.frozen or reason


def add_role(term: Term, role: str) -> None:
    """Note on every variable of the term what it is used as."""
    for leaf in leaves(term):
        leaf.roles.add(role)


def _bind(var: Var, term: Term, reason: str) -> None:
    if any(leaf is var for leaf in leaves(term)):
        freeze(term, reason)
        return
    if var.frozen is not None:
        freeze(term, var.frozen)
    for leaf in leaves(term):
        leaf.roles |= var.roles
    if isinstance(term, Var):
        term.tile = term.tile or var.tile
    var.bound = term


def unify(a: Term, b: Term, reason: str) -> None:
    """State that two dimensions are the same; freeze both with `reason` where no cut could keep them so."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if size_of(a) != size_of(b):
        freeze(a, reason)
        freeze(b, reason)
    elif isinstance(a, Var):
        _bind(a, b, reason)
    elif isinstance(b, Var):
        _bind(b, a, reason)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        align(a.factors, b.factors, reason)
    elif isinstance(a, Cat) and isinstance(b, Cat):
        _align_segments(a, b, reason)
    else:
        grouped, parts = (a, b) if isinstance(a, Prod) else (b, a)
        _unify_product_with_concat(grouped, parts, reason)


def _unify_product_with_concat(a: Term, b: Term, reason: str) -> None:
    """``[k, n]`` flattened is k segments of n: the same cut in each segment, none of the k."""
    if isinstance(a, Prod) and isinstance(b, Cat):
        first, rest = a.factors[0], product(a.factors[1:])
        if len(b.segments) == size_of(first) and all(size_of(s) == size_of(rest) for s in b.segments):
            freeze(first, reason)
            for segment in b.segments:
                unify(rest, segment, reason)
            return
    freeze(a, reason)
    freeze(b, reason)


def align(left: Sequence[Term], right: Sequence[Term], reason: str) -> None:
    """State that two row-major products are the same, splitting factors where the boundaries ask for it."""
    a = [f for t in left if size_of(f := resolve(t)) != 1]
    b = [f for t in right if size_of(f := resolve(t)) != 1]
    while a and b:
        x, y = resolve(a.pop(0)), resolve(b.pop(0))
        if isinstance(x, Prod):
            a[:0] = x.factors
            b.insert(0, y)
            continue
        if isinstance(y, Prod):
            b[:0] = y.factors
            a.insert(0, x)
            continue
        if size_of(x) == size_of(y):
            unify(x, y, reason)
            continue
        larger, rest, smaller = (x, a, y) if size_of(x) > size_of(y) else (y, b, x)
        other = b if rest is a else a
        parts = split(larger, size_of(smaller), reason)
        if parts is None:
            a.append(x)
            b.append(y)
            break
        rest[:0] = parts
        other.insert(0, smaller)
    for term in (*a, *b):
        freeze(term, reason)


def split(term: Term, outer: int, reason: str) -> tuple[Term, Term] | None:
    """Split a dimension into [outer, size // outer]; None where that is impossible."""
    term = resolve(term)
    if outer == 0 or size_of(term) % outer:
        return None
    inner = size_of(term) // outer
    if isinstance(term, Var):
        parts = Var(outer, tile=term.tile), Var(inner, tile=term.tile)
        _bind(term, Prod(parts), reason)
        return parts
    if isinstance(term, Cat):
        if any(size_of(segment) % inner for segment in term.segments):
            return None
        outers: list[Term] = []
        inner_var = Var(inner)
        for segment in term.segments:
            head, tail = Var(size_of(segment) // inner), Var(inner)
            unify(product([head, tail]) if head.size > 1 else tail, segment, reason)
            unify(tail, inner_var, reason)
            if head.size == 1:
                head.frozen = reason
            outers.append(head)
        return concat(outers), inner_var
    return None


def _cut_at(term: Term, position: int) -> tuple[Term, Term] | None:
    """Split a dimension into two segments at `position`."""
    term = resolve(term)
    if isinstance(term, Var):
        parts = Var(position, tile=term.tile), Var(term.size - position, tile=term.tile)
        _bind(term, Cat(parts), "cut in two")
        return parts
    if isinstance(term, Prod):
        inner = prod(size_of(f) for f in term.factors[1:])
        if position % inner or not isinstance(term.factors[0], Var):
            return None
        parts_of_first = _cut_at(term.factors[0], position // inner)
        if parts_of_first is None:
            return None
        first, second = (product([part, *term.factors[1:]]) for part in parts_of_first)
        return first, second
    before: list[Term] = []
    rest = list(term.segments)
    while rest and position >= size_of(rest[0]):
        position -= size_of(rest[0])
        before.append(rest.pop(0))
    if position:
        parts_of_segment = _cut_at(rest[0], position)
        if parts_of_segment is None:
            return None
        before.append(parts_of_segment[0])
        rest[0] = parts_of_segment[1]
    return concat(before), concat(rest)


def _align_segments(a: Cat, b: Cat, reason: str) -> None:
    left, right = list(a.segments), list(b.segments)
    while left and right:
        x, y = resolve(left.pop(0)), resolve(right.pop(0))
        for term, queue in ((x, left), (y, right)):
            if isinstance(term, Cat):
                queue[:0] = term.segments
        if isinstance(x, Cat) or isinstance(y, Cat):
            if not isinstance(x, Cat):
                left.insert(0, x)
            if not isinstance(y, Cat):
                right.insert(0, y)
            continue
        if size_of(x) == size_of(y):
            unify(x, y, reason)
            continue
        larger, rest, smaller, other = (x, left, y, right) if size_of(x) > size_of(y) else (y, right, x, left)
        parts = _cut_at(larger, size_of(smaller))
        if parts is None:
            for term in (x, y, *left, *right):
                freeze(term, reason)
            return
        rest[:0] = parts
        other.insert(0, smaller)


def narrow(term: Term, start: int, stop: int, reason: str) -> Term:
    """Units `start` to `stop` of a dimension, as ``slice`` and ``split`` select them."""
    term = resolve(term)
    total = size_of(term)
    if (start, stop) == (0, total):
        return term
    if stop <= start:
        return Var(0, frozen=reason)
    if not is_live(term):
        frozen = next(iter(leaves(term))).frozen or reason
        return Var(stop - start, frozen=frozen)
    for position, keep in ((stop, 0), (start, 1)):
        if 0 < position < size_of(term):
            parts = _cut_at(term, position)
            if parts is None:
                freeze(term, reason)
                return Var(stop - start, frozen=reason)
            term = parts[keep]
    return resolve(term)
