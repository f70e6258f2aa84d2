"""The one error type for mistakes that the user can fix."""

import difflib
from collections.abc import Iterable


class SecateurError(ValueError):
    """Something in the input is wrong; the message names the thing, the value and the fix.

    The command line prints the message in one line and exits with 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or the list of known names."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
