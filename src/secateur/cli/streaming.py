"""Models larger than memory on the command line: when they are streamed, and the folder that a run goes on from."""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from secateur import world
from secateur.choose.budget import Budget, parse_limit
from secateur.cli import tables
from secateur.cli.options import Interrupted
from secateur.errors import SecateurError
from secateur.files import read_json, write_json
from secateur.load.batches import Batch
from secateur.load.built import STRUCTURE
from secateur.load.functions import is_constructor
from secateur.load.model import Source, check_finite, find_source, fingerprint_data
from secateur.load.place import find_dtype
from secateur.load.shards import Shard, writing
from secateur.load.store import store_of
from secateur.measure.bench_memory import available
from secateur.methods.reporting import provenance
from secateur.methods.streaming import check_streams, file_system, needs
from secateur.ship.checkpoint import json_values

_RUN, _LOCK = "run.json", "lock"
_MMAP_THRESHOLD = -3
"""What glibc calls M_MMAP_THRESHOLD."""
_GIVEN_BACK, _KEPT = 1 << 20, 32 << 20
"""Bytes of it while a model is streamed, and afterwards: the most that glibc raises it to."""
_PROGRAM = 64 * 2**20
"""What the program still loads and makes after the start: modules, traces, a report."""
_TIMES = 3
"""A run in memory has the dense model, the pruned one, and what they are decided by."""


@dataclasses.dataclass(frozen=True)
class Streaming:
    """For a model that does not fit in memory."""

    stream: bool = False
    """Leave the weights in their files and go through the model block by block. Without it and --no-stream, that is
    done where three times the weights exceed the memory that may be used. A run that is stopped goes on when the same
    command is given again: what it has finished is in OUT.streaming until then."""
    no_stream: bool = False
    """Load the model whole, whatever its size."""
    max_memory: str | None = None
    """Memory that may be used, such as 6GiB; what is free at the start by default."""
    restart: bool = False
    """Begin a streamed run anew, and remove what an unfinished one has left in OUT.streaming."""


@dataclasses.dataclass
class Streamed:
    """A run that is streamed.

    Attributes:
        folder: OUT.streaming.
        limit: bytes that may be used; None where nothing tells.
        asked: whether the user said how many.
        source: of the model.
    """

    folder: Path
    limit: int | None
    asked: bool
    source: Source
    _begun: float = dataclasses.field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def running(
        self,
        model: nn.Module,
        budget: Budget,
        method: str,
        settings: Mapping[str, Any],
        data: Mapping[str, Sequence[Batch] | None],
    ) -> Iterator[None]:
        """Check all that a run needs, then let it run; what it has finished stays where it is cut off.

        Args:
            model: streamed.
            budget: of the run.
            method: its name.
            settings: all else that decides the result.
            data: batches, by what they are for: ``calibration`` and others.

        Raises:
            SecateurError: An unfinished run of other settings is there; the disk or the memory is too small; a weight
                is not finite.
            Interrupted: The user stopped it.
        """
        identity = {**_files(self.source), "method": method, "budget": str(budget), **settings}
        identity |= {f"{what} data": None if rows is None else _fingerprint(rows) for what, rows in data.items()}
        identity = json.loads(json.dumps(json_values(identity)))
        _check_same(self.folder, identity)
        self._check_room(model, budget, method, data["calibration"] or [], str(settings.get("mend") or "least_squares"))
        try:
            with _alone(self.folder):
                try:
                    if not _check_same(self.folder, identity):
                        check_finite(model, self.source.name)
                        write_json(self.folder / _RUN, identity)
                    yield
                finally:
                    _pieces_from(_KEPT)
                    if self.folder.is_dir() and {p.name for p in self.folder.iterdir()} <= {_RUN, _LOCK}:
                        shutil.rmtree(self.folder)
        except KeyboardInterrupt:
            raise Interrupted(
                f"what is finished is in {self.folder}: give the same command again, and it goes on"
            ) from None

    def _check_room(self, model: nn.Module, budget: Budget, method: str, rows: Sequence[Batch], mend: str) -> None:
        """Say what is needed; raise SecateurError where it is not there."""
        store = store_of(model)
        if store is None:
            raise ValueError("the model is not streamed")
        found = needs(model, store, self.source, budget, method, rows, mend)
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        disk = max(0, found.all_disk - there)
        above = next(p for p in self.folder.absolute().parents if p.exists())
        free = shutil.disk_usage(above).free
        place = file_system(above)
        shown = ", ".join(f"{what} {tables.bytes_text(size)}" for what, size in found.disk.items())
        if disk > free:
            raise SecateurError(
                f"{self.folder}: this run needs up to {tables.bytes_text(disk)} more on the file system {place} "
                f"({shown}, and a margin), and {tables.bytes_text(free)} are free: give another --out, "
                "fewer --samples, or make room"
            )
        least = _resident() + _PROGRAM + found.all_memory
        if self.limit is not None and least > self.limit:
            parts = ", ".join(f"{what} {tables.bytes_text(size)}" for what, size in found.memory.items())
            given = "--max-memory gives" if self.asked else "there are"
            raise SecateurError(
                f"this run needs {tables.bytes_text(least)} of memory at least ({parts}, and what the program itself "
                f"takes), and {given} {tables.bytes_text(self.limit)}: give more, or a smaller --batch-size or "
                "--seq-len"
            )
        _tell(
            f"streamed from {self.source.name}: needs up to {tables.bytes_text(disk)} of disk on {place}, which has "
            f"{tables.bytes_text(free)} free, and about {tables.bytes_text(least)} of memory"
        )

    def told(self, *models: nn.Module) -> dict[str, Any]:
        """What the report tells of it.

        Args:
            models: the dense model, and what was made of it.
        """
        stores = {id(store): store for model in models if (store := store_of(model)) is not None}.values()
        blocks = [unit for unit in next(iter(stores)).units if unit.rpartition(".")[2].isdecimal()]
        return {
            "blocks": len(blocks),
            "bytes_read": sum(store.read for store in stores),
            "bytes_written": sum(store.written for store in stores),
            "activations": sum(path.stat().st_size for path in self.folder.rglob("acts-*.bin")),
            "seconds": time.perf_counter() - self._begun,
            "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "max_memory": self.limit if self.asked else None,
        }

    def finish(self) -> None:
        """Remove what only an unfinished run needs."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def streamed(
    options: Streaming,
    name: str,
    out: Path,
    *,
    method: str,
    budget: Budget,
    settings: Mapping[str, Any],
    device: str,
    dtype: str | None,
) -> Streamed | None:
    """Whether a run is streamed, as the user says or by the size of the model; nothing is loaded.

    Args:
        options: of the user.
        name: MODEL.
        out: --out.
        method: its name.
        budget: of the run.
        settings: for `check_streams`.
        device: where the weights go.
        dtype: that they are computed in; None is the checkpoint's own.

    Raises:
        SecateurError: Options contradict each other, or the model, device, method or an option of it cannot be
            streamed.
    """
    most = _checked(options)
    whole = _why_not(name, device)
    if whole is not None and options.stream:
        raise SecateurError(f"--stream is for Hugging Face model folders and hub ids: {name} is {whole}")
    if options.stream:
        check_streams(method, settings, budget)
    folder = out.expanduser().with_name(f"{out.name}.streaming")
    source, free = None, available(torch.device("cpu"))
    limit = most if most is not None else None if free is None else free + _resident()
    if whole is None and not options.no_stream:
        source = find_source(name)
        if not options.stream:
            why = "an unfinished run is there" if (folder / _RUN).is_file() else _too_large(_size(source, dtype), limit)
            source = source if why is not None and _can(why, method, settings, budget) else None
    if source is None:
        if options.restart:
            raise SecateurError("--restart is for a streamed run, and this one is not: add --stream, or leave it out")
        return None
    if options.restart and folder.exists():
        _check_ours(folder)
        with _alone(folder):
            shutil.rmtree(folder)
    _clean(out)
    _pieces_from(_GIVEN_BACK)
    return Streamed(folder, limit, most is not None, source)


def _pieces_from(size: int) -> None:
    """Have glibc give pieces of so many bytes back when they are freed; it would keep them, in ever more fragments.

    By itself it raises that size as it sees such pieces freed.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_MMAP_THRESHOLD, size)


def _checked(options: Streaming) -> int | None:
    """Bytes of memory that the user gives; raises SecateurError for options that contradict each other."""
    if options.stream and options.no_stream:
        raise SecateurError("--stream and --no-stream contradict each other: give one of them")
    if options.no_stream and options.max_memory is not None:
        raise SecateurError("--max-memory decides whether a model is streamed, and --no-stream says it: give one")
    return None if options.max_memory is None else _memory(options.max_memory)


def _can(why: str, method: str, settings: Mapping[str, Any], budget: Budget) -> bool:
    """Whether a run that should be streamed can be; what is done is said."""
    try:
        check_streams(method, settings, budget)
    except SecateurError as error:
        _tell(f"{why}, but the run cannot be streamed, so the model is loaded whole: {error}")
        return False
    _tell(f"{why}: the weights stay in their files (--no-stream loads them)")
    return True


def _too_large(size: int, limit: int | None) -> str | None:
    """Why a model of so many bytes is streamed; None if it is not."""
    if limit is None or _TIMES * size <= limit:
        return None
    return (
        f"{_TIMES} times the weights ({tables.bytes_text(size)}) exceed the {tables.bytes_text(limit)} of memory that "
        "may be used"
    )


def _why_not(name: str, device: str) -> str | None:
    """What a model is that cannot be streamed; None for one that can."""
    if is_constructor(name):
        return "built by a function"
    if (Path(name).expanduser() / STRUCTURE).is_file():
        return "saved with a constructor"
    if device != "cpu":
        return f"to go to --device {device}, and models are streamed on the cpu only, for now"
    if world.size() > 1:
        return f"for {world.size()} processes, and models are streamed in one process only, for now"
    return None


def _memory(text: str) -> int:
    try:
        found = parse_limit("memory", text)
    except SecateurError as error:
        raise SecateurError(str(error).replace("budget memory=", "--max-memory ")) from error
    if found.share:
        raise SecateurError(f"--max-memory {text}: must be a number of bytes, such as 6GiB")
    return int(found.value)


def _size(source: Source, dtype: str | None) -> int:
    """Bytes of the weights, as they are computed with."""
    kind = find_dtype(dtype) or source.dtype or torch.float32
    entries = [entry for path in source.files for entry in Shard(path).entries.values()]
    return sum(size // own.itemsize * kind.itemsize for own, _, _, size in entries)


def _resident() -> int:
    """Bytes of memory that this process has now."""
    path = Path("/proc/self/statm")
    if not path.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(path.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def _tell(text: str) -> None:
    Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(text, markup=False)


# --- what a run goes on from ---


def _files(source: Source) -> dict[str, Any]:
    """What a run depends on beside its settings: versions, and the files of the model, known by all but their data."""
    versions = provenance()["made"]["versions"]
    found: dict[str, Any] = {name: versions.get(name) for name in ("secateur", "torch", "transformers")}
    found["number of threads"] = torch.get_num_threads()
    config = None if source.folder is None else source.folder / "config.json"
    for path in [*source.files, *([] if config is None else [config])]:
        seen = path.stat()
        with path.open("rb") as file:
            start = file.read(8)
            head = start + file.read(int.from_bytes(start, "little") if path != config else -1)
        digest = hashlib.sha256(head).hexdigest()[:12]
        found[f"file {path.name}"] = f"{seen.st_size:,} bytes of {seen.st_mtime_ns} ({digest})"
    return found


def _fingerprint(rows: Sequence[Batch]) -> str:
    plain = [{str(i): x for i, x in enumerate(row)} if isinstance(row, tuple | list) else row for row in rows]
    return fingerprint_data(plain)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; a process that is killed lets them in."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SecateurError(
                f"{folder}: another run is at work there: wait for it, or give another --out"
            ) from error
        except OSError as error:
            _tell(f"{folder}: cannot be locked ({error.strerror}): see that no other run has the same --out")
        yield


def _check_ours(folder: Path) -> None:
    """Raise SecateurError for a folder (or file) that no streamed run has made."""
    if not folder.exists() or (folder / _RUN).is_file():
        return
    if not folder.is_dir() or any(p.name != _LOCK and not p.name.startswith(f".{_RUN}") for p in folder.iterdir()):
        raise SecateurError(f"{folder}: is in the way, and is no folder of a streamed run; remove it or rename --out")


def _unfinished(folder: Path) -> Mapping[str, Any] | None:
    """What a run was told that has left something; None where there is none."""
    _check_ours(folder)
    if not (folder / _RUN).is_file():
        return None
    try:
        found = read_json(folder / _RUN, "record of an unfinished run")
    except SecateurError as error:
        raise SecateurError(f"{error}; begin anew with --restart") from error
    if not isinstance(found, dict):
        raise SecateurError(f"{folder / _RUN}: is no record of a run; begin anew with --restart")
    return found


def _check_same(folder: Path, new: Mapping[str, Any]) -> bool:
    """Whether there is an unfinished run; raise SecateurError for the first thing that it had otherwise."""
    old = _unfinished(folder)
    if old is None:
        return False
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            raise SecateurError(
                f"{folder} has an unfinished run, and {name} has changed: it was {old.get(name)}, and is now "
                f"{new.get(name)}; run it as it was, or begin anew with --restart"
            )
    return True


def _clean(out: Path) -> None:
    """Remove hidden folders of runs that were killed while they saved."""
    target = out.expanduser().resolve()
    for path in target.parent.glob(f".*{target.name}.partial-*") if target.parent.is_dir() else ():
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and not _runs(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
