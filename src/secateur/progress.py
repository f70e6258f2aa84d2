"""How long work tells that it is under way: the caller hands in a `Track`, the rooms call it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps the items of a loop: ``for x in track(items, "what is being done")``."""

    def __call__(self, items: Sequence[T], what: str) -> Iterable[T]:
        """Yield every item in order."""
        ...


def quiet(items: Sequence[T], what: str) -> Iterable[T]:
    """Show nothing: the default of every library call."""
    del what
    return items


def bars(items: Sequence[T], what: str) -> Iterator[T]:
    """Show a rich progress bar on standard error, which vanishes when it is done."""
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=what, console=Console(stderr=True), transient=True)
