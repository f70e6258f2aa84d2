"""Numbers as people read them: counts, bytes, times, changes. What JSON has no word for comes as text."""

import sys
from typing import Any

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
MISSING = "\N{EN DASH}"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_INFINITE = {"nan": "not a number", "inf": "infinite", "-inf": f"{MINUS}infinite"}


def number(value: Any) -> float | None:
    """A finite number as it stands in a report; None for anything else (reports have "inf" and "nan" as text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # JSON has whole numbers that no float holds


def shown(value: Any, digits: int = 4) -> str:
    """Any value in a few characters: whole numbers in full, others with so many digits."""
    if value is None or isinstance(value, bool):
        return {None: MISSING, True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return _number(value, digits)
    if isinstance(value, list | tuple):
        return ", ".join(shown(entry, digits) for entry in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(entry, digits)}" for key, entry in value.items()) or "none"
    return _INFINITE.get(str(value), str(value))


def _number(value: float, digits: int) -> str:
    if number(value) is None:
        return _INFINITE.get(str(value), MISSING)
    whole = isinstance(value, int) or (value.is_integer() and abs(value) >= 10**digits)
    return f"{value:,.0f}".replace("-", MINUS) if whole else _plain(value, digits)


def _plain(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    if "e" in text and abs(value) >= 1:
        text = f"{value:,.0f}"
    return text.replace("-", MINUS)


def score(value: Any) -> str:
    """A perplexity, a loss, a KL: two decimals above 1, three digits below."""
    found = number(value)
    if found is None:
        return shown(value)
    if 0 < abs(found) < 1e-4:
        return "<0.0001" if found > 0 else f">{MINUS}0.0001"
    return f"{found:,.2f}".replace("-", MINUS) if abs(found) >= 1 else _plain(found, 3)


def short(value: Any) -> str:
    """A count in four characters or so: 2.83M."""
    found = number(value)
    if found is None:
        return shown(value)
    for unit, one in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):  # B: billions, as everybody writes them
        if abs(found) >= one:
            return f"{found / one:.3g}{unit}"
    return shown(value)


def size(value: Any) -> str:
    """Bytes with a binary unit."""
    found = number(value)
    if found is None:
        return shown(value)
    for unit in _UNITS:
        if abs(found) < 1024 or unit == _UNITS[-1]:
            break
        found /= 1024
    return f"{found:,.0f} {unit}" if unit == "B" or found >= 100 else f"{found:,.2f} {unit}"


def seconds(value: Any) -> str:
    """A time with the unit that suits it."""
    found = number(value)
    if found is None:
        return shown(value)
    if found >= 120:
        return f"{found / 60:,.1f} min" if found < 7200 else f"{found / 3600:,.1f} h"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("\N{MICRO SIGN}s", 1e6)):
        if found * factor >= 1 or (unit != "s" and found * factor >= 0.1):
            break
    return f"{found * factor:.3g} {unit}" if found else "0 s"


def percent(value: Any, digits: int = 1) -> str:
    """A share as per cent."""
    found = number(value)
    return shown(value) if found is None else f"{100 * found:.{digits}f}%".replace("-", MINUS)


def change(dense: Any, now: Any) -> str:
    """By how much something grew or shrank, in per cent of what it was; empty where that says nothing."""
    before, after = number(dense), number(now)
    if before is None or after is None or before == 0:
        return ""
    share = after / before - 1
    if abs(share) < 5e-4:
        return "same"
    return f"{'+' if share > 0 else MINUS}{100 * abs(share):,.1f}%"


def points(dense: Any, now: Any) -> str:
    """By how many points of a hundred a share moved."""
    before, after = number(dense), number(now)
    if before is None or after is None:
        return ""
    moved = 100 * (after - before)
    return "same" if abs(moved) < 0.05 else f"{'+' if moved > 0 else MINUS}{abs(moved):.1f} points"
