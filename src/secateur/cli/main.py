"""Parse the verb and its options, run it, and turn errors into exit codes: 2 is your input, 1 is our fault."""

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    sys.path.append(os.getcwd())  # noqa: PTH109 - module:function is looked up from where the user stands
    code = 0
    try:
        _run(words)
    except SecateurError as error:
        errors.print(f"error: {error}", style="red", markup=False)
        code = 2
    except KeyboardInterrupt as stop:
        errors.print(f"stopped; {str(stop) or 'nothing was written'}")
        code = 130
    except SystemExit as stop:  # tyro has shown the help, or has said what is wrong with the options
        code = stop.code if isinstance(stop.code, int) else 2
    except Exception as error:  # noqa: BLE001 - the last line of defence: a fault of ours, told as one
        errors.print(f"secateur failed: {type(error).__name__}: {error}", style="red", markup=False)
        errors.print("This is our fault. Please report it with the lines below.")
        errors.print(traceback.format_exc(), markup=False)
        code = 1
    return code


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
