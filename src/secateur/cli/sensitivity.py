"""``secateur sensitivity MODEL --data D --out FILE.json``: measure what each single cut costs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from secateur.cli.models import Making, batches_from, check_sources, inputs_of, open_model
from secateur.cli.options import Common, Group, Interrupted, Reading, parse
from secateur.cli.tables import table
from secateur.methods.scan import RATIOS, SAMPLES, WHAT, What, sensitivity
from secateur.methods.scan_plot import check_plot, draw
from secateur.methods.scan_result import Sensitivity, check_path, check_ratios

_ROWS = 12
"""Lines of each table."""


@dataclasses.dataclass(frozen=True)
class Rows(Reading):
    """How data becomes token rows."""

    samples: int | None = SAMPLES
    """Rows (of batches, samples) to measure on."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure what cutting every axis and every weight, and dropping every block, costs: one at a time, unrepaired.

    `secateur prune MODEL --method magnitude --budget sparsity=50% --allocation FILE` shares its zeros out by the file.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model, or module:callable that builds any model."""
    data: str
    """What to measure on: .txt, .jsonl, .parquet, .npy token ids, a folder of them, a hub id, self (written by the
    model), or module:function that returns batches."""
    out: Path
    """The file to write, .json. A run that was stopped goes on from what stands in FILE.partial."""
    ratios: tuple[float, ...] = RATIOS
    """Shares that go."""
    what: tuple[What, ...] = WHAT
    """What is cut: units of axes; elements of weights (what --allocation needs); layers, attentions and MLPs that are
    dropped."""
    only: tuple[str, ...] = ()
    """Kinds, and patterns of axis, weight, block or module names; everything by default but the axes head_dim,
    ssm_head_dim and rank."""
    ignore: tuple[str, ...] = ()
    """The same, of what is left out."""
    measure: Literal["kl", "loss", "accuracy", "mse"] | None = None
    """kl (to the dense model, nats for each prediction), loss (nats), accuracy (of classifiers), mse (of models that
    give no probabilities, over the variance of their outputs); kl by default, or mse. The file has the others too."""
    criterion: str | None = None
    """What ranks the units of an axis, as in `secateur prune --method structural`; activation by default, and
    magnitude_l2 for axes that no linear layer or convolution reads."""
    masks: Literal["magnitude", "wanda", "alps"] = "magnitude"
    """How a weight is thinned out: magnitude, wanda, or alps, which also mends what stays of it. Take the method that
    the allocation is for."""
    plot: Path | None = None
    """A heat map of blocks and parts at the middle ratio, .png or .svg."""
    overwrite: bool = False
    """Replace --out and --plot."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)
    reading: Annotated[Rows, Group] = dataclasses.field(default_factory=Rows)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "sensitivity", words)
    common = arguments.common
    target = check_path(arguments.out, overwrite=arguments.overwrite)
    if arguments.plot is not None:
        check_plot(arguments.plot, overwrite=arguments.overwrite)
    check_ratios(arguments.ratios)
    check_sources(arguments.model, data=arguments.data)
    model, tokenizer, _ = open_model(arguments.model, arguments.making, device=common.device, dtype=common.dtype)
    partial = target.with_name(f"{target.name}.partial")
    how = dataclasses.asdict(arguments.reading)
    try:
        found = sensitivity(
            model,
            batches_from(arguments.data, "--data"),
            ratios=arguments.ratios,
            measure=arguments.measure,
            what=arguments.what,
            only=arguments.only,
            ignore=arguments.ignore,
            criterion=arguments.criterion,
            masks=arguments.masks,
            inputs=inputs_of(model, arguments.making, arguments.model, needed=False),
            partial=partial,
            name=arguments.model,
            data_name=arguments.data,
            tokenizer=tokenizer,
            seed=common.seed,
            track=common.track(),
            **how,
        )
    except KeyboardInterrupt as stop:
        kept = _lines(partial)
        if not kept:
            raise
        text = f"{kept} measurements are kept in {partial}; the same command goes on from there"
        raise Interrupted(text) from stop
    found.save(target, overwrite=arguments.overwrite)
    if arguments.plot is not None:
        draw(found, arguments.plot, overwrite=arguments.overwrite)
    partial.unlink(missing_ok=True)
    values = {"out": str(arguments.out), **found.to_json()}
    common.show(values, lambda console: _draw(console, found, arguments))


def _lines(partial: Path) -> int:
    """Measurements in a file of them."""
    return max(0, len(partial.read_text(encoding="utf-8").splitlines()) - 1) if partial.exists() else 0


def _draw(console: Console, found: Sensitivity, arguments: Arguments) -> None:
    texts = [f"{ratio:g}" for ratio in found.ratios]
    heads = [f"{100 * ratio:g}% gone" for ratio in found.ratios]
    what = {"accuracy": "accuracy lost", "mse": "mse", "kl": "KL, nats", "loss": "loss increase, nats"}[found.measure]
    for kind in ("axes", "weights", "blocks"):
        worst = found.worst(kind)
        if not worst:
            continue
        columns = ["1"] if kind == "blocks" else texts
        rows = [(name, *(_number(losses.get(text)) for text in columns)) for name, losses in worst[:_ROWS]]
        more = f", the worst {_ROWS} of {len(worst)}" if len(worst) > _ROWS else ""
        title = f"What single {kind} of {found.model} cost ({what}){more}"
        table(console, title, (kind, *(["dropped"] if kind == "blocks" else heads)), rows)
    for name, why in found.left.items():
        console.print(f"left out: {name}: {why}", markup=False, soft_wrap=True)
    cost = found.cost
    chain = f" (what {cost['blocks']:.0f} blocks give is kept)" if cost["blocks"] else " (no chain of blocks to keep)"
    again = f", {cost['resumed']:.0f} of them by the run before" if cost["resumed"] else ""
    console.print(
        f"{cost['measurements']:.0f} measurements on {found.samples} samples{again}: {cost['passes']:.1f} passes of "
        f"the data instead of {cost['naive']:.0f}{chain}, {cost['seconds']:.1f} s",
        soft_wrap=True,
    )
    console.print(f"written to {arguments.out}" + (f" and {arguments.plot}" if arguments.plot else ""), soft_wrap=True)
    if found.losses and not arguments.only and not arguments.ignore:
        data = "" if found.masks == "magnitude" else f"--data {found.data} "
        console.print(
            f"now: secateur prune {found.model} --method {found.masks} --budget sparsity=50% {data}"
            f"--allocation {arguments.out} --out DIR",
            markup=False,
            soft_wrap=True,
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
