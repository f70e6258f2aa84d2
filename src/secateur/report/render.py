"""From what a run left to one HTML file: nothing is loaded from anywhere, and nothing in it runs."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.report import charts, facts, grids, notes, steps
from secateur.report.read import Run

HERE = Path(__file__).parent
GENERATOR = '<meta name="generator" content="secateur'
"""By which a page of ours is known."""
_HEAD = 4096  # bytes in which that must stand


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template of this folder; everything that goes in is escaped.

    Raises:
        SecateurError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise SecateurError(
            f"the report is made with jinja2, which is missing: pip install 'secateur[report]' ({error})"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(template).render(**content)
    return text.encode("utf-8", "replace").decode("utf-8")  # names of files that are no UTF-8 have halves of characters


def drawn(wanted: Sequence[charts.Chart]) -> list[charts.Chart]:
    """The same with their drawings; matplotlib is imported only where there is one."""
    return [replace(chart, svg=charts.svg(chart)) for chart in wanted]


def page_of(run: Run) -> str:
    """The page of one run."""
    return render(
        "page.html",
        {
            "title": f"{run.name}: a run of Secateur",
            "version": run.report.get("secateur", "of an unknown version"),
            "run": run,
            "headline": facts.headline(run),
            "about": facts.about(run),
            "rows": facts.rows(run),
            "speed": notes.speed(run),
            "caveats": notes.caveats(run),
            "warnings": notes.warnings(run),
            "steps": steps.steps(run),
            "cuts": grids.cuts(run),
            "zeros": grids.zeros(run),
            "front": drawn(charts.front(run)),
            "sensitivity": grids.sensitivity(run),
            "sensitivity_of": grids.sensitivity_note(run),
            "trainings": steps.trainings(run),
            "curves": drawn(charts.curves(run)),
            "latency": steps.latency(run),
            "bench_sizes": steps.bench_sizes(run),
            "bench_columns": steps.BENCH_COLUMNS,
            "bench_notes": steps.bench_notes(run),
            "bench_setting": steps.bench_setting(run),
            "options": facts.options(run),
            "versions": facts.versions(run),
            "command": facts.command(run),
        },
    )


def put(text: str, out: Path, *, overwrite: bool) -> None:
    """Write a page, whole or not at all.

    Args:
        text: the page.
        out: the file.
        overwrite: whether an older page may be replaced; anything else never is.

    Raises:
        SecateurError: Something is in the way, or it cannot be written.
    """
    check_place(out, overwrite=overwrite)
    try:
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.partial-")
        partial = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
            partial.chmod(0o666 & ~_umask())
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None else str(error)
        raise SecateurError(f"{out}: the page cannot be written ({reason})") from error


def check_place(out: Path, *, overwrite: bool) -> None:
    """Raise SecateurError where a page may not be written to `out`."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise SecateurError(f"{out}: a page is an .html file; give a name that ends so")
    if out.is_dir():
        raise SecateurError(f"{out}: is a folder; give the name of an .html file")
    if not out.parent.is_dir():
        raise SecateurError(f"{out}: there is no folder {out.parent}")
    if not out.exists():
        return
    with out.open("rb") as file:
        ours = GENERATOR.encode() in file.read(_HEAD)
    if not ours:
        raise SecateurError(f"{out}: exists, and is no page of secateur; it is not overwritten: give another name")
    if not overwrite:
        raise SecateurError(
            f"{out}: exists already; choose another name, or overwrite it (overwrite=True, --overwrite)"
        )


def _umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
