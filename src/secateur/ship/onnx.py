"""Export to ONNX, and proof: ONNX Runtime gives what torch gives, on inputs of other sizes than the example's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.measure.onnx import OnnxModel, require_onnx
from secateur.measure.ports import FileModel
from secateur.progress import Track, quiet
from secateur.ship.cache import check_steps, convert_cached
from secateur.ship.example import Example, Open, Tensors, batched_experts, check_weights, without_cache
from secateur.ship.files import bytes_of, check_file, whole_files
from secateur.ship.graph import save_graph, to_onnx
from secateur.ship.memory import check_memory
from secateur.ship.proof import Agreement, Exported, compare, shapes_of
from secateur.space.trace import Inputs, export


@dataclass(frozen=True)
class OnnxExport(Exported):
    """What was exported, and how near it is to torch.

    Attributes:
        path: the file.
        bytes: of the file, and of the one with its tensors beside it, where there is one.
        inputs: name -> shape, with names for sizes that are open.
        outputs: the same.
        checked: shapes of the inputs that it was compared with torch on: input -> shape, for each trial.
        max_abs_error: largest absolute difference from torch, in the unit of the outputs.
        max_rel_error: the same over the largest absolute value of that output.
        opset: of the ONNX operators.
        operators: nodes in the graph.
        cache: whether it is called with a key/value cache.
    """

    opset: int
    operators: int
    cache: bool = False


def export_onnx(
    model: nn.Module,
    example: Inputs,
    out: str | Path,
    *,
    dynamic: bool | Open = True,
    cache: bool = False,
    tolerance: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
    track: Track = quiet,
) -> OnnxExport:
    """Write a model as an ONNX file that runs wherever ONNX Runtime does.

    The inputs keep the names of the forward pass (``input_ids``, ``attention_mask``, ``pixel_values``, ``x``), and so
    do the weights, where the exporter does not merge them. Batch norms are merged into convolutions. The file appears
    only when ONNX Runtime agrees with torch on random inputs, of other sizes than the example where sizes are open.
    Tensors above 1.8 GB go to a file beside it, ``<name>.onnx.data``.

    Language models run without a key/value cache, or, with `cache`, are called token by token: the file takes
    ``past_key_values.N.key`` and ``.value`` [batch, heads, past, numbers] and gives ``present.N.key`` and ``.value``
    back, as the files of Hugging Face's optimum do. The past may be empty: one file reads the prompt and writes.

    Args:
        model: any module that torch.export can trace, in float32, float64 or float16.
        example: arguments of one forward pass: a tensor, a tuple, a mapping; None = made for a Hugging Face model.
        out: the file, ending in .onnx; its folder is made.
        dynamic: True leaves the batch open, and of token ids the sequence too; False fixes all sizes; or which are
            open: ``{"x": {0: "batch", 2: "height"}}``. A file with a cache is open.
        cache: with a key/value cache, for a language model.
        tolerance: largest difference from torch, relative to the largest value of an output; None = 1e-4, of float16
            1e-2.
        overwrite: replace `out`.
        seed: of the random inputs.
        track: progress over the trials of the check.

    Raises:
        SecateurError: a package is missing; the model cannot be traced, or uses an operator that ONNX has not; it has
            no key/value cache that could be passed; the file does not give what torch gives; memory is short; or `out`
            is in the way.
    """
    require_onnx("exporting to ONNX")
    target = check_file(Path(out), overwrite=overwrite)
    check_weights(model)
    check_memory(model, "exporting to ONNX")
    if cache and dynamic is not True:
        raise SecateurError("a file with a key/value cache has open sizes: leave dynamic out, or the cache")
    given = Example.of(model, example, dynamic)
    generator = torch.Generator().manual_seed(seed)
    agreement = Agreement(model, OnnxModel.runtime, tolerance)
    with whole_files(target) as folder:
        path = folder / target.name
        program = convert_cached(given, generator) if cache else converted(given, generator)
        graph = save_graph(program, path)
        file = OnnxModel(path)
        if cache:
            checked = check_steps(given, path, generator, agreement, track)
        else:
            trials = given.trials(generator)
            names = [port.name for port in file.outputs]
            compare(given, lambda trial: outputs_of(file, trial), names, trials, agreement, track)
            checked = shapes_of(trials)
    return OnnxExport(
        path=str(out),
        bytes=bytes_of(target),
        inputs={port.name: list(port.shape) for port in file.inputs},
        outputs={port.name: list(port.shape) for port in file.outputs},
        checked=checked,
        max_abs_error=agreement.largest,
        max_rel_error=agreement.relative,
        opset=graph.opset_imports[""],
        operators=sum(1 for _ in graph.graph.all_nodes()),
        cache=cache,
    )


def converted(given: Example, generator: torch.Generator) -> torch.onnx.ONNXProgram:
    """The model without a cache as an ONNX program."""
    traced = given.traced(generator)
    with without_cache(given.model), batched_experts(given.model):
        program, _ = export(
            given.model, {**traced.tensors, **traced.constants}, sources=False, dynamic_shapes=given.shapes()
        )
    return to_onnx(given.model, program, given.opened)


def outputs_of(file: FileModel, inputs: Tensors) -> Sequence[torch.Tensor]:
    """What a file gives for inputs, in the order of its outputs."""
    found = file(**inputs)
    return [found] if isinstance(found, torch.Tensor) else list(vars(found).values())
