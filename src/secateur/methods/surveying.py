"""Make a survey, stage by stage: what readers of the axes meet, then the order in which units go, then the next stage.

An axis is ordered as soon as all that reads it was met, and where nobody wants the second moments afterwards they are
used up for that: memory does not grow with the number of layers, and what was found is small enough to be saved after
each of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, size_of
from secateur.load.model import fingerprint, fingerprint_data
from secateur.load.shared import shared
from secateur.mend.damping import enough
from secateur.methods.counterparts import bias_of
from secateur.methods.survey import WIDE, Consumer, Survey, named, read_consumer, stored
from secateur.progress import Track, quiet
from secateur.score.fisher import output_gradients
from secateur.score.grams import Gram, Read, grams
from secateur.score.obs import Consumed, by_unit, inverted, ladder, together
from secateur.space import Axis, Space
from secateur.space.trace import Inputs
from secateur.space.weights import Part, Weight, maskable
from secateur.walk import Stage, walk

AT_ONCE_FROM = 1024
"""Units of an axis from which 2% go at once in the search for their order."""


def survey(
    model: nn.Module,
    space: Space,
    axes: Sequence[Axis],
    data: Sequence[Batch],
    *,
    rows: Sequence[Batch] | None = None,
    inputs: Inputs = None,
    damping: float = 1e-3,
    order_damping: float = 1e-2,
    gradients: bool = True,
    keep_moments: bool = True,
    seed: int = 0,
    name: str = "",
    track: Track = quiet,
) -> Survey:
    """Find out what reads the axes, what it meets, in which order units go, and what every size loses.

    Args:
        model: the dense model; it stays as it is.
        space: its Space.
        axes: those that may be cut. What nothing reads as a matrix is left out, and listed in `left`.
        data: calibration batches for the second moments of inputs.
        rows: those for the gradients; all by default.
        inputs: arguments of one forward pass, for weights that only a forward pass explains.
        damping: share of the mean of the diagonal of C that is added to it for repair; more where rows are few.
        order_damping: the same for the order, unless `damping` is larger.
        gradients: errors count by what the model loses, which takes backward passes; else all outputs count alike.
        keep_moments: the survey can repair, be saved, and tell what a whole block loses; else it has orders and
            ladders, and needs no more memory for many layers than for one.
        seed: of the outputs that the model draws.
        name: of the model, for error messages.
        track: shows progress.

    Raises:
        SecateurError: without data, for a damping that is not above 0, and activations that are not finite.
    """
    if not data:
        raise SecateurError("a survey needs data: give batches, or 'self' for a language model that writes its own")
    making = Surveying(
        model, space, axes, inputs=inputs, damping=damping, order_damping=order_damping, keep_moments=keep_moments
    )
    if gradients:
        making.weigh(data if rows is None else rows, seed=seed, track=track)
    what = "in which order units go"
    for stage in walk(model, shared(data), making.weights, track=track, what=what, name="survey"):
        if stage.done:
            file, values = stage.recall()
            making.restore({name: file.read(name) for name in file.entries}, values)
        else:
            making.add(stage)
            stage.keep(*making.state())
    return making.finish(data, name=name)


class Surveying:
    """A survey while it is made: `add` the stages of `walk` over its `weights`, then `finish`.

    Args:
        model: the dense model; the weights of a stage must be there while it is added.
        space: its Space.
        axes: those that may be cut.
        inputs: arguments of one forward pass, for weights that only a forward pass explains.
        damping: as in `survey`, like the other options.
        order_damping: see there.
        keep_moments: see there.

    Raises:
        SecateurError: for a damping that is not above 0, and where nothing reads the axes.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        axes: Sequence[Axis],
        *,
        inputs: Inputs = None,
        damping: float = 1e-3,
        order_damping: float = 1e-2,
        keep_moments: bool = True,
    ) -> None:
        for option, value in (("damping", damping), ("order_damping", order_damping)):
            if not 0 < value < float("inf"):
                raise SecateurError(f"{option} {value} must be above 0 and finite")
        self.model, self.space, self.axes = model, space, list(axes)
        self.damping, self.order_damping, self.keep_moments = damping, max(damping, order_damping), keep_moments
        self.reads = {axis.name: _reads(space, axis) for axis in axes}
        names = dict.fromkeys(p for found in self.reads.values() for p, _ in found)
        if not names:
            raise SecateurError("no weight reads the axes that may be cut: allow others")
        self.weights = list(maskable(model, inputs, only=list(names)))
        """What to walk over."""
        self.parameters = dict(model.named_parameters())
        self.norms = any(isinstance(m, _BatchNorm) for m in model.modules())
        self.active = {router.parameter: router.active for router in space.routers}
        self.worth: Mapping[str, torch.Tensor] = {}
        self.gradients = False
        watched = {weight.name for weight in self.weights}
        self.waiting = {n: {p for p, _ in found} for n, found in self.reads.items() if found}
        """Axis -> weights that read it and were not met yet."""
        self.left = {n: "nothing that is multiplied with reads it" for n, found in self.reads.items() if not found}
        for name, found in list(self.waiting.items()):
            if found - watched:
                del self.waiting[name]
        self.seen: list[str] = []
        self.unseen: list[str] = []
        self.thin: list[str] = []
        self.count = 0
        self.consumers: dict[int, Consumer] = {}
        """Those that are still needed, by number."""
        self.orders: dict[str, torch.Tensor] = {}
        self.ladders: dict[str, torch.Tensor] = {}
        self.joint: dict[str, torch.Tensor] = {}

    def weigh(self, rows: Sequence[Batch], *, seed: int = 0, track: Track = quiet) -> None:
        """Find out by backward passes what errors cost; before the first stage."""
        self.worth = _gradients(self.model, [w.name for w in self.weights], rows, seed, track)
        self.gradients = True

    def add(self, stage: Stage) -> None:
        """Take in a stage, and order the axes that it completes; one that was taken in before is passed over."""
        own = [w.name for w in stage.weights]
        if set(own) <= set(self.seen):
            return
        groups = grams(stage.run, stage.weights, self.parameters, full=True, last=stage.last)
        met = Counter[str]()
        for read in (read for group in groups for read in group):
            met[read.weight.name] += read.gram.rows if read.gram is not None else 0
        while groups:
            self._take(groups.pop(0), met)
        self.seen += own
        self.unseen += [name for name in own if not met[name]]
        for name in self.waiting:
            self.waiting[name] -= set(own)
        ready = [a for a in self.axes if a.name in self.waiting and not self.waiting[a.name]]
        for axis in ready:
            del self.waiting[axis.name]
        self._order([a for a in ready if not any(p in self.unseen for p, _ in self.reads[a.name])])
        self._forget()

    def _forget(self) -> None:
        """Let go of what no axis waits for."""
        if not self.keep_moments:
            needed = {i for i, c in self.consumers.items() if any(name in self.waiting for name in c.axes)}
            self.consumers = {i: c for i, c in self.consumers.items() if i in needed}

    def _take(self, group: Sequence[Read], met: Mapping[str, int]) -> None:
        """Keep what a group of matrices that read the same met."""
        moments = _moments(group[0].gram)
        for number, read in enumerate(group):
            name = read.weight.name
            if not met[name]:
                continue
            matrix = read.weight.matrix(self.parameters[name].detach(), read.part)
            rows, columns = matrix.shape
            # An expert that no token met loses nothing and is sliced as it is.
            count, second, mean = moments or (0, torch.zeros(columns, columns), torch.zeros(columns))
            if count < columns and name not in self.thin:
                self.thin.append(name)
            owner = self.model.get_submodule(name.rpartition(".")[0])
            convolves = isinstance(owner, nn.modules.conv._ConvNd)
            shifts = bias_of(read.weight, self.parameters) is not None or (convolves and self.norms)
            axes = {}
            for axis, places in self.reads.items():
                for other, units in places:
                    if other == name:
                        axes[axis] = read.weight.matrix(units.expand(read.weight.shape), read.part)[0].clone()
            if columns > WIDE:  # in place, since each has a moment of its own
                own = second if number + 1 == len(group) else second.clone()
                own = own.addr_(mean, mean, alpha=-1) if shifts else own
            else:
                own = second - torch.outer(mean, mean) if shifts else second
            output = _output(read.weight, read.part, self.worth.get(name))
            if name in self.active:  # an expert that few tokens meet matters less
                output = (torch.eye(rows) if output is None else output) * (count * self.active[name] / met[name])
            few = enough(0.0, count, columns)
            self.consumers[self.count] = Consumer(read.weight, read.part, axes, own, mean, output, shifts, few)
            self.count += 1

    def _order(self, ready: Sequence[Axis]) -> None:
        """Orders and ladders of axes of which all readers are there, and of those with their parents."""
        readers = {axis.name: [i for i, c in self.consumers.items() if axis.name in c.axes] for axis in ready}
        children = {axis.name: axis.parent for axis in ready if axis.parent in readers}
        both = {name: list(dict.fromkeys(readers[str(parent)] + readers[name])) for name, parent in children.items()}
        uses = Counter(i for numbers in (*readers.values(), *both.values()) for i in numbers)
        prepared: dict[int, Consumed] = {}

        def consumed(number: int, name: str) -> Consumed:
            one = prepared.get(number) or self._consumed(self.consumers[number])
            if uses[number] > 1:
                prepared[number] = one
            units = self.consumers[number].axes.get(name)
            columns = torch.empty(0, dtype=torch.int64) if units is None else units
            return replace(one, columns=by_unit(columns, self.space.axis(name).size), spare=uses[number] == 1)

        for axis in ready:
            share = 0.02 if axis.per_group > AT_ONCE_FROM else 0.0
            own = [consumed(i, axis.name) for i in readers[axis.name]]
            found = ladder(own, axis.size, axis.groups, rounds_at_once=share)
            self.orders[axis.name], self.ladders[axis.name] = found.order, found.lost / 2
        for name, parent in children.items():
            outer = [consumed(i, str(parent)) for i in both[name]]
            inner = [consumed(i, name).columns for i in both[name]]
            self.joint[name] = together(outer, inner, self.orders[str(parent)], self.orders[name]) / 2

    def _consumed(self, consumer: Consumer) -> Consumed:
        """W, G W and the inverse of the damped second moment; in its own memory, where that is wide and not kept."""
        wide = len(consumer.mean) > WIDE
        kind = torch.float32 if wide else torch.float64
        parameter = self.parameters[consumer.weight.name].detach()
        W = consumer.weight.matrix(parameter, consumer.part).to("cpu", kind, copy=True)
        graded = None if consumer.output is None else consumer.output.to(kind) @ W
        kept = self.keep_moments or any(name in self.waiting for name in consumer.axes)
        C = consumer.second.to(kind, copy=kept or not wide)
        C.diagonal().add_(max(self.order_damping, consumer.damping) * float(C.diagonal().mean()) or 1.0)
        return Consumed(W, inverted(C), torch.empty(0, dtype=torch.int64), graded)

    def finish(self, data: Sequence[Batch], *, name: str = "") -> Survey:
        """The survey, after the last stage.

        Args:
            data: that it was made on.
            name: of the model, for error messages.
        """
        watched = {weight.name for weight in self.weights}
        reads = [(axis, p) for axis, found in self.reads.items() for p, _ in found]
        left = self.left | {n: f"no calibration data reaches {p}" for n, p in reads if p in self.unseen}
        left |= {n: f"{p} is no matrix" for n, p in reads if p not in watched}
        orders = {axis.name: self.orders[axis.name] for axis in self.axes if axis.name in self.orders}
        identity = {"data": _fingerprint(data), "name": name}
        if self.keep_moments:  # it is asked for where a survey is loaded, and takes a look at all weights
            identity["model"] = fingerprint(self.model)
        return Survey(
            self.model, self.space, tuple(self.consumers.values()), orders, left, self.damping, identity,
            sum(map(size_of, data)), tuple(self.thin), dict(self.ladders), dict(self.joint), self.gradients,
            self.keep_moments,
        )  # fmt: skip

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that was found until now, as tensors by name and JSON values; what gradients told is not among it."""
        tensors, places = stored(self.consumers)
        found = {"order": self.orders, "ladder": self.ladders, "joint": self.joint}
        tensors |= {f"{what}:{name}": x for what, own in found.items() for name, x in own.items()}
        lists = {"seen": list(self.seen), "unseen": list(self.unseen), "thin": list(self.thin)}
        return tensors, {**lists, "count": self.count, "consumers": places}

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, in a new object that was made with the same arguments."""
        self.seen, self.unseen, self.thin = list(values["seen"]), list(values["unseen"]), list(values["thin"])
        self.count = values["count"]
        self.consumers = {entry["number"]: read_consumer(entry, tensors) for entry in values["consumers"]}
        self.orders, self.ladders, self.joint = (named(tensors, what) for what in ("order", "ladder", "joint"))
        self.waiting = {n: rest for n, found in self.waiting.items() if (rest := found - set(self.seen))}


def _fingerprint(data: Sequence[Batch]) -> str:
    """Of the tensors in all batches."""
    leaves = [[x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)] for batch in data]
    return fingerprint_data([{str(i): x for i, x in enumerate(found)} for found in leaves])


def _reads(space: Space, axis: Axis) -> list[tuple[str, torch.Tensor]]:
    """Consumers of an axis: (parameter, which unit each row of its input dimension is, -1 for none)."""
    found: dict[str, torch.Tensor] = {}
    dims: dict[str, int] = {}
    for reader, part in space.consumers(axis):
        name, dim = reader.parameter, reader.in_dim
        if name not in space.parameters:
            continue
        rows = part.rows()
        own = torch.full((space.parameters[name].shape[dim],), -1, dtype=torch.int64)
        own[rows] = torch.arange(axis.size)[:, None].expand_as(rows)
        units = found.setdefault(name, torch.full_like(own, -1))
        clash = (units >= 0) & (own >= 0) & (units != own)
        if dims.setdefault(name, dim) != dim or len(set(rows.flatten().tolist())) < rows.numel() or bool(clash.any()):
            return []
        found[name] = torch.where(own >= 0, own, units)  # a unit may be read in several places (concatenated twice)
    shapes = {n: [-1 if d == dims[n] else 1 for d in range(len(space.parameters[n].shape))] for n in found}
    return [(name, units.reshape(shapes[name])) for name, units in found.items()]


def _gradients(
    model: nn.Module, names: Sequence[str], rows: Sequence[Batch], seed: int, track: Track
) -> dict[str, torch.Tensor]:
    """Weight -> second moment of the gradients at its module's output, or at that of the module around it."""
    owners = {name: [name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]] for name in names}
    paths = dict.fromkeys(path for found in owners.values() for path in found if path)
    moments = output_gradients(model, list(paths), rows, seed=seed, track=track)
    return {
        name: next(moments[path] for path in found if path in moments)
        for name, found in owners.items()
        if any(path in moments for path in found)
    }


def _moments(gram: Gram | None) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """Rows, second moment and mean of what came by; in the memory of the sum."""
    if gram is None or gram.total is None:
        return None
    return gram.rows, gram.full().div_(gram.rows).float().cpu(), (gram.total / gram.rows).float().cpu()


def _output(weight: Weight, part: Part, moment: torch.Tensor | None) -> torch.Tensor | None:
    """The part of the outputs' second moment that a part of the weight makes."""
    if moment is None or len(weight.rows) != 1:
        return None
    a, b = part[weight.rows[0]]
    if len(moment) == weight.shape[weight.rows[0]]:
        return moment[a:b, a:b]
    return moment if len(moment) == b - a else None
