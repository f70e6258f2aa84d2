"""``secateur profile MODEL --out table.json``: measure how long a model and its parts take, in many sizes."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

from secateur.cli.models import Making, inputs_of, open_model
from secateur.cli.options import Common, Group, parse
from secateur.cli.tables import share, table
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.measure.clock import Clock
from secateur.measure.latency import LatencyTable, Stopwatch, check_table_path, device_of

SEQ_LEN = 256


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure how long a model and each of its parts take, at full size and at smaller ones, and write a table of it.

    The times are those of this machine, device, number of threads, dtype and size of the inputs.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model; a folder that was saved with a constructor; or module:callable that
    builds any model. What is no Hugging Face model needs --input-shape or --inputs."""
    out: Path
    """The table, a .json file."""
    batch: int | None = None
    """Sequences of a language model in one forward pass; 1 by default."""
    seq_len: int | None = None
    """Tokens of each; 256, or what the model takes, by default."""
    levels: int = 8
    """Lengths of each axis to measure at, evenly spaced. Parts with several axes are measured at each with each, at
    most 64 together."""
    repeats: int = 15
    """Samples of each time."""
    threads: int | None = None
    """CPU threads; as torch has it by default."""
    cpu_time: bool = False
    """Count the time that this process has the processor, where others run beside it; with --threads 1."""
    existing: Path | None = None
    """A table of this device to add to: what it has is not measured again."""
    overwrite: bool = False
    """Replace --out, if it is a table."""
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "profile", words)
    check_table_path(arguments.out, overwrite=arguments.overwrite)
    for option in ("levels", "repeats", "batch", "seq_len", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise SecateurError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    known = LatencyTable.load(arguments.existing) if arguments.existing is not None else None
    common = arguments.common
    with limited_threads(arguments.threads, common.device):
        model, _, _ = open_model(arguments.model, arguments.making, device=common.device, dtype=common.dtype)
        timer = Stopwatch(device_of(model), "process" if arguments.cpu_time else "wall")
        traced = inputs_of(model, arguments.making, arguments.model)
        inputs = _inputs(model, traced, arguments)
        space = discover(model, traced)
        track = common.track()
        clock = Clock(model, space, inputs, known, traced=traced, repeats=arguments.repeats, timer=timer, track=track)
        clock.measure(clock.points(arguments.levels))
        values = _values(clock, arguments)
    clock.table.save(arguments.out, overwrite=arguments.overwrite)
    common.show(values, lambda console: _draw(console, values))


@contextmanager
def limited_threads(count: int | None, device: str) -> Iterator[None]:
    """Torch with so many threads, for a while."""
    if count is not None and not device.startswith("cpu"):
        raise SecateurError(f"--threads {count} goes with --device cpu, not {device}")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inputs(model: nn.Module, traced: Any, arguments: Arguments) -> Any:
    """What the model is timed with: the inputs that were given, or token ids."""
    asked = [f"--{n.replace('_', '-')}" for n in ("batch", "seq_len") if getattr(arguments, n) is not None]
    if traced is not None:
        if asked:
            raise SecateurError(f"{asked[0]} does not go with --input-shape or --inputs: their shapes say it")
        return traced
    config: Any = getattr(model, "config", None)
    tokens = getattr(model, "main_input_name", None) == "input_ids" and hasattr(config, "vocab_size")
    if not tokens or getattr(config, "is_encoder_decoder", False):
        if asked:
            raise SecateurError(
                f"{asked[0]} is for language models, and {type(model).__name__} takes more than token ids: give "
                "--inputs module:function"
            )
        return None
    longest = getattr(config, "max_position_embeddings", None) or SEQ_LEN
    length = arguments.seq_len or min(SEQ_LEN, longest)
    if length > longest:
        raise SecateurError(f"--seq-len {length} is longer than the {longest} positions that the model takes")
    drawn = torch.Generator().manual_seed(arguments.common.seed)
    ids = torch.randint(config.vocab_size, (arguments.batch or 1, length), generator=drawn)
    return {"input_ids": ids.to(device_of(model))}


def _values(clock: Clock, arguments: Arguments) -> dict[str, Any]:
    parts = []
    for signature, leaves in clock.kinds().items():
        first, count = leaves[0], len(leaves)
        kind, shape, *_ = signature.split(" | ")
        parts.append(
            {
                "part": kind.rpartition(".")[2],
                "shape": shape.partition(" ")[0].partition("=")[2].partition(":")[0],
                "first": first.module,
                "count": count,
                "axes": list(first.axes),
                "seconds": count * clock.leaf_seconds(first, clock.whole),
                "half": count * clock.leaf_seconds(first, clock.half) if first.axes else None,
            }
        )
    found = clock.table
    rest = sum(clock.rest(name) for name in (None, *(block.name for block in clock.space.blocks)))
    return {
        "model": arguments.model,
        "class": type(clock.model).__name__,
        "out": arguments.out,
        "device": found.device,
        "dtype": found.dtype,
        "threads": found.threads,
        "torch_version": found.torch_version,
        "clock": found.clock,
        "dense": dataclasses.asdict(clock.dense),
        "parts": parts,
        "rest": rest,
        "entries": len(found.entries),
    }


def _draw(console: Console, values: dict[str, Any]) -> None:
    dense = values["dense"]
    threads = f", {values['threads']} thread{'s' if values['threads'] > 1 else ''}" if values["threads"] else ""
    console.print(f"{values['device']}{threads}, {values['dtype']}, torch {values['torch_version']}", markup=False)
    console.print(
        f"one forward pass of {values['class']}: {_ms(dense['median'])} ms, half of {dense['repeats']} samples between "
        f"{_ms(dense['low'])} and {_ms(dense['high'])} ms"
    )
    whole = dense["median"]
    rows = [
        (p["part"], p["shape"], str(p["count"]), _ms(p["seconds"]), share(p["seconds"], whole), _ms(p["half"]))
        for p in sorted(values["parts"], key=lambda p: -p["seconds"])
    ]
    rows.append(("all else", "", "", _ms(values["rest"]), share(values["rest"], whole), ""))
    columns = ("part", "weight", "count", "ms", "of the whole", "ms, axes halved")
    table(console, f"Where the time of {values['model']} goes", columns, rows)
    console.print(f"{values['entries']:,} times written to {values['out']}", soft_wrap=True)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.3f}"
