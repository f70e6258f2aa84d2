"""``secateur run recipe.yaml``: the steps of a recipe, one after the other, and the result as one folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from secateur import recipe
from secateur.cli import tables
from secateur.cli.options import Common, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run a recipe: check all of it, then do its steps in order and save the last model with a report."""

    recipe: Annotated[Path, tyro.conf.Positional]
    """YAML file with model, out and steps."""
    set: tuple[str, ...] = ()
    """Values in place of the recipe's, read as YAML: out=out/other steps.1.tolerance=0.1 (steps count from 1)."""
    overwrite: bool = False
    """Replace an existing result."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "run", words)
    common = Common(json=arguments.json)
    chosen = recipe.load(arguments.recipe, arguments.set, overwrite=arguments.overwrite)
    numbers = iter(range(1, len(chosen.steps) + 1))

    def show(entry: Mapping[str, Any]) -> None:
        number = next(numbers)
        common.show(entry, lambda console: _draw(console, number, entry))

    # Each table as soon as there is one: later steps may take hours, or fail.
    done = chosen.run(track=common.track(), on_step=None if arguments.json else show)
    common.show(
        {"out": str(chosen.head.out), **done.report}, lambda console: _end(console, chosen.head.out, done.report)
    )


def _draw(console: Console, number: int, entry: Mapping[str, Any]) -> None:
    """One step."""
    title = f"{number}. {entry['step']}, {entry['seconds']:.1f} s"
    if "history" in entry:
        title += f": {entry['metric']} of the dense model {entry['dense']:.4g}"
        columns = ("step", "gone", "parameters", "not zero", "before training", "after")
        tables.table(console, title, columns, [_in_steps(one, entry["best"]) for one in entry["history"]])
        console.print(f"{entry['method']} to {entry['budget']}; {entry['stopped']}", soft_wrap=True)
        return
    rows = [(name, "", f"{entry['size'][key]:,}") for key, name in (("params", "parameters"), ("nonzero", "not zero"))]
    for name, cost in entry.get("costs", {}).items():
        if name in ("params", "nonzero", "macs"):
            label = {"params": "parameters", "nonzero": "not zero", "macs": "multiply-accumulates"}[name]
            rows = [row for row in rows if row[0] != label]
            rows.append((label, f"{cost['dense']:,}", f"{cost['pruned']:,}"))
    if "batch_norms_adapted" in entry:
        rows = [("batch norms adapted", "", str(entry["batch_norms_adapted"])), ("samples", "", str(entry["samples"]))]
    if "measured" in entry:
        rows += _measured(entry["measured"])
    tables.table(console, title, ("", "dense" if entry["step"] == "evaluate" else "before", "after"), rows)


def _in_steps(one: Mapping[str, Any], best: int) -> tuple[str, ...]:
    before, after = ("not finite" if one[key] is None else f"{one[key]:.4g}" for key in ("before", "after"))
    name = f"{one['step']}" + (" best" if one["step"] == best else "")
    return name, f"{100 * one['sparsity']:.2f}%", f"{one['params']:,}", f"{one['nonzero']:,}", before, after


def _measured(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Quality of two models, whichever measures there are."""
    rows = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            rows.append((f"{name}, held out", f"{value['dense']:.4g}", f"{value['pruned']:.4g}"))
        elif name == "top1":
            rows.append(("top-1 agreement", "", f"{100 * value:.1f}%"))
        elif name == "kl":
            rows.append(("KL, nats per token", "", f"{value:.4g}"))
        elif name in ("samples", "tokens"):
            rows.append((f"{name} measured on", "", f"{value:,}"))
    return rows


def _end(console: Console, out: Path, report: Mapping[str, Any]) -> None:
    plan = " and plan.json" if report["plan"] == "saved" else ""
    console.print(f"saved in {out} (report.json{plan}), {report['seconds']['total']:.1f} s", soft_wrap=True)
    if not plan:
        console.print(f"the plan was {report['plan']}", soft_wrap=True)
