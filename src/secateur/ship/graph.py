"""From an exported program of torch to an ONNX graph: names, sizes, and one line where that cannot be."""

import ast
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.ship import files
from secateur.ship.example import Open
from secateur.space.trace import without_stacks

if TYPE_CHECKING:
    from onnx_ir import Model
    from torch.onnx import ONNXProgram


def to_onnx(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    opened: Open,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> "ONNXProgram":
    """A traced model as an ONNX program.

    Args:
        model: what was traced, for messages.
        program: the trace.
        opened: names of open sizes, by input.
        inputs: names of the inputs; None = those of the forward pass.
        outputs: names of the outputs; None = the fields of what the model returns.

    Raises:
        SecateurError: it uses an operator that ONNX has not.
    """
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch tells of every package that it does not find
    try:
        # No gradients, as in the trace: attention with a bias that learns would take another way, of other strides.
        with warnings.catch_warnings(), without_stacks(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=inputs,
                output_names=output_names(program) if outputs is None else outputs,
            )
    except torch.onnx.OnnxExporterError as error:
        raise SecateurError(_explained(model, error)) from error
    finally:
        logging.disable(silenced)
    if found is None:
        raise SecateurError(f"torch.onnx.export made nothing of {type(model).__name__}")
    own = set(program.graph_signature.user_inputs)
    taken = {value.name for value in found.model.graph.outputs}
    names = {}
    for value in found.model.graph.inputs:
        name = (value.name or "").removesuffix("_orig")  # what the exporter calls an input that is an output too
        if value.name not in own and name in own - taken:
            value.name = name
        for dim, label in opened.get(value.name or "", {}).items():
            names[str(value.shape[dim])] = label  # type: ignore[index]
    found.rename_axes(names)  # type: ignore[arg-type]
    return found


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the outputs: the fields of what the model returns; ``output`` where they have none."""
    spec = program.call_spec.out_spec
    if spec is None:
        return []
    result = pytree.tree_unflatten(range(spec.num_leaves), spec)
    fields = dict(result) if isinstance(result, Mapping) else {"output": result}
    names = []
    for field, value in fields.items():
        leaves = pytree.tree_leaves(value)
        names += [str(field)] if len(leaves) == 1 else [f"{field}_{i}" for i in range(len(leaves))]
    return names


def _explained(model: nn.Module, error: BaseException) -> str:
    """What ONNX has no form for, in a line."""
    deepest: BaseException = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    text = " ".join(str(deepest).split())
    if "No ONNX function found for" in text:
        operator = text.partition("op='")[2].partition("'")[0]
        return (
            f"{type(model).__name__} uses the operator {operator}, which has no form in ONNX: replace it in the "
            f"model's code by others"
        )
    return f"{type(model).__name__} cannot be converted to ONNX: {type(deepest).__name__}: {text[:300]}"


def save_graph(program: "ONNXProgram", path: Path) -> "Model":
    """Write the graph without the exporter's notes (they hold the paths of the user's code)."""
    import onnx_ir as ir

    model = program.model
    for node in model.graph.all_nodes():
        _name_weight(node, model)
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=path.name + files.DATA if size > files.LIMIT else None)
    return model


def _name_weight(node: Any, model: "Model") -> None:
    """Give a weight that was transposed the name of its parameter back."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    if node.op_type not in ("MatMul", "Gemm") or len(scopes) < 2:
        return
    weight = node.inputs[1]
    name = f"{scopes[-2]}.weight"
    if weight.is_initializer() and weight.name.startswith("val_") and name not in model.graph.initializers:
        weight.name = name
