"""``secateur compare DIR1 DIR2... --out FILE.html``: several runs in one page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from secateur.cli.options import parse
from secateur.report import compare


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Put several runs in one page: sizes, quality, options and budgets side by side."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Two or more of what secateur prune, distill or run has written."""
    out: Path
    """The .html file to write."""
    overwrite: bool = False
    """Replace an older page in --out."""


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "compare", words)
    written = compare(arguments.folders, arguments.out, overwrite=arguments.overwrite)
    Console(highlight=False, emoji=False, soft_wrap=True).print(f"report: {written}", markup=False)
