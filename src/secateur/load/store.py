"""Models whose weights rest on disk, and are in memory only while they are used.

To everybody else such a model is a module like any other. Its parameters rest as views of files (or as NaN, where a
cut model makes its weights when they are asked for). Each unit, a block or a module outside of blocks, loads
its weights when it is called and lets go of them afterwards; `held` keeps them, and writes down what was changed.
"""

import contextlib
import copy
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.shards import Shard, write_shard, writing

_ATTRIBUTE = "secateur_store"
moved: list[Callable[[torch.Tensor], None]] = []
"""Who looks for parameters by their place in memory is called here with each that is at another one from now on."""


@dataclass(frozen=True)
class Entry:
    """Where the value of a parameter comes from.

    Attributes:
        load: Makes a tensor in memory of its own.
        rest: Stands for it meanwhile: a view of a file, or NaN of that shape, all in one place of memory.
        shards: Files that it is read from.
        is_view: Whether `rest` has the values.
    """

    load: Callable[[], torch.Tensor]
    rest: torch.Tensor
    shards: tuple[Shard, ...] = ()
    is_view: bool = False


def from_shard(shard: Shard, name: str) -> Entry:
    """A parameter as it stands in a file."""
    return Entry(lambda: shard.read(name), shard.mapped(name), (shard,), is_view=True)


def made(load: Callable[[], torch.Tensor], like: torch.Tensor, shards: tuple[Shard, ...] = ()) -> Entry:
    """A parameter that is worked out whenever it is loaded."""
    return Entry(load, torch.full((), torch.nan, dtype=like.dtype).expand(like.shape), shards)


class Store:
    """What loads and writes the weights of one model.

    Attributes:
        folder: Where changed weights are written, and journals are kept; None = nothing of this model may change.
        units: Path of a module -> names of the parameters that it needs, tied ones under their first name.
        owned: The same without those that a unit before it has: what is written with it.
        entries: Parameter -> where it comes from.
        read, written: Bytes, for reports.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Mapping[str, Entry],
        folder: Path | None,
        *,
        work: Path,
    ) -> None:
        """Take over the parameters of a model: they rest from now on.

        Args:
            model: whose parameters' values do not matter.
            entries: for every parameter, by its first name.
            folder: see above.
            work: folder of the whole run, for `copy_of` and journals.
        """
        self.entries, self.folder, self.work = dict(entries), folder, work
        self.parameters = dict(model.named_parameters())
        self.units, self._modules = _units(model)
        first = {name: unit for unit, names in reversed(self.units.items()) for name in names}
        self.owned = {unit: [name for name in names if first[name] == unit] for unit, names in self.units.items()}
        self._counts: dict[str, int] = {}
        """Loaded parameter -> how many hold it."""
        self._versions: dict[str, int] = {}
        self._new: list[str] = []
        self._called: list[str] = []
        """Units that are loaded because they run."""
        self.read = self.written = 0
        for name, parameter in self.parameters.items():
            parameter.data = self.entries[name].rest
        for path in self.units:
            module = self._modules[path]
            module.register_forward_pre_hook(lambda module, _, path=path: self._enter(module, path), prepend=True)
            module.register_forward_hook(lambda module, *_, path=path: self._leave(module, path), always_call=True)
        object.__setattr__(model, _ATTRIBUTE, self)

    def __deepcopy__(self, memo: Any) -> None:
        """A plain copy of a model is not streamed; `copy_of` makes one that is."""

    # --- in and out ---

    @contextlib.contextmanager
    def hold(self, names: Iterable[str]) -> Iterator[None]:
        """Keep parameters in memory; write those of a unit that were changed."""
        held = list(dict.fromkeys(names))
        self._load(held)
        try:
            yield
            self._keep(held)
        finally:
            self._release(held)
            _trim()

    def under(self, path: str) -> list[str]:
        """Parameters of all units at or under a module."""
        inside = [u for u in self.units if not path or u == path or u.startswith(f"{path}.")]
        around = [u for u in self.units if path.startswith(f"{u}.")] if path else []
        return list(dict.fromkeys(name for unit in [*inside, *around] for name in self.units[unit]))

    def valueless(self) -> dict[nn.Parameter, torch.Tensor]:
        """Parameters that rest as NaN now -> what they rest as."""
        return {
            self.parameters[name]: entry.rest
            for name, entry in self.entries.items()
            if not entry.is_view and name not in self._counts
        }

    def settle(self) -> None:
        """Let go of what a forward pass that was cut off has loaded, and of pages that were read."""
        while self._called:
            self._release(self.units[self._called.pop()])
        self.forget()
        _trim()

    def forget(self) -> None:
        """Let go of the pages of all files."""
        for shard in {id(s): s for entry in self.entries.values() for s in entry.shards}.values():
            shard.forget()

    def _enter(self, module: nn.Module, path: str) -> None:
        if module is not self._modules.get(path) or torch.compiler.is_exporting():
            return  # a copy, whose weights are its own; or a trace, which needs none
        names = self.units[path]
        if isinstance(module, nn.Embedding) and all(self.entries[name].is_view for name in names):
            return  # few of its rows are read
        self._load(names)
        self._called.append(path)

    def _leave(self, module: nn.Module, path: str) -> None:
        if module is not self._modules.get(path) or torch.compiler.is_exporting():
            return
        if path in self._called:
            self._called.remove(path)
            self._release(self.units[path])

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1
            if self._counts[name] == 1:
                parameter = self.parameters[name]
                parameter.data = self.entries[name].load()
                self._versions[name] = parameter._version
                self.read += parameter.nbytes
                self._tell(name)

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]
                self.parameters[name].data = self.entries[name].rest
                self._tell(name)

    def _tell(self, name: str) -> None:
        for call in moved:
            call(self.parameters[name])

    # --- writing ---

    def _keep(self, names: Iterable[str]) -> None:
        changed = [name for name in names if self.parameters[name]._version != self._versions[name]]
        for unit, own in self.owned.items():
            if not set(changed).isdisjoint(own):
                self.write(unit)

    def file_of(self, unit: str) -> Path:
        """Where a unit is written.

        Raises:
            SecateurError: for a model that must not change.
        """
        if self.folder is None:
            raise SecateurError(f"{unit} of the dense model was changed while it was read: this is a fault of secateur")
        return self.folder / f"unit-{list(self.units).index(unit):05d}.safetensors"

    def write(self, unit: str) -> Path:
        """Write all weights of a unit as they are now; from then on they rest in that file."""
        path = self.file_of(unit)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        names = self.owned[unit]
        missing = [name for name in names if name not in self._counts]
        self._load(missing)
        try:
            self.written += write_shard(path, {name: self.parameters[name].data for name in names})
            self.adopt(unit)
            self._new.append(unit)
        finally:
            self._release(missing)
        return path

    def taken(self) -> list[str]:
        """Units that were written since this was asked before."""
        found, self._new = self._new, []
        return found

    def is_written(self, unit: str) -> bool:
        """Whether the weights of a unit rest in a file of this store."""
        names = self.owned[unit]
        return bool(names) and all([s.path for s in self.entries[n].shards] == [self.file_of(unit)] for n in names)

    def adopt(self, unit: str) -> bool:
        """Take the weights of a unit from its file, where a run has written it; False where there is none."""
        if not self.owned[unit] or self.folder is None or not self.file_of(unit).exists():
            return False
        shard = Shard(self.file_of(unit))
        for name in self.owned[unit]:
            self.entries[name] = from_shard(shard, name)
            self._versions[name] = self.parameters[name]._version
            if name not in self._counts:
                self.parameters[name].data = self.entries[name].rest
        return True


def _trim() -> None:
    """Give memory that was freed back to the system: glibc keeps it, in pieces, and the more the longer a walk is."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def store_of(model: nn.Module) -> Store | None:
    """The store of a streamed model; None for one that is in memory."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, Store) else None


@contextlib.contextmanager
def held(model: nn.Module, path: str = "", names: Iterable[str] | None = None) -> Iterator[None]:
    """The weights of all units at or under a module (or those that are named) are in memory, and may be changed.

    Nothing happens for a model that is in memory.
    """
    store = store_of(model)
    if store is None:
        yield
        return
    with store.hold(store.under(path) if names is None else names):
        yield


@contextlib.contextmanager
def strided(model: nn.Module) -> Iterator[None]:
    """For traces, which look at strides: what rests as NaN stands as memory that nobody writes to, so it is not there.

    Nothing happens for a model that is in memory.
    """
    store = store_of(model)
    resting = {} if store is None else store.valueless()
    try:
        for parameter in resting:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
        yield
    finally:
        for parameter, rest in resting.items():
            parameter.data = rest


def settle(model: nn.Module) -> None:
    """See `Store.settle`."""
    store = store_of(model)
    if store is not None:
        store.settle()


def copy_of(model: nn.Module, folder: str) -> nn.Module:
    """A copy that may be changed; of a streamed model it shares what is not changed.

    Args:
        model: to copy.
        folder: name, within the run's folder, for what is changed of a streamed model.
    """
    store = store_of(model)
    if store is None:
        return copy.deepcopy(model)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(store.entries[name].rest, p.requires_grad) for name, p in store.parameters.items()
    }
    new = copy.deepcopy(model, memo)
    drop_hooks(new)
    Store(new, store.entries, store.work / folder, work=store.work)
    return new


def drop_hooks(model: nn.Module) -> None:
    """Take the hooks of a store off a copy of its model."""
    vars(model).pop(_ATTRIBUTE, None)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "") == __name__:
                    del hooks[key]
                    for kinds in (module._forward_hooks_always_called, module._forward_hooks_with_kwargs):
                        kinds.pop(key, None)


def _units(model: nn.Module) -> tuple[dict[str, list[str]], dict[str, nn.Module]]:
    """Units in the order of the model, with the first names of all parameters that they have."""
    first = {id(p): name for name, p in model.named_parameters()}
    paths = dict(model.named_modules())
    blocks = [
        f"{path}.{name}".lstrip(".")
        for path, module in paths.items()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for name, _ in module.named_children()
    ]
    outermost = [p for p in blocks if not any(p.startswith(f"{other}.") for other in blocks)]
    units: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((p for p in outermost if name.startswith(f"{p}.")), name.rpartition(".")[0])
        own = units.setdefault(owner, [])
        if first[id(parameter)] not in own:
            own.append(first[id(parameter)])
    return units, {path: paths[path] for path in units}
