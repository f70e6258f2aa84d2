"""``secateur report DIR``: make the HTML page of a run again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from secateur.cli.options import parse
from secateur.report import write_report


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Make the page of a run again, from what is in its folder: sensitivity.json and bench.json too, where they are."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What secateur prune, distill or run has written."""
    out: Path | None = None
    """The .html file; report.html in the folder by default, where an older page is replaced."""
    overwrite: bool = False
    """Replace an older page in --out."""


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "report", words)
    written = write_report(arguments.folder, arguments.out, overwrite=arguments.overwrite)
    Console(highlight=False, emoji=False, soft_wrap=True).print(f"report: {written}", markup=False)
