"""The state of a run on several processes: each writes its part, and any number of them goes on from it.

The tensors are in the format of torch.distributed.checkpoint, in a folder ``state-STEP`` (the best weights in
``best-STEP``); beside them, in ``run.pt``, what is the same for all. A folder has its name only once it is whole.
"""

import contextlib
import importlib
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.train.sharded import local, local_of

RUN = "run.pt"
_STATE, _BEST = "state-", "best-"
Optimizers = Sequence[torch.optim.Optimizer]


def latest(folder: Path) -> Path | None:
    """The last whole state in the folder of a run."""
    steps = [int(path.name.removeprefix(_STATE)) for path in folder.glob(f"{_STATE}*")]
    return folder / f"{_STATE}{max(steps)}" if steps else None


def step_of(state: Path) -> int:
    """The step that a state is of."""
    return int(state.name.removeprefix(_STATE))


def best_of(folder: Path, step: int) -> Path | None:
    """The weights of a step, where several processes have kept them."""
    path = folder / f"{_BEST}{step}"
    return path if path.is_dir() else None


def forget(folder: Path, step: int | None = None, best: int | None = None) -> None:
    """Remove all states but that of a step, all best weights but those of one, and what was never finished."""
    for path in [*folder.glob(f".{_STATE}*"), *folder.glob(f".{_BEST}*")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_STATE}*"):
        if path.name != f"{_STATE}{step}":
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_BEST}*"):
        if path.is_dir() and path.name != f"{_BEST}{best}":
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints() -> Any:
    return importlib.import_module("torch.distributed.checkpoint")


# --- writing ---


def save_state(
    folder: Path, state: Mapping[str, Any], model: nn.Module, extra: nn.Module | None, optimizers: Optimizers
) -> None:
    """Write the state of a run; the one before stays until this one is whole.

    Args:
        folder: of the run, the same file system for all processes.
        state: what is not a tensor of the others; that of the first process is written.
        model: whose weights are written.
        extra: what is trained beside it.
        optimizers: whose state is written.

    Raises:
        SecateurError: It cannot be written.
    """
    tensors = _weights(model, extra) | _known(model, extra, optimizers)
    _write(folder, f"{_STATE}{state['step']}", tensors, state)

    def clear() -> None:
        forget(folder, state["step"], state["best_step"])
        (folder / "state.pt").unlink(missing_ok=True)

    world.from_first(clear)


def save_best(folder: Path, step: int, model: nn.Module, extra: nn.Module | None) -> None:
    """Write the weights of a step. Older ones stay until a state is written that does without them."""
    _write(folder, f"{_BEST}{step}", _weights(model, extra), {})


def _write(folder: Path, name: str, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a folder whole or not at all."""
    dcp = _checkpoints()
    hidden, target = folder / f".{name}.new", folder / name

    def begin() -> None:
        with _writing(folder):
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)

    def end() -> None:
        with _writing(folder, hidden):
            with (hidden / RUN).open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.rmtree(target)
            hidden.rename(target)

    world.from_first(begin)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(hidden, sync_files=True))
    except dcp.api.CheckpointException as error:
        if world.first():
            shutil.rmtree(hidden, ignore_errors=True)
        first = next(iter(error.failures.values()))[0]
        raise _unsaved(folder, first) from error
    world.from_first(end)
    seen = target.is_dir()
    world.check_all(None if seen else f"{target} is written and not seen: all processes need one file system for it")


@contextlib.contextmanager
def _writing(folder: Path, hidden: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        raise _unsaved(folder, error) from error


def _unsaved(folder: Path, error: BaseException) -> SecateurError:
    why = " ".join(str(error).split())[:300]
    return SecateurError(
        f"{folder}: the state of the run cannot be saved ({why}); the one saved before is still there: make room and "
        "run it again, and it goes on from there"
    )


def _weights(model: nn.Module, extra: nn.Module | None) -> dict[str, torch.Tensor]:
    """What training changes, as `state.trained` names it; the tensors themselves."""
    found: dict[str, Any] = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    found |= {f"buffer.{name}": b for name, b in model.named_buffers()}
    found |= {f"extra.{name}": p for name, p in extra.named_parameters()} if extra is not None else {}
    return {name: tensor.detach() for name, tensor in found.items()}


def _owned(model: nn.Module, extra: nn.Module | None, optimizers: Optimizers) -> dict[str, tuple[Any, nn.Parameter]]:
    """The parameters of the optimisers: ``optimizer.NUMBER.NAME`` -> (optimiser, parameter)."""
    names = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    names |= {id(p): f"extra.{name}" for name, p in extra.named_parameters()} if extra is not None else {}
    return {
        f"optimizer.{number}.{names[id(p)]}": (optimizer, p)
        for number, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _known(model: nn.Module, extra: nn.Module | None, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """What optimisers know of their parameters."""
    found = {}
    for name, (optimizer, p) in _owned(model, extra, optimizers).items():
        for key, value in optimizer.state[p].items() if p in optimizer.state else ():
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = value.detach()
    return found


# --- reading ---


def load_run(state: Path) -> dict[str, Any]:
    """What of a state is the same for all processes.

    Raises:
        SecateurError: It cannot be read.
    """
    with _readable(state):
        return {**torch.load(state / RUN, map_location="cpu", weights_only=False), "shards": state}


def restore(state: Mapping[str, Any], model: nn.Module, extra: nn.Module | None, optimizers: Optimizers) -> None:
    """Put back the tensors of a state, whatever number of processes has written it and reads it.

    Args:
        state: as `state.Keeper.found` gives it.
        model: as it was then.
        extra: likewise.
        optimizers: likewise, new ones.

    Raises:
        SecateurError: It cannot be read.
    """
    owned = _owned(model, extra, optimizers)
    if "shards" not in state:
        put_whole(state["tensors"], model, extra)
        _put_known(state["optimizers"], optimizers)
        return
    places = _weights(model, extra)
    for key, (shape, dtype) in _shapes(state["shards"]).items():
        name, _, what = key.rpartition(".")
        if name in owned:
            optimizer, p = owned[name]
            alike = shape == p.shape and len(shape) > 0
            places[key] = torch.zeros_like(p, requires_grad=False) if alike else torch.zeros(shape, dtype=dtype)
            optimizer.state[p][what] = places[key]
    _read(state["shards"], places)


def load_best(folder: Path, step: int, model: nn.Module, extra: nn.Module | None) -> None:
    """Put back the weights of a step.

    Raises:
        SecateurError: They cannot be read.
    """
    path = best_of(folder, step)
    if path is None:  # one process has kept them
        with _readable(folder / "best.pt"):
            put_whole(torch.load(folder / "best.pt", map_location="cpu", weights_only=True), model, extra)
    else:
        _read(path, _weights(model, extra))


@torch.no_grad()
def put_whole(tensors: Mapping[str, torch.Tensor], model: nn.Module, extra: nn.Module | None) -> None:
    """Put whole tensors, as `state.trained` names them, into a model whose own may be spread."""
    places = _weights(model, extra)
    for name, tensor in tensors.items():
        local(places[name]).copy_(local_of(tensor, places[name]))


def _put_known(states: Sequence[Mapping[str, Any]], optimizers: Optimizers) -> None:
    """Put back what optimisers knew in one process."""
    from torch.distributed.tensor import DTensor

    for optimizer, state in zip(optimizers, states, strict=True):
        every = [p for group in optimizer.param_groups for p in group["params"]]
        for number, known in state["state"].items():
            p: Any = every[number]
            for key, value in known.items():
                if not isinstance(value, torch.Tensor) or value.shape != p.shape or not isinstance(p, DTensor):
                    optimizer.state[p][key] = value
                    continue
                part = local_of(value, p)
                optimizer.state[p][key] = DTensor.from_local(
                    part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )


def _shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    dcp = _checkpoints()
    with _readable(path):
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: (entry.size, entry.properties.dtype) for key, entry in metadata.items() if hasattr(entry, "size")}


def _read(path: Path, places: dict[str, torch.Tensor]) -> None:
    dcp = _checkpoints()
    with _readable(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process reads by itself
        dcp.load(places, storage_reader=dcp.FileSystemReader(path), no_dist=world.size() == 1)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    damages = (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError)
    try:
        yield
    except (*damages, _checkpoints().api.CheckpointException) as error:
        if world.size() > 1 and isinstance(error, RuntimeError) and "Connection" in str(error):
            raise  # another process is gone
        raise SecateurError(
            f"{path}: the state of the run cannot be read, it is damaged ({type(error).__name__}): remove that folder "
            "to begin anew"
        ) from error


# --- random numbers ---


def random_of(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The random numbers that this process goes on with; None where another number of processes has saved."""
    found = state["random"]
    every = list(found) if isinstance(found, list) else [found]
    if len(every) == world.size() or world.first():
        own: Mapping[str, Any] = every[world.rank()]
        return own
    return None
