"""INT8 for ONNX Runtime: dynamic or static, with weights whose zeros stay zeros."""

import fnmatch
import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, first_samples, size_of
from secateur.measure.onnx import OnnxModel, require_onnx
from secateur.progress import Track, quiet
from secateur.ship import files
from secateur.ship.embeddings import MIN_TABLE, TRANSPOSED, quantize_tables, table_of
from secateur.ship.files import DATA, bytes_of, check_file, whole_files

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

MODES = ("dynamic", "static")
RANGES = ("minmax", "percentile")
"""Ways to find the range of activations from calibration data."""
SAMPLES = 64
_LINEAR = ("MatMul", "Gemm")
_WEIGHTED = (*_LINEAR, "Conv", "ConvTranspose")
_PREPARED = "prepared.onnx"
_INTEGER = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")


@dataclass(frozen=True)
class Quantization:
    """What was quantised, and what it saves.

    Attributes:
        path: the file.
        mode: dynamic or static.
        bytes_before: of the float file, with that of its tensors.
        bytes_after: of the INT8 file.
        quantized: weights that are INT8 now, by name.
        left: weights that stay float, by name: those that could be INT8, and any other of 4096 numbers or more.
        calibration_samples: rows that the ranges of activations come from.
    """

    path: str
    mode: str
    bytes_before: int
    bytes_after: int
    quantized: list[str]
    left: list[str]
    calibration_samples: int


def quantize_onnx(
    path: str | Path,
    out: str | Path,
    *,
    mode: str = "dynamic",
    calibration: Iterable[Batch] | None = None,
    per_channel: bool = True,
    ranges: str | None = None,
    samples: int = SAMPLES,
    embeddings: bool = True,
    reduce_range: bool = False,
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    track: Track = quiet,
) -> Quantization:
    """Make an INT8 file of a float ONNX file, for ONNX Runtime on a CPU.

    Weights are signed 8-bit numbers around zero (a zero stays one), activations are unsigned. ``dynamic`` takes the
    range of activations from each batch as it comes, for the matrix products; convolutions stay float, because ONNX
    Runtime runs them slower so. ``static`` fixes the ranges by calibration data; in networks of convolutions without
    attention the operators between them are quantised too. Tables of embeddings become INT8 with a scale for each row;
    one that is tied to the projection to the vocabulary is stored once.

    Args:
        path: a float .onnx file.
        out: the file to write, ending in .onnx.
        mode: dynamic or static.
        calibration: batches of what the model is made for; static needs them, dynamic takes none.
        per_channel: a scale for each output of a weight, rather than one for the whole weight.
        ranges: how static finds the range of an activation: minmax or percentile (99.999%). None =
            percentile: a few outliers in a range cost more precision than they are worth.
        samples: the first so many rows of the calibration data are used.
        embeddings: quantise tables of embeddings.
        reduce_range: 7 bits for weights: on x86 CPUs without VNNI, 8-bit products may overflow in 16 bits.
        exclude: patterns of weight names that stay float, such as ``lm_head.*``.
        overwrite: replace `out`.
        track: progress over the calibration batches.

    Raises:
        SecateurError: a package is missing; an option is wrong, or a pattern matches no weight; static without
            calibration data; nothing can be quantised in this mode; ONNX Runtime cannot read or run a file.
    """
    require_onnx("quantising an ONNX file")
    source = Path(path).expanduser()
    _check_options(mode, calibration is not None, ranges, samples)
    target = check_file(Path(out), overwrite=overwrite)
    if target == source.resolve():
        raise SecateurError(f"{out}: is the float file itself; choose another name")
    model = OnnxModel(source)
    rows = first_samples(list(calibration or ()), samples)
    feeds = [model.feed_of(batch) for batch in track(rows, "reading calibration data")]
    if mode == "static" and not feeds:
        raise SecateurError("static quantisation needs at least one calibration batch, and there is none")
    with whole_files(target) as folder:
        graph = _prepared(source, folder)
        names = _weights(graph)
        floats = _matching(names, exclude, str(path))
        settings = {
            "per_channel": per_channel,
            "reduce_range": reduce_range,
            "nodes_to_exclude": [n for node, name in names.items() if name in floats for n in (node, f"{node}_MatMul")],
            "use_external_data_format": bytes_of(source) > files.LIMIT,
        }
        raw = folder / "int8.onnx"
        with _silence():
            if mode == "dynamic":
                _dynamic(folder / _PREPARED, raw, settings)
            else:
                _static(folder / _PREPARED, raw, feeds, ranges or "percentile", graph, settings)
        done, left = _finish(raw, folder / target.name, floats if embeddings else set(names.values()), names)
        if not done:
            hint = ": convolutions need mode static" if mode == "dynamic" else ""
            raise SecateurError(f"{path}: {mode} quantisation finds no weight that it could make INT8{hint}")
        written = OnnxModel(folder / target.name)  # an operator that ONNX Runtime lacks shows here
        if feeds:
            written(**{name: torch.from_numpy(value) for name, value in feeds[0].items()})
    counted = sum(size_of(batch) for batch in rows)
    return Quantization(str(out), mode, bytes_of(source), bytes_of(target), done, left, counted)


def _check_options(mode: str, calibrated: bool, ranges: str | None, samples: int) -> None:
    if mode not in MODES:
        raise SecateurError(f"there is no mode {mode!r} of quantisation{nearest(mode, MODES)}")
    if samples < 1:
        raise SecateurError(f"samples must be at least 1, not {samples}")
    if ranges is not None and ranges not in RANGES:
        raise SecateurError(f"there are no ranges {ranges!r}{nearest(ranges, RANGES)}")
    if mode == "static" and not calibrated:
        raise SecateurError("static quantisation needs calibration data: give batches, or take mode dynamic")
    if mode == "dynamic" and calibrated:
        raise SecateurError("dynamic quantisation takes no calibration data: leave it out, or take mode static")
    if mode == "dynamic" and ranges is not None:
        raise SecateurError(f"ranges {ranges} are found by calibration, which dynamic quantisation has not")


@contextmanager
def _silence() -> Iterator[None]:
    """Without what ONNX Runtime's quantiser logs and prints: advice that was taken, and every step."""
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(silenced)


# --- the graph ---


def _prepared(source: Path, folder: Path) -> "GraphProto":
    """Write the graph that is quantised; returns it, with the values of its tensors.

    Weights that are transposed at run time, as that of a tied projection, are transposed here: the quantiser sees only
    products with constants. Batch norms that are left are merged into convolutions by ONNX Runtime.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    if any(node.op_type in _INTEGER for node in model.graph.node):
        raise SecateurError(f"{source}: is quantised already; start from the float file")
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        model = _merged(source, folder)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    products = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    kept = []
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        weight, result = tensors.get(node.input[0]) if node.input else None, node.output[0]
        if node.op_type == "Transpose" and weight is not None and len(weight.dims) == 2 and result in products:
            values = numpy_helper.to_array(weight).T.copy()
            graph.initializer.append(numpy_helper.from_array(values, weight.name + TRANSPOSED))
            for other in graph.node:
                other.input[:] = [weight.name + TRANSPOSED if name == result else name for name in other.input]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    for name, tensor in tensors.items():
        if name not in used:
            graph.initializer.remove(tensor)
    _write(model, folder / _PREPARED)
    return graph


def _merged(source: Path, folder: Path) -> "ModelProto":
    """The model as ONNX Runtime's own preparation leaves it."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "merged.onnx"
    with _silence():
        quant_pre_process(
            str(source), str(path), skip_symbolic_shape=True, save_as_external_data=bytes_of(source) > files.LIMIT
        )
    return onnx.load(path)


def _write(model: "ModelProto", path: Path) -> None:
    """One file, or two for a large model."""
    import onnx

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    large = size > files.LIMIT
    onnx.save_model(model, path, save_as_external_data=large, location=path.name + DATA if large else None)


def _weights(graph: "GraphProto") -> dict[str, str]:
    """Node -> weight of every node that may be quantised, by the name that it has in torch."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in _WEIGHTED and node.input[1] in tensors and len(tensors[node.input[1]].dims) > 1:
            found[node.name] = node.input[1].removesuffix(TRANSPOSED)
        table = table_of(node, tensors)
        if table is not None:
            found[node.name] = table
    return found


def _matching(names: dict[str, str], exclude: Sequence[str], path: str) -> set[str]:
    """Weights that stay float."""
    found: set[str] = set()
    for pattern in exclude:
        some = {name for name in names.values() if fnmatch.fnmatchcase(name, pattern)}
        if not some:
            raise SecateurError(f"{path}: {pattern!r} matches no weight{nearest(pattern, names.values())}")
        found |= some
    return found


# --- ONNX Runtime's quantisers ---


def _dynamic(source: Path, out: Path, settings: dict[str, Any]) -> None:
    """Quantise products with weights; a Gemm becomes a product named ``<name>_MatMul`` and a sum first."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, out, op_types_to_quantize=list(_LINEAR), weight_type=QuantType.QInt8, **settings)


def _static(
    source: Path, out: Path, feeds: list[dict[str, Any]], ranges: str, graph: "GraphProto", settings: dict[str, Any]
) -> None:
    """Quantise and dequantise (QDQ) around the operators."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def __len__(self) -> int:
            return len(feeds)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(feeds[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
    }
    # What flows between convolutions may all be INT8. A residual stream with attention may not: its outliers need more.
    kinds = {node.op_type for node in graph.node}
    plain = "Conv" in kinds and not kinds & {"Softmax", "LayerNormalization", "Attention"}
    more = {} if plain else {"op_types_to_quantize": list(_WEIGHTED)}
    options: dict[str, Any] = {"MatMulConstBOnly": True, "CalibStridedMinMax": 1}  # one batch at a time in memory
    if not plain:
        options["OpTypesToExcludeOutputQuantization"] = list(_LINEAR)
    quantize_static(
        source,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        calibrate_method=methods[ranges],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options=options,
        **more,
        **settings,
    )


def _finish(raw: Path, out: Path, floats: set[str], names: dict[str, str]) -> tuple[list[str], list[str]]:
    """Quantise the tables of embeddings, write the file; returns (weights in INT8, weights in float)."""
    import onnx

    model = onnx.load(raw)
    quantize_tables(model.graph, floats)
    _write(model, out)
    known = set(names.values())
    done: set[str] = set()
    left: set[str] = set()
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix("_quantized").removesuffix("_Transposed").removesuffix(TRANSPOSED)
        if name in known and tensor.data_type == onnx.TensorProto.INT8:
            done.add(name)
        elif name in known or _is_large(tensor):
            left.add(name)
    return sorted(done), sorted(left)


def _is_large(tensor: "TensorProto") -> bool:
    """Whether a tensor is a float weight that no operator reads in a way that can be quantised: stacked experts."""
    floats = tensor.data_type in (1, 10)  # FLOAT, FLOAT16
    return floats and len(tensor.dims) > 1 and math.prod(tensor.dims) >= MIN_TABLE
