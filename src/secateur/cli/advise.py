"""``secateur advise MODEL --target cpu``: a few cheap facts, and what they say: whether to prune, how, how far."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.text import Text
from torch import nn

from secateur.choose.budget import Budget
from secateur.cli.models import Making, batches_from, check_sources, inputs_of, open_model
from secateur.cli.options import Common, Group, parse
from secateur.cli.tables import bytes_text, table
from secateur.errors import SecateurError
from secateur.load.batches import Batch, first_samples, is_pair
from secateur.load.functions import names_function
from secateur.measure.bench_passes import is_language_model, longest_of
from secateur.methods.advice import PLACEHOLDERS, Advice, Wish
from secateur.methods.advise import Recommendation, recommend
from secateur.methods.facts import Facts, gather
from secateur.methods.verbs import batches_of

FORMAT = 1
SAMPLES, SEQ_LEN = 8, 64
"""Rows, and tokens in each, that single cuts are tried on."""
IMAGES = 64
_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Say whether and how to prune a model for a target, with the reasons and the commands; nothing is written."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model, or module:callable that builds any model."""
    target: Literal["cpu", "gpu", "mobile", "llm-serving"]
    """Where the result will run."""
    budget: tuple[str, ...] = ()
    """What it may cost, as for prune: params=70%, latency=10ms, memory=50%..."""
    data: str | None = None
    """A few rows that single cuts are tried on, as for prune; a language model writes some itself where none are
    given."""
    seconds: float = 60.0
    """No cut is tried after that long."""
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "advise", words)
    common, making = arguments.common, arguments.making
    if arguments.seconds <= 0:
        raise SecateurError(f"--seconds must be above 0, not {arguments.seconds:g}")
    budget = Budget.parse(arguments.budget)
    check_sources(arguments.model, data=arguments.data)
    model, tokenizer, _ = open_model(arguments.model, making, device=common.device, dtype=common.dtype)
    batches = _batches(arguments, model, tokenizer)
    given = making.inputs is not None or bool(making.input_shape)
    inputs = inputs_of(model, making, arguments.model) if given or not batches else _inputs(model, batches)
    facts = gather(
        model, name=arguments.model, inputs=inputs, batches=batches, seconds=arguments.seconds,
        cut=_was_cut(arguments.model, model), track=common.track(),
    )  # fmt: skip
    found = recommend(facts, Wish(arguments.target, budget, arguments.data, _input_words(making, inputs)))
    values: dict[str, Any] = {"format": FORMAT, "kind": "advice", "target": arguments.target, "budget": str(budget)}
    values |= {"facts": dataclasses.asdict(facts), "recommendation": dataclasses.asdict(found.best)}
    values |= {"others": [dataclasses.asdict(advice) for advice in found.others]}
    values |= {"cautions": [dataclasses.asdict(advice) for advice in found.warnings]}
    common.show(values, lambda console: _draw(console, facts, found, arguments))


def _batches(arguments: Arguments, model: nn.Module, tokenizer: Any) -> list[Batch]:
    """A few rows; none for what is no language model where none are given."""
    if arguments.data is None and not is_language_model(model):
        return []
    data = batches_from(arguments.data, "--data")
    if names_function(arguments.data):
        return first_samples(batches_of(model, data, samples=IMAGES), IMAGES)
    longest = longest_of(model) or SEQ_LEN
    return batches_of(
        model, data, tokenizer=tokenizer, samples=SAMPLES, seq_len=min(SEQ_LEN, longest), seed=arguments.common.seed,
        track=arguments.common.track(),
    )  # fmt: skip


def _inputs(model: nn.Module, batches: Sequence[Batch]) -> Any:
    """Example inputs from the data, for what is no Hugging Face model: two of its samples."""
    if hasattr(getattr(model, "config", None), "to_dict"):
        return None
    first = first_samples(batches, 2)[0]
    inputs: Any = first[0] if is_pair(first) else first  # type: ignore[index]  # a pair
    return {k: v for k, v in inputs.items() if k != "labels"} if isinstance(inputs, dict) else inputs


def _input_words(making: Making, inputs: Any) -> tuple[str, ...]:
    """How the commands say what the example inputs are."""
    if making.inputs is not None:
        return ("--inputs", making.inputs)
    if making.input_shape:
        return ("--input-shape", *making.input_shape)
    if isinstance(inputs, torch.Tensor):
        return ("--input-shape", ",".join(map(str, inputs.shape)))
    return () if inputs is None else ("--inputs", "my_data:example")


def _was_cut(name: str, model: nn.Module) -> bool:
    """Whether a folder has a plan of ours, or its config says that it was cut."""
    return (Path(name).expanduser() / "plan.json").is_file() or hasattr(getattr(model, "config", None), "secateur")


# --- for people ---


def _draw(console: Console, facts: Facts, found: Recommendation, arguments: Arguments) -> None:
    budget = f", {Budget.parse(arguments.budget)}" if arguments.budget else ""
    title = f"Recommendation for {facts.name} on {arguments.target}{budget}"
    console.print(Text(f"\n{title}", style="bold"))
    _advice(console, found.best, commands=True)
    if found.others:
        console.print(Text("\nOr", style="bold"))
        for advice in found.others:
            _advice(console, advice, commands=False, mark="- ")
    if found.warnings:
        console.print(Text("\nWhen not to, and what to know", style="bold"))
        for advice in found.warnings:
            _advice(console, advice, commands=True, mark="- ")
    console.print()
    table(console, "Facts that this rests on", ("fact", "value"), _facts(facts))


def _advice(console: Console, advice: Advice, *, commands: bool, mark: str = "") -> None:
    inner = " " * 2
    _print(console, f"{mark}{advice.what}", inner if mark else "")
    _print(console, advice.why, inner)
    if advice.evidence:
        _print(console, f"evidence: {advice.evidence}", inner)
    if commands:
        for command in advice.commands:
            console.print(Text(f"    {command}", style="cyan"), soft_wrap=True)
        names = [name for name in PLACEHOLDERS if any(name in command.split() for command in advice.commands)]
        if names:
            _print(console, f"({', '.join(names)}: in place of your own data)", inner)


def _print(console: Console, text: str, indent: str) -> None:
    first = "" if text.startswith("- ") else indent
    lines = textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=indent or "", break_long_words=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _facts(facts: Facts) -> list[tuple[str, str]]:
    machine = facts.machine
    gpu = "none" if machine.gpu is None else f"{machine.gpu}, compute capability {machine.capability}"
    parts = ", ".join(f"{name} {100 * share:.0f}%" for name, share in facts.shares.items())
    lines = [
        ("parameters", f"{facts.params:,} in {facts.dtype}, {bytes_text(facts.bytes)}"),
        ("in", parts),
        ("zeros", f"{100 * facts.zeros:.1f}% of the weights" + (", 2:4" if facts.two_four else "")),
        ("what can be cut", ", ".join(f"{kind} {'/'.join(map(str, s[:4]))}" for kind, s in facts.kinds.items()) or "-"),
    ]
    if facts.untraced:
        lines.append(("not traced", textwrap.shorten(facts.untraced, 90)))
    if facts.batch_norms:
        lines.append(("batch norms", str(facts.batch_norms)))
    if facts.seconds is not None and facts.busy is not None:
        lines.append(
            (f"one forward pass, {facts.passed}", f"{1e3 * facts.seconds:.2f} ms, {100 * facts.busy:.0f}% in products")
        )
    for probe in facts.probes:
        gone = f"half of it, {100 * probe.params:.1f}% of the parameters"
        what = (
            "dropped"
            if probe.kind in ("layers", "attention", "mlp")
            else "half zero"
            if probe.kind == "weights"
            else gone
        )
        unit = "KL" if facts.measure == "kl" else "error"
        lines.append((probe.name, f"{what}: {unit} {probe.loss:.4f}"))
    if facts.spread is not None:
        lines.append(("median stable rank of weights", f"{100 * facts.spread:.0f}% of full"))
    lines.append(
        (
            "CPU",
            f"{machine.cpu}, {machine.threads} thread{'s' if machine.threads > 1 else ''}; "
            f"8-bit: {', '.join(machine.int8) or 'none'}",
        )
    )
    lines.append(("bfloat16 on the CPU", ", ".join(machine.bf16) or "none"))
    lines.append(("GPU", gpu))
    lines.append(("runtimes installed", ", ".join(machine.runtimes) or "none"))
    return lines
