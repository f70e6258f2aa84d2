"""Export to ONNX, and proof: ONNX Runtime gives what torch gives, on inputs of other sizes than the example's."""

import ast
import inspect
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError, nearest
from secateur.load.mode import evaluating
from secateur.measure.onnx import OnnxModel, require_onnx
from secateur.progress import Track, quiet
from secateur.space.trace import Inputs, arguments, export

if TYPE_CHECKING:
    from onnx_ir import Model
    from torch.onnx import ONNXProgram

DATA = ".data"
"""What the name of the file with the tensors of a large model ends with, after that of the .onnx file."""
LIMIT = 1_800_000_000
"""Bytes of tensors up to which a model is one file: protobuf ends at 2 GiB."""
EXPERTS = ', or ask a mixture for model.set_experts_implementation("batched_mm")'
_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_LONGER = 3  # tokens that the check is longer than the example
Open = Mapping[str, Mapping[int, str]]
"""Sizes of inputs that stay open: input -> dim -> the size's name."""


@dataclass(frozen=True)
class OnnxExport:
    """What was exported, and how near it is to torch.

    Attributes:
        path: the file.
        bytes: of the file, and of the one with its tensors beside it, where there is one.
        opset: of the ONNX operators.
        operators: nodes in the graph.
        inputs: name -> shape, with names for sizes that are open.
        outputs: the same.
        checked: shapes of the inputs that it was compared with torch on: input -> shape, for each trial.
        max_abs_error: largest absolute difference from torch, in the unit of the outputs.
        max_rel_error: the same over the largest absolute value of that output.
    """

    path: str
    bytes: int
    opset: int
    operators: int
    inputs: dict[str, list[int | str | None]]
    outputs: dict[str, list[int | str | None]]
    checked: list[dict[str, list[int]]]
    max_abs_error: float
    max_rel_error: float


def export_onnx(
    model: nn.Module,
    example: Inputs,
    out: str | Path,
    *,
    dynamic: bool | Open = True,
    tolerance: float | None = None,
    overwrite: bool = False,
    seed: int = 0,
    track: Track = quiet,
) -> OnnxExport:
    """Write a model as an ONNX file that runs wherever ONNX Runtime does.

    The inputs keep the names of the forward pass (``input_ids``, ``attention_mask``, ``pixel_values``, ``x``), and so
    do the weights, where the exporter does not merge them. Language models run without a key/value cache. Batch norms
    are merged into convolutions. The file appears only when ONNX Runtime agrees with torch on random inputs, of other
    sizes than the example where sizes are open. Tensors above 1.8 GB go to a file beside it, ``<name>.onnx.data``.

    Args:
        model: any module that torch.export can trace, in float32, float64 or float16.
        example: arguments of one forward pass: a tensor, a tuple, a mapping; None = made for a Hugging Face model.
        out: the file, ending in .onnx; its folder is made.
        dynamic: True leaves the batch open, and of token ids the sequence too; False fixes all sizes; or which are
            open: ``{"x": {0: "batch", 2: "height"}}``.
        tolerance: largest difference from torch, relative to the largest value of an output; None = 1e-4, of float16
            1e-2.
        overwrite: replace `out`.
        seed: of the random inputs.
        track: progress over the trials of the check.

    Raises:
        SecateurError: a package is missing; the model cannot be traced, or uses an operator that ONNX has not; the file
            does not give what torch gives; or `out` is in the way.
    """
    require_onnx("exporting to ONNX")
    target = check_file(Path(out), overwrite=overwrite)
    _check_weights(model)
    inputs, constants = _inputs(model, example)
    opened = _opened(model, inputs, dynamic)
    generator = torch.Generator().manual_seed(seed)
    traced = _fresh(model, inputs, opened, _sizes(inputs, opened, batch=lambda n: max(n, 2)), generator)
    with whole_files(target) as folder:
        path = folder / target.name
        graph = _save(_converted(model, traced, constants, opened), path)
        trials = _trials(model, inputs, opened, generator)
        file = OnnxModel(path)
        worst = _agreement(model, file, trials, constants, tolerance, track)
    return OnnxExport(
        path=str(out),
        bytes=bytes_of(target),
        opset=graph.opset_imports[""],
        operators=sum(1 for _ in graph.graph.all_nodes()),
        inputs={port.name: list(port.shape) for port in file.inputs},
        outputs={port.name: list(port.shape) for port in file.outputs},
        checked=[{name: list(value.shape) for name, value in trial.items()} for trial in trials],
        max_abs_error=worst[0],
        max_rel_error=worst[1],
    )


# --- files ---


def check_file(out: Path, *, overwrite: bool) -> Path:
    """Check that an ONNX file may be written; returns its absolute path.

    Raises:
        SecateurError: for another ending, or what is in the way.
    """
    if out.suffix != ".onnx":
        raise SecateurError(f"{out}: an ONNX file must end in .onnx")
    target = out.expanduser().resolve()
    above = next(p for p in target.parents if p.exists())
    if not above.is_dir():
        raise SecateurError(f"{out}: cannot be made, because {above} is a file")
    if target.is_dir():
        raise SecateurError(f"{out}: is a folder; choose another name")
    if target.exists() and not overwrite:
        raise SecateurError(f"{out}: exists already; choose another name, or overwrite it (overwrite=True)")
    return target


def bytes_of(path: Path) -> int:
    """Bytes of an ONNX file, with those of the file of its tensors."""
    data = path.with_name(path.name + DATA)
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


@contextmanager
def whole_files(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`; at the end its files of that name, and of that name + DATA, take their places.

    Nothing is left of them where that fails, and an old file stays as it was.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    data, stale = partial / (target.name + DATA), target.with_name(target.name + DATA)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if data.exists():
            target.unlink(missing_ok=True)  # an old graph must not be seen with new tensors
            data.replace(stale)
            (partial / target.name).replace(target)
        else:
            (partial / target.name).replace(target)
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise SecateurError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- what goes in ---


def _check_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SecateurError(f"{type(model).__name__}: {name} has no values (it is on the meta device): load them")
        if tensor.dtype == torch.bfloat16:
            raise SecateurError(
                f"{type(model).__name__}: {name} is bfloat16, which ONNX Runtime runs hardly anything in; export "
                "model.float()"
            )


def _inputs(model: nn.Module, example: Inputs) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and other arguments of the forward pass by name; Hugging Face models get a mask and no cache."""
    args, kwargs = arguments(model, example)
    signature = inspect.signature(model.forward)
    try:
        named: dict[str, Any] = dict(signature.bind_partial(*args).arguments)
    except TypeError as error:
        raise SecateurError(f"the example does not fit {type(model).__name__}.forward: {error}") from error
    for name, parameter in signature.parameters.items():
        if name in named and parameter.kind is parameter.VAR_POSITIONAL:
            raise SecateurError(f"{type(model).__name__}.forward takes *{name}: pass an example of named inputs")
    named |= kwargs
    if hasattr(model, "config"):
        named.pop("use_cache", None)
        if "use_cache" in signature.parameters:  # the others read the config: see _without_cache
            named["use_cache"] = False
        ids = named.get("input_ids")
        if isinstance(ids, torch.Tensor) and "attention_mask" in signature.parameters:
            named.setdefault("attention_mask", torch.ones_like(ids))
    for name in named:
        if name not in signature.parameters:
            raise SecateurError(
                f"{type(model).__name__}.forward has no input {name!r} of its own{nearest(name, signature.parameters)}"
            )
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    tensors = {name: value.to(place) for name, value in named.items() if isinstance(value, torch.Tensor)}
    for name, value in named.items():
        if name not in tensors and pytree.tree_any(lambda x: isinstance(x, torch.Tensor), value):
            raise SecateurError(f"the input {name!r} is a {type(value).__name__} of tensors: only tensors are exported")
    if not tensors:
        raise SecateurError("the example holds no tensor")
    return tensors, {name: value for name, value in named.items() if name not in tensors}


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and a Hugging Face model that makes no key/value cache.

    The config says it: not every forward pass has a ``use_cache`` that torch.export takes.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    configs = [c for c in {id(c): c for c in (config, text)}.values() if getattr(c, "use_cache", None) is not None]
    before = [c.use_cache for c in configs]
    for c in configs:
        c.use_cache = False
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for c, value in zip(configs, before, strict=True):
            c.use_cache = value


def _opened(model: nn.Module, inputs: Mapping[str, torch.Tensor], dynamic: bool | Open) -> Open:
    """Which sizes stay open."""
    if isinstance(dynamic, Mapping):
        for name, dims in dynamic.items():
            if name not in inputs:
                raise SecateurError(f"dynamic names the input {name!r}{nearest(name, inputs)}")
            for dim in dims:
                if not 0 <= dim < inputs[name].dim():
                    raise SecateurError(f"dynamic names dim {dim} of {name}, whose shape is {list(inputs[name].shape)}")
        return dynamic
    if not dynamic:
        return {}
    batch = next((len(x) for x in inputs.values() if x.dim()), 0)
    found: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        if not value.dim() or len(value) != batch:
            continue
        found[name] = {0: "batch"}
        whole = value.dim() == 2 and not value.is_floating_point()
        if whole and (name.removeprefix("decoder_") in _TOKENS or not hasattr(model, "config")):
            found[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return found


def _sizes(inputs: Mapping[str, torch.Tensor], opened: Open, batch: Any, others: Any = lambda n: n) -> dict[str, int]:
    """Open sizes by name: those of the example, changed."""
    found: dict[str, int] = {}
    for name, dims in opened.items():
        for dim, label in dims.items():
            size = inputs[name].shape[dim]
            if found.setdefault(label, size) != size:
                raise SecateurError(f"the open size {label!r} is {found[label]} and {size} in the example")
            if label != "batch" and size < 2:
                raise SecateurError(f"the open size {label!r} is {size} in the example: give at least 2")
    return {label: batch(size) if label == "batch" else others(size) for label, size in found.items()}


def _fresh(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    opened: Open,
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Random inputs like the example: any tokens, masks that end anywhere, floats of its mean and spread."""
    found = {}
    embedding = getattr(model, "get_input_embeddings", lambda: None)() if hasattr(model, "config") else None
    for name, value in inputs.items():
        shape = list(value.shape)
        for dim, label in opened.get(name, {}).items():
            shape[dim] = sizes[label]
        own = value.detach().cpu()
        if name.endswith("input_ids") and isinstance(embedding, nn.Embedding):
            made = torch.randint(embedding.num_embeddings, shape, generator=generator)
        elif name.endswith("attention_mask") and len(shape) == 2:
            ends = torch.randint(1, shape[1] + 1, (shape[0],), generator=generator)
            ends[0] = shape[1]
            made = torch.arange(shape[1])[None] < ends[:, None]
        elif own.is_floating_point():
            spread, mean = (own.double().std(correction=0), own.double().mean()) if own.numel() else (1.0, 0.0)
            made = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean
        else:  # which whole numbers a model takes, only the example says
            made = own.flatten()[torch.randint(max(own.numel(), 1), shape, generator=generator)]
        found[name] = made.to(value.device, value.dtype)
    return found


def _trials(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], opened: Open, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """Two sets of fresh inputs: more and longer than the example, and a single one that is shorter."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    def longer(size: int) -> int:
        """A model of a user's own may have no place for more."""
        return min(size + _LONGER, longest) if isinstance(longest, int) else size

    wanted = [(lambda n: n + 1, longer), (lambda _: 1, lambda n: max(2, n // 2))]
    return [_fresh(model, inputs, opened, _sizes(inputs, opened, *how), generator) for how in wanted]


# --- the conversion ---


def _converted(
    model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], opened: Open
) -> "ONNXProgram":
    """The model as an ONNX program, with the names of inputs, outputs and open sizes."""
    shapes: dict[str, Any] = {name: dict.fromkeys(opened.get(name, {}), Dim.DYNAMIC) for name in inputs}
    shapes |= dict.fromkeys(constants)
    with _without_cache(model):
        program, _ = export(model, {**inputs, **constants}, sources=False, dynamic_shapes=shapes if opened else None)
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch tells of every package that it does not find
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.onnx.export(program, (), dynamo=True, verbose=False, output_names=_output_names(program))
    except torch.onnx.OnnxExporterError as error:
        raise SecateurError(_explained(model, error)) from error
    finally:
        logging.disable(silenced)
    if found is None:
        raise SecateurError(f"torch.onnx.export made nothing of {type(model).__name__}")
    names = {}
    for value in found.model.graph.inputs:
        for dim, label in opened.get(value.name or "", {}).items():
            names[str(value.shape[dim])] = label  # type: ignore[index]
    found.rename_axes(names)  # type: ignore[arg-type]
    return found


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
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
            f"model's code by others{EXPERTS if 'grouped_mm' in operator else ''}"
        )
    return f"{type(model).__name__} cannot be converted to ONNX: {type(deepest).__name__}: {text[:300]}"


def _save(program: "ONNXProgram", path: Path) -> "Model":
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
    ir.save(model, path, external_data=path.name + DATA if size > LIMIT else None)
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


# --- the proof ---


def _agreement(
    model: nn.Module,
    file: OnnxModel,
    trials: Sequence[dict[str, torch.Tensor]],
    constants: Mapping[str, Any],
    tolerance: float | None,
    track: Track,
) -> tuple[float, float]:
    """Largest absolute and relative difference between torch and the file."""
    half = any(p.dtype == torch.float16 for p in model.parameters())
    limit = (1e-2 if half else 1e-4) if tolerance is None else tolerance
    largest, relative = 0.0, 0.0
    for trial in track(trials, "comparing ONNX Runtime with torch"):
        with _without_cache(model):
            wanted = pytree.tree_leaves(model(**trial, **constants))
        found = file(**trial)
        results = [found] if isinstance(found, torch.Tensor) else list(vars(found).values())
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in trial.items())
        mask = trial["attention_mask"].cpu().bool() if "attention_mask" in trial else None
        for port, ours, theirs in zip(file.outputs, [x for x in wanted if x is not None], results, strict=True):
            expected, found_here = ours.detach().cpu().double(), theirs.double()
            where = f"{type(model).__name__}: {port.name} on {shapes}"
            if theirs.shape != expected.shape:
                raise SecateurError(f"{where} has shape {list(theirs.shape)} in ONNX, {list(expected.shape)} in torch")
            if mask is not None and expected.shape[:2] == mask.shape:  # what comes out at padding means nothing
                expected, found_here = expected[mask], found_here[mask]
            if not bool(torch.isfinite(expected).all()):
                raise SecateurError(f"{where} has NaN or infinite values in torch: nothing can be compared with it")
            worst = float((found_here - expected).abs().max()) if expected.numel() else 0.0
            scale = float(expected.abs().max()) if expected.numel() else 0.0
            share = worst / scale if scale else worst
            largest, relative = max(largest, worst), max(relative, share)
            if not share <= limit:
                raise SecateurError(
                    f"{where} differs between ONNX Runtime and torch by {worst:.3g}, {share:.2g} of its largest value "
                    f"(tolerance {limit:g}): nothing was written"
                )
    return largest, relative
