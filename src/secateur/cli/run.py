"""``secateur run recipe.yaml``: the steps of a recipe, one after the other, and the result as one folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from secateur import recipe
from secateur.cli import tables
from secateur.cli.options import Common, Interrupted, parse
from secateur.cli.saving import tell_missing, tell_page
from secateur.report import PAGE


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run a recipe: check all of it, then do its steps in order and save the last model with a report."""

    recipe: Annotated[Path, tyro.conf.Positional]
    """YAML file with model, out and steps."""
    set: tuple[str, ...] = ()
    """Values in place of the recipe's, read as YAML: out=out/other steps.1.tolerance=0.1 (steps count from 1)."""
    overwrite: bool = False
    """Replace an existing result."""
    fresh: bool = False
    """Do all steps, also those that a run before has done and kept in OUT.steps."""
    dry_run: bool = False
    """Show the steps with estimated sizes, memory and time, and do nothing."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "run", words)
    common = Common(json=arguments.json)
    overwrite = arguments.overwrite or arguments.dry_run  # what writes nothing has nothing in its way
    chosen = recipe.load(arguments.recipe, arguments.set, overwrite=overwrite, fresh=arguments.fresh)
    if arguments.dry_run:
        found = recipe.estimate(chosen, track=common.track())
        common.show(found, lambda console: _dry(console, found))
        return

    def show(entry: Mapping[str, Any]) -> None:
        common.show(entry, lambda console: _draw(console, entry))

    def note(text: str) -> None:
        common.show({}, lambda console: console.print(text, soft_wrap=True))

    # Each table as soon as there is one: later steps may take hours, or fail.
    told: dict[str, Any] = {} if arguments.json else {"on_step": show, "on_note": note}
    told["command"] = ["secateur", "run", *words]
    try:
        done = chosen.run(track=common.track(), **told)
    except KeyboardInterrupt:
        raise Interrupted(f"finished steps are in {chosen.head.out}.steps: run it again, and it goes on") from None
    if done.new or arguments.json:
        values = {"out": str(chosen.head.out), **done.report}
        common.show(values, lambda console: _end(console, chosen.head.out, done.report))
        if arguments.json and not (chosen.head.out.expanduser() / PAGE).is_file():
            tell_missing(f"{PAGE} is not there: secateur report {chosen.head.out} says why")


def _draw(console: Console, entry: Mapping[str, Any]) -> None:
    """One step."""
    title = f"{_name(entry)}, {entry['seconds']:.1f} s"
    if entry["step"] == "iterative":
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
    rows += _training(entry.get("training", {})) + _written(entry)
    if "measured" in entry:
        rows += _measured(entry["measured"])
    before = {"evaluate": "dense", "quantize": "model"}.get(entry["step"], "before")
    tables.table(console, title, ("", before, "int8" if entry["step"] == "quantize" else "after"), rows)


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['number']}. {entry['step']}" + (f" (round {entry['round']})" if entry.get("round") else "")


def _in_steps(one: Mapping[str, Any], best: int) -> tuple[str, ...]:
    before, after = ("not finite" if one[key] is None else f"{one[key]:.4g}" for key in ("before", "after"))
    name = f"{one['step']}" + (" best" if one["step"] == best else "")
    return name, f"{100 * one['sparsity']:.2f}%", f"{one['params']:,}", f"{one['nonzero']:,}", before, after


def _training(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """How a training went."""
    if not found:
        return []
    rows = [("steps of training", "", f"{found['steps']:,}"), ("highest learning rate", "", f"{found['lr']:.3g}")]
    rows += [("tokens", "", f"{found['tokens']:,}")] if found.get("tokens") is not None else []
    before, after = found.get("before", {}), found.get("after", {})
    return rows + [
        (f"{name}, held out", _text(before.get(name)), _text(value))
        for name, value in after.items()
        if isinstance(value, int | float)
    ]


def _written(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The files of a step, and how good a quantised one is."""
    rows = [(name, "", tables.bytes_text(size)) for name, size in entry.get("files", {}).items()]
    if "bytes" in entry:
        both = entry["bytes"]
        rows = [("size", tables.bytes_text(both["exported"]), tables.bytes_text(both["quantized"]))]
    for name, value in entry.get("quality", {}).items():
        if isinstance(value, Mapping):
            rows.append((f"{name}, held out", _text(value["model"]), _text(value["int8"])))
    return rows


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


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


def _dry(console: Console, found: Mapping[str, Any]) -> None:
    """What is estimated."""
    rows = [
        (
            _name(entry) + (", done already" if entry["done"] else ""),
            *(f"{entry[key]:,}" for key in ("params", "nonzero", "samples", "tokens")),
            tables.bytes_text(entry["memory"]),
            f"{entry['seconds']:.1f} s",
        )
        for entry in found["steps"]
    ]
    columns = ("step", "parameters", "not zero", "samples", "tokens", "memory", "time")
    tables.table(console, f"{found['model']}: {found['params']:,} parameters", columns, rows)
    left = f"about {found['seconds']:.0f} s and {tables.bytes_text(found['memory'])} for what is not done already"
    timed = found["forward"]
    size = f"{timed['tokens']:,} tokens" if timed["tokens"] else f"{timed['samples']:,} samples"
    console.print(f"{left}; a forward pass of {size} took {timed['seconds']:.3g} s here", soft_wrap=True)
    console.print(found["note"], soft_wrap=True)


def _end(console: Console, out: Path, report: Mapping[str, Any]) -> None:
    plan = " and plan.json" if report["plan"] == "saved" else ""
    console.print(f"saved in {out} (report.json{plan}), {report['seconds']['total']:.1f} s", soft_wrap=True)
    if not plan:
        console.print(f"the plan was {report['plan']}", soft_wrap=True)
    tell_page(console, out)
