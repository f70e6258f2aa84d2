"""Parse the verb and its options, run it, and turn errors into exit codes: 2 is your input, 1 is our fault."""

import contextlib
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from secateur import world
from secateur.errors import SecateurError, nearest

VERBS = {
    "inspect": "show what can be cut of a model, and what is frozen and why",
    "advise": "say whether and how to prune a model for a target, and with which commands",
    "prune": "cut a model to a budget and save the smaller one",
    "survey": "find out once what every cut would lose; then any budget is served without data",
    "sensitivity": "measure what cutting each axis and each weight alone would cost",
    "distill": "train a pruned model to say what the dense one says",
    "run": "run a recipe: prune, fine-tune, adapt and measure, in the steps of a YAML file",
    "apply": "make a saved plan again, or thin it out otherwise, on these weights",
    "eval": "measure a model, and what it lost against the dense one",
    "check": "the gate: exit with 3 where a model has lost more than it may, on any part of new data",
    "bench": "measure sizes, memory and speed of several models side by side",
    "profile": "measure how long a model and its parts take on this device",
    "stats": "show the zeros of the weights, and what they could save",
    "export": "write ONNX, OpenVINO, torch.export or 2:4 files, and INT8, checked against torch",
    "report": "make the HTML page of a run again",
    "compare": "put several runs in one HTML page",
}
"""Command -> what it does; its module in this folder has its name, and a function run(words)."""


TOGETHER = ("prune", "survey", "eval", "distill")
"""Commands that several processes of torchrun run as one job."""

Say = Callable[..., None]
"""Prints lines of an error; takes the style of the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.append(os.getcwd())  # noqa: PTH109 - module:function is looked up from where the user stands
    if world.started() > 1:
        return _one_of_many(words)
    return _guarded(words, _voice())


def _voice() -> Say:
    errors = Console(file=sys.stderr, soft_wrap=True, highlight=False, emoji=False)

    def say(first: str, *more: str, style: str | None = None) -> None:
        errors.print(first, style=style, markup=False)
        for line in more:
            errors.print(line, markup=False)

    return say


def _guarded(words: Sequence[str], say: Say) -> int:
    code = 0
    try:
        _check_together(words)
        _run(words)
    except SecateurError as error:
        say(f"error: {error}", style="red")
        code = 2
    except KeyboardInterrupt as stop:
        say(f"stopped; {str(stop) or 'nothing was written'}")
        code = 130
    except SystemExit as stop:  # tyro has shown the help, or has said what is wrong with the options
        code = stop.code if isinstance(stop.code, int) else 2
    except Exception as error:  # noqa: BLE001 - the last line of defence: a fault of ours, told as one
        where = f" in process {world.rank()} of {world.size()}" if world.size() > 1 else ""
        lines = ("This is our fault. Please report it with the lines below.", traceback.format_exc())
        say(f"secateur failed{where}: {type(error).__name__}: {error}", *lines, style="red")
        code = 1
    return code


def _one_of_many(words: Sequence[str]) -> int:
    """Run the command as one of the processes of torchrun: the first one prints, and an error is said once."""
    voice = _voice()

    def say(first: str, *more: str, style: str | None = None) -> None:
        world.say_once(first, lambda: voice(first, *more, style=style))

    with contextlib.ExitStack() as muted:
        if not world.started_first():
            nothing = muted.enter_context(open(os.devnull, "w"))  # noqa: PTH123 - no file but a place for words
            muted.enter_context(contextlib.redirect_stdout(nothing))
            muted.enter_context(contextlib.redirect_stderr(nothing))
        try:
            with world.joined(_device(words)):
                return _guarded(words, say)
        except SecateurError as error:
            say(f"error: {error}", style="red")
            return 2


def _check_together(words: Sequence[str]) -> None:
    """Raise SecateurError for a command that several processes cannot run, or that is not the same in all."""
    if world.size() == 1:
        return
    world.check_same(list(words), "the command line")
    verb = words[0] if words else "--help"
    if verb in VERBS and verb not in TOGETHER:
        raise SecateurError(
            f"{verb} runs in one process, and torchrun has started {world.size()}: run it without; "
            f"{', '.join(TOGETHER)} take several"
        )


def _device(words: Sequence[str]) -> str:
    """The value of --device, which decides how processes talk to each other."""
    for place, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name == "--device":
            return value if sign else "".join(words[place + 1 : place + 2])
    return "cpu"


def _run(words: Sequence[str]) -> None:
    verb = words[0] if words else "--help"
    if verb == "--version":
        Console().print(importlib.metadata.version("secateur"))
    elif verb in ("-h", "--help"):
        _help(Console(highlight=False))
    elif verb in VERBS:
        importlib.import_module(f"secateur.cli.{verb}").run(words[1:])
    else:
        raise SecateurError(f"there is no command {verb!r}{nearest(verb, VERBS)}")


def _help(console: Console) -> None:
    console.print("secateur: prune trained PyTorch models to a budget\n\nusage: secateur COMMAND ... [--help]\n")
    grid = Table.grid(padding=(0, 2))
    for name, what in VERBS.items():
        grid.add_row(f"  {name}", what)
    console.print(grid)
