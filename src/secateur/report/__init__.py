"""The report: one self-contained HTML file for a run, or for several side by side.

Made of what the run has left in its folder: report.json, plan.json, and sensitivity.json and bench.json where they
are. Needs ``pip install 'secateur[report]'``: jinja2, and matplotlib where there is something to draw.
"""

from collections.abc import Sequence
from pathlib import Path

from secateur.errors import SecateurError

PAGE = "report.html"


def page(folder: str | Path, *, shown: str | Path | None = None) -> str:
    """The page of a run, as HTML.

    The same folder gives the same bytes. Only sections that have data appear.

    Args:
        folder: what prune, distill, run or `secateur.save` wrote.
        shown: what the page calls the folder; by default as it is named.

    Returns:
        One document: no scripts, and nothing is loaded from anywhere.

    Raises:
        SecateurError: The folder is of no run, a file in it is damaged or of another format; jinja2 or matplotlib is
            missing.
    """
    from secateur.report.read import read
    from secateur.report.render import page_of

    return page_of(read(folder, shown=shown))


def write_report(folder: str | Path, out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Make the page of a run, and write it as a whole or not at all.

    Args:
        folder: as for `page`.
        out: the file; by default report.html in the folder, where an older page is replaced.
        overwrite: whether another page may be replaced. What is no page of ours never is.

    Returns:
        The file.

    Raises:
        SecateurError: as `page`; something is in the way, or the file cannot be written.
    """
    from secateur.report.render import put

    place = Path(folder).expanduser() / PAGE if out is None else Path(out).expanduser()
    put(page(folder), place, overwrite=overwrite or out is None)
    return place


def compare(folders: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> Path:
    """Put several runs in one page: sizes, quality, options and budgets side by side.

    Runs of other dense models, or measured on other data, are shown with a warning; nothing is marked best then.

    Args:
        folders: two or more, as for `page`.
        out: the file.
        overwrite: whether an older page may be replaced.

    Returns:
        The file.

    Raises:
        SecateurError: as `write_report`; there are fewer than two folders, or one is given twice.
    """
    from secateur.report.read import read
    from secateur.report.render import check_place, put
    from secateur.report.together import page_of

    place = Path(out).expanduser()
    check_place(place, overwrite=overwrite)
    known = [Path(folder).expanduser().resolve() for folder in folders]
    if len(known) < 2:
        raise SecateurError(f"compare takes two runs or more, not {len(known)}; for one there is secateur report")
    twice = next((folder for i, folder in enumerate(folders) if known[i] in known[:i]), None)
    if twice is not None:
        raise SecateurError(f"{twice} is given twice: give each run once")
    put(page_of([read(folder) for folder in folders]), place, overwrite=overwrite)
    return place


def add_page(folder: Path, shown: str | Path) -> str | None:
    """Write the page into the folder of a result that is being made, if it can be.

    A result may have taken hours: whatever goes wrong with its page is told, and the result is kept.

    Args:
        folder: where its files are now.
        shown: where they will be.

    Returns:
        Why there is no page, in one line; None where there is one.
    """
    try:
        (folder / PAGE).write_text(page(folder, shown=shown), encoding="utf-8", newline="\n")
    except (SecateurError, OSError) as error:
        why = str(error)
    except Exception as error:  # noqa: BLE001 - a fault of ours in a picture must not cost a result
        why = f"{type(error).__name__}: {error}; please report it"
    else:
        return None
    (folder / PAGE).unlink(missing_ok=True)
    return f"{PAGE} was not written ({why}); once that is mended: secateur report {shown}"
