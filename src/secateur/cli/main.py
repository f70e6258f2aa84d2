"""Parse the verb and its options, run it, and turn errors into exit codes: 2 is your input, 1 is our fault."""

import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from secateur.cli import apply as apply_verb
from secateur.cli import distill as distill_verb
from secateur.cli import eval as eval_verb
from secateur.cli import inspect as inspect_verb
from secateur.cli import profile as profile_verb
from secateur.cli import prune as prune_verb
from secateur.cli import run as run_verb
from secateur.cli import stats as stats_verb
from secateur.cli import survey as survey_verb
from secateur.errors import SecateurError, nearest

VERBS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    "inspect": (inspect_verb.run, "show what can be cut of a model, and what is frozen and why"),
    "prune": (prune_verb.run, "cut a model to a budget and save the smaller one"),
    "survey": (survey_verb.run, "find out once what every cut would lose; then any budget is served without data"),
    "distill": (distill_verb.run, "train a pruned model to say what the dense one says"),
    "run": (run_verb.run, "run a recipe: prune, fine-tune, adapt and measure, in the steps of a YAML file"),
    "apply": (apply_verb.run, "make a saved plan again, or thin it out otherwise, on these weights"),
    "eval": (eval_verb.run, "measure a model, and what it lost against the dense one"),
    "stats": (stats_verb.run, "show the zeros of the weights, and what they could save"),
    "profile": (profile_verb.run, "measure how long a model and its parts take on this device"),
}


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
        VERBS[verb][0](words[1:])
    else:
        raise SecateurError(f"there is no command {verb!r}{nearest(verb, VERBS)}")


def _help(console: Console) -> None:
    console.print("secateur: prune trained PyTorch models to a budget\n\nusage: secateur COMMAND ... [--help]\n")
    for name, (_, what) in VERBS.items():
        console.print(f"  {name:8} {what}")
