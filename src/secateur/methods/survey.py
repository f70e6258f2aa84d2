"""A survey of a dense model: what everything that reads an axis meets, and in which order its units go.

One forward pass, block by block, gives X'X of every consumer, one backward pass what errors at its output cost;
structured OBS (`score.obs`) makes of both the order in which units go. From then on any size of any axis is worked out
in closed form, without data: W' = W C_:,S (C_SS + lambda I)^-1. So a survey that was saved serves every budget.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from secateur.choose.plan import Kept, Plan
from secateur.cut.tensors import cut_tensors
from secateur.errors import SecateurError
from secateur.load.batches import Batch, size_of
from secateur.load.model import fingerprint, fingerprint_data
from secateur.mend.damping import enough
from secateur.methods.counterparts import bias_of, bias_places
from secateur.progress import Track, quiet
from secateur.score.fisher import output_gradients
from secateur.score.grams import Gram, grams
from secateur.score.obs import Consumed, by_unit, eliminate
from secateur.space import Axis, Space
from secateur.space.trace import Inputs
from secateur.space.weights import Part, Weight, maskable
from secateur.walk import walk

FORMAT = 1
AT_ONCE_FROM = 1024
"""Units of an axis from which 2% go at once in the search for their order."""
KEPT_BYTES = 2**29
"""Solved matrices that are kept for the next question."""


@dataclass(frozen=True)
class Consumer:
    """One matrix that reads axes: a part of a weight.

    Attributes:
        weight: The tensor.
        part: Of it.
        axes: Axis -> unit of each column, int64 [columns]; -1 where a column belongs to none.
        second: Second moment of the inputs, float32 [columns, columns], centred where `shifts`.
        mean: Of the inputs, [columns].
        output: Second moment of the gradients at the outputs, [rows, rows]; None where nothing is known.
        shifts: A constant at the output can be made up for: by its bias, or the batch norm behind it.
        damping: Share of the mean of the diagonal of `second` that its few rows ask for; see `mend.damping.enough`.
    """

    weight: Weight
    part: Part
    axes: Mapping[str, torch.Tensor]
    second: torch.Tensor
    mean: torch.Tensor
    output: torch.Tensor | None
    shifts: bool
    damping: float = 0.0


Sizes = Mapping[str, int]
"""Axis -> units that stay in each of its groups."""


@dataclass
class Survey:
    """What was found out about a model; see `survey`.

    Attributes:
        model: The dense model.
        space: Its Space.
        consumers: All matrices that read surveyed axes.
        orders: Axis -> units in the order in which they go, int64 [rounds, groups].
        left: Axis -> why it could not be surveyed.
        damping: Share of the mean of the diagonal of C that is added to it.
        identity: What the survey depends on.
        samples: Calibration samples.
    """

    model: nn.Module
    space: Space
    consumers: tuple[Consumer, ...]
    orders: Mapping[str, torch.Tensor]
    left: Mapping[str, str]
    damping: float
    identity: Mapping[str, str]
    samples: int
    thin: tuple[str, ...] = ()
    """Weights that met fewer rows than they have columns: only the damping makes their repair unique."""
    _solved: "OrderedDict[Any, tuple[torch.Tensor, torch.Tensor]]" = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.by_axis: dict[str, list[int]] = {name: [] for name in self.orders}
        for i, consumer in enumerate(self.consumers):
            for name in consumer.axes:
                self.by_axis.setdefault(name, []).append(i)
        self.parameters = dict(self.model.named_parameters())

    def kept(self, axis: Axis, per_group: int) -> torch.Tensor:
        """Units that stay, ascending, where so many do in each group."""
        gone = self.orders[axis.name][: axis.per_group - per_group].flatten()
        stays = torch.ones(axis.size, dtype=torch.bool)
        stays[gone] = False
        return stays.nonzero().flatten()

    def plan(self, sizes: Sizes, dropped: Sequence[str] = ()) -> Plan:
        """The plan that keeps such sizes; axes within dropped blocks are left out."""
        gone = set(dropped)
        kept = {}
        for axis in self.space.axes:
            size = sizes.get(axis.name, axis.per_group)
            inside = {part.parameter for part in axis.slices}
            lost = any(b.name in gone and inside <= b.parameters for b in self.space.blocks) or axis.block in gone
            if size != axis.per_group and not lost:
                kept[axis.name] = Kept(axis.kind, axis.size, tuple(self.kept(axis, size).tolist()))
        return Plan(kept, tuple(b.name for b in self.space.blocks if b.name in gone))

    def stays(self, consumer: Consumer, sizes: Sizes) -> torch.Tensor:
        """Which columns of a consumer stay, bool [columns]."""
        found = torch.ones(len(consumer.mean), dtype=torch.bool)
        for name, units in consumer.axes.items():
            axis = self.space.axis(name)
            if name in sizes and sizes[name] != axis.per_group:
                alive = torch.zeros(axis.size + 1, dtype=torch.bool)
                alive[self.kept(axis, sizes[name])] = True
                alive[-1] = True  # columns of no unit
                found &= alive[units]
        return found

    def solved(self, number: int, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
        """The repaired matrix of a consumer, zero where columns go, [rows, columns], and the shift of its output."""
        consumer = self.consumers[number]
        key = (number, tuple((name, sizes.get(name)) for name in consumer.axes))
        if key in self._solved:
            self._solved.move_to_end(key)
            return self._solved[key]
        matrix = consumer.weight.matrix(self.parameters[consumer.weight.name].detach(), consumer.part)
        found = refitted(matrix, consumer, self.stays(consumer, sizes), max(self.damping, consumer.damping))
        self._solved[key] = found
        while sum(m.nbytes for m, _ in self._solved.values()) > KEPT_BYTES and len(self._solved) > 1:
            self._solved.popitem(last=False)
        return found

    def lost(self, number: int, sizes: Sizes, *, repaired: bool = True) -> float:
        """What a consumer's cut costs, tr(G dW C dW')/2."""
        consumer = self.consumers[number]
        matrix = consumer.weight.matrix(self.parameters[consumer.weight.name].detach(), consumer.part).float()
        new = self.solved(number, sizes)[0].float() if repaired else matrix * self.stays(consumer, sizes)
        change = (new - matrix).cpu()
        error = change @ consumer.second @ change.T
        if not repaired and consumer.shifts:
            shift = change @ consumer.mean
            error += torch.outer(shift, shift)
        worth = error.diagonal().sum() if consumer.output is None else (consumer.output * error).sum()
        return max(0.0, float(worth) / 2)

    def axis_loss(self, sizes: Sizes) -> float:
        """The same for all consumers of the axes that are named."""
        numbers = dict.fromkeys(i for name in sizes for i in self.by_axis.get(name, ()))
        return sum(self.lost(i, sizes) for i in numbers)

    def gone_loss(self, axes: Sequence[str]) -> float:
        """What it costs that nothing of some axes is left."""
        total = 0.0
        for i in dict.fromkeys(i for name in axes for i in self.by_axis.get(name, ())):
            consumer = self.consumers[i]
            W = consumer.weight.matrix(self.parameters[consumer.weight.name].detach(), consumer.part).float().cpu()
            error = W @ consumer.second @ W.T
            if consumer.shifts:  # the bias goes, too, so nothing makes up for the mean
                mean = W @ consumer.mean + self._bias(consumer)
                error += torch.outer(mean, mean)
            worth = error.diagonal().sum() if consumer.output is None else (consumer.output * error).sum()
            total += float(worth) / 2
        return total

    def _bias(self, consumer: Consumer) -> torch.Tensor:
        """What is added to the products of a matrix, float32 [rows]."""
        name = bias_of(consumer.weight, self.parameters)
        if name is None:
            return torch.zeros(())
        return self.parameters[name].detach()[bias_places(consumer.weight, consumer.part)].float().cpu()

    def tensors(self, sizes: Sizes, *, weights: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Repaired parameters of full width: columns of units that go are zero. Biases take up the shifts.

        Args:
            sizes: of the axes that are cut.
            weights: only these; None = all that change.
        """
        found: dict[str, torch.Tensor] = {}
        cut = {name for name, size in sizes.items() if size != self.space.axis(name).per_group}
        for number in dict.fromkeys(i for name in cut for i in self.by_axis.get(name, ())):
            consumer = self.consumers[number]
            name = consumer.weight.name
            if weights is not None and name not in weights:
                continue
            matrix, shift = self.solved(number, sizes)
            tensor = found.setdefault(name, self.parameters[name].detach().clone())
            consumer.weight.put(tensor, consumer.part, matrix.to(tensor.dtype))
            bias = bias_of(consumer.weight, self.parameters) if consumer.shifts else None
            if bias is not None:
                own = found.setdefault(bias, self.parameters[bias].detach().clone())
                own[bias_places(consumer.weight, consumer.part)] += shift.to(own.device, own.dtype)
        return found

    def repaired(self, sizes: Sizes, plan: Plan) -> dict[str, torch.Tensor]:
        """Repaired parameters of the cut model, by their names in the dense one."""
        full = self.tensors(sizes)
        return cut_tensors(full, self.space, plan)

    def save(self, folder: Path) -> None:
        """Write survey.json and survey.safetensors into an existing folder."""
        tensors: dict[str, torch.Tensor] = {f"order:{name}": order for name, order in self.orders.items()}
        places: list[dict[str, Any]] = []
        for i, consumer in enumerate(self.consumers):
            tensors |= {f"{i}:second": consumer.second, f"{i}:mean": consumer.mean}
            tensors |= {f"{i}:axis:{name}": units for name, units in consumer.axes.items()}
            tensors |= {} if consumer.output is None else {f"{i}:output": consumer.output}
            weight = consumer.weight
            shape = [list(weight.shape), list(weight.rows), list(weight.columns), weight.groups]
            entry: dict[str, Any] = {"weight": [weight.name, *shape], "output": consumer.output is not None}
            entry["part"] = [list(span) for span in consumer.part]
            entry |= {"axes": list(consumer.axes), "shifts": consumer.shifts, "damping": consumer.damping}
            places.append(entry)
        content = {
            "format": FORMAT,
            "identity": dict(self.identity),
            "samples": self.samples,
            "damping": self.damping,
            "left": dict(self.left),
            "thin": list(self.thin),
            "axes": list(self.orders),
            "consumers": places,
        }
        save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, folder / "survey.safetensors")
        (folder / "survey.json").write_text(json.dumps(content, indent=1) + "\n")


def load_survey(folder: Path, model: nn.Module, space: Space) -> Survey:
    """Read what `Survey.save` wrote.

    Raises:
        SecateurError: where a file is missing or damaged, or the survey is of another model.
    """
    try:
        content = json.loads((folder / "survey.json").read_text())
        tensors = load_file(folder / "survey.safetensors")
        if content["format"] != FORMAT:
            raise SecateurError(f"{folder / 'survey.json'} is not a survey of format {FORMAT}")
        if content["identity"]["model"] != fingerprint(model):
            raise SecateurError(
                f"the survey in {folder} was made of another model ({content['identity'].get('name') or 'unnamed'}): "
                "make one of this model (secateur survey)"
            )
        consumers = tuple(_read_consumer(i, entry, tensors) for i, entry in enumerate(content["consumers"]))
        orders = {name: tensors[f"order:{name}"] for name in content["axes"]}
        return Survey(
            model, space, consumers, orders, content["left"], content["damping"], content["identity"],
            content["samples"], tuple(content["thin"]),
        )  # fmt: skip
    except SecateurError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise SecateurError(f"no readable survey in {folder}: {error}") from error


def _read_consumer(i: int, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Consumer:
    name, shape, rows, columns, groups = entry["weight"]
    return Consumer(
        Weight(name, tuple(shape), tuple(rows), tuple(columns), groups),
        tuple((a, b) for a, b in entry["part"]),
        {axis: tensors[f"{i}:axis:{axis}"] for axis in entry["axes"]},
        tensors[f"{i}:second"],
        tensors[f"{i}:mean"],
        tensors[f"{i}:output"] if entry["output"] else None,
        entry["shifts"],
        entry["damping"],
    )


def refitted(
    matrix: torch.Tensor, consumer: Consumer, stays: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W' = (W C_:,S + lambda W_S)(C_SS + lambda I)^-1 with zeros elsewhere, and (W - W') E[x] where that counts."""
    W, C = matrix.double().cpu(), consumer.second.double()
    new = torch.zeros_like(W)
    kept = stays.nonzero().flatten()
    if len(kept) == W.shape[1]:
        return matrix, torch.zeros(len(matrix))
    if len(kept):
        more = damping * float(C.diagonal().mean()) or 1.0
        inner = C[kept][:, kept]
        inner.diagonal().add_(more)
        new[:, kept] = torch.linalg.solve(inner, C[kept] @ W.T + more * W[:, kept].T).T
    shift = (W - new) @ consumer.mean.double() if consumer.shifts else torch.zeros(len(W), dtype=torch.float64)
    return new.to(matrix.device, matrix.dtype), shift.to(torch.float32)


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
    seed: int = 0,
    name: str = "",
    track: Track = quiet,
) -> Survey:
    """Find out what reads the axes, what it meets, and in which order units go.

    Args:
        model: the dense model; it stays as it is.
        space: its Space.
        axes: those that may be cut. What nothing reads as a matrix is left out, and listed in `left`.
        data: calibration batches for the second moments of inputs.
        rows: those for the gradients; all by default.
        inputs: arguments of one forward pass, for weights that only a forward pass explains.
        damping: share of the mean of the diagonal of C that is added to it for repair; more where rows are few.
        order_damping: the same for the order.
        seed: of the outputs that the model draws.
        name: of the model, for error messages.
        track: shows progress.

    Raises:
        SecateurError: without data, for a damping that is not above 0, and activations that are not finite.
    """
    if not data:
        raise SecateurError("a survey needs data: give batches, or 'self' for a language model that writes its own")
    for option, value in (("damping", damping), ("order_damping", order_damping)):
        if not 0 < value < float("inf"):
            raise SecateurError(f"{option} {value} must be above 0 and finite")
    reads = {axis.name: _reads(space, axis) for axis in axes}
    left = {n: "nothing that is multiplied with reads it" for n, found in reads.items() if not found}
    names = dict.fromkeys(p for found in reads.values() for p, _ in found)
    if not names:
        raise SecateurError("no weight reads the axes that may be cut: allow others")
    weights = maskable(model, inputs, only=list(names))
    watched = {w.name: w for w in weights}
    gradients = _gradients(model, list(watched), data if rows is None else rows, seed, track)
    consumers, unseen, thin = _consumers(model, space, watched, reads, data, gradients, track)
    left |= {n: f"no calibration data reaches {p}" for n, found in reads.items() for p, _ in found if p in unseen}
    left |= {n: f"{p} is no matrix" for n, found in reads.items() for p, _ in found if p not in watched}
    orders = {}
    prepared = [_consumed(model, consumer, max(order_damping, consumer.damping)) for consumer in consumers]
    for axis in track([a for a in axes if a.name not in left], "in which order units go"):
        own = [
            Consumed(*prepared[i], by_unit(consumer.axes[axis.name], axis.size))
            for i, consumer in enumerate(consumers)
            if axis.name in consumer.axes
        ]
        share = 0.02 if axis.per_group > AT_ONCE_FROM else 0.0
        orders[axis.name] = eliminate(own, axis.size, axis.groups, rounds_at_once=share)
    identity = {"model": fingerprint(model), "data": _fingerprint(data), "name": name}
    samples = sum(map(size_of, data))
    return Survey(model, space, tuple(consumers), orders, left, damping, identity, samples, tuple(thin))


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


def _consumers(
    model: nn.Module,
    space: Space,
    weights: Mapping[str, Weight],
    reads: Mapping[str, Sequence[tuple[str, torch.Tensor]]],
    data: Sequence[Batch],
    gradients: Mapping[str, torch.Tensor],
    track: Track,
) -> tuple[list[Consumer], set[str], list[str]]:
    """Every matrix with what it meets; weights that nothing reached, and those that met too few rows."""
    parameters = dict(model.named_parameters())
    norms = any(isinstance(m, _BatchNorm) for m in model.modules())
    active = {router.parameter: router.active for router in space.routers}
    found: list[Consumer] = []
    unseen: set[str] = set()
    thin: list[str] = []
    for stage in walk(model, data, list(weights.values()), track=track):
        groups = grams(stage.run, stage.weights, parameters, full=True, last=stage.last)
        met = Counter[str]()
        for read in (read for group in groups for read in group):
            met[read.weight.name] += read.gram.rows if read.gram is not None else 0
        for group in groups:
            moments = _moments(group[0].gram)
            for read in group:
                name = read.weight.name
                if not met[name]:
                    unseen.add(name)
                    continue
                matrix = read.weight.matrix(parameters[name].detach(), read.part)
                rows, columns = matrix.shape
                # An expert that no token met loses nothing and is sliced as it is.
                count, second, mean = moments or (0, torch.zeros(columns, columns), torch.zeros(columns))
                if count < columns and name not in thin:
                    thin.append(name)
                owner = model.get_submodule(name.rpartition(".")[0])
                convolves = isinstance(owner, nn.modules.conv._ConvNd)
                shifts = bias_of(read.weight, parameters) is not None or (convolves and norms)
                axes = {}
                for axis, places in reads.items():
                    for other, units in places:
                        if other == name:
                            axes[axis] = read.weight.matrix(units.expand(read.weight.shape), read.part)[0].clone()
                own = second - torch.outer(mean, mean) if shifts else second
                output = _output(read.weight, read.part, gradients.get(name))
                if name in active:  # an expert that few tokens meet matters less
                    output = (torch.eye(rows) if output is None else output) * (count * active[name] / met[name])
                few = enough(0.0, count, columns)
                found.append(Consumer(read.weight, read.part, axes, own, mean, output, shifts, few))
    return found, unseen, thin


def _moments(gram: Gram | None) -> tuple[int, torch.Tensor, torch.Tensor] | None:
    """Rows, second moment and mean of what came by."""
    if gram is None or gram.total is None:
        return None
    return gram.rows, (gram.full() / gram.rows).float().cpu(), (gram.total / gram.rows).float().cpu()


def _output(weight: Weight, part: Part, moment: torch.Tensor | None) -> torch.Tensor | None:
    """The part of the outputs' second moment that a part of the weight makes."""
    if moment is None or len(weight.rows) != 1:
        return None
    a, b = part[weight.rows[0]]
    if len(moment) == weight.shape[weight.rows[0]]:
        return moment[a:b, a:b]
    return moment if len(moment) == b - a else None


def _consumed(model: nn.Module, consumer: Consumer, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(W' G W, inverse of the damped second moment)."""
    W = consumer.weight.matrix(dict(model.named_parameters())[consumer.weight.name].detach(), consumer.part)
    W = W.double().cpu()
    worth = W.T @ W if consumer.output is None else W.T @ consumer.output.double() @ W
    C = consumer.second.double()
    C = C + torch.eye(len(C), dtype=torch.float64) * (damping * float(C.diagonal().mean()) or 1.0)
    return worth, torch.cholesky_inverse(torch.linalg.cholesky(C))
