"""Export as a torch.export program, and proof: what is read back gives what the model gives, at other sizes too."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.progress import Track, quiet
from secateur.ship.example import Example, Open, Tensors, calling, check_weights, without_cache
from secateur.ship.files import bytes_of, check_file, whole_files
from secateur.ship.graph import output_names
from secateur.ship.memory import check_memory
from secateur.ship.proof import Agreement, Exported, compare, shapes_of
from secateur.space.trace import Inputs, export


@dataclass(frozen=True)
class ProgramExport(Exported):
    """What was exported, and how near it is to the model: see `Exported`.

    Attributes:
        path: the file.
        bytes: of the file.
        inputs: name -> shape, with names for sizes that are open.
        outputs: the same; None for sizes that follow from others.
        checked: shapes of the inputs that it was compared with the model on: input -> shape, for each trial.
        max_abs_error: largest absolute difference from the model, in the unit of the outputs.
        max_rel_error: the same over the largest absolute value of that output.
        operators: nodes in the graph.
    """

    operators: int


def export_program(
    model: nn.Module,
    example: Inputs,
    out: str | Path,
    *,
    dynamic: bool | Open = True,
    tolerance: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
    track: Track = quiet,
) -> ProgramExport:
    """Write a model as a program of torch.export: no code of the model is needed to run it, only torch.

    ``torch.export.load(path).module()(**inputs)`` runs it, with the names of the forward pass. What a Hugging Face
    model returns becomes a dict of tensors: the file is read where transformers is not installed. It takes no other
    arguments, and makes no key/value cache.

    Args:
        model: any module that torch.export can trace.
        example: arguments of one forward pass: a tensor, a tuple, a mapping; None = made for a Hugging Face model.
        out: the file, ending in .pt2; its folder is made.
        dynamic: True leaves the batch open, and of token ids the sequence too; False fixes all sizes; or which are
            open: ``{"x": {0: "batch", 2: "height"}}``.
        tolerance: largest difference from the model, relative to the largest value of an output; None = 1e-4, of
            16-bit floats 1e-2.
        overwrite: replace `out`.
        seed: of the random inputs.
        track: progress over the trials of the check.

    Raises:
        SecateurError: the model cannot be traced or stored; what is read back does not give what the model gives;
            memory is short; or `out` is in the way.
    """
    target = check_file(Path(out), overwrite=overwrite, suffix=".pt2")
    check_weights(model, narrow=True)
    check_memory(model, "exporting a program")
    given = Example.of(model, example, dynamic)
    generator = torch.Generator().manual_seed(seed)
    traced = given.traced(generator)
    with without_cache(model), calling(model, _plain(model, given)):
        program, _ = export(model, traced.tensors, sources=False, dynamic_shapes=_shapes(given))
    agreement = Agreement(model, "the program", tolerance)
    names = output_names(program)
    with whole_files(target) as folder:
        try:
            torch.export.save(program, folder / target.name)
            again: Any = torch.export.load(folder / target.name).module()
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            text = " ".join(str(error).split())[:300]
            raise SecateurError(f"{type(model).__name__}: torch.export cannot store it ({text})") from error
        trials = given.trials(generator)
        compare(given, lambda trial: _leaves(again, trial), names, trials, agreement, track)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    labels = _labels(program, given, values)
    results = zip(names, program.graph_signature.user_outputs, strict=True)
    return ProgramExport(
        path=str(out),
        bytes=bytes_of(target),
        inputs={name: _shape(values[node], labels) for name, node in _placeholders(program, given)},
        outputs={name: _shape(values.get(str(node)), labels) for name, node in results},
        checked=shapes_of(trials),
        max_abs_error=agreement.largest,
        max_rel_error=agreement.relative,
        operators=sum(node.op == "call_function" for node in program.graph.nodes),
    )


def _plain(model: nn.Module, given: Example) -> Any:
    """The forward pass with its tensors alone, and a dict instead of a class of transformers."""
    forward, hugging = model.forward, hasattr(model, "config")

    def plain(**inputs: Any) -> Any:
        found = forward(**inputs, **given.constants)
        if hugging and isinstance(found, Mapping):
            return {name: value for name, value in found.items() if value is not None}
        return found

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in given.tensors])

    def by_place(*args: Any, **kwargs: Any) -> Any:
        return plain(**signature.bind(*args, **kwargs).arguments)

    setattr(by_place, "__signature__", signature)  # noqa: B010  # what torch.export reads
    return by_place


def _shapes(given: Example) -> dict[str, Any] | None:
    shapes = given.shapes()
    return None if shapes is None else {name: shapes[name] for name in given.tensors}


def _leaves(program: Any, inputs: Tensors) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(program(**inputs)) if x is not None]


def _placeholders(program: torch.export.ExportedProgram, given: Example) -> list[tuple[str, str]]:
    """(input, node of the graph) of every input."""
    return list(zip(given.tensors, map(str, program.graph_signature.user_inputs), strict=True))


def _labels(program: torch.export.ExportedProgram, given: Example, values: Mapping[str, Any]) -> dict[str, str]:
    """Symbol of an open size -> its name."""
    return {
        str(values[node].shape[dim]): label
        for name, node in _placeholders(program, given)
        for dim, label in given.opened.get(name, {}).items()
    }


def _shape(value: Any, labels: Mapping[str, str]) -> list[int | str | None]:
    """Sizes, with names where they are open; None where they follow from others."""
    return [size if isinstance(size, int) else labels.get(str(size)) for size in getattr(value, "shape", ())]
