"""Teachers: a model that is asked batch by batch, or what it said once, on disk."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, run, size_of
from secateur.load.feed import Given, Rows
from secateur.load.mode import evaluating
from secateur.load.predictions import predictions
from secateur.progress import Track, quiet
from secateur.score.fisher import are_logits, outputs_and_kind
from secateur.train.features import watching
from secateur.train.losses import Signal, signal_of
from secateur.train.shares import rounds

FORMAT = 1
CACHED_TOP_K = 64
_SAVED_EVERY = 64  # batches between the points from which an interrupted cache goes on


@dataclass(frozen=True)
class Said:
    """What a teacher says of a batch.

    Attributes:
        signal: of its predictions; None where its outputs are no logits.
        output: its outputs [P, D], where they are no logits.
        features: of the modules that were watched.
        attentions: of every layer, [B, heads, Q, K], where they were asked for.
        counts: predictions of each row of the batch.
    """

    signal: Signal | None
    output: torch.Tensor | None = None
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    attentions: Sequence[torch.Tensor] = ()
    counts: Sequence[int] = ()


class Teacher(Protocol):
    """Says what it thinks of batches."""

    @property
    def temperature(self) -> float:
        """That its signals are taken at."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What must be the same when a run goes on; JSON values."""
        ...

    def says(self, batch: Batch, numbers: tuple[int, ...] | None, paths: Sequence[str], *, attention: bool) -> Said:
        """What it says of a batch, whose rows have these numbers."""
        ...


def forward(model: nn.Module, batch: Batch, *, attention: bool = False) -> tuple[torch.Tensor, bool, Sequence[Any]]:
    """Outputs of a model, whether they are logits, and its attention where that is asked for."""
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if attention:
        name = str(getattr(model, "main_input_name", "input_ids"))
        named = (
            dict(batch)
            if isinstance(batch, Mapping)
            else {name: batch[0] if isinstance(batch, tuple | list) else batch}
        )
        batch = {**named, "output_attentions": True}
    result = run(model, batch, labels=decodes)
    output, said = outputs_and_kind(result)
    found = getattr(result, "attentions", None) or () if attention else ()
    if attention and not all(isinstance(one, torch.Tensor) for one in found or [None]):
        raise SecateurError(f"{type(model).__name__} gives no attention: leave the attention loss out")
    return output, are_logits(batch, said=said), found


class Live:
    """A model that is asked for every batch."""

    def __init__(self, model: nn.Module, temperature: float, top_k: int | None, who: Mapping[str, Any]) -> None:
        """Take the model, and what identifies it; it runs in evaluation mode and is not changed."""
        self.temperature, self._top_k = temperature, top_k
        self._model = model
        self.identity: Mapping[str, Any] = {**who, "temperature": temperature, "top_k": top_k}

    @torch.no_grad()
    def says(self, batch: Batch, numbers: tuple[int, ...] | None, paths: Sequence[str], *, attention: bool) -> Said:
        """Run it."""
        del numbers
        seen: AbstractContextManager[dict[str, torch.Tensor]] = (
            watching(self._model, paths) if paths else nullcontext({})
        )
        # The student's precision is not the teacher's.
        device = next((p.device.type for p in self._model.parameters()), "cpu")
        with evaluating(self._model), torch.autocast(device, enabled=False), seen as features:
            output, logits, attentions = forward(self._model, batch, attention=attention)
        found = predictions(self._model, batch, output)
        rows = found.some(slice(None))
        if not bool(torch.isfinite(rows).all()):
            raise SecateurError("the teacher's outputs are not finite: check its weights, the data and teacher_dtype")
        if not logits:
            return Said(None, rows, features, attentions)
        size = size_of(batch)
        places = torch.arange(len(found.rows)) if found.places is None else found.places.cpu()
        counts = torch.bincount(places // max(1, len(found.rows) // size), minlength=size).tolist()
        return Said(signal_of(rows, self.temperature, self._top_k), None, features, attentions, counts)


class Cached:
    """What a teacher said of the rows of a feed, kept on disk: log probabilities of its k largest logits.

    Attributes:
        meta: what the folder says of itself.
    """

    def __init__(self, folder: Path) -> None:
        """Open a cache that is whole.

        Raises:
            SecateurError: There is none, or it is of another version.
        """
        self.meta = read_meta(folder)
        count, k, wanted = self.meta["predictions"], self.meta["width"], self.meta["wanted"]
        try:
            self._offsets = np.load(folder / "offsets.npy")
            self._places = {number: i for i, number in enumerate(np.load(folder / "numbers.npy").tolist())}
            self._logs = _mapped(folder / "logs.f16", np.float16, (count, k))
            self._which = _mapped(folder / "which.i32", np.int32, (count, k))
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(folder) from error
        self.temperature, self._classes = float(wanted["temperature"]), int(self.meta["classes"])
        self.identity: Mapping[str, Any] = {**wanted, "cached": True}

    def lacks(self, numbers: Iterable[int]) -> int:
        """How many of these rows are not there."""
        return sum(number not in self._places for number in numbers)

    def says(self, batch: Batch, numbers: tuple[int, ...] | None, paths: Sequence[str], *, attention: bool) -> Said:
        """Look it up."""
        del batch, paths, attention
        parts = [slice(*self._offsets[self._places[number] :][:2]) for number in numbers or ()]
        logs = torch.from_numpy(np.concatenate([self._logs[part] for part in parts]))
        if logs.shape[-1] == self._classes:  # all of them, in order
            return Said(Signal(logs, self._classes))
        which = torch.from_numpy(np.concatenate([self._which[part] for part in parts]))
        return Said(Signal(logs, self._classes, which))


def read_meta(folder: Path) -> dict[str, Any]:
    """What a whole cache says of itself.

    Raises:
        SecateurError: There is none in the folder, or it is of another version.
    """
    path = folder / "meta.json"
    if not path.exists():
        raise SecateurError(f"{folder}: no cache of a teacher's logits is there: give the teacher, and it is made")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder) from error
    if meta.get("format") != FORMAT:
        raise SecateurError(f"{folder}: this cache is of format {meta.get('format')}, not {FORMAT}: remove it")
    return meta


def _mapped(path: Path, kind: type, shape: tuple[int, int]) -> Any:
    """A file as an array that is read where it is looked at."""
    if path.stat().st_size != shape[0] * shape[1] * np.dtype(kind).itemsize:
        raise ValueError(f"{path.name} is too short or too long")
    return np.memmap(path, dtype=kind, mode="r", shape=shape) if shape[0] else np.zeros(shape, dtype=kind)


def _damaged(folder: Path) -> SecateurError:
    return SecateurError(f"{folder}: this cache of a teacher is damaged: remove it, and it is made again")


def cache(
    model: nn.Module,
    feed: Rows | Given,
    numbers: Sequence[int],
    folder: Path,
    wanted: Mapping[str, Any],
    *,
    batch_size: int,
    track: Track = quiet,
) -> Cached:
    """Ask a teacher about rows once and keep what it says; what was interrupted goes on where it was.

    Several processes share the rows, and the first one writes.

    Args:
        model: the teacher.
        feed: that the rows are of.
        numbers: of the rows.
        folder: to write; it is there once it is whole.
        wanted: what the cache must say of itself: ``teacher``, its ``params``, ``data``, ``temperature`` and ``top_k``;
            JSON values.
        batch_size: rows that are asked about at once.
        track: shows progress.

    Raises:
        SecateurError: for outputs that are no logits, or a folder that cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        writer = None
        if world.first():
            partial.mkdir(parents=True, exist_ok=True)
            writer = _Writer(partial, wanted)
        done = world.from_first(lambda: 0 if writer is None else writer.done)
        groups = [numbers[i : i + batch_size] for i in range(done, len(numbers), batch_size)]
        mine = rounds(len(groups))
        live = Live(model, wanted["temperature"], wanted["top_k"], {})
        with nullcontext() if writer is None else writer:
            for index, group in enumerate(track([groups[number] for number, _ in mine], "the teacher's logits")):
                asked = _asked(live, feed, group)
                for found in world.gathered(asked if mine[index][1] else []):
                    for signal, of_rows in found:
                        if writer is not None:
                            writer.add(signal, of_rows)
                if index % _SAVED_EVERY == _SAVED_EVERY - 1 and writer is not None:
                    writer.save()
        if writer is not None:
            writer.finish(numbers)
            partial.rename(folder)
    except OSError as error:
        raise SecateurError(f"{folder}: the teacher's logits cannot be kept there ({error})") from error
    world.gathered(None)  # it is there once the first process is here
    return Cached(folder)


def _asked(live: Live, feed: Rows | Given, group: Sequence[int]) -> list[tuple[Signal, Sequence[int]]]:
    """What a teacher says of some rows, or batches; with how many predictions each has."""
    found: list[tuple[Signal, Sequence[int]]] = []
    for batch in [feed.rows(group)] if isinstance(feed, Rows) else [feed.given[n] for n in group]:
        said = live.says(batch, None, (), attention=False)
        if said.signal is None:
            raise SecateurError("only logits are cached, and the teacher's outputs are none")
        signal = said.signal if world.size() == 1 else said.signal.at(torch.device("cpu"))
        found.append((signal, said.counts if isinstance(feed, Rows) else [sum(said.counts)]))
    return found


class _Writer:
    """Appends what a teacher says to files, and knows how far it has come."""

    def __init__(self, folder: Path, wanted: Mapping[str, Any]) -> None:
        self._folder, self._wanted = folder, dict(wanted)
        path = folder / "progress.json"
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if state.get("wanted") != self._wanted:
            shutil.rmtree(folder)
            folder.mkdir()
            state = {"offsets": [0], "width": 0, "classes": 0}
        self._offsets: list[int] = state["offsets"]
        self._width, self._classes = int(state["width"]), int(state["classes"])
        self._files: list[Any] = []

    @property
    def done(self) -> int:
        """Rows that are safe."""
        return len(self._offsets) - 1

    def __enter__(self) -> None:
        for name, size in (("logs.f16", 2), ("which.i32", 4)):
            file = (self._folder / name).open("ab")
            file.truncate(self._offsets[-1] * self._width * size)
            self._files.append(file)

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, signal: Signal, counts: Sequence[int]) -> None:
        """Append what was said of rows that have so many predictions each."""
        which, logs = signal.which, signal.logs
        if which is None:
            which, logs = torch.arange(logs.shape[-1]).expand(logs.shape), logs.float().log_softmax(-1)
        self._width, self._classes = logs.shape[-1], signal.classes
        self._files[0].write(logs.cpu().numpy().astype(np.float16).tobytes())
        self._files[1].write(which.cpu().numpy().astype(np.int32).tobytes())
        for count in counts:
            self._offsets.append(self._offsets[-1] + count)

    def save(self) -> None:
        """Make what was written safe."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = {"wanted": self._wanted, "offsets": self._offsets, "width": self._width}
        state |= {"classes": self._classes}
        replace_text(self._folder / "progress.json", json.dumps(state))

    def finish(self, numbers: Sequence[int]) -> None:
        """Say that it is whole."""
        np.save(self._folder / "offsets.npy", np.array(self._offsets, dtype=np.int64))
        np.save(self._folder / "numbers.npy", np.array(numbers, dtype=np.int64))
        meta = {"format": FORMAT, "wanted": self._wanted, "width": self._width, "classes": self._classes}
        meta["predictions"] = self._offsets[-1]
        (self._folder / "progress.json").unlink(missing_ok=True)
        replace_text(self._folder / "meta.json", json.dumps(meta, indent=1))


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    hidden = path.with_name(f".{path.name}.new")
    hidden.write_text(text, encoding="utf-8")
    hidden.replace(path)
