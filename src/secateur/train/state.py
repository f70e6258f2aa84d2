"""The state of a training run: taken and put back bit for bit, and kept in a folder from which a killed run goes on."""

import contextlib
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.train import shared_state
from secateur.train.sharded import local

FORMAT = 1
Tensors = dict[str, torch.Tensor]


def trained(model: nn.Module, extra: nn.Module | None = None) -> Tensors:
    """Copies, on the CPU, of what training changes: parameters that take gradients, and buffers.

    Of a model that is spread over processes, what this one holds.
    """
    found = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    found |= {f"buffer.{name}": b for name, b in model.named_buffers()}  # type: ignore[misc]  # tensors all
    found |= {f"extra.{name}": p for name, p in extra.named_parameters()} if extra is not None else {}
    return {name: local(tensor.detach()).cpu().clone() for name, tensor in found.items()}


@torch.no_grad()
def put_back(tensors: Mapping[str, torch.Tensor], model: nn.Module, extra: nn.Module | None = None) -> None:
    """Undo all that happened since `trained` took these."""
    places: dict[str, torch.Tensor] = {f"model.{name}": p for name, p in model.named_parameters()}
    places |= {f"buffer.{name}": b for name, b in model.named_buffers()}
    places |= {f"extra.{name}": p for name, p in extra.named_parameters()} if extra is not None else {}
    for name, tensor in tensors.items():
        local(places[name]).copy_(tensor)


def random_state() -> dict[str, Any]:
    """Where the random numbers of torch, NumPy and Python stand."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put them back."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed; the caller's go on as before afterwards."""
    before = random_state()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        set_random_state(before)


class Keeper:
    """Keeps the state of a run in a folder; without one it only holds the best weights in memory.

    Attributes:
        folder: where; None = nowhere.
        best: the best weights until now; None where they are on disk or there are none.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Take the folder and what makes the run this one.

        Args:
            folder: of the run; made when something is saved.
            identity: settings, and fingerprints of models and data, as JSON values: a run goes on only where all of
                them are equal.
        """
        self.folder, self._identity = folder, json.loads(json.dumps(identity))
        self.best: Tensors | None = None

    def found(self) -> dict[str, Any] | None:
        """The state of this run where one is kept.

        Raises:
            SecateurError: The state is of another run; the first difference is named.
        """
        if self.folder is None:
            return None
        one, many = self.folder / "state.pt", shared_state.latest(self.folder)
        state: dict[str, Any] = self._read("state.pt", plain=False) if one.exists() else {}
        if many is not None and shared_state.step_of(many) > state.get("step", -1):
            state = shared_state.load_run(many)
        world.check_same(state.get("step"), f"the step of the state in {self.folder}")
        if not state:
            return None
        if state.get("format") != FORMAT:
            raise SecateurError(
                f"{self.folder}: this state is of format {state.get('format')}, not {FORMAT}: remove it"
            )
        theirs = state["identity"]
        for key in dict.fromkeys([*self._identity, *theirs]):
            if self._identity.get(key) != theirs.get(key):
                raise SecateurError(
                    f"{self.folder} holds a run that was cut off, with {key} {_short(theirs.get(key))}, and this one "
                    f"has {_short(self._identity.get(key))}: run it as it was, or remove that folder to begin anew"
                )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state of the run; the one before stays until this one is whole."""
        if self.folder is not None:
            self._write("state.pt", self.named(state))
            shared_state.forget(self.folder, best=state["best_step"])

    def named(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state that says what run it is of."""
        return {"format": FORMAT, "identity": self._identity, **state}

    def save_best(self, tensors: Tensors) -> None:
        """Keep the best weights."""
        if self.folder is None:
            self.best = tensors
        else:
            self._write("best.pt", tensors)

    def load_best(self) -> Tensors:
        """The best weights."""
        if self.folder is None:
            return self.best or {}
        return self._read("best.pt", plain=True)  # type: ignore[no-any-return]

    def tell(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write what was measured until now, a JSON object in each line of metrics.jsonl."""
        if self.folder is not None and world.first():
            text = "".join(f"{json.dumps(entry)}\n" for entry in history)
            self._replace("metrics.jsonl", lambda file: file.write(text.encode()))

    def _read(self, name: str, *, plain: bool) -> Any:
        path = (self.folder or Path()) / name
        try:
            return torch.load(path, map_location="cpu", weights_only=plain)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise SecateurError(
                f"{path}: the state of the run cannot be read, the file is damaged ({type(error).__name__}): remove "
                "that folder to begin anew"
            ) from error

    def _write(self, name: str, content: Any) -> None:
        self._replace(name, lambda file: torch.save(content, file))

    def _replace(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Write a file whole or not at all."""
        folder = self.folder or Path()
        hidden = folder / f".{name}.new"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with hidden.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            hidden.replace(folder / name)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            with contextlib.suppress(OSError):
                hidden.unlink(missing_ok=True)
            why = " ".join(str(error).split())[:300]
            raise SecateurError(
                f"{folder}: the state of the run cannot be saved ({why}); the one saved before is still there: make "
                "room and run it again, and it goes on from there"
            ) from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
