"""A survey of a dense model: what everything that reads an axis meets, and in which order its units go.

One forward pass, block by block, gives X'X of every consumer, one backward pass what errors at its output cost;
structured OBS (`score.obs`) makes of both the order in which units go, and what every size loses. `methods.surveying`
makes one. Where the moments are kept, any size of any axis is worked out in closed form from then on, without data:
W' = W C_:,S (C_SS + lambda I)^-1. So a survey that was saved serves every budget.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.choose.plan import Kept, Plan
from secateur.cut.tensors import cut_tensors
from secateur.errors import SecateurError
from secateur.load.model import fingerprint
from secateur.methods.counterparts import bias_of, bias_places
from secateur.space import Axis, Space
from secateur.space.weights import Part, Weight

FORMAT = 1
WIDE = 4096
"""Columns above which a matrix is worked in float32 and in place, and levels are never solved one by one: at 14336 (an
8B Llama) a second moment takes 1.6 GB in float64, and a solve minutes; float32 is exact enough with its damping."""
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
        thin: Weights that met fewer rows than they have columns: only the damping makes their repair unique.
        ladders: Axis -> what it loses without so many rounds of its order, float64 [rounds + 1] (`score.obs.Ladder`).
        joint: Axis -> the same together with rounds of its parent, [rounds of the parent + 1, rounds + 1].
        gradients: The losses are weighted by gradients at the outputs.
        moments: The consumers are there; without them there are orders and ladders alone.
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
    ladders: Mapping[str, torch.Tensor] = field(default_factory=dict)
    joint: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gradients: bool = True
    moments: bool = True
    _solved: "OrderedDict[Any, tuple[torch.Tensor, torch.Tensor]]" = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.by_axis: dict[str, list[int]] = {name: [] for name in self.orders}
        for i, consumer in enumerate(self.consumers):
            for name in consumer.axes:
                self.by_axis.setdefault(name, []).append(i)
        self.parameters = dict(self.model.named_parameters())
        wide = any(len(c.mean) > WIDE for c in self.consumers)
        self.by_ladder = not self.moments or (wide and self.ladders.keys() >= self.orders.keys())
        """What sizes lose is read from the ladders, for all axes alike, and not solved for each."""

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
        """The same for all consumers of the axes that are named.

        By ladder, it counts the damping of the order as rows that were met, too: a little more than by solving.
        """
        if self.by_ladder:
            return self._by_ladder(sizes)
        numbers = dict.fromkeys(i for name in sizes for i in self.by_axis.get(name, ()))
        return sum(self.lost(i, sizes) for i in numbers)

    def _by_ladder(self, sizes: Sizes) -> float:
        gone = {a.name: a.per_group - sizes[a.name] for a in self.space.axes if a.name in sizes}
        total = 0.0
        for name, rounds in gone.items():
            parent = self.space.axis(name).parent
            if name in self.joint and parent is not None and parent in gone:  # what the parent loses is counted there
                total += float(self.joint[name][gone[parent], rounds] - self.joint[name][gone[parent], 0])
            elif name in self.ladders:
                total += float(self.ladders[name][rounds])
        return max(0.0, total)

    def _must_have(self, what: str) -> None:
        if not self.moments:
            raise SecateurError(f"{what} needs the second moments, which this survey did not keep: make it with them")

    def gone_loss(self, axes: Sequence[str]) -> float:
        """What it costs that nothing of some axes is left.

        Raises:
            SecateurError: without the moments, as in `tensors` and `save`.
        """
        self._must_have("what a whole block loses")
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
        self._must_have("repair by a survey")
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
        self._must_have("a survey that is saved")
        tensors, places = stored(dict(enumerate(self.consumers)))
        found = {"order": self.orders, "ladder": self.ladders, "joint": self.joint}
        tensors |= {f"{what}:{name}": x for what, named in found.items() for name, x in named.items()}
        content = {
            "format": FORMAT,
            "identity": dict(self.identity),
            "samples": self.samples,
            "damping": self.damping,
            "left": dict(self.left),
            "thin": list(self.thin),
            "axes": list(self.orders),
            "gradients": self.gradients,
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
        consumers = tuple(read_consumer({"number": i} | e, tensors) for i, e in enumerate(content["consumers"]))
        orders = {name: tensors[f"order:{name}"] for name in content["axes"]}
        more = [named(tensors, "ladder"), named(tensors, "joint"), content.get("gradients", True)]  # older ones: none
        return Survey(
            model, space, consumers, orders, content["left"], content["damping"], content["identity"],
            content["samples"], tuple(content["thin"]), *more,
        )  # fmt: skip
    except SecateurError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise SecateurError(f"no readable survey in {folder}: {error}") from error


def named(tensors: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Axis -> the tensor that was stored as ``what:axis``."""
    return {name.removeprefix(f"{what}:"): x for name, x in tensors.items() if name.startswith(f"{what}:")}


def stored(consumers: Mapping[int, Consumer]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Consumers by number, as tensors and JSON values that `read_consumer` understands."""
    tensors: dict[str, torch.Tensor] = {}
    places: list[dict[str, Any]] = []
    for i, consumer in consumers.items():
        tensors |= {f"{i}:second": consumer.second, f"{i}:mean": consumer.mean}
        tensors |= {f"{i}:axis:{name}": units for name, units in consumer.axes.items()}
        tensors |= {} if consumer.output is None else {f"{i}:output": consumer.output}
        weight = consumer.weight
        shape = [list(weight.shape), list(weight.rows), list(weight.columns), weight.groups]
        entry: dict[str, Any] = {"weight": [weight.name, *shape], "output": consumer.output is not None}
        entry |= {"number": i, "part": [list(span) for span in consumer.part]}
        entry |= {"axes": list(consumer.axes), "shifts": consumer.shifts, "damping": consumer.damping}
        places.append(entry)
    return tensors, places


def read_consumer(entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Consumer:
    """One of those that `stored` wrote."""
    name, shape, rows, columns, groups = entry["weight"]
    i = entry["number"]
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
    kind = torch.float32 if len(consumer.second) > WIDE else torch.float64
    W, C = matrix.to("cpu", kind), consumer.second.to(kind)
    new = torch.zeros_like(W)
    kept = stays.nonzero().flatten()
    if len(kept) == W.shape[1]:
        return matrix, torch.zeros(len(matrix))
    if len(kept):
        more = damping * float(C.diagonal().mean()) or 1.0
        new[:, kept] = _ridge(C, kept, C[kept] @ W.T + more * W[:, kept].T, more).T
    shift = (W - new).double() @ consumer.mean.double() if consumer.shifts else torch.zeros(len(W), dtype=torch.float64)
    return new.to(matrix.device, matrix.dtype), shift.to(torch.float32)


def _ridge(C: torch.Tensor, kept: torch.Tensor, wanted: torch.Tensor, more: float) -> torch.Tensor:
    """(C_SS + more I)^-1 wanted."""
    inner = C[kept][:, kept]
    inner.diagonal().add_(more)
    if C.dtype == torch.float32:
        failed = torch.zeros((), dtype=torch.int32)
        torch.linalg.cholesky_ex(inner.mT, out=(inner.mT, failed))  # in place
        if not bool(failed):
            return torch.cholesky_solve(wanted, inner.mT)
        inner = C[kept][:, kept].double()  # slow and large, and right where float32 does not do
        inner.diagonal().add_(more)
    found: torch.Tensor = torch.linalg.solve(inner, wanted.to(inner.dtype))
    return found.to(C.dtype)
