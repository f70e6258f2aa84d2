"""Cut the width of a residual stream in a basis of its own, in place of its units as they are.

    streams = measure_streams(model, space, data)
    base = rotated(model, space, streams, k)                 # the same function, in another basis
    plan = Plan(first_units(space, k) | ...)                 # of which the first k units stay
    pruned = apply(base, plan, space=space)
    after_cut(base, pruned, space, plan, streams, basis(streams, k))
    repair(base, pruned, plan, space, data)
    after_repair(base, pruned, space, plan, basis(streams, k), data)

One basis serves all layers, so no layer needs a matrix to pass from one to the next, and an embedding that is tied to
the head stays tied. That a stream between RMS norms may be turned: Ashkboos et al. 2024, "SliceGPT" (arXiv:2401.15024).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.choose.plan import Kept, Plan
from secateur.cut.names import new_name, renumbered
from secateur.cut.tensors import kept_rows
from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.mend.rotation import complete, gained, guess, missed, subspace, tie_rotation, tied_weight
from secateur.methods.streams import Stream, Streams, measure_streams, normalised, refusal, stream_axis, weight_of
from secateur.progress import Track, quiet
from secateur.space import Space
from secateur.space.types import Norm

__all__ = [
    "Basis",
    "Stream",
    "Streams",
    "after_cut",
    "after_repair",
    "basis",
    "expected_loss",
    "first_units",
    "measure_streams",
    "rotated",
]
ITERATIONS = 60
_EXACT = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Share by which what a norm makes may differ in the new basis; of shorter types 0.2."""


@dataclass(frozen=True)
class Tie:
    """How a head reads the stream that is tied to the embedding E.

    Attributes:
        norm: Whose result it reads.
        table: The parameter of both.
        weight: The best weight of that norm for u in the new basis at full width, [d].
        narrow: The same for the first k units alone, [k].
        pull: A'FA [k, k], F the second moments of the gradients at the norm's result.
        push: A'F diag(g) Q [k, d], g the dense weight of the norm.
        whole: tr(diag(g) F diag(g) C): what a head that gives nothing misses.
    """

    norm: str
    table: str
    weight: torch.Tensor
    narrow: torch.Tensor
    pull: torch.Tensor
    push: torch.Tensor
    whole: float


@dataclass(frozen=True)
class Basis:
    """A basis of the residual stream; all float64.

    Attributes:
        matrix: Q [d, d], orthogonal: h becomes Q'h. Its first k columns A span what is to stay.
        k: Units that are to stay.
        scales: Norm -> sqrt(tr(A'CA) / k), what the first k units of u have of its size.
        guesses: Norm -> B'CA (A'CA)^-1 [d - k, k], B the other columns: the best linear guess of the units that go.
        tie: For a head that is tied to the embedding; None where there is none.
    """

    matrix: torch.Tensor
    k: int
    scales: dict[str, float]
    guesses: dict[str, torch.Tensor]
    tie: Tie | None


def expected_loss(streams: Streams, k: int, *, iterations: int = ITERATIONS) -> float:
    """The KL to the dense model to be expected, to second order, when k units of the stream stay and all is repaired.

    What readers lose by not seeing the rest of the stream; that the head is tied is not in it, nor that errors meet.

    Args:
        streams: of `measure_streams`.
        k: units that stay.
        iterations: of the search for the basis, at most.

    Raises:
        SecateurError: for a k that the stream does not have.
    """
    return 0.5 * missed(_space(streams, k, iterations), streams.seconds, streams.fishers)


def basis(streams: Streams, k: int, *, iterations: int = ITERATIONS) -> Basis:
    """The basis whose first k units are worth most: to what reads each norm, and to the loss, in equal parts.

    Args:
        streams: of `measure_streams`.
        k: units that are to stay.
        iterations: of the search, at most.

    Raises:
        SecateurError: for a k that the stream does not have.
    """
    A = _space(streams, k, iterations)
    last = next((stream for stream in streams.streams if stream.norm == streams.tied), None)
    matrix = complete(A)
    if last is not None:
        given = last.outer, last.weight, last.second
        parts = [tie_rotation(part, *given) for part in (matrix[:, :k], matrix[:, k:]) if part.shape[1]]
        matrix = torch.cat(parts, 1)
    A = matrix[:, :k]
    scales = {s.norm: float((A * (s.second @ A)).sum() / k) ** 0.5 for s in streams.streams}
    guesses = {s.norm: guess(A, matrix[:, k:], s.second) for s in streams.streams}
    return Basis(matrix, k, scales, guesses, None if last is None else _tie(last, matrix, k))


def _tie(last: Stream, matrix: torch.Tensor, k: int) -> Tie:
    C = matrix.T @ last.second @ matrix
    pull, push = matrix.T @ last.outer @ matrix, matrix.T @ (last.outer * last.weight) @ matrix
    weight, _ = tied_weight(pull, push, C, C)
    narrow, _ = tied_weight(pull[:k, :k], push[:k], C[:k, :k], C[:, :k])
    whole = float((last.fisher * last.second).sum())
    return Tie(last.norm, last.readers[0], weight, narrow, pull[:k, :k], push[:k], whole)


def _space(streams: Streams, k: int, iterations: int) -> torch.Tensor:
    if not 1 <= k <= streams.width:
        raise SecateurError(
            f"{streams.axis} has {streams.width} units: {k} of them cannot stay, give 1 to {streams.width}"
        )
    if (k, iterations) not in streams.found:
        metrics = _mixed(streams)
        with torch.enable_grad():
            streams.found[k, iterations] = subspace(streams.seconds, metrics, k, iterations=iterations)
    return streams.found[k, iterations]


def _mixed(streams: Streams) -> list[torch.Tensor]:
    """L and F, each over what all norms together would lose by it."""
    local = sum(float((s.reads * s.second).sum()) for s in streams.streams) or 1.0
    loss = sum(float((s.fisher * s.second).sum()) for s in streams.streams) or 1.0
    return [s.reads / local + s.fisher / loss for s in streams.streams]


def first_units(space: Space, k: int) -> dict[str, Kept]:
    """For a plan: the first k units of the residual stream stay.

    Raises:
        SecateurError: for a model without just one such axis.
    """
    axis = stream_axis(space)
    return {axis.name: Kept(axis.kind, axis.size, tuple(range(k)))}


@torch.inference_mode(mode=False)
def rotated(model: nn.Module, space: Space, streams: Streams, k: int, *, iterations: int = ITERATIONS) -> nn.Module:
    """A copy of the model, as wide as before, with its residual stream in the basis for k.

    What is inside the blocks is what it was, to rounding in the model's type: embeddings and all that writes to the
    stream are turned, readers too, once they have taken over the weight of their norm, which becomes ones. Only the
    norm of a tied head keeps a weight, and gives logits that are close, not equal.

    Args:
        model: that the streams were measured on.
        space: its Space.
        streams: of `measure_streams`.
        k: units that are to stay.
        iterations: of the search for the basis, at most.

    Raises:
        SecateurError: where a norm of the copy does not give what it did, in the new basis: something reads the stream
            that is not known; or for a k that the stream does not have.
    """
    found = basis(streams, k, iterations=iterations)
    new = copy.deepcopy(model)
    parameters = dict(new.named_parameters())
    norms = {norm.module: norm for norm in space.norms if norm.axis == streams.axis}
    folded = {name: s.weight for s in streams.streams if s.norm != streams.tied for name in s.readers}
    with torch.no_grad():
        weights = {norm.weight for norm in norms.values()}
        for part in stream_axis(space).slices:
            if part.parameter in weights:
                continue
            tensor = parameters[part.parameter]
            wide = tensor.detach().double().movedim(part.dim, -1)
            if part.parameter in folded:
                wide = wide * folded[part.parameter].to(wide.device)
            tensor.copy_((wide @ found.matrix.to(wide.device)).movedim(-1, part.dim))
        for stream in streams.streams:
            tied = found.tie is not None and stream.norm == found.tie.norm
            weight = found.tie.weight if found.tie is not None and tied else torch.ones_like(stream.weight)
            _set(norms[stream.norm], parameters, weight)
    _check(model, new, [norms[s.norm] for s in streams.streams], found, streams.sample)
    return new


def _set(norm: Norm, parameters: dict[str, nn.Parameter], weight: torch.Tensor, name: str | None = None) -> None:
    """Make a norm multiply by `weight`; one without a weight does so by ones already."""
    if norm.weight is not None:
        parameters[name or norm.weight].copy_(weight - norm.weight_offset)
    elif not bool((weight == 1).all()):
        raise SecateurError(f"the norm {norm.module} has no weight: it cannot take the scale of a narrower stream")


def _check(model: nn.Module, new: nn.Module, norms: Sequence[Norm], found: Basis, sample: Batch) -> None:
    """Run both models on one sample: every norm of the new one must give what it gave, in the new basis."""
    before, after = (_inputs(each, norms, sample) for each in (model, new))
    for norm in norms:
        one, two = before[norm.module], after[norm.module]
        apart = float((one.double() @ found.matrix.to(one.device) - two.double()).norm() / one.double().norm())
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        if not apart <= _EXACT.get(dtype, 0.2):
            raise refusal(
                f"{norm.module} reads what is {apart:.1%} off in another basis: something else reads the stream"
            )


def _inputs(model: nn.Module, norms: Sequence[Norm], batch: Batch) -> dict[str, torch.Tensor]:
    """What each norm makes before its weight, u [rows, width]."""
    found: dict[str, torch.Tensor] = {}
    with evaluating(model), torch.no_grad(), normalised(model, norms, lambda norm, u: found.update({norm.module: u})):
        run(model, batch)
    return found


@torch.inference_mode(mode=False)
@torch.no_grad()
def after_cut(base: nn.Module, pruned: nn.Module, space: Space, plan: Plan, streams: Streams, found: Basis) -> None:
    """Let what reads a cut copy make the best of the units that are left, by the statistics alone, in place.

    Readers take for the units that are gone what is to be expected of them, given the others. A norm over k units makes
    more of them than the one over all did, so the weights become sqrt(tr(A'CA) / k); that of a tied head becomes what
    suits it best. A repair then starts from there.

    Args:
        base: the `rotated` model.
        pruned: what `apply` made of it; the plan keeps its first k units.
        space: that was cut.
        plan: the cut.
        streams: that the basis was made from.
        found: the basis.

    Raises:
        SecateurError: for a plan that keeps other units, and norms without a weight.
    """
    _same_units(space, plan, found)
    if found.k == len(found.matrix):
        return
    parameters, moved, dense = dict(pruned.named_parameters()), renumbered(space, plan), dict(base.named_parameters())
    norms, rows = {norm.module: norm for norm in space.norms}, kept_rows(space, plan)
    dims = {part.parameter: part.dim for part in stream_axis(space).slices}
    for stream in streams.streams:
        norm = norms[stream.norm]
        name = None if norm.weight is None else new_name(norm.weight, moved)
        if norm.weight is not None and name not in parameters:
            continue  # its layer is gone
        weight = torch.full((found.k,), found.scales[stream.norm], dtype=torch.float64)
        if found.tie is not None and stream.norm == found.tie.norm:
            weight = weight * found.tie.narrow.cpu() / _table_scale(base, pruned, space, found.tie)
            _set(norm, parameters, weight, name)
            continue
        _set(norm, parameters, weight, name)
        for reader in stream.readers:
            after = new_name(reader, moved)
            if after in parameters and reader not in plan.masks:
                dim = dims[reader]
                wide = dense[reader].detach().double().movedim(dim, -1)
                guesses = found.guesses[stream.norm].to(wide.device)
                full = (wide[..., : found.k] + wide[..., found.k :] @ guesses).movedim(-1, dim)
                for other in range(full.dim()):
                    if other != dim and (reader, other) in rows:
                        full = full.index_select(other, rows[reader, other].to(full.device))
                parameters[after].copy_(full)


@torch.inference_mode(mode=False)
def after_repair(
    base: nn.Module,
    pruned: nn.Module,
    space: Space,
    plan: Plan,
    found: Basis,
    data: Sequence[Batch],
    *,
    track: Track = quiet,
) -> dict[str, Any]:
    """Fit the last norm's weight to a tied head, in place, once all before it is repaired.

    It minimises the error of the logits as the loss sees it: that of A diag(w) x to diag(g) u in the metric of the
    gradients there, x what the norm makes of the narrow stream. A head of its own is a reader as any other, which
    `repair` has fitted.

    Args:
        base: the `rotated` model.
        pruned: what was cut from it.
        space: that was cut.
        plan: the cut.
        found: the basis.
        data: calibration batches.
        track: shows progress.

    Returns:
        For the report: ``final_norm``, its module, and the share of the head's target that is missed ``before`` and
        ``after``; empty without a tied head.

    Raises:
        SecateurError: for no data, a plan that keeps other units, and activations that are not finite.
    """
    _same_units(space, plan, found)
    if found.tie is None:
        return {}
    if not data:
        raise SecateurError("the norm before a tied head is fitted to what runs through it: give calibration data")
    tie, parameters = found.tie, dict(pruned.named_parameters())
    norm = next(norm for norm in space.norms if norm.module == tie.norm)
    name = str(new_name(str(norm.weight), renumbered(space, plan)))
    after = Norm(name.rpartition(".")[0], norm.axis, name, norm.weight_offset)
    k, d = found.k, len(found.matrix)
    second, cross, rows = torch.zeros(k, k).double(), torch.zeros(d, k).double(), 0
    for batch in track(data, "fitting the last norm"):
        u, x = _inputs(base, [norm], batch)[norm.module], _inputs(pruned, [after], batch)[after.module]
        second, cross, rows = second + (x.T @ x).double().cpu(), cross + (u.T @ x).double().cpu(), rows + len(x)
    second, cross = second / rows, cross / rows
    if not bool(torch.isfinite(second).all() and torch.isfinite(cross).all()):
        raise SecateurError(f"NaN or infinite activations at {after.module}: check the weights and dtype")
    pull, push, scale = tie.pull.cpu(), tie.push.cpu(), _table_scale(base, pruned, space, tie)
    now = weight_of(after, parameters, k).cpu() * scale
    weight, taken = tied_weight(pull, push, second, cross)
    before = gained(pull, push, second, cross, now)
    with torch.no_grad():
        _set(after, parameters, weight / scale)
    shares = {"before": 1 + before / tie.whole, "after": 1 + taken / tie.whole}
    return {"final_norm": after.module, **shares}


def _table_scale(base: nn.Module, pruned: nn.Module, space: Space, tie: Tie) -> float:
    """What the cut multiplied the tied table by, to make up for a factor that follows from the hidden size (Gemma)."""
    dim = next(part.dim for part in stream_axis(space).slices if part.parameter == tie.table)
    before = dict(base.named_parameters())[tie.table].detach().double()
    after = dict(pruned.named_parameters())[tie.table].detach().double()
    before = before.narrow(dim, 0, after.shape[dim])
    return float((before * after).sum() / before.square().sum())


def _same_units(space: Space, plan: Plan, found: Basis) -> None:
    axis = stream_axis(space)
    kept = plan.kept.get(axis.name)
    units = tuple(range(axis.size)) if kept is None else kept.units
    if units != tuple(range(found.k)):
        raise SecateurError(
            f"the plan keeps {len(units)} units of {axis.name}, the basis is for the first {found.k}: use first_units"
        )
