"""What a model costs but for time: parameters, zeros, bytes as they are and compressed, multiply-accumulates."""

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.errors import SecateurError
from secateur.load.mode import evaluating
from secateur.measure.bench import Facts
from secateur.measure.latency import forward, tried
from secateur.measure.onnx import require_onnx
from secateur.measure.ports import one_line
from secateur.measure.sparsity import plain_recurrence
from secateur.space.products import plain_attention
from secateur.space.trace import Inputs

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

LEVEL = 6
_CHUNK = 1 << 24
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
_WHOLE = ("INT8", "UINT8", "INT4", "UINT4")
_SCALES = ("_scale", "_zero_point")
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
_PRODUCTS = ("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "DynamicQuantizeMatMul", "Gemm", "QGemm")
_UNCOUNTED = ("LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "MatMulNBits")
_SECOND = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
"""Operators whose second operand is not at place 1."""


def torch_facts(
    model: nn.Module, inputs: Inputs, samples: int, files: Sequence[Path], *, compress: bool, macs: bool = True
) -> Facts:
    """Facts of a torch model.

    Args:
        model: with values.
        inputs: arguments of one forward pass.
        samples: rows in them.
        files: of its weights; none = its parameters count.
        compress: measure what zlib leaves.
        macs: count multiply-accumulates, which takes a forward pass.
    """
    parameters = list(model.parameters())
    chunks = file_chunks(files) if files else tensor_chunks(parameters)
    size = sum(file.stat().st_size for file in files) if files else sum(p.nbytes for p in parameters)
    return Facts(
        params=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.count_nonzero()) for p in parameters),
        bytes=size,
        bytes_compressed=compressed(chunks) if compress else None,
        macs=torch_macs(model, inputs) / samples if macs else None,
    )


def torch_macs(model: nn.Module, inputs: Inputs) -> float:
    """Multiply-accumulates of convolutions and products, attention's too, in one forward pass on the inputs."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )
    with evaluating(model), torch.no_grad(), plain_attention(), plain_recurrence(model), counter:
        tried(model, forward(model, inputs))
    return float(counter.get_total_flops() / 2)


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, out_shape: object = None, **__: object
) -> int:
    """Of attention [batch, heads, tokens, numbers] that the CPU fuses and torch does not count; masked parts too."""
    del out_shape
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# --- bytes ---


def file_chunks(files: Iterable[Path]) -> Iterator[bytes]:
    """The bytes of files, a part at a time."""
    for path in files:
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                yield part


def tensor_chunks(tensors: Iterable[torch.Tensor]) -> Iterator[bytes]:
    """The bytes of tensors, a part at a time."""
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for begin in range(0, len(flat), _CHUNK):
            yield flat[begin : begin + _CHUNK].cpu().numpy().tobytes()


def compressed(chunks: Iterable[bytes]) -> int:
    """Bytes that zlib level 6 leaves of all parts, each by itself; parts of 16 MiB lose nothing by that."""
    workers, size = os.cpu_count() or 1, 0
    rest = iter(chunks)
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(rest, workers)):
            size += sum(pool.map(lambda part: len(zlib.compress(part, LEVEL)), some))
    return size


# --- ONNX files ---


def onnx_files(path: Path) -> list[Path]:
    """An ONNX file, and the files of its tensors.

    Raises:
        SecateurError: it is damaged, or a file of its tensors is missing.
    """
    model = _read(path)
    names = {_external(t)["location"] for t in model.graph.initializer if _is_external(t)}
    files = [path, *(path.parent / name for name in sorted(names))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise SecateurError(f"{path}: the file of its tensors {missing.name} is missing beside it")
    return files


def onnx_facts(path: Path, feed: Mapping[str, npt.NDArray[Any]] | None, samples: int, *, compress: bool) -> Facts:
    """Facts of an ONNX file. Tensors of floats and of whole numbers of 8 bits or fewer count as parameters.

    Args:
        path: the file.
        feed: its inputs: name -> array; None leaves the multiply-accumulates out.
        samples: rows in them.
        compress: measure what zlib leaves.

    Raises:
        SecateurError: it cannot be read or run.
    """
    require_onnx("measuring an ONNX file", ("onnx", "onnxruntime"))
    files = onnx_files(path)
    params, nonzero = _counted(_read(path), path)
    macs = onnx_macs(path, feed) if feed is not None else None
    return Facts(
        params=params,
        nonzero=nonzero,
        bytes=sum(file.stat().st_size for file in files),
        bytes_compressed=compressed(file_chunks(files)) if compress else None,
        macs=None if macs is None else macs / samples,
    )


def _read(path: Path) -> "ModelProto":
    """The graph, without tensors that lie in other files."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has classes of its own
        raise SecateurError(f"{path}: is no ONNX file that can be read ({one_line(error)})") from error


def _counted(model: "ModelProto", path: Path) -> tuple[int, int | None]:
    """Parameters, and those that are not zero; None where unsigned numbers leave open which that are."""
    import onnx

    params, nonzero, known = 0, 0, True
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind not in (*_FLOATS, *_WHOLE) or tensor.name.endswith(_SCALES):
            continue
        if not tensor.dims:
            continue  # a constant of a formula
        params += math.prod(tensor.dims)
        if kind.startswith("UINT"):
            known = False
        else:
            nonzero += int(np.count_nonzero(_values(tensor, path)))
    return params, nonzero if known else None


def _values(tensor: "TensorProto", path: Path) -> npt.NDArray[Any]:
    """The numbers of a tensor; those in another file are read as they are looked at."""
    from onnx import helper, numpy_helper

    if not _is_external(tensor):
        return numpy_helper.to_array(tensor)
    where = _external(tensor)
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file, begin = path.parent / where["location"], int(where.get("offset", 0))
    return np.memmap(file, dtype=kind, mode="r", offset=begin, shape=(math.prod(tensor.dims),))


def _is_external(tensor: "TensorProto") -> bool:
    return len(tensor.external_data) > 0


def _external(tensor: "TensorProto") -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def onnx_macs(path: Path, feed: Mapping[str, npt.NDArray[Any]]) -> float | None:
    """Multiply-accumulates of convolutions and products in one run on the inputs; None where some cannot be counted.

    The file is run once with the shapes of what goes into these operators as further outputs: so that they are known
    whatever computes them.

    Args:
        path: the file.
        feed: its inputs: name -> array.

    Raises:
        SecateurError: it cannot be read or run.
    """
    import onnx
    import onnxruntime as ort

    model = _read(path)
    nodes = [n for n in model.graph.node if n.op_type in (*_CONVOLUTIONS, "ConvTranspose", *_PRODUCTS)]
    if any(n.op_type in _UNCOUNTED for n in model.graph.node) or any(
        a.HasField("g") for n in model.graph.node for a in n.attribute
    ):
        return None
    wanted = list(dict.fromkeys(name for n in nodes for name in (*_operands(n), n.output[0])))
    del model.graph.output[:]
    for index, name in enumerate(wanted):
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"secateur_shape_{index}"]))
        info = onnx.helper.make_tensor_value_info(f"secateur_shape_{index}", onnx.TensorProto.INT64, None)
        model.graph.output.append(info)
    if not wanted:
        return 0.0
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        known = {port.name for port in session.get_inputs()}
        found = session.run(None, {name: value for name, value in feed.items() if name in known})
    except Exception as error:  # ONNX Runtime has a class of its own for every status
        raise SecateurError(f"{path}: ONNX Runtime cannot run it ({one_line(error)})") from error
    shapes = {name: [int(n) for n in shape] for name, shape in zip(wanted, found, strict=True)}
    return float(sum(_macs(node, shapes) for node in nodes))


def _operands(node: "NodeProto") -> tuple[str, str]:
    return node.input[0], node.input[_SECOND.get(node.op_type, 1)]


def _macs(node: "NodeProto", shapes: Mapping[str, Sequence[int]]) -> int:
    """Of one operator."""
    first, second = (shapes[name] for name in _operands(node))
    out = shapes[node.output[0]]
    if node.op_type in _CONVOLUTIONS:  # every number that comes out meets the kernel of its group
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # every number that goes in does
        return math.prod(first) * math.prod(second[1:])
    flipped = {a.name: a.i for a in node.attribute}.get("transA", 0)
    inner = first[-2] if flipped and len(first) > 1 else first[-1]
    return math.prod(out) * inner
