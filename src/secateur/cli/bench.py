"""``secateur bench A B ... [--onnx]``: sizes, memory and speed of several models, side by side in one run."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from secateur.cli.bench_models import Entry, Opened, check_memory, entries, open_entry, peaks
from secateur.cli.models import Making, inputs_of
from secateur.cli.options import Common, Group, parse
from secateur.cli.profile import limited_threads
from secateur.cli.tables import bytes_text, table
from secateur.errors import SecateurError, nearest
from secateur.load.functions import is_constructor
from secateur.load.place import find_device
from secateur.measure.bench import Bench, Benched, Facts, bench, check_bench_path, check_rounds
from secateur.measure.bench_facts import compressed, file_chunks, onnx_facts, torch_facts
from secateur.measure.bench_passes import (
    Load,
    default_load,
    file_load,
    file_vocabulary,
    is_language_model,
    longest_of,
    token_load,
    vocabulary_of,
)
from secateur.measure.bench_words import sentences, times
from secateur.measure.latency import Stopwatch, dtype_of
from secateur.measure.onnx import OnnxModel
from secateur.measure.ports import FileModel
from secateur.ship.onnx import export_onnx

SKIPS = ("compressed", "memory", "macs")
_FIRST = ("model", "runtime")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure several models side by side: parameters, bytes, peak memory, multiply-accumulates, latency, throughput.

    All are timed in one run, in turns, on the same inputs; the first is what the others are compared with. Of language
    models, the prefill of --seq tokens and the decoding of --decode tokens after it are timed; of others one forward
    pass. A difference that the noise of this run explains is called one.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders or hub ids of Hugging Face models; folders that were saved with a constructor; module:callable; or .onnx
    files. Others than these need --input-shape or --inputs where they are no Hugging Face models."""
    onnx: bool = False
    """Export every torch model too, and time it under ONNX Runtime in the same run."""
    batch: int | None = None
    """Rows in one pass; 1 by default."""
    seq: Annotated[int | None, tyro.conf.arg(aliases=["--seq-len"])] = None
    """Tokens of each; 256, or what the models take, by default."""
    decode: int | None = None
    """Tokens that a language model then generates with its key/value cache; 16 by default, 0 = none."""
    threads: int | None = None
    """CPU threads; as torch has it by default."""
    repeats: int = 20
    """Rounds; each times every model once."""
    seconds: float | None = None
    """No round begins after that long, once there are 3."""
    cpu_time: bool = False
    """Count the time that this process has the processor, where others run beside it; with --threads 1."""
    skip: tuple[str, ...] = ()
    """What not to measure, because it takes long: compressed, memory, macs."""
    out: Path | None = None
    """Write all figures to this file, such as bench.json."""
    overwrite: bool = False
    """Replace --out, if it is such a file."""
    common: Annotated[Common, Group] = dataclasses.field(default_factory=Common)
    making: Annotated[Making, Group] = dataclasses.field(default_factory=Making)


def run(words: Sequence[str]) -> None:
    """Run the verb."""
    arguments = parse(Arguments, "bench", words)
    if arguments.out is not None:
        check_bench_path(arguments.out, overwrite=arguments.overwrite)
    _check(arguments)
    chosen = entries(arguments.models)
    common = arguments.common
    check_memory(chosen, common.device, common.dtype, onnx=arguments.onnx)
    with limited_threads(arguments.threads, common.device), tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        found = _measured(arguments, chosen, Path(folder))
    if arguments.out is not None:
        found.save(arguments.out, overwrite=arguments.overwrite)
    values = {**found.to_json(), "out": arguments.out}
    common.show(values, lambda console: _draw(console, found, arguments.out))


def _check(arguments: Arguments) -> None:
    """What needs no model to be seen."""
    check_rounds(arguments.repeats, arguments.seconds)
    for option, least in (("batch", 1), ("seq", 1), ("decode", 0), ("threads", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise SecateurError(f"--{option} must be at least {least}, not {value}")
    for what in arguments.skip:
        if what not in SKIPS:
            raise SecateurError(f"--skip {what!r}: there is no such figure{nearest(what, SKIPS)}")
    built = [name for name in arguments.models if is_constructor(name)]
    for option in ("weights", "model_args"):
        if getattr(arguments.making, option) is not None and len(built) != 1:
            shown, count = option.replace("_", "-"), len(built)
            raise SecateurError(f"--{shown} goes with one MODEL that is module:callable, and there are {count}")
    given = arguments.making.inputs is not None or bool(arguments.making.input_shape)
    for option in ("batch", "seq", "decode"):
        if given and getattr(arguments, option) is not None:
            raise SecateurError(f"--{option} does not go with --input-shape or --inputs: their shapes say it")
    if find_device(arguments.common.device).type != "cpu":
        files = next((name for name in arguments.models if name.endswith((".onnx", ".xml"))), None)
        if arguments.onnx or files:
            raise SecateurError(
                f"{files or '--onnx'} runs on the CPU, and the device is {arguments.common.device}: times of two "
                "devices are no comparison of models"
            )


def _measured(arguments: Arguments, chosen: Sequence[Entry], folder: Path) -> Bench:
    """Open, export, time."""
    common, making, threads = arguments.common, arguments.making, torch.get_num_threads()
    where: dict[str, Any] = {"device": common.device, "dtype": common.dtype, "threads": threads}
    opened = [open_entry(entry, making, **where) for entry in chosen]
    load = _load(arguments, chosen, opened)
    notes: list[str] = []
    listed = list(zip(chosen, opened, strict=True))
    if arguments.onnx:
        for entry, model in zip(chosen, opened, strict=True):
            if entry.runtime == "torch":
                exported = _exported(entry, model, load, folder, notes)
                listed.append((exported, open_entry(exported, making, **where)))
    compress = "compressed" not in arguments.skip
    facts = [_facts(entry, model, load, compress, "macs" not in arguments.skip) for entry, model in listed]
    if "memory" not in arguments.skip:
        used, why = peaks([entry for entry, _ in listed], making, load, folder, **where)
        facts = [dataclasses.replace(own, peak_memory=peak) for own, peak in zip(facts, used, strict=True)]
        missing = [entry.name for (entry, _), peak in zip(listed, used, strict=True) if peak is None]
        if missing:
            notes.append(f"Peak memory of {', '.join(dict.fromkeys(missing))} is not known: {why}.")
    models = [
        Benched(entry.name, entry.runtime, model.passes(load), own)
        for (entry, model), own in zip(listed, facts, strict=True)
    ]
    place = find_device(common.device)
    torch_models = [model.model for model in opened if not isinstance(model.model, FileModel)]
    found = bench(
        models,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
        timer=Stopwatch(place, "process" if arguments.cpu_time else "wall"),
        device=place,
        dtype=dtype_of(torch_models[0]) if torch_models else torch.float32,
        setting=_setting(arguments, load),
        track=common.track(),
    )
    found.notes = [*sentences(found), *notes]
    return found


def _setting(arguments: Arguments, load: Load) -> dict[str, Any]:
    tensors = load.inputs if isinstance(load.inputs, dict) else {}
    given = load.inputs if isinstance(load.inputs, tuple) else ()
    shapes = {name: list(x.shape) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    shapes |= {str(i): list(x.shape) for i, x in enumerate(given) if isinstance(x, torch.Tensor)}
    return {
        "batch": load.samples,
        "seq": load.seq,
        "decode": load.decode if load.language else None,
        "inputs": shapes,
        "clock": "process" if arguments.cpu_time else "wall",
        "repeats": arguments.repeats,
        "seconds": arguments.seconds,
        "seed": arguments.common.seed,
    }


# --- what goes in ---


def _load(arguments: Arguments, chosen: Sequence[Entry], opened: Sequence[Opened]) -> Load:
    """The same inputs for all models.

    Raises:
        SecateurError: they take other inputs, or know other tokens.
    """
    first = next((m.model for m in opened if not isinstance(m.model, FileModel)), opened[0].model)
    _check_vocabularies(chosen, opened)
    given = inputs_of(first, arguments.making, chosen[0].source, needed=False)
    if given is not None:
        rows = _rows(given)
        return Load(given, rows)
    if isinstance(first, FileModel):
        made = file_load(first.path, first, batch=arguments.batch, seq=arguments.seq, decode=arguments.decode)
        if made is None:
            raise SecateurError(f"{first.path}: sizes of its inputs are open: give --input-shape 1,3,32,32")
        return made
    language = is_language_model(first)
    config: Any = getattr(first, "config", None)
    one = not getattr(config, "is_encoder_decoder", False)
    tokens = one and getattr(first, "main_input_name", None) == "input_ids" and vocabulary_of(first) is not None
    for option in ("seq", "decode"):
        if getattr(arguments, option) is not None and not (tokens if option == "seq" else language):
            raise SecateurError(f"--{option} is for language models, and {chosen[0].name} is a {type(first).__name__}")
    if tokens:
        longest = [n for m in opened if (n := longest_of(m.model)) is not None]
        return token_load(
            vocabulary_of(first) or 1,
            batch=arguments.batch,
            seq=arguments.seq,
            decode=arguments.decode,
            longest=min(longest, default=None),
            language=language,
            seed=arguments.common.seed,
        )
    if not hasattr(config, "to_dict"):
        inputs_of(first, arguments.making, chosen[0].source)  # says what is missing
    return default_load(first, arguments.batch or 1)


def _rows(given: Any) -> int:
    parts = list(given.values()) if isinstance(given, dict) else list(given) if isinstance(given, tuple) else [given]
    sizes = [len(x) for x in parts if isinstance(x, torch.Tensor) and x.dim()]
    return sizes[0] if sizes else 1


def _check_vocabularies(chosen: Sequence[Entry], opened: Sequence[Opened]) -> None:
    sizes = [file_vocabulary(m.model) if isinstance(m.model, FileModel) else vocabulary_of(m.model) for m in opened]
    known = [(entry.name, size) for entry, size in zip(chosen, sizes, strict=True) if size is not None]
    for name, size in known[1:]:
        if size != known[0][1]:
            raise SecateurError(
                f"{known[0][0]} has {known[0][1]} tokens in its vocabulary, {name} has {size}: they cannot be compared"
            )


def _exported(entry: Entry, model: Opened, load: Load, folder: Path, notes: list[str]) -> Entry:
    """The model as an ONNX file; with a key/value cache, where it can be had and is timed."""
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    cached = load.language and load.decode > 0
    try:
        export_onnx(model.model, load.inputs, path, cache=cached)
    except SecateurError as error:
        if not cached:
            raise SecateurError(f"{entry.name}: {error}") from error
        notes.append(f"{entry.name} is exported without a key/value cache, which did not go: {error}")
        export_onnx(model.model, load.inputs, path)
    return dataclasses.replace(entries([str(path)])[0], name=entry.name)


def _facts(entry: Entry, model: Opened, load: Load, compress: bool, macs: bool) -> Facts:
    """Sizes and work."""
    files = [Path(file) for file in entry.files]
    if isinstance(model.model, OnnxModel):
        feed = _feed(model.model, load) if macs else None
        return onnx_facts(model.model.path, feed, load.samples, compress=compress)
    if isinstance(model.model, FileModel):
        return Facts(bytes=entry.bytes, bytes_compressed=compressed(file_chunks(files)) if compress else None)
    return torch_facts(model.model, load.inputs, load.samples, files, compress=compress, macs=macs)


def _feed(model: OnnxModel, load: Load) -> Any:
    """Inputs as the file takes them."""
    given = load.inputs
    if isinstance(given, Mapping):
        return model.feed(**{name: value for name, value in given.items() if isinstance(value, torch.Tensor)})
    return model.feed(*(given if isinstance(given, tuple) else (torch.as_tensor(given),)))


# --- what is shown ---


def _draw(console: Console, found: Bench, out: Path | None) -> None:
    machine, setting = found.machine, found.setting
    threads = machine["threads"]
    told = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    console.print(f"{machine['device']}{told}, {machine['dtype']}, torch {machine['torch']}", markup=False)
    rows = []
    for model in found.models:
        own = model.facts
        rows.append(
            (
                model.name,
                model.runtime,
                _count(own.params),
                "-" if own.nonzero is None else f"{100 * own.zeros:.1f}%",
                _bytes(own.bytes),
                _bytes(own.bytes_compressed),
                _bytes(own.peak_memory),
                _count(own.macs),
            )
        )
    columns = (*_FIRST, "parameters", "zeros", "bytes", "compressed", "peak memory", "MACs")
    table(console, "Sizes", columns, rows)
    for what in dict.fromkeys(what for model in found.models for what in model.passes):
        table(
            console,
            _title(what, setting),
            (*_FIRST, "ms", "half between", "per second", "speed-up", "95%", "ideal", ""),
            _rows_of(found, what),
        )
    for note in found.notes:
        console.print(f"- {note}", markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"written to {out}", markup=False, soft_wrap=True)


def _title(what: str, setting: dict[str, Any]) -> str:
    batch = setting["batch"]
    if what == "prefill":
        return f"Prefill of {batch} x {setting['seq']} tokens"
    if what == "decode":
        return f"Decoding {batch} x {setting['decode']} tokens after {setting['seq']}, ms for all"
    return f"Forward pass of {batch} sample{'s' if batch > 1 else ''}"


def _rows_of(found: Bench, what: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for index, model in enumerate(found.models):
        timing, against = found.timing(index, what), found.ratio(index, what)
        if timing is None:
            continue
        ideal = found.ideal(index) if what != "decode" else None
        others = index > 0 and against is not None
        rows.append(
            (
                model.name,
                model.runtime,
                f"{1000 * timing.median:,.3f}",
                f"{1000 * timing.low:,.3f} - {1000 * timing.high:,.3f}",
                f"{model.passes[what].count / timing.median:,.1f}",
                times(against.value) if others and against else "",
                f"{against.low:.2f} - {against.high:.2f}" if others and against else "",
                times(ideal) if others and ideal else "",
                "noise" if others and against and against.within_noise else "",
            )
        )
    return rows


def _count(number: float | None) -> str:
    if number is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


def _bytes(number: int | None) -> str:
    return "-" if number is None else bytes_text(number)
