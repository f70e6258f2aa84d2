"""The one error type for mistakes that the user can fix."""

import difflib
from collections.abc import Iterable

_SHOWN = 24


class SecateurError(ValueError):
    """Something in the input is wrong; the message names the thing, the value and the fix.

    The command line prints the message in one line and exits with 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or the known names (some of them)."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names[:_SHOWN])}{more}"
