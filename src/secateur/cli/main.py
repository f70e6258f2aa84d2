"""Parse the verb and its options, run it, and turn errors into exit codes: 2 is your input, 1 is our fault."""

import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from secateur.cli import eval as eval_verb
from secateur.cli import inspect as inspect_verb
from secateur.cli import prune as prune_verb
from secateur.errors import SecateurError

VERBS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    "inspect": (inspect_verb.run, "show what can be cut of a model, and what is frozen and why"),
    "prune": (prune_verb.run, "cut a model to a budget and save the smaller one"),
    "eval": (eval_verb.run, "measure a model, and what it lost against the dense one"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    if not words or words[0] in ("-h", "--help"):
        _help(Console(highlight=False))
        return 0 if words else 2
    if words[0] == "--version":
        Console().print(importlib.metadata.version("secateur"))
        return 0
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - module:function is looked up from where the user stands
    try:
        if words[0] not in VERBS:
            from secateur.errors import nearest

            raise SecateurError(f"there is no command {words[0]!r}{nearest(words[0], VERBS)}")
        VERBS[words[0]][0](words[1:])
    except SecateurError as error:
        errors.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped; nothing was written")
        return 130
    except SystemExit as stop:  # tyro has said what is wrong with the options
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:  # noqa: BLE001 - the last line of defence: a fault of ours, told as one
        errors.print(f"secateur failed: {type(error).__name__}: {error}", style="red", markup=False)
        errors.print("This is our fault. Please report it with the lines below.")
        errors.print(traceback.format_exc(), markup=False)
        return 1
    return 0


def _help(console: Console) -> None:
    console.print("secateur: prune trained PyTorch models to a budget\n\nusage: secateur COMMAND ... [--help]\n")
    for name, (_, what) in VERBS.items():
        console.print(f"  {name:8} {what}")
