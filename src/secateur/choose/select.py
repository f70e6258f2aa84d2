"""Which axes a user means: kinds, and patterns of axis, module or parameter names."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil

from secateur.errors import SecateurError, nearest
from secateur.space import Axis, Space

ON_REQUEST = ("head_dim", "ssm_head_dim", "rank")
"""Kinds that go only when asked for: what queries and keys share has no reader whose weights could tell its worth, and
kernels want these sizes to be round."""


def matching(space: Space, modules: Collection[str], pattern: str, option: str) -> dict[str, bool]:
    """Axes that a pattern means -> whether it names the axis or its kind itself, and not just a module.

    Args:
        space: the Space.
        modules: names of all modules.
        pattern: a kind, or a pattern of shell style for names of axes, modules or parameters. A module means the axes
            of all its parameters and of the modules in it.
        option: where the pattern is from, for the error.

    Raises:
        SecateurError: for a pattern that matches nothing; says the nearest name.
    """
    within = tuple(f"{name}." for name in modules if name and fnmatchcase(name, pattern)) or ("\0",)
    found = {}
    for axis in space.axes:
        own = axis.kind == pattern or fnmatchcase(axis.name, pattern)
        held = (part.parameter for part in axis.slices)
        if own or any(name.startswith(within) or fnmatchcase(name, pattern) for name in held):
            found[axis.name] = own
    frozen = any(fnmatchcase(name, pattern) for name in (*modules, *space.parameters))
    if not found and not frozen:
        known = [*space.kinds(), *(a.name for a in space.axes), *filter(None, modules)]
        raise SecateurError(f"{option}: {pattern!r} matches no kind, axis or module{_near(pattern, known)}")
    return found


def _near(pattern: str, known: Sequence[str]) -> str:
    hint = nearest(pattern, known)
    return hint if hint.startswith("; did you mean") or len(known) < 12 else f"; such as {', '.join(known[:6])}"


def choose_axes(space: Space, modules: Collection[str], only: Sequence[str], ignore: Sequence[str]) -> list[Axis]:
    """The axes that may be cut.

    Args:
        space: the Space.
        modules: names of all modules.
        only: kinds and patterns of what may go; empty for everything but the kinds `ON_REQUEST`, which must be named
            by their kind or axis.
        ignore: kinds and patterns of what must stay whole.

    Raises:
        SecateurError: for a pattern that matches nothing, or where nothing is left.
    """
    both = set(only) & set(ignore)
    if both:
        raise SecateurError(f"{both.pop()!r} is in both only and ignore")
    wanted = {axis.name: False for axis in space.axes}
    if only:
        wanted = {}
        for pattern in only:
            for name, own in matching(space, modules, pattern, "only").items():
                wanted[name] = own or wanted.get(name, False)
    spared = {name for pattern in ignore for name in matching(space, modules, pattern, "ignore")}
    found = [
        axis
        for axis in space.axes
        if axis.name in wanted and axis.name not in spared and (wanted[axis.name] or axis.kind not in ON_REQUEST)
    ]
    if not found:
        what = f"only {list(only)}" if only else "the model"
        less = f" without {list(ignore)}" if ignore else ""
        asked = [k for k in ON_REQUEST if space.of_kind(k)]
        hint = f"; {', '.join(asked)} is cut only when named in only" if asked else "; `secateur inspect` says why"
        raise SecateurError(f"nothing can be cut: no axis is left of {what}{less}{hint}")
    return found


def least_units(
    space: Space,
    modules: Collection[str],
    axes: Sequence[Axis],
    keep_at_least: float,
    limits: Mapping[str, float],
) -> dict[str, int]:
    """How many units of each axis must stay.

    Args:
        space: the Space.
        modules: names of all modules.
        axes: those that may be cut.
        keep_at_least: share of every axis that must stay.
        limits: kind or pattern -> the largest share that may go; of several for one axis, the smallest.

    Raises:
        SecateurError: for shares outside 0..1, a pattern that matches nothing, or only axes that are not cut anyway.
    """
    if not 0 <= keep_at_least < 1:
        raise SecateurError(f"keep_at_least must be at least 0 and below 1, not {keep_at_least}")
    shares = {axis.name: keep_at_least for axis in axes}
    for pattern, most in limits.items():
        if not 0 <= most <= 1:
            raise SecateurError(f"limits: {pattern}={most} must be a share from 0 to 1 that may go")
        found = matching(space, modules, pattern, "limits")
        if not shares.keys() & found.keys():
            raise SecateurError(f"limits: {pattern!r} matches only what is not cut anyway (ignore, only or frozen)")
        for name in shares.keys() & found.keys():
            shares[name] = max(shares[name], 1 - most)
    return {a.name: max(1, a.minimum, ceil(shares[a.name] * a.size - 1e-9)) for a in axes}


def divisor_of(axis: Axis, round_to: int | Mapping[str, int] | None) -> int:
    """Of what the axis's size must be a multiple."""
    if round_to is None:
        return 1
    return round_to if isinstance(round_to, int) else round_to.get(axis.kind, 1)


def check_divisors(round_to: int | Mapping[str, int] | None, kinds: Iterable[str]) -> None:
    """Raise SecateurError for a divisor below 1 or a kind that is not cut."""
    known = sorted(set(kinds))
    for kind, step in ({} if round_to is None else {"": round_to} if isinstance(round_to, int) else round_to).items():
        if kind and kind not in known:
            raise SecateurError(f"round_to: no axis of kind {kind!r} is cut{nearest(kind, known)}")
        if step < 1:
            raise SecateurError(f"round_to{f' of {kind}' if kind else ''} must be at least 1, not {step}")
