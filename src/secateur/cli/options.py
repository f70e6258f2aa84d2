"""Options that several verbs share, and the options of a method read off its signature."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import docstring_parser
import tyro
from rich.console import Console

from secateur import world
from secateur.errors import SecateurError
from secateur.load.data import check_source
from secateur.progress import Track, bars, quiet
from secateur.ship.checkpoint import json_values

_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
Group = tyro.conf.arg(name="")
"""Annotates a dataclass of options that stand beside the others."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a command that has kept something; the message says what."""


@dataclasses.dataclass(frozen=True)
class Common:
    """Where and how to compute, and how to show the result."""

    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:1..."""
    dtype: str | None = None
    """Type to compute in, such as float32; the checkpoint's own by default. The result keeps the checkpoint's."""
    seed: int = 0
    """Seed of everything that is drawn."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def track(self) -> Track:
        """Progress bars on standard error, when somebody is looking."""
        return bars if world.first() and Console(stderr=True).is_terminal else quiet

    def show(self, values: Mapping[str, Any], draw: Callable[[Console], None]) -> None:
        """Print the result: JSON, or what `draw` draws."""
        console = Console(highlight=False, emoji=False, markup=False)  # names of the user's may hold [brackets]
        if not console.is_terminal:
            console = Console(highlight=False, emoji=False, markup=False, width=120)
        if self.json:
            console.print_json(json.dumps(json_values(values), allow_nan=False))
        else:
            draw(console)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data becomes token rows."""

    samples: int | None = None
    """Rows to use: 1024 of given data by default, 128 when the model writes them itself."""
    seq_len: int | None = None
    """Tokens in a row: 2048 or what the model takes by default, 256 when the model writes them itself."""
    batch_size: int = 8
    """Rows in one forward pass."""
    text_field: str = "text"
    """The field of .jsonl and .parquet records that holds the text."""
    split: str = "train"
    """Split of a hub data set."""


def parse(kind: type[Any], verb: str, words: Sequence[str]) -> Any:
    """Read a verb's options into a dataclass; tyro prints what is wrong and exits with 2.

    Raises:
        SecateurError: for an option that is given twice, of which only the last would count.
    """
    flags = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise SecateurError(f"{flag} is given twice: put all of its values behind one {flag}")
    return tyro.cli(kind, prog=f"secateur {verb}", args=list(words), config=_CONFIG)


def method_options(method: Callable[..., Any], without: Iterable[str]) -> type[Any]:
    """A dataclass with the options of a method: its keyword arguments, documented by its docstring."""
    hints = typing.get_type_hints(method)
    documented = {p.arg_name: p.description for p in docstring_parser.parse(method.__doc__ or "").params}
    fields: list[Any] = []
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in without:
            text = " ".join((documented.get(name) or "").split())
            documented_kind: Any = Annotated.__class_getitem__((hints[name], tyro.conf.arg(help=text)))  # type: ignore[attr-defined]
            fields.append((name, documented_kind, dataclasses.field(default=parameter.default)))
    return dataclasses.make_dataclass("Options", fields, frozen=True)


def settings_options(kind: type[Any], without: Iterable[str] = ()) -> type[Any]:
    """A dataclass of settings without some of its fields, documented by its docstring."""
    hints = typing.get_type_hints(kind)
    documented = {p.arg_name: p.description for p in docstring_parser.parse(kind.__doc__ or "").params}
    fields: list[Any] = []
    for entry in dataclasses.fields(kind):
        if entry.name not in without:
            text = " ".join((documented.get(entry.name) or "").split())
            shown: Any = Annotated.__class_getitem__((hints[entry.name], tyro.conf.arg(help=text)))  # type: ignore[attr-defined]
            fields.append((entry.name, shown, dataclasses.field(default=entry.default)))
    return dataclasses.make_dataclass(kind.__name__, fields, frozen=True)


def check_data(*sources: str | None) -> None:
    """Say at once, before a model is loaded, that a file of data is not there."""
    for source in sources:
        if source is not None and source != "self":
            check_source(source)
