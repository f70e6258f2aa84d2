"""Export a model to an ATen graph on fake tensors: no weight is read, no memory is taken for it."""

import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.fx.config as fx_config
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.megatron_trace import traceable, unheld
from secateur.load.mode import evaluating
from secateur.load.store import strided
from secateur.space.inputs import example_inputs
from secateur.space.products import plain_attention
from secateur.space.provenance import Recorder, holders, tagging

CANNOT_TRACE = "torch.export cannot trace"
"""What the message begins with where the forward pass of a model cannot be followed."""
_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
Inputs = Mapping[str, Any] | tuple[Any, ...] | torch.Tensor | None
"""Arguments of a forward pass: by name, by place, or one tensor; None where a Hugging Face model has its own."""


def arguments(model: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of one forward pass.

    Raises:
        SecateurError: for None, where the model has no default inputs; for inputs of another type.
    """
    if inputs is None:
        return (), dict(example_inputs(model))
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    raise SecateurError(f"inputs must be a tensor, a tuple or a mapping of arguments, not {type(inputs).__name__}")


def batch_of(model: nn.Module, inputs: Inputs) -> int:
    """Samples in the inputs: the first size of the first tensor."""
    leaves = pytree.tree_leaves(arguments(model, inputs))
    sizes = [x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.dim()]
    return int(sizes[0]) if sizes else 1


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes, buffers and parts back: some forward passes set them.

    Rotary tables of longrope are such, and attentions that are exchanged for short sequences (BigBird). What methods
    remember of earlier calls is forgotten, before and after: it would mix real and fake tensors.
    """
    _forget(model)
    kept = [(m, dict(vars(m)), dict(m._buffers), dict(m._modules)) for m in model.modules()]
    configs = [(config, dict(vars(config))) for _, config, is_config in holders(model) if is_config]
    try:
        yield
    finally:
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)
        for module, attributes, buffers, parts in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._modules.clear()
            module._modules.update(parts)
        _forget(model)


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and not isinstance(value, torch.Tensor):
                value.cache_clear()


def export(
    model: nn.Module, inputs: Inputs = None, *, sources: bool = True, dynamic_shapes: Any = None
) -> tuple[ExportedProgram, Recorder]:
    """Trace `model` in eval mode; also where the whole numbers in its graph come from.

    Args:
        model: any module; its parameters may be on the meta device.
        inputs: see `Inputs`.
        sources: find out where numbers come from; it costs a third of the time.
        dynamic_shapes: sizes that stay open, as torch.export takes them; None = every size is that of the inputs.

    Raises:
        SecateurError: when torch.export cannot follow the forward pass.
    """
    model, (args, kwargs) = unheld(model, arguments(model, inputs))
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch prints graphs and tracebacks of errors that we report in a line
    try:
        with (
            evaluating(model),
            _untouched(model),
            strided(model),
            plain_attention(),
            traceable(model),
            without_stacks(),
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            with tagging(model) if sources else nullcontext(Recorder()) as recorder:
                return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False), recorder
    except Exception as error:  # torch.export raises whatever the user's own code raises
        raise SecateurError(_explained(model, error)) from error
    finally:
        logging.disable(silenced)


@contextmanager
def without_stacks() -> Iterator[None]:
    """Nodes that do not keep the stack of Python's calls, which nobody asks for: a quarter of the time."""
    before = fx_config.do_not_emit_stack_traces
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


_ADVICE = (
    (
        "DataDependent",
        "the code branches on a tensor's value: make the branch a torch.where or torch.cond, or skip it when "
        "torch.compiler.is_exporting()",
    ),
    ("unbacked", "a shape depends on a tensor's value: give it a fixed size while torch.compiler.is_exporting()"),
    ("shapes cannot be multiplied", "the inputs do not fit the model: pass `inputs` of the shapes that it takes"),
    ("same reduction dim", "the inputs do not fit the model: pass `inputs` of the shapes that it takes"),
    ("channels, but got", "the inputs do not fit the model: pass `inputs` of the shapes that it takes"),
    (
        "Constraints violated",
        "the model takes one size only where another was left open: name what may vary, or nothing (dynamic=False, "
        "--fixed)",
    ),
    ("argument", "the inputs do not fit the forward pass: pass `inputs` with the arguments that it takes"),
    ("size of tensor", "the inputs do not fit the model: pass `inputs` of the shapes that it takes"),
)


def _explained(model: nn.Module, error: BaseException) -> str:
    """What stopped the trace, at which line of the user's code, and what to do."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH, _HERE, "<"))]
    where = f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    advice = next((advice for sign, advice in _ADVICE if sign in f"{type(error).__name__} {error}"), None)
    return f"{CANNOT_TRACE} {type(model).__name__}{where}: {text}{'; ' + advice if advice else ''}"
