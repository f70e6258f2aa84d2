"""``secateur survey MODEL --data D --out DIR``: find out once what every cut would lose; then any budget is served."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from secateur import world
from secateur.cli import tables
from secateur.cli.models import Making, batches_from, check_sources, inputs_of, open_model
from secateur.cli.options import Common, Group, Reading, parse
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.load.shared import check_alike, check_enough
from secateur.methods.searching import may_go
from secateur.methods.survey import Survey
from secateur.methods.surveying import survey
from secateur.methods.verbs import batches_of
from secateur.ship.checkpoint import check_out, whole_folder
from secateur.space import Axis

SHARES = (0.75, 0.5, 0.25)
"""Of the units of all axes of a kind, for the table."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Find out in which order the units of every axis go, and what weights meet, once for all budgets.

    `secateur prune MODEL --method obs --survey DIR --budget ...` then needs no data: plan and repair come out of DIR.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model, or module:callable that builds any model."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    data: str
    """Calibration data: .txt, .jsonl, .parquet, .npy token ids, a folder of them, a hub id, self (written by
    the model), or module:function that returns batches."""
    only: tuple[str, ...] = ()
    """Kinds and patterns of axes to survey; everything by default but hidden, head_dim, ssm_head_dim and rank."""
    ignore: tuple[str, ...] = ()
    """Kinds, and patterns of axis or module names, to leave out."""
    damping: float = 1e-3
    """Share of the mean of the diagonal of X'X that is added to it."""
    gradients: bool = True
    """Weigh errors by what the model loses, by backward passes; else all outputs of all layers count alike."""
    overwrite: bool = False
    """Replace an existing survey in --out."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)
    reading: Annotated[Reading, Group] = dataclasses.field(default_factory=Reading)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "survey", words)
    common = arguments.common
    target = check_out(arguments.out, overwrite=arguments.overwrite)
    check_sources(arguments.model, data=arguments.data)
    model, tokenizer, source = open_model(arguments.model, arguments.making, device=common.device, dtype=common.dtype)
    check_out(arguments.out, overwrite=arguments.overwrite, source=source)
    inputs = inputs_of(model, arguments.making, arguments.model)
    how = {"tokenizer": tokenizer, "seed": common.seed, **dataclasses.asdict(arguments.reading)}
    rows = batches_of(model, batches_from(arguments.data, "--data"), track=common.track(), **how)
    begin = time.perf_counter()
    space = discover(model, inputs)
    axes = may_go(space, [name for name, _ in model.named_modules()], arguments.only, arguments.ignore)
    with world.splitting():
        check_enough(rows)
        check_alike(rows)
        found = survey(
            model, space, axes, rows, inputs=inputs, damping=arguments.damping, gradients=arguments.gradients,
            seed=common.seed, name=arguments.model, track=common.track(),
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    world.from_first(lambda: _save(found, target, arguments.out))
    kinds = _kinds(found)
    values: dict[str, Any] = {"out": str(arguments.out), "kinds": kinds, "left": dict(found.left), "seconds": seconds}
    if found.thin:
        values["fewer_rows_than_columns"] = list(found.thin)
    common.show(values, lambda console: _draw(console, found, kinds, arguments))


def _save(found: Survey, target: Path, out: Path) -> None:
    try:
        with whole_folder(target) as folder:
            found.save(folder)
    except OSError as error:
        raise SecateurError(f"{out}: the survey cannot be written ({error})") from error


def _kinds(found: Survey) -> dict[str, dict[str, Any]]:
    """For each kind: axes, units, and the expected loss of cutting all of them to some shares."""
    by_kind: dict[str, list[Axis]] = defaultdict(list)
    for name in found.orders:
        axis = found.space.axis(name)
        by_kind[axis.kind].append(axis)
    return {
        kind: {
            "axes": len(axes),
            "units": sum(axis.size for axis in axes),
            "loss": {
                str(s): sum(found.axis_loss({a.name: max(1, round(s * a.per_group))}) for a in axes) for s in SHARES
            },
        }
        for kind, axes in by_kind.items()
    }


def _draw(console: Console, found: Survey, kinds: dict[str, dict[str, Any]], arguments: Arguments) -> None:
    heads = [f"{100 * share:.0f}% kept" for share in SHARES]
    rows = [
        (kind, str(told["axes"]), str(told["units"]), *(f"{loss:.4f}" for loss in told["loss"].values()))
        for kind, told in kinds.items()
    ]
    title = f"What cuts of {arguments.model} would lose (expected, repaired; KL in nats where it gives probabilities)"
    tables.table(console, title, ("kind", "axes", "units", *heads), rows)
    for name, why in found.left.items():
        console.print(f"left out: {name}: {why}", markup=False)
    if found.thin:
        console.print(
            f"{len(found.thin)} weights met fewer rows than they have columns, such as {found.thin[0]}: only the "
            "damping makes their repair unique; give more data",
            markup=False,
        )
    console.print(
        f"saved to {arguments.out}; now: secateur prune {arguments.model} --method obs --survey {arguments.out} "
        "--budget params=70% --out DIR",
        markup=False,
    )
