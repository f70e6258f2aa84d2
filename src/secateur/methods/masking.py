"""What the methods that make masks share: which weights, how much of each, and the way through the model."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur import world
from secateur.choose.allocate import Allocation, read_allocation, shares
from secateur.choose.budget import Budget
from secateur.choose.mask import Layout, mask_matrix, masks_each, zeros_of
from secateur.choose.packed import PackedMasks, packed
from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.errors import SecateurError
from secateur.load.batches import Batch, samples_of, size_of
from secateur.load.pieces import pieces_of
from secateur.load.shared import shared
from secateur.load.store import copy_of, held
from secateur.load.through import shown, whole_passes
from secateur.methods.base import Decision
from secateur.progress import Track
from secateur.score.grams import Gram, Read, grams, grams_through
from secateur.score.outliers import outliers
from secateur.space.trace import Inputs
from secateur.space.weights import Weight, Weights, blocks_of, maskable
from secateur.walk import Stage, walk


@dataclass(frozen=True)
class Which:
    """Options that say what is masked, and in what pattern."""

    only: Sequence[str] = ()
    ignore: Sequence[str] = ()
    block: tuple[int, int] = (1, 1)
    allocation: Allocation = "uniform"
    owl_times: float = 5.0
    owl_spread: float = 0.08
    inputs: Inputs = None


@dataclass(frozen=True)
class Task:
    """What is to be masked, and how much of each weight."""

    weights: Weights
    layout: Layout
    sparsity: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Solved:
    """Masks of matrices, and what came out beside them."""

    masks: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor] | None = None
    """Repaired; None where what stays is as it was."""
    scores: Sequence[torch.Tensor] | None = None
    damping: float = 0.0


Solver = Callable[[Sequence[torch.Tensor], Gram, Sequence[int], Layout], Solved]
"""Matrices [rows, columns] that read the same, what they read, how many of each go."""


def task(model: nn.Module, budget: Budget, data: Sequence[Batch], which: Which, scope: str, track: Track) -> Task:
    """Read a budget and options, and find the weights; nothing heavy runs before all of it is known to fit.

    Raises:
        SecateurError: for options that contradict each other or do not fit the model.
    """
    sparsity = budget.sparsity()
    layout = Layout(scope, budget.n_m, which.block)
    allocation = read_allocation(which.allocation)
    if allocation != "uniform" and budget.n_m is not None:
        raise SecateurError("n:m fixes the share of every weight, and allocation would change it: give one of them")
    if allocation != "uniform" and scope == "global":
        raise SecateurError("scope global ranks all weights together, and allocation gives each its own share")
    if allocation != "owl" and (which.owl_times, which.owl_spread) != (Which.owl_times, Which.owl_spread):
        raise SecateurError("owl_times and owl_spread go with allocation owl")
    if not (which.owl_times > 0 and which.owl_spread > 0):
        raise SecateurError(f"owl_times {which.owl_times} and owl_spread {which.owl_spread} must be above 0")
    if allocation == "owl" and not data:
        raise SecateurError(
            "allocation owl needs data: give batches, or 'self' for a language model that writes its own"
        )
    inputs = which.inputs
    if inputs is None and data:
        inputs = inputs_from(model, samples_of(data[0])[0])
    weights = maskable(model, inputs, only=which.only, ignore=which.ignore)
    parameters, pieces = dict(model.named_parameters()), pieces_of(model)
    for weight in weights:
        if not all(bool(torch.isfinite(piece).all()) for piece in pieces(parameters[weight.name])):
            raise SecateurError(f"{weight.name} holds NaN or infinite values: mend the checkpoint, or ignore it")
    layout.check(weights)
    found = None
    if allocation == "owl":
        found = _outliers(model, data, weights.chosen, which.owl_times, track)
    elif allocation == "magnitude":
        found = _by_magnitude(parameters, weights.chosen, sparsity)
    return Task(weights, layout, sparsity, shares(weights.chosen, sparsity, allocation, found, which.owl_spread))


def from_weights(
    model: nn.Module, task: Task, score: Callable[[torch.Tensor], torch.Tensor], *, keep: bool
) -> Decision:
    """Masks by a score of each weight by itself; no data is needed."""
    parameters = dict(model.named_parameters())
    begin = time.perf_counter()
    scores = {w.name: score(parameters[w.name].detach()) for w in task.weights} if keep else {}

    def own(weight: Weight) -> torch.Tensor:
        if keep:
            return scores[weight.name]
        with held(model, names=[weight.name]):
            return score(parameters[weight.name].detach())

    sparsity = task.sparsity if task.layout.scope == "global" else task.shares
    masks = PackedMasks.of(masks_each(task.weights.chosen, own, sparsity, task.layout))
    details = _details(task, 0, [], {"masking": time.perf_counter() - begin})
    return Decision(Plan(masks=masks), scores=_scores(task, scores) if keep else None, details=details)


@torch.inference_mode(mode=False)  # what is written into must be plain tensors, whoever calls
def block_by_block(
    model: nn.Module,
    data: Sequence[Batch],
    task: Task,
    solve: Solver,
    *,
    full: bool,
    keep: bool,
    track: Track,
) -> Decision:
    """Masks by what weights read, each block on what the masked blocks before it give; its copy is the cut model.

    Args:
        model: the dense model; a copy is worked on.
        data: calibration batches.
        task: what is to be done.
        solve: makes masks of weights that read the same.
        full: whether it wants X'X, or the squares alone.
        keep: whether the scores are kept.
        track: shows progress.
    """
    work = copy_of(model, "masked").requires_grad_(requires_grad=False)
    parameters = dict(work.named_parameters())
    masks = PackedMasks()
    scores = {w.name: torch.zeros(w.shape) for w in task.weights} if keep else {}
    counts = _Counts(task)
    unreached: list[str] = []
    spent = {"calibrating": 0.0, "solving": 0.0}
    damping: dict[str, float] = {}
    told: dict[str, Any]
    for stage in walk(work, shared(data), task.weights.chosen, track=track, name="masks"):
        if stage.done:
            told = _recall(stage, masks)
            unreached += told["unreached"]
            damping |= told["damping"]
            continue
        begin = time.perf_counter()
        groups = grams(stage.run, stage.weights, parameters, full=full, last=stage.last)
        ready = time.perf_counter()
        own = {w.name: torch.ones(w.shape, dtype=torch.bool) for w in stage.weights}
        told = {"unreached": [], "damping": {}}
        for group, found in zip(groups, _solved(groups, parameters, counts, task.layout, solve, keep), strict=True):
            told["unreached"] += [read.weight.name for read in group if read.gram is None]
            if found.damping:
                told["damping"] |= {read.weight.name: found.damping for read in group}
            _put(group, found, parameters, own, scores)
        unreached += told["unreached"]
        damping |= told["damping"]
        if stage.journal is None:
            for name, mask in own.items():
                masks.put(name, mask)
        else:
            stage.keep({name: packed(mask) for name, mask in own.items()}, told)
            _recall(stage, masks)
        spent["calibrating"] += ready - begin
        spent["solving"] += time.perf_counter() - ready
    details = _details(task, sum(map(size_of, data)), list(dict.fromkeys(unreached)), spent)
    if damping:
        details["more_damping"] = damping
    plan = Plan(masks=masks.ordered(w.name for w in task.weights))
    kept = _scores(task, scores) if keep else None
    return Decision(plan, details=details, scores=kept, pruned=_as_was(work, model))


def _recall(stage: Stage, masks: PackedMasks) -> dict[str, Any]:
    """Take the masks of a stage from where they were kept, as views of the file; what else was told."""
    shard, told = stage.recall()
    for weight in stage.weights:
        masks.take(weight.name, shard.mapped(weight.name), weight.shape)
    shard.forget()
    return told  # type: ignore[no-any-return]


def _put(
    group: Sequence[Read],
    found: Solved,
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, torch.Tensor],
    scores: Mapping[str, torch.Tensor],
) -> None:
    """Write what was solved into the weights and the masks, and into the scores where they are kept."""
    for i, read in enumerate(group):
        tensor = parameters[read.weight.name]
        read.weight.put(masks[read.weight.name], read.part, found.masks[i].cpu())
        if found.weights is not None:
            new = found.weights[i].to(tensor.dtype)
        else:
            new = read.weight.matrix(tensor, read.part).masked_fill(~found.masks[i], 0)
        read.weight.put(tensor, read.part, new)
        if scores and found.scores is not None:
            read.weight.put(scores[read.weight.name], read.part, found.scores[i].float().cpu())


def _as_was(work: nn.Module, model: nn.Module) -> nn.Module:
    """A copy that was worked on, in all but its weights as the model is: what trains, and buffers that passes moved."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(trained[name])
    before = dict(model.named_buffers(remove_duplicate=False))
    for name, buffer in list(work.named_buffers(remove_duplicate=False)):
        if name in before and (buffer.shape != before[name].shape or not torch.equal(buffer, before[name])):
            path, _, leaf = name.rpartition(".")
            setattr(work.get_submodule(path), leaf, before[name].detach().clone())
    return work


def _solved(
    groups: Sequence[Sequence[Read]],
    parameters: Mapping[str, torch.Tensor],
    counts: "_Counts",
    layout: Layout,
    solve: Solver,
    keep: bool,
) -> Iterator[Solved]:
    """Solve the groups of a stage, one after the other; several processes share them out and tell each other."""
    zeros = [[counts.take(read) for read in group] for group in groups]
    if not world.split():
        yield from (_solve_group(*job, parameters, layout, solve) for job in zip(groups, zeros, strict=True))
        return
    owners = world.dealt([_cost(group) for group in groups])
    own: dict[int, Solved] = {}
    with world.as_one():
        for job, owner in enumerate(owners):
            if owner == world.rank():
                own[job] = _solve_group(groups[job], zeros[job], parameters, layout, solve)
                own[job] = own[job] if keep else replace(own[job], scores=None)
    told = [(found.weights is not None, found.scores is not None, found.damping) for found in own.values()]
    every: dict[int, tuple[bool, bool, float]] = {}
    for found in world.gathered(dict(zip(own, told, strict=True))):
        every |= found
    tensors = {job: [*s.masks, *(s.weights or ()), *(s.scores or ())] for job, s in own.items()}
    for job, made in enumerate(world.handed_out(tensors, owners)):
        repaired, scored, damping = every[job]
        parts = [made[i : i + len(groups[job])] for i in range(0, len(made), len(groups[job]))]
        yield Solved(parts.pop(0), parts.pop(0) if repaired else None, parts.pop(0) if scored else None, damping)


def _cost(group: Sequence[Read]) -> float:
    """About what it takes to solve a group: one factorisation, and a sweep over the columns of each matrix."""
    found = 0.0
    for read in group:
        columns = prod(read.part[dim][1] - read.part[dim][0] for dim in read.weight.columns)
        found += _elements(read) * float(columns)
    return found


def _elements(read: Read) -> int:
    return prod(b - a for a, b in read.part)


def _solve_group(
    group: Sequence[Read], zeros: Sequence[int], parameters: Mapping[str, torch.Tensor], layout: Layout, solve: Solver
) -> Solved:
    matrices = [read.weight.matrix(parameters[read.weight.name], read.part) for read in group]
    gram = group[0].gram
    if gram is not None:
        return solve(matrices, gram, zeros, layout)
    scores = [m.abs().float() for m in matrices]  # nothing was seen: all inputs count alike
    return Solved([mask_matrix(s, n, layout) for s, n in zip(scores, zeros, strict=True)], scores=scores)


class _Counts:
    """How many elements (tiles) of each part go: exact in total, whatever parts a weight turns out to have."""

    def __init__(self, task: Task) -> None:
        self.tile = task.layout.block[0] * task.layout.block[1]
        sizes = [w.size // self.tile for w in task.weights]
        zeros = zeros_of(sizes, [task.shares[w.name] for w in task.weights])
        self.zeros = {w.name: n for w, n in zip(task.weights, zeros, strict=True)}
        self.done: dict[str, tuple[int, int]] = {}

    def take(self, read: Read) -> int:
        """Zeros of the next part of a weight."""
        weight = read.weight
        seen, given = self.done.get(weight.name, (0, 0))
        seen += _elements(read) // self.tile
        upto = self.zeros[weight.name] * seen // (weight.size // self.tile)
        self.done[weight.name] = seen, upto
        return upto - given


def _outliers(
    model: nn.Module, data: Sequence[Batch], weights: Sequence[Weight], times: float, track: Track
) -> dict[str, float]:
    parameters = dict(model.named_parameters())
    reads = grams_through(model, data, weights, parameters, full=False, through=shown(whole_passes, track, "outliers"))
    return outliers(reads, parameters, blocks_of(model, [w.name for w in weights]), times)


def _by_magnitude(
    parameters: Mapping[str, torch.Tensor], weights: Sequence[Weight], sparsity: float
) -> dict[str, float]:
    """What global magnitude, each weight divided by its norm, would take from each: layers differ in what they need."""
    every = masks_each(weights, lambda w: relative_size(parameters[w.name].detach()), sparsity, Layout("global"))
    return {name: int((~mask).sum()) / mask.numel() for name, mask in every}


def relative_size(weight: torch.Tensor) -> torch.Tensor:
    """|w| by the norm of its tensor, as NNCF compares weights of different tensors; |w| where all are zero."""
    size = weight.abs().float()
    norm = torch.linalg.vector_norm(size)
    return size / norm if float(norm) > 0 else size


def inputs_from(model: nn.Module, batch: Batch) -> Inputs:
    """The arguments of `load.batches.run`, on the model's device."""
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = batch[0] if isinstance(batch, tuple | list) else batch
    moved: Any = pytree.tree_map(lambda x: x.to(place) if isinstance(x, torch.Tensor) else x, given)
    if isinstance(moved, Mapping):
        return {name: value for name, value in moved.items() if name != "labels"}
    return {str(getattr(model, "main_input_name", "input_ids")): moved} if hasattr(model, "config") else moved


def _details(task: Task, samples: int, unreached: list[str], seconds: Mapping[str, float]) -> dict[str, Any]:
    layout = task.layout
    found: dict[str, Any] = {
        "masking": {
            "target": task.sparsity,
            "scope": layout.scope,
            "n:m": None if layout.n_m is None else f"{layout.n_m[0]}:{layout.n_m[1]}",
            "block": list(layout.block),
            "weights": len(task.weights),
            "left": dict(task.weights.left),
        },
        "calibration": {"samples": samples},
        "seconds": dict(seconds),
    }
    if len(set(task.shares.values())) > 1:
        found["masking"]["shares"] = dict(task.shares)
    if unreached:
        found["unreached"] = unreached
    return found


def _scores(task: Task, scores: Mapping[str, torch.Tensor]) -> MaskScores:
    shares = None if task.layout.scope == "global" else task.shares
    return MaskScores(_on_cpu(scores), task.weights.chosen, task.layout, shares)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def need_data(method: str, data: Sequence[Batch]) -> None:
    """Raise SecateurError where a method that calibrates has no data."""
    if not data:
        raise SecateurError(f"{method} needs data: give batches, or 'self' for a language model that writes its own")


def matrix_scope(method: str, scope: str) -> str:
    """A scope that lies within one matrix.

    Raises:
        SecateurError: for another.
    """
    if scope == "global":
        raise SecateurError(
            f"{method} goes block by block and cannot rank all weights together: take scope row or tensor"
        )
    return scope
