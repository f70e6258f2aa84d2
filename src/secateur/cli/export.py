"""``secateur export MODEL --format onnx --out FILE``: files for other runtimes, checked against torch; and INT8."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from torch import nn

from secateur.cli.models import Making, batches_from, check_sources, inputs_of, open_model
from secateur.cli.options import Common, Group, parse
from secateur.cli.tables import bytes_text, table
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.functions import is_constructor
from secateur.load.place import find_dtype
from secateur.methods.verbs import batches_of
from secateur.ship.files import check_file, whole_files
from secateur.ship.memory import check_folder_memory
from secateur.ship.semi_structured import require_sparse_gpu, try_semi_structured
from secateur.ship.shapes import Finding, shape_advice

FORMAT = 1
Format = Literal["onnx", "openvino", "torch-export", "semi-structured"]
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "semi-structured": ".json"}
SEQ_LEN = 256
FINDINGS = 3
"""Sizes that kernels dislike which are shown; --json lists all."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that the file takes."""

    fixed: bool = False
    """Fix all sizes, as some runtimes need it; by default the batch is open, and the sequence of token ids."""
    batch: int | None = None
    """Rows of token ids of a --fixed file; 1 by default."""
    seq_len: int | None = None
    """Tokens in a row of a --fixed file (256, or what the model takes, by default), and of calibration data."""


@dataclasses.dataclass(frozen=True)
class Quantizing:
    """An INT8 file beside the float one, named FILE_int8.onnx."""

    int8: Literal["dynamic", "static"] | None = None
    """Quantise: dynamic needs no data, and leaves convolutions float; static fixes the ranges by --data."""
    data: str | None = None
    """Calibration data of static quantisation: .txt, .jsonl, .parquet, .npy token ids, a hub id; or module:function
    that returns batches."""
    samples: int = 64
    """Rows of it to use."""
    text_field: str = "text"
    """The field of .jsonl and .parquet records that holds the text."""
    split: str = "train"
    """Split of a hub data set."""
    exclude: tuple[str, ...] = ()
    """Patterns of weight names that stay float, such as '*down_proj*'."""
    ranges: Literal["minmax", "percentile"] | None = None
    """How static finds the range of an activation; percentile by default, which leaves out a few outliers."""
    reduce_range: bool = False
    """7 bits for weights: x86 CPUs without VNNI may overflow with 8."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a model, pruned or dense, for another runtime, once that gives what torch gives."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id of a Hugging Face model; a folder that was saved with a constructor; or module:callable that
    builds any model. What is no Hugging Face model needs --input-shape or --inputs."""
    out: Path
    """The file: .onnx, .xml (OpenVINO, with a .bin beside it), .pt2 (torch.export), or .json (semi-structured: what
    was packed on this GPU, and what it gained)."""
    format: Format | None = None
    """What to write; by default what the ending of --out says."""
    cache: bool = False
    """With a key/value cache, to write text token by token (onnx, language models)."""
    half_weights: bool = False
    """Store weights as float16 (openvino)."""
    backend: Literal["cusparselt", "cutlass"] | None = None
    """Kernels for 2:4 (semi-structured); cusparselt by default."""
    overwrite: bool = False
    """Replace what --out names."""
    sizes: Annotated[Sizes, Group] = dataclasses.field(default_factory=Sizes)
    quantizing: Annotated[Quantizing, Group] = dataclasses.field(default_factory=Quantizing)
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = _with_format(parse(Arguments, "export", words))
    _check(arguments)
    common = arguments.common
    model, tokenizer, _ = open_model(arguments.model, arguments.making, device=common.device, dtype=common.dtype)
    notes = []
    narrow = any(p.dtype == torch.bfloat16 for p in model.parameters())
    if narrow and common.dtype is None and arguments.format in ("onnx", "openvino"):
        model = model.float()
        notes.append("the weights are bfloat16, which CPUs hardly compute in: they are exported in float32")
    example = _example(model, arguments)
    values: dict[str, Any] = {"format": FORMAT, "kind": "export", "secateur": importlib.metadata.version("secateur")}
    rows = _calibration(model, tokenizer, arguments)  # first: what is wrong with it shows before a long export
    values |= {"model": arguments.model, "to": arguments.format, "export": _export(model, example, arguments)}
    if arguments.quantizing.int8 is not None:
        values["int8"] = _quantize(rows, arguments)
    findings = shape_advice(model)
    values |= {"shapes": [dataclasses.asdict(finding) for finding in findings], "notes": notes}
    common.show(values, lambda console: _draw(console, values, findings))


# --- what cannot be, before anything is loaded ---


def _with_format(arguments: Arguments) -> Arguments:
    """The arguments with the format that the ending of --out says, where none is given."""
    if arguments.format is not None:
        return arguments
    found: dict[str, Format] = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch-export"}
    if arguments.out.suffix not in found:
        raise SecateurError(f"--out {arguments.out} must end in {', '.join(found)}, or say the --format")
    return dataclasses.replace(arguments, format=found[arguments.out.suffix])


def _check(arguments: Arguments) -> None:
    kind, sizes, quantizing = str(arguments.format), arguments.sizes, arguments.quantizing
    if Path(arguments.model).suffix in SUFFIXES.values() and Path(arguments.model).is_file():
        raise SecateurError(f"{arguments.model} is an exported file: export starts from the model in torch")
    only = {
        "--cache": (arguments.cache, "onnx"),
        "--int8": (quantizing.int8 is not None, "onnx"),
        "--half-weights": (arguments.half_weights, "openvino"),
        "--backend": (arguments.backend is not None, "semi-structured"),
    }
    for option, (given, goes) in only.items():
        if given and kind != goes:
            raise SecateurError(f"{option} goes with --format {goes}, not {kind}")
    if sizes.fixed and (arguments.cache or kind == "semi-structured"):
        other = "--cache" if arguments.cache else "--format semi-structured"
        raise SecateurError(f"--fixed does not go with {other}")
    for option, size in (("--batch", sizes.batch), ("--seq-len", sizes.seq_len), ("--samples", quantizing.samples)):
        if size is not None and size < 1:
            raise SecateurError(f"{option} must be at least 1, not {size}")
    timed = sizes.fixed or kind == "semi-structured"
    if sizes.batch is not None and not timed:
        raise SecateurError("--batch goes with --fixed: an open file takes any")
    if sizes.seq_len is not None and not timed and quantizing.data is None:
        raise SecateurError("--seq-len goes with --fixed or --data: an open file takes any")
    _check_int8(quantizing)
    check_file(arguments.out, overwrite=arguments.overwrite, suffix=SUFFIXES[kind])
    if quantizing.int8 is not None:
        check_file(_int8_file(arguments.out), overwrite=arguments.overwrite)
    check_sources(arguments.model, data=quantizing.data)
    if kind == "semi-structured":
        require_sparse_gpu(arguments.common.device, arguments.backend or "cusparselt")
    if not is_constructor(arguments.model) and (Path(arguments.model).expanduser() / "config.json").is_file():
        wide = arguments.common.dtype or ("float32" if kind in ("onnx", "openvino") else None)
        check_folder_memory(arguments.model, f"exporting it as {kind}", dtype=find_dtype(wide))


def _check_int8(quantizing: Quantizing) -> None:
    given = {
        "--data": quantizing.data is not None,
        "--ranges": quantizing.ranges is not None,
        "--exclude": bool(quantizing.exclude),
        "--reduce-range": quantizing.reduce_range,
    }
    for option, there in given.items():
        if there and quantizing.int8 is None:
            raise SecateurError(f"{option} goes with --int8")
        if there and quantizing.int8 == "dynamic" and option in ("--data", "--ranges"):
            raise SecateurError(f"{option} goes with --int8 static: dynamic takes the ranges of each batch as it comes")
    if quantizing.int8 == "static" and quantizing.data is None:
        raise SecateurError("--int8 static needs --data, to find the ranges of activations; --int8 dynamic needs none")


# --- what is done ---


def _example(model: nn.Module, arguments: Arguments) -> Any:
    """What the model is traced with, and what the sizes of a --fixed file are."""
    sizes, making = arguments.sizes, arguments.making
    given = inputs_of(model, making, arguments.model)
    if making.input_shape or making.inputs is not None or not hasattr(model, "config"):
        for option, size in (("--batch", sizes.batch), ("--seq-len", sizes.seq_len)):
            if size is not None and arguments.quantizing.data is None:
                raise SecateurError(f"{option} goes with token ids: the example inputs say all sizes")
        return given
    if not (sizes.fixed or arguments.format == "semi-structured"):
        return None
    if getattr(model, "main_input_name", "") != "input_ids":
        if sizes.batch is not None or sizes.seq_len is not None:
            raise SecateurError(f"--batch and --seq-len go with token ids, and {arguments.model} takes none")
        return None
    longest = getattr(model.config, "max_position_embeddings", None)
    length = sizes.seq_len or min(SEQ_LEN, longest or SEQ_LEN)
    if isinstance(longest, int) and length > longest:
        raise SecateurError(f"--seq-len {length}: {arguments.model} takes at most {longest} tokens")
    place = next(p.device for p in model.parameters())
    ids = torch.ones(sizes.batch or 1, length, dtype=torch.int64, device=place)
    two = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if two else {})}


def _export(model: nn.Module, example: Any, arguments: Arguments) -> dict[str, Any]:
    from secateur.ship.onnx import export_onnx
    from secateur.ship.openvino import export_openvino
    from secateur.ship.program import export_program

    common, out = arguments.common, arguments.out
    if arguments.format == "semi-structured":
        return _pack(model, example, arguments)
    options: dict[str, Any] = {"dynamic": not arguments.sizes.fixed, "overwrite": arguments.overwrite}
    options |= {"seed": common.seed, "track": common.track()}
    told: Any
    if arguments.format == "onnx":
        told = export_onnx(model, example, out, cache=arguments.cache, **options)
    elif arguments.format == "openvino":
        told = export_openvino(model, example, out, half_weights=arguments.half_weights, **options)
    else:
        told = export_program(model, example, out, **options)
    return dataclasses.asdict(told)


def _pack(model: nn.Module, example: Any, arguments: Arguments) -> dict[str, Any]:
    """Pack what is 2:4 on this GPU; what it gained is what is written."""
    common = arguments.common
    backend = arguments.backend or "cusparselt"
    _, told, measured = try_semi_structured(model, example, backend=backend, seed=common.seed, track=common.track())
    values = {"path": str(arguments.out), **dataclasses.asdict(told), **measured, "torch": torch.__version__}
    target = check_file(arguments.out, overwrite=arguments.overwrite, suffix=".json")
    with whole_files(target) as folder:
        text = json.dumps({"format": FORMAT, "kind": "semi-structured", "model": arguments.model, **values}, indent=2)
        (folder / target.name).write_text(text + "\n", encoding="utf-8")
    return values


def _int8_file(out: Path) -> Path:
    return out.with_name(f"{out.stem}_int8.onnx")


def _calibration(model: nn.Module, tokenizer: Any, arguments: Arguments) -> list[Batch] | None:
    """Batches of --data; None where there is none."""
    chosen, common, sizes = arguments.quantizing, arguments.common, arguments.sizes
    if chosen.data is None:
        return None
    return batches_of(
        model,
        batches_from(chosen.data, "--data"),
        tokenizer=tokenizer,
        samples=chosen.samples,
        seq_len=sizes.seq_len or (SEQ_LEN if sizes.fixed else None),
        batch_size=(sizes.batch or 1) if sizes.fixed else 8,
        text_field=chosen.text_field,
        split=chosen.split,
        seed=common.seed,
        track=common.track(),
    )


def _quantize(rows: list[Batch] | None, arguments: Arguments) -> dict[str, Any]:
    from secateur.ship.quantize import quantize_onnx

    chosen, common = arguments.quantizing, arguments.common
    try:
        told = quantize_onnx(
            arguments.out,
            _int8_file(arguments.out),
            mode=str(chosen.int8),
            calibration=rows,
            ranges=chosen.ranges,
            samples=chosen.samples,
            reduce_range=chosen.reduce_range,
            exclude=chosen.exclude,
            overwrite=arguments.overwrite,
            track=common.track(),
        )
    except SecateurError as error:
        raise SecateurError(f"{error}; there is no INT8 file, the float file {arguments.out} is whole") from error
    return dataclasses.asdict(told)


# --- what is shown ---


def _draw(console: Console, values: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    told = values["export"]
    if values["to"] == "semi-structured":
        _draw_packed(console, values["model"], told)
    else:
        sizes = ", ".join(_shape(next(iter(shapes.values()))) for shapes in told["checked"])
        rows = [
            ("file", told["path"]),
            ("size", bytes_text(told["bytes"])),
            *((f"input {name}", _shape(shape)) for name, shape in _some(told["inputs"]).items()),
            *((f"output {name}", _shape(shape)) for name, shape in _some(told["outputs"]).items()),
            ("largest error against torch", f"{told['max_abs_error']:.2g}"),
            ("the same, of the largest output", f"{told['max_rel_error']:.2g}"),
            ("compared on random inputs", sizes),
        ]
        table(console, f"{values['model']} as {values['to']}", ("", "value"), rows)
    if "int8" in values:
        made = values["int8"]
        rows = [
            ("file", made["path"]),
            ("size", f"{bytes_text(made['bytes_after'])} of {bytes_text(made['bytes_before'])}"),
            ("weights in INT8", f"{len(made['quantized'])}"),
            (
                "weights left in float",
                ", ".join(made["left"][:3]) + (" ..." if len(made["left"]) > 3 else "") or "none",
            ),
        ]
        table(console, f"INT8, {made['mode']}: it rounds, so measure what it costs on your data", ("", "value"), rows)
    for note in values["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if findings:
        console.print("Sizes that kernels dislike:")
    for finding in findings[:FINDINGS]:
        console.print(f"  {finding}", markup=False, soft_wrap=True)
    if len(findings) > FINDINGS:
        console.print(f"  and {len(findings) - FINDINGS} more: --json lists them")


def _draw_packed(console: Console, name: str, told: Mapping[str, Any]) -> None:
    dense, sparse = told["dense"], told["sparse"]
    rows = [
        ("weights that run as 2:4", f"{len(told['converted'])}"),
        ("their size", f"{bytes_text(told['bytes_after'])} of {bytes_text(told['bytes_before'])}"),
        ("dense, median", f"{1e3 * dense['median']:.3f} ms"),
        ("2:4, median", f"{1e3 * sparse['median']:.3f} ms"),
        ("times faster", f"{told['speedup']:.2f}"),
        ("largest error, of the largest output", f"{told['max_rel_error']:.2g}"),
        ("list", told["path"]),
    ]
    table(console, f"{name} with {told['backend']} on {told['device']}", ("", "value"), rows)
    for weight, reason in list(told["left"].items())[:FINDINGS]:
        console.print(f"dense: {weight}: {reason}", markup=False, soft_wrap=True)
    console.print("Packed weights are not stored: call secateur.ship.semi_structured.to_semi_structured after loading.")


def _some(ports: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs or outputs, of a cache the first layer alone."""
    names = [n for n in ports if not n.startswith(("past_key_values.", "present."))]
    cache = [n for n in ports if n not in names]
    shown = {name: ports[name] for name in (*names, *cache[:2])}
    if len(cache) > 2:
        shown["..."] = [f"{len(cache) - 2} more of the cache"]
    return shown


def _shape(shape: Sequence[int | str | None]) -> str:
    return " x ".join("?" if size is None else str(size) for size in shape)
