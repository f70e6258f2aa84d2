"""A result with its page: one folder, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from secateur.load.model import Source
from secateur.recipe.folders import as_user_error, save_into
from secateur.report import PAGE, add_page
from secateur.ship.checkpoint import check_out, whole_folder


def save_with_page(
    model: nn.Module, out: Path, *, report: Mapping[str, Any], source: Source | None, overwrite: bool, **saved: Any
) -> str | None:
    """Save a result with the page of its report.

    Args:
        model: as for `ship.save`.
        out: likewise.
        report: likewise.
        source: likewise.
        overwrite: likewise.
        saved: what else `ship.save` takes.

    Returns:
        Why there is no page, in one line; None where there is one.

    Raises:
        SecateurError: as `ship.save`.
    """
    target = check_out(out, overwrite=overwrite, source=source)
    with as_user_error(out, "nothing is left of the result"), whole_folder(target) as partial:
        save_into(partial, out, model, report=report, source=source, **saved)
        return add_page(partial, out)


def tell_page(console: Console, out: Path, without: str | None = None) -> None:
    """Say where the page is, or why there is none."""
    if without is None and (out.expanduser() / PAGE).is_file():
        console.print(f"report: {out / PAGE}", soft_wrap=True)
    elif without is not None:
        console.print(without, soft_wrap=True)


def tell_missing(without: str | None) -> None:
    """The same beside JSON, which takes standard output for itself: only that there is none."""
    if without is not None:
        Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(without, markup=False)
