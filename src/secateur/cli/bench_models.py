"""What ``secateur bench`` measures: names and files of its models, opened here or in a process of their own."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.cli.models import Building, open_model
from secateur.errors import SecateurError
from secateur.load.built import STRUCTURE, WEIGHTS
from secateur.load.functions import is_constructor
from secateur.load.model import find_source
from secateur.load.place import find_device, find_dtype
from secateur.measure.bench import Pass
from secateur.measure.bench_facts import onnx_files
from secateur.measure.bench_memory import available, can_measure, forked, peak_memory
from secateur.measure.bench_passes import Load, file_passes, torch_passes
from secateur.measure.onnx import OnnxModel
from secateur.measure.onnx_cache import OnnxGenerator
from secateur.measure.ports import PAST, FileModel

ENDINGS = {".onnx": "onnxruntime", ".xml": "openvino"}
"""How a file is called -> the runtime that it is for."""


@dataclass(frozen=True)
class Entry:
    """A model to measure.

    Attributes:
        source: as it was given.
        name: short and unique.
        runtime: torch, onnxruntime or openvino.
        files: of its weights; none of a module:callable.
        itemsize: bytes of a number in them; None where that is not known.
    """

    source: str
    name: str
    runtime: str
    files: tuple[str, ...] = ()
    itemsize: int | None = None

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(Path(file).stat().st_size for file in self.files)


@dataclass
class Opened:
    """A model that can be called.

    Attributes:
        model: a torch module, or a file behind the call of one.
        generator: the file with its key/value cache, where it has one.
    """

    model: nn.Module
    generator: OnnxGenerator | None = None

    def passes(self, load: Load, *, keep: bool = True) -> dict[str, Pass]:
        """What is timed of it; see `torch_passes` and `file_passes`."""
        if isinstance(self.model, FileModel):
            return file_passes(self.model, load, self.generator)
        return torch_passes(self.model, load, keep=keep)


def entries(models: Sequence[str]) -> list[Entry]:
    """What the models are, and their files; nothing is loaded.

    Raises:
        SecateurError: for none, the same one twice, or one that is not there.
    """
    if not models:
        raise SecateurError("there is no model to bench: give at least one, as in secateur bench dense pruned")
    places = [model if is_constructor(model) else str(Path(model).expanduser().resolve()) for model in models]
    for model, place in zip(models, places, strict=True):
        if places.count(place) > 1:
            raise SecateurError(f"{model} is given twice: a model need not be measured against itself")
    return [_entry(model, name) for model, name in zip(models, short_names(models), strict=True)]


def _entry(source: str, name: str) -> Entry:
    path = Path(source).expanduser()
    runtime = ENDINGS.get(path.suffix)
    if runtime is not None and not path.is_dir():
        if not path.is_file():
            raise SecateurError(f"{source}: there is no such file")
        files = onnx_files(path) if runtime == "onnxruntime" else [path, path.with_suffix(".bin")]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise SecateurError(f"{source}: the file of its weights {missing.name} is missing beside it")
        return Entry(source, name, runtime, tuple(map(str, files)))
    if is_constructor(source):
        return Entry(source, name, "torch")
    if (path / STRUCTURE).is_file():
        return Entry(source, name, "torch", (str(path / WEIGHTS),) if (path / WEIGHTS).is_file() else ())
    found = find_source(source)
    return Entry(source, name, "torch", tuple(map(str, found.files)), found.dtype.itemsize if found.dtype else None)


def short_names(models: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; module:callable stays whole."""
    parts = [[m] if is_constructor(m) else list(Path(m).expanduser().parts) or [m] for m in models]
    parts = [p if p != ["."] else [Path.cwd().name] for p in parts]
    counts = [1] * len(parts)
    while True:
        names = ["/".join(p[-count:]).replace("//", "/") for p, count in zip(parts, counts, strict=True)]
        longer = [i for i, name in enumerate(names) if names.count(name) > 1 and counts[i] < len(parts[i])]
        if not longer:
            break
        for i in longer:
            counts[i] += 1
    return [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]


def open_entry(entry: Entry, making: Building, *, device: str, dtype: str | None, threads: int) -> Opened:
    """Load it.

    Raises:
        SecateurError: where it cannot be opened.
    """
    if entry.runtime == "onnxruntime":
        model = OnnxModel(entry.source, threads=threads)
        if not any(port.name.startswith(f"{PAST}.") for port in model.inputs):
            return Opened(model)
        generator = OnnxGenerator(entry.source, threads=threads)
        return Opened(generator.model, generator)
    if entry.runtime == "openvino":
        from secateur.measure.openvino import OpenvinoModel

        return Opened(OpenvinoModel(entry.source, threads=threads))
    own = making if is_constructor(entry.source) else Building()
    return Opened(open_model(entry.source, own, device=device, dtype=dtype)[0])


def check_memory(chosen: Sequence[Entry], device: str, dtype: str | None, *, onnx: bool) -> None:
    """Say before anything is loaded that the models do not fit in memory together.

    Args:
        chosen: the models; those without files are not counted.
        device: where torch models go.
        dtype: of their weights; None is their own.
        onnx: whether they are exported too: ONNX Runtime holds them again, and exporting holds them twice for a while.

    Raises:
        SecateurError: they do not fit.
    """
    place, kind = find_device(device), find_dtype(dtype)
    free = available(place)
    if free is None:
        return
    kept, besides = 0.0, 0.0
    for entry in chosen:
        if entry.runtime != "torch" and place.type != "cpu":
            continue
        ratio = (
            kind.itemsize / entry.itemsize if kind is not None and entry.itemsize and entry.runtime == "torch" else 1
        )
        size = entry.bytes * ratio
        kept += size * (2 if onnx and entry.runtime == "torch" else 1)
        besides = max(besides, size * (2 if onnx else 1))
    if kept + besides > free:
        names = ", ".join(entry.name for entry in chosen)
        raise SecateurError(
            f"{names}: loading {'them together' if len(chosen) > 1 else 'it'} needs about {_gib(kept + besides)}, and "
            f"{_gib(free)} are free on {place}: bench fewer or smaller models at once"
            + ("" if onnx or dtype is not None else ", or give --dtype bfloat16")
            + (", or leave out --onnx" if onnx else "")
        )


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"


# --- alone in a process ---


def peaks(
    chosen: Sequence[Entry], making: Building, load: Load, folder: Path, *, device: str, dtype: str | None, threads: int
) -> tuple[list[int | None], str]:
    """Peak memory of each model and its passes, each alone in a process; None where that is not known, and why.

    Args:
        chosen: the models.
        making: of those that are module:callable.
        load: what goes in.
        folder: for what the process is told.
        device: of the torch models.
        dtype: of their weights.
        threads: CPU threads.
    """
    if not can_measure(find_device(device)):
        return [None] * len(chosen), "it is read from Linux's /proc, which is not here or not open"
    inputs = load.inputs
    torch.save(dict(inputs) if isinstance(inputs, Mapping) else inputs, folder / "inputs.pt")
    job = {
        "entries": [asdict(entry) for entry in chosen],
        "making": {"weights": str(making.weights) if making.weights else None, "model_args": making.model_args},
        "load": {key: value for key, value in vars(load).items() if key != "inputs"},
        "inputs": str(folder / "inputs.pt"),
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "path": [part for part in sys.path if part],
    }
    code = "from secateur.cli.bench_models import serve; serve()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = [None] * len(chosen)
    said = done.stderr.strip().splitlines()
    why = (
        f"the process that measures it ended early ({said[-1][:300] if said else 'it was stopped: too little memory?'})"
    )
    return [size if isinstance(size, int) else None for size in found], why


def serve() -> None:
    """What that process does: a copy of itself for each model, so that what they import is imported once."""
    job = json.load(sys.stdin)
    sys.path[:] = [*sys.path, *(part for part in job["path"] if part not in sys.path)]
    chosen = [Entry(**{**values, "files": tuple(values["files"])}) for values in job["entries"]]
    if any(entry.runtime == "torch" and not is_constructor(entry.source) for entry in chosen):
        import transformers.modeling_utils  # noqa: F401 - before the copies are made
    if any(entry.runtime == "onnxruntime" for entry in chosen):
        import onnxruntime  # noqa: F401
    if any(entry.runtime == "openvino" for entry in chosen):
        import openvino  # noqa: F401
    on_gpu = not job["device"].startswith("cpu")
    if on_gpu or threading.active_count() > 1:  # neither may be copied: one after the other here
        sizes = [_peak(entry, job) for entry in chosen]
    else:
        sizes = [forked(lambda entry=entry: _peak(entry, job)) for entry in chosen]  # type: ignore[misc]
    sys.stdout.write(json.dumps(sizes) + "\n")


def _peak(entry: Entry, job: Mapping[str, Any]) -> int:
    making = Building(Path(job["making"]["weights"]) if job["making"]["weights"] else None, job["making"]["model_args"])
    torch.set_num_threads(job["threads"])
    load = Load(inputs=torch.load(job["inputs"], weights_only=True), **job["load"])

    def make() -> Any:
        opened = open_entry(entry, making, device=job["device"], dtype=job["dtype"], threads=job["threads"])

        def run() -> None:
            for own in opened.passes(load, keep=False).values():
                own()

        return run

    return peak_memory(make, torch.device(job["device"]))
