"""``secateur eval MODEL [--against DENSE]``: perplexity, KL to the dense model, top-1 agreement."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from secateur.cli.options import Common, Group, Reading, check_data, parse
from secateur.cli.tables import table
from secateur.errors import SecateurError
from secateur.load.model import load_model
from secateur.methods.verbs import batches_of, evaluate


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure a model, and what it lost against the dense one."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face language model."""
    data: str
    """.txt, .jsonl, .parquet, .npy token ids, a folder of them, or a hub id of a data set."""
    against: str | None = None
    """The dense model to compare with."""
    reading: Annotated[Reading, Group] = dataclasses.field(default_factory=Reading)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "eval", words)
    common, reading = arguments.common, arguments.reading
    if arguments.data == "self":
        raise SecateurError("--data self would measure a model on its own words: give held-out data")
    check_data(arguments.data)
    model, tokenizer, _ = load_model(arguments.model, device=common.device, dtype=common.dtype)
    dense = None
    if arguments.against is not None:
        dense, tokenizer, _ = load_model(arguments.against, device=common.device, dtype=common.dtype)
        small, large = (int(getattr(m.config, "vocab_size")) for m in (model, dense))  # noqa: B009 - typed as Module
        if small != large:
            raise SecateurError(
                f"{arguments.model} has {small} tokens in its vocabulary, {arguments.against} has {large}: "
                "they cannot be compared"
            )
    track = common.track()
    rows = batches_of(
        dense or model,
        arguments.data,
        tokenizer=tokenizer,
        seed=common.seed,
        track=track,
        **dataclasses.asdict(reading),
    )
    found = {"model": arguments.model, "data": arguments.data, "rows": sum(len(r) for r in rows)}
    found |= evaluate(model, rows, against=dense, track=track)

    def draw(console: Console) -> None:
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
