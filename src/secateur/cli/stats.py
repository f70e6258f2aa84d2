"""``secateur stats MODEL``: the zeros of the weights, weight by weight, and what they could save."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from secateur.choose.mask import NM
from secateur.cli.models import Making, inputs_of, open_model
from secateur.cli.options import Common, Group, parse
from secateur.cli.tables import bytes_text, share, table
from secateur.errors import SecateurError
from secateur.measure.sparsity import Statistics, Totals, WeightStatistics, statistics

ROWS = 60
"""Weights that the table shows; --json lists all."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Show how many zeros the weights hold, in which patterns, and what they could save."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model; a folder that was saved with a constructor; or module:callable that
    builds any model. What is no Hugging Face model needs --input-shape or --inputs for MACs."""
    only: tuple[str, ...] = ()
    """Names of weights or modules, or patterns, of the weights to list; all that can be masked by default."""
    ignore: tuple[str, ...] = ()
    """The same, of weights to leave out."""
    pattern: tuple[str, ...] = ("2:4",)
    """N:M patterns to look for: at most N non-zeros in every M inputs in a row."""
    gzip: bool = False
    """Compress the bytes of all parameters, to measure what is left."""
    device: str = "cpu"
    """Device to count on: cpu, cuda, cuda:1..."""
    json: bool = False
    """Print one JSON object and nothing else."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "stats", words)
    patterns = [_pattern(text) for text in arguments.pattern]
    making = arguments.making
    model, _, _ = open_model(arguments.model, making, device=arguments.device)
    given = making.inputs is not None or making.input_shape
    found = statistics(
        model,
        inputs=inputs_of(model, making, arguments.model) if given else None,
        only=arguments.only,
        ignore=arguments.ignore,
        patterns=patterns,
        gzip=arguments.gzip,
    )
    values: dict[str, Any] = {"model": arguments.model, "class": type(model).__name__, **found.to_json()}
    Common(json=arguments.json).show(values, lambda console: _draw(console, found, arguments))


def _pattern(text: str) -> NM:
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise SecateurError(f"--pattern {text!r} is no N:M pattern, such as 2:4")
    return int(n), int(m)


def _draw(console: Console, found: Statistics, arguments: Arguments) -> None:
    whole, every = found.maskable, found.parameters
    what = "listed weights" if arguments.only or arguments.ignore else "maskable weights"
    console.print(
        f"{whole.zeros:,} of {whole.elements:,} elements of the {what} are zero; "
        f"{every.zeros:,} of all {every.elements:,} parameters"
    )
    names = list(found.weights[0].patterns)
    macs = found.no_macs is None
    rows = [_row(w.name, "x".join(map(str, w.shape)), w, _shares(w), macs) for w in found.weights[:ROWS]]
    if len(found.weights) > ROWS:
        more = f"... and {len(found.weights) - ROWS:,} more: --json lists all"
        rows.append((more, *[""] * (len(rows[0]) - 1)))
    blank = [""] * len(names)
    rows += [_row(what, "", whole, blank, macs), _row("all parameters", "", every, blank, macs)]
    columns = ("weight", "shape", "zeros", *names, *(("MACs", "x zero") if macs else ()), "bytes", "as bitmask")
    table(console, f"Zeros in {arguments.model}", columns, rows)
    if found.gzip is not None:
        sizes = f"{share(found.gzip, every.bytes)} of {bytes_text(every.bytes)}"
        console.print(f"all parameters, zlib level 6: {bytes_text(found.gzip)}, {sizes}")
    for reason, count in Counter(found.left.values()).items():
        console.print(f"not listed: {count} tensor{'s' if count > 1 else ''}: {reason}", markup=False)
    if found.no_macs is not None:
        asked = "give example inputs, --input-shape 1,3,32,32 or --inputs module:function"
        console.print(f"no MACs ({found.no_macs}): {asked}", markup=False)
    console.print(
        "Zeros make files smaller once they are compressed, and nothing faster; 2:4 is faster on NVIDIA Ampere or "
        "newer, with kernels for it."
    )


def _row(
    name: str, shape: str, found: WeightStatistics | Totals, shares: Sequence[str], with_macs: bool
) -> tuple[str, ...]:
    macs: tuple[str, ...] = ()
    if with_macs:
        total, skipped = found.macs, found.macs_skipped
        macs = ("-", "-") if total is None or skipped is None else (_count(total), share(skipped, total))
    sizes = (bytes_text(found.bytes), bytes_text(found.bytes_bitmask))
    return (name, shape, share(found.zeros, found.elements), *shares, *macs, *sizes)


def _shares(weight: WeightStatistics) -> list[str]:
    return ["-" if p is None else "all" if p.all else f"{100 * p.share:.1f}%" for p in weight.patterns.values()]


def _count(count: float) -> str:
    """A count with a decimal unit."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:,.4g}{unit}"
        count /= 1000
    return f"{count:,.4g}T"
