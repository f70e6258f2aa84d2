"""``secateur eval MODEL [--against DENSE]``: perplexity or accuracy, distance from the dense model."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from secateur.cli.models import Building, batches_from, check_sources, open_model
from secateur.cli.options import Common, Group, Reading, parse
from secateur.cli.tables import table
from secateur.errors import SecateurError
from secateur.load.batches import size_of
from secateur.load.functions import is_constructor
from secateur.methods.verbs import batches_of, evaluate


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure a model, and what it lost against the dense one."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face language model; a folder that was saved with a constructor; or
    module:callable that builds any model."""
    data: str
    """.txt, .jsonl, .parquet, .npy token ids, a folder of them, a hub id of a data set; or module:function that returns
    batches: (inputs, class numbers) for a classifier."""
    against: str | None = None
    """The dense model to compare with."""
    making: Annotated[Building, Group] = dataclasses.field(default_factory=Building)
    reading: Annotated[Reading, Group] = dataclasses.field(default_factory=Reading)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "eval", words)
    common, reading = arguments.common, arguments.reading
    if arguments.data == "self":
        raise SecateurError("--data self would measure a model on its own words: give held-out data")
    check_sources(arguments.model, data=arguments.data)
    built = [is_constructor(name) for name in (arguments.model, arguments.against or "")]
    if sum(built) > 1:
        raise SecateurError("MODEL and --against are both module:callable, and --weights can only be those of one")
    plain = Building()
    model, tokenizer, _ = open_model(
        arguments.model, plain if built[1] else arguments.making, device=common.device, dtype=common.dtype
    )
    dense = None
    if arguments.against is not None:
        making = arguments.making if built[1] else plain
        dense, tokenizer, _ = open_model(arguments.against, making, device=common.device, dtype=common.dtype)
        small, large = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (model, dense))
        if small != large:
            raise SecateurError(
                f"{arguments.model} has {small} tokens in its vocabulary, {arguments.against} has {large}: "
                "they cannot be compared"
            )
    track = common.track()
    rows = batches_of(
        dense or model,
        batches_from(arguments.data, "--data"),
        tokenizer=tokenizer,
        seed=common.seed,
        track=track,
        **dataclasses.asdict(reading),
    )
    found = {"model": arguments.model, "data": arguments.data, "rows": sum(map(size_of, rows))}
    found |= evaluate(model, rows, against=dense, track=track)

    def draw(console: Console) -> None:
        if "accuracy" in found:
            lines = [("accuracy", f"{100 * float(found['accuracy']):.2f}%"), ("loss", f"{found['loss']:.4f}")]
            if dense is not None:
                lines += [
                    ("accuracy of the dense model", f"{100 * float(found['dense_accuracy']):.2f}%"),
                    ("loss of the dense model", f"{found['dense_loss']:.4f}"),
                    ("top-1 agreement", f"{100 * float(found['top1']):.2f}%"),
                ]
            table(console, f"{arguments.model} on {arguments.data}, {found['rows']} samples", ("", "value"), lines)
            return
        lines = [("perplexity", f"{found['perplexity']:.3f}")]
        if dense is not None:
            lines = [
                ("perplexity of the dense model", f"{found['dense_perplexity']:.3f}"),
                *lines,
                ("KL to the dense model, nats per token", f"{found['kl']:.4f}"),
                ("top-1 agreement", f"{100 * float(found['top1']):.2f}%"),
            ]
        table(console, f"{arguments.model} on {arguments.data}, {found['rows']} rows", ("", "value"), lines)

    common.show(found, draw)
