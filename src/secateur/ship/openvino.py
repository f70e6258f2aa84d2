"""Export to OpenVINO, and proof: its runtime gives what torch gives, on inputs of other sizes than the example's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.measure.onnx import require_onnx
from secateur.measure.openvino import OpenvinoModel, require_openvino
from secateur.measure.ports import one_line
from secateur.progress import Track, quiet
from secateur.ship.example import Example, Open, check_weights
from secateur.ship.files import bytes_of, check_file, whole_files
from secateur.ship.graph import save_graph
from secateur.ship.memory import check_memory
from secateur.ship.onnx import converted, outputs_of
from secateur.ship.proof import Agreement, Exported, compare, shapes_of
from secateur.space.trace import Inputs


@dataclass(frozen=True)
class OpenvinoExport(Exported):
    """What was exported, and how near it is to torch: see `Exported`.

    Attributes:
        path: the .xml file.
        bytes: of it and of the .bin file beside it.
        inputs: name -> shape, with names for sizes that are open.
        outputs: the same.
        checked: shapes of the inputs that it was compared with torch on: input -> shape, for each trial.
        max_abs_error: largest absolute difference from torch, in the unit of the outputs.
        max_rel_error: the same over the largest absolute value of that output.
        operators: nodes in the graph.
        half_weights: whether weights are stored as float16.
    """

    operators: int
    half_weights: bool = False


def export_openvino(
    model: nn.Module,
    example: Inputs,
    out: str | Path,
    *,
    dynamic: bool | Open = True,
    half_weights: bool = False,
    tolerance: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
    track: Track = quiet,
) -> OpenvinoExport:
    """Write a model as OpenVINO's intermediate representation: an .xml file, and a .bin file with its tensors.

    It goes by way of ONNX, so that inputs and outputs have the same names. The files appear only when OpenVINO agrees
    with torch on random inputs, of other sizes than the example where sizes are open; it computes in float32 for that.

    Args:
        model: any module that torch.export can trace, in float32, float64 or float16.
        example: arguments of one forward pass: a tensor, a tuple, a mapping; None = made for a Hugging Face model.
        out: the file, ending in .xml; its folder is made.
        dynamic: True leaves the batch open, and of token ids the sequence too; False fixes all sizes; or which are
            open: ``{"x": {0: "batch", 2: "height"}}``.
        half_weights: store float32 weights as float16: half the bytes, and a tolerance of 1e-2.
        tolerance: largest difference from torch, relative to the largest value of an output; None = 1e-4, of float16
            1e-2.
        overwrite: replace `out`.
        seed: of the random inputs.
        track: progress over the trials of the check.

    Raises:
        SecateurError: a package is missing; the model cannot be traced, or uses an operator that ONNX or OpenVINO has
            not; the file does not give what torch gives; memory is short; or `out` is in the way.
    """
    require_onnx("exporting to OpenVINO", ("onnx", "onnxscript"))
    require_openvino("exporting to OpenVINO")
    import openvino

    target = check_file(Path(out), overwrite=overwrite, suffix=".xml")
    check_weights(model, "OpenVINO")
    check_memory(model, "exporting to OpenVINO")
    given = Example.of(model, example, dynamic)
    generator = torch.Generator().manual_seed(seed)
    agreement = Agreement(model, OpenvinoModel.runtime, 1e-2 if half_weights and tolerance is None else tolerance)
    with whole_files(target) as folder:
        graph = save_graph(converted(given, generator), folder / "model.onnx").graph
        try:
            found = openvino.convert_model(folder / "model.onnx")
        except Exception as error:  # OpenVINO has a class of its own for every part of the conversion
            raise SecateurError(f"{type(model).__name__}: OpenVINO cannot convert it ({one_line(error)})") from error
        openvino.save_model(found, folder / target.name, compress_to_fp16=half_weights)
        file = OpenvinoModel(folder / target.name)
        trials = given.trials(generator)
        compare(given, lambda t: outputs_of(file, t), [p.name for p in file.outputs], trials, agreement, track)
    return OpenvinoExport(
        path=str(out),
        bytes=bytes_of(target),
        inputs={str(value.name): _shape(value) for value in graph.inputs},
        outputs={str(value.name): _shape(value) for value in graph.outputs},
        checked=shapes_of(trials),
        max_abs_error=agreement.largest,
        max_rel_error=agreement.relative,
        operators=len(found.get_ops()),
        half_weights=half_weights,
    )


def _shape(value: Any) -> list[int | str | None]:
    """Sizes of an input or output, with names where they are open, which OpenVINO does not keep."""
    return [size if isinstance(size, int) else size.value for size in value.shape]
