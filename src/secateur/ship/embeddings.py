"""Tables of embeddings in an ONNX graph as INT8: a scale for each row, and one table where the projection is tied."""

from collections.abc import Container
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

MIN_TABLE = 4096
"""Elements below which a table stays float: its scales and operators would cost what it saves."""
TRANSPOSED = ".transposed"
"""What the name of a weight that was transposed ends with, after that of the weight."""


def table_of(node: "NodeProto", tensors: dict[str, "TensorProto"]) -> str | None:
    """Name of the table that a node reads rows of, or None: float [rows, width], looked up along the rows."""
    if node.op_type != "Gather" or node.input[0] not in tensors:
        return None
    tensor = tensors[node.input[0]]
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    known = tensor.data_type in (1, 10) and len(tensor.dims) == 2 and axis == 0  # FLOAT, FLOAT16
    return tensor.name if known and int(np.prod(tensor.dims)) >= MIN_TABLE else None


def quantize_tables(graph: "GraphProto", skip: Container[str]) -> None:
    """Make INT8 of every table of embeddings, in place.

    A table whose transpose is an INT8 weight with a scale for each output takes that weight's numbers: the graph then
    holds them once.

    Args:
        graph: after its other weights were quantised.
        skip: names of tables that stay float.
    """
    from onnx import helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made: set[str] = set()
    nodes = []
    for node in graph.node:
        name = table_of(node, tensors)
        if name is None or name in skip:
            nodes.append(node)
            continue
        if name not in made:
            nodes[:0] = _store(graph, tensors, name)
            made.add(name)
        rows, scales, cast = (f"{node.output[0]}_{part}" for part in ("rows", "scales", "cast"))
        nodes += [
            helper.make_node("Gather", [f"{name}_quantized", node.input[1]], [rows], name=f"{node.name}_rows"),
            helper.make_node("Gather", [f"{name}_row_scale", node.input[1]], [scales], name=f"{node.name}_scales"),
            helper.make_node("Cast", [rows], [cast], name=f"{node.name}_cast", to=tensors[name].data_type),
            helper.make_node("Mul", [cast, scales], list(node.output), name=f"{node.name}_mul"),
        ]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in made or tensor.name in used]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def _store(graph: "GraphProto", tensors: dict[str, "TensorProto"], name: str) -> list["NodeProto"]:
    """Put an INT8 table [rows, width] and its scales [rows, 1] into the graph; the node that a tied weight needs."""
    from onnx import helper, numpy_helper

    table = numpy_helper.to_array(tensors[name])
    tied, tied_scale = f"{name}{TRANSPOSED}_quantized", tensors.get(f"{name}{TRANSPOSED}_scale")
    nodes = []
    if tied in tensors and tied_scale is not None and list(tied_scale.dims) == [len(table)]:
        rows = np.ascontiguousarray(numpy_helper.to_array(tensors[tied]).T)
        scales = numpy_helper.to_array(tied_scale)
        graph.initializer.remove(tensors[tied])
        nodes.append(
            helper.make_node("Transpose", [f"{name}_quantized"], [tied], name=f"{name}_transpose", perm=[1, 0])
        )
    else:
        largest = np.abs(table.astype(np.float32)).max(axis=1)
        scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        rows = np.rint(table.astype(np.float32) / scales[:, None]).clip(-127, 127).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(rows, f"{name}_quantized"))
    graph.initializer.append(numpy_helper.from_array(scales[:, None].astype(table.dtype), f"{name}_row_scale"))
    return nodes
