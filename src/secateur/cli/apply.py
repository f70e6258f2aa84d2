"""``secateur apply MODEL --plan DIR --out DIR``: make a saved decision again, on these weights."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from secateur.choose import Budget, Plan
from secateur.choose.rescore import MaskScores
from secateur.cli import tables
from secateur.cli.models import Making, inputs_of, open_model, stored_as
from secateur.cli.options import Common, Group, parse
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.functions import is_constructor
from secateur.load.model import fingerprint
from secateur.ship import save
from secateur.ship.checkpoint import check_out


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Apply a saved plan to a model: the dense one again, or one that was trained since."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model, or module:callable that builds any model."""
    plan: Path
    """Folder with plan.json and plan.safetensors: a result of secateur prune."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    budget: tuple[str, ...] = ()
    """Other masks than the plan's, by the scores beside it (prune --keep-scores): sparsity=40%, n:m=2:4."""
    overwrite: bool = False
    """Replace an existing result in --out."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments: Arguments = parse(Arguments, "apply", words)
    check_out(arguments.out, overwrite=arguments.overwrite)
    plan = Plan.load(arguments.plan)
    if arguments.budget:
        budget = Budget.parse(arguments.budget)
        plan = MaskScores.load(arguments.plan).plan(budget, {**plan.origin, "budget": str(budget)})
    common, making = arguments.common, arguments.making
    model, tokenizer, source = open_model(arguments.model, making, device=common.device, dtype=common.dtype)
    if source is None and not is_constructor(arguments.model):
        raise SecateurError(
            f"{arguments.model} was saved with a constructor: give that, and its weights with --weights"
        )
    check_out(arguments.out, overwrite=arguments.overwrite, source=source)
    pruned = apply(model, plan, inputs=inputs_of(model, making, arguments.model, needed=not plan.only_masks))
    stored_as(pruned, source)
    both = {"dense": model, "pruned": pruned}
    counts = {name: [(p.numel(), int(p.count_nonzero())) for p in m.parameters()] for name, m in both.items()}
    report: dict[str, Any] = {
        "secateur": importlib.metadata.version("secateur"),
        "method": f"apply (a plan by {plan.origin.get('method', 'hand')})",
        "model": {"name": arguments.model, "fingerprint": fingerprint(model)},
        "budget": plan.origin.get("budget", ""),
        "costs": {
            "params": {name: sum(n for n, _ in found) for name, found in counts.items()},
            "nonzero": {name: sum(n for _, n in found) for name, found in counts.items()},
        },
    }
    built: dict[str, Any] = {"constructor": arguments.model, "arguments": making.arguments} if source is None else {}
    save(
        pruned, arguments.out, plan=plan, source=source, tokenizer=tokenizer, report=report,
        overwrite=arguments.overwrite, **built,
    )  # fmt: skip
    common.show({"out": str(arguments.out), **report}, lambda console: _draw(console, report, plan, arguments.out))


def _draw(console: Console, report: dict[str, Any], plan: Plan, out: Path) -> None:
    rows = [
        (label, f"{cost['dense']:,}", f"{cost['pruned']:,}", tables.share(cost["pruned"], cost["dense"]))
        for label, cost in (
            ("parameters", report["costs"]["params"]),
            ("parameters that are not zero", report["costs"]["nonzero"]),
        )
    ]
    tables.table(console, "The plan, applied", ("", "before", "after", "share"), rows)
    for line in plan.summary():
        console.print(line, soft_wrap=True)
    console.print(f"saved in {out}", soft_wrap=True)
