"""Measure what each single cut costs: every axis and weight at several ratios, every block dropped, one at a time.

The data runs through the dense blocks before the one that changes once, not once for each cut: a cut in block i of L
costs L - i blocks (`trials.Prefix`). What runs through the whole model, such as the hidden size, costs full passes.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur.choose.mask import Layout, mask_matrix, masks_of, zeros_of
from secateur.choose.plan import Plan
from secateur.choose.rank import keep_best
from secateur.cut.pretend import Pretence
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, first_samples, run, size_of
from secateur.load.mode import evaluating
from secateur.load.model import fingerprint
from secateur.measure.harm import Harm, run_on_data
from secateur.mend.alps import alps
from secateur.methods.scan_result import Sensitivity, check_ratios, text_of
from secateur.methods.scan_select import Chosen, choose
from secateur.methods.scan_state import State, identity
from secateur.methods.structural import FROM_DATA, FROM_WEIGHTS, criterion_scores
from secateur.methods.trials import Prefix, find_prefix, without_blocks
from secateur.methods.verbs import Data, batches_of
from secateur.progress import Track, quiet
from secateur.score.grams import Read, grams
from secateur.score.reads import readers_of
from secateur.score.wanda import wanda
from secateur.space import Axis, Block
from secateur.space.products import plain_attention
from secateur.space.trace import Inputs
from secateur.space.weights import Weight

RATIOS = (0.25, 0.5, 0.75)
SAMPLES = 64
What = Literal["axes", "weights", "blocks"]
WHAT: tuple[What, ...] = ("axes", "weights", "blocks")
MASKS = ("magnitude", "wanda", "alps")
_READ, _UNREAD = "activation", "magnitude_l2"
"""What ranks units by default: of axes that linear layers or convolutions read, and of others."""


@torch.inference_mode(mode=False)  # what is written into must be plain tensors, whoever calls
def sensitivity(
    model: nn.Module,
    data: Data,
    *,
    ratios: Sequence[float] = RATIOS,
    measure: str | None = None,
    what: Sequence[str] = WHAT,
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    criterion: str | None = None,
    masks: str = "magnitude",
    inputs: Inputs = None,
    reuse: bool = True,
    partial: Path | None = None,
    name: str = "",
    data_name: str = "",
    track: Track = quiet,
    **loading: Any,
) -> Sensitivity:
    """Measure how much worse a model gets when one axis, weight or block alone is cut.

    Nothing is repaired, but for weights with masks=alps.

    Args:
        model: any module; it stays as it is.
        data: what to measure on; see `methods.verbs.Data`.
        ratios: shares that go, each in (0, 1). Of an axis whole units go, at least one.
        measure: kl (nats for each prediction), loss (nats), accuracy (share, of classifiers) or mse (of models that
            give no probabilities); None = kl, or mse. The others are kept beside it, since they cost nothing more.
        what: axes, whose units are cut; weights, which masks thin out; blocks (layers, attentions, MLPs), which are
            dropped.
        only: kinds, and patterns of axis, weight, block or module names; all by default but the axes head_dim,
            ssm_head_dim and rank.
        ignore: the same, of what is left out.
        criterion: what ranks the units of axes, as in `structural`; None = activation, and magnitude_l2 of axes that
            no linear layer or convolution reads.
        masks: how a weight is thinned out: magnitude, wanda (within each row), or alps, which also mends what stays of
            it. Take the method that the allocation is for.
        inputs: arguments of one forward pass to trace the model with; by default the first samples of the data.
        reuse: keep what the blocks before a cut give; False = a full pass for each measurement, with the same result.
        partial: a file that every measurement is added to, and from which a run that was stopped goes on.
        name: of the model, for the result.
        data_name: of the data, for the result.
        track: shows progress.
        loading: how data is read, as for `batches_of`; at most 64 rows unless ``samples`` says otherwise.

    Raises:
        SecateurError: for a ratio outside of (0, 1), a pattern that matches nothing, a measure that the model or the
            data do not have, data that does not fit, and a partial file of another model or data.
    """
    ratios = check_ratios(ratios)
    _check_names(what, criterion, masks)
    loading = {"samples": SAMPLES, **loading}
    batches = batches_of(model, data, track=track, **loading)
    batches = first_samples(batches, loading["samples"]) if loading["samples"] else batches
    begin = time.perf_counter()
    with evaluating(model), torch.no_grad():
        run_on_data(model, batches[0])  # says at once what does not fit
    chosen = choose(model, batches, inputs, what=what, only=only, ignore=ignore)
    harm = Harm(model, batches, track=track)
    measure = _measure_of(measure, harm)
    state = State(partial, identity(model, batches, criterion, masks) if partial is not None else {})
    bench = _Bench(model, harm, chosen, reuse=reuse, repair=masks == "alps")
    scores, ranked = _unit_scores(model, chosen, batches, criterion, track)
    reads = _reads(model, chosen.weights, batches, masks, track)
    jobs, left = bench.jobs(ratios, scores, reads)
    found = bench.all(jobs, state, left, track)
    done = [job for job in jobs if job.key in found]
    shared = harm.passes + 1 / len(batches) + bool(reads) + (_READ in ranked.values())
    cost = {**bench.cost(done, state, shared), "seconds": time.perf_counter() - begin + state.seconds}
    tables = {m: _table(done, found, m) for m in (measure, *(m for m in harm.measures if m != measure))}
    own = tables.pop(measure)
    return Sensitivity(
        name, fingerprint(model), data_name, sum(map(size_of, batches)), measure, ratios, masks, dict(harm.dense),
        own["losses"], _axes_told(chosen, bench.kept, ranked, own["axes"]), own["blocks"], chosen.described(model),
        tables, {**chosen.left, **left}, cost,
    )  # fmt: skip


def _check_names(what: Sequence[str], criterion: str | None, masks: str) -> None:
    unknown = [name for name in what if name not in WHAT]
    if unknown or not what:
        raise SecateurError(f"what: {unknown[0] if unknown else 'nothing'!r} cannot be measured: {', '.join(WHAT)} can")
    known = [*FROM_WEIGHTS, *FROM_DATA]
    if criterion is not None and criterion not in known:
        raise SecateurError(f"there is no criterion {criterion!r}{nearest(criterion, known)}")
    if masks not in MASKS:
        raise SecateurError(f"there are no masks {masks!r}{nearest(masks, MASKS)}")


def _measure_of(measure: str | None, harm: Harm) -> str:
    """The measure, where it can be told from the model and the data."""
    if measure is None:
        return harm.measures[0]
    if measure in harm.measures:
        return measure
    have = f"these can be measured: {', '.join(harm.measures)}"
    if measure == "accuracy" and "loss" in harm.measures:
        raise SecateurError(f"measure accuracy is for classifiers, and this is a language model: {have}")
    if measure in ("accuracy", "loss") and harm.measures == ("kl",):
        raise SecateurError(f"measure {measure} needs to know what is right: give data with labels; {have}")
    raise SecateurError(f"measure {measure} cannot be told from what the model gives for this data: {have}")


class _UncuttableError(Exception):
    """A cut that cannot be made; the message says why."""


@dataclass(frozen=True)
class _Job:
    """One measurement."""

    key: str
    change: Callable[[], AbstractContextManager[nn.Module]]
    """Gives the changed model for a while."""
    entries: list[tuple[str, str, str]] = field(default_factory=list)
    """(losses, axes or blocks; name; ratio) that it tells."""
    first: int = 0
    """Blocks of the chain that it leaves as they are."""


class _Bench:
    """One copy of the dense model that is changed, measured, and put right again.

    Attributes:
        prefix: What is kept of the blocks; None where they form no chain, or nothing is to be kept.
        kept: Axis -> {ratio: units that stay}.
        passes: Passes that it took to find the chain, and to go along it.
    """

    def __init__(self, model: nn.Module, harm: Harm, chosen: Chosen, *, reuse: bool, repair: bool) -> None:
        self.harm, self.chosen, self.repair = harm, chosen, repair
        space = chosen.space
        self.pretence = Pretence(model, space, chosen.inputs) if space is not None else None
        self.model = self.pretence.copy if self.pretence is not None else copy.deepcopy(model)
        self.model.requires_grad_(requires_grad=False)
        self.parameters = dict(self.model.named_parameters())
        self.kept: dict[str, dict[str, int]] = {}
        self.prefix: Prefix | None = None
        self.passes = 0.0
        if reuse:
            self.prefix = find_prefix(self.model, harm.batches, lambda at: harm.values(self.model, [0], at))
            length = len(self.prefix.chain) if self.prefix is not None else 1
            tried = 3 + (length - 1) * (length + 2) / (2 * length) if self.prefix is not None else 1
            self.passes += tried / len(harm.batches)  # on the first batch

    def jobs(
        self, ratios: Sequence[float], scores: Mapping[str, torch.Tensor], reads: Mapping[str, Sequence[Read]]
    ) -> tuple[list[_Job], dict[str, str]]:
        """All measurements, and the axes of which nothing may go."""
        found: list[_Job] = []
        left: dict[str, str] = {}
        for axis in self.chosen.axes:
            cuts = _sizes(axis, ratios)
            if not cuts:
                left[axis.name] = f"all of its {axis.size} units must stay"
            for size, texts in cuts.items():
                self.kept.setdefault(axis.name, {}).update(dict.fromkeys(texts, size))
                found.append(self._axis_job(axis, scores[axis.name], size, texts))
        for weight in self.chosen.weights:
            for ratio in ratios:
                found.append(self._weight_job(weight, ratio, reads.get(weight.name)))
        for block in self.chosen.blocks:
            paths = (block.name, *(block.idle if block.kind != "layers" else ()))
            entries = [("blocks", block.name, "1")]
            key = f"block {block.name} ({block.kind})"
            found.append(_Job(key, functools.partial(self._without, block), entries, self._before(paths)))
        return found, left

    def _axis_job(self, axis: Axis, scores: torch.Tensor, size: int, texts: Sequence[str]) -> _Job:
        plan = Plan({axis.name: keep_best(axis, scores, size)})
        pretence, space = self.pretence, self.chosen.space
        if pretence is None or space is None:
            raise ValueError("axes are cut in a traced model")
        first = 0
        if pretence.exact(axis):
            first = self._before([part.parameter for _, part in space.consumers(axis)])

        entries = [("axes", axis.name, text) for text in texts]
        return _Job(f"axis {axis.name} to {size}", lambda: pretence.cut(plan), entries, first)

    def _weight_job(self, weight: Weight, ratio: float, reads: Sequence[Read] | None) -> _Job:
        text = text_of(ratio)
        entries = [("losses", weight.name, text)]
        first = self._before([weight.name])
        return _Job(f"weight {weight.name} at {text}", lambda: self._masked(weight, ratio, reads), entries, first)

    def _before(self, paths: Sequence[str]) -> int:
        """Blocks of the chain before everything that lies at some paths."""
        if self.prefix is None:
            return 0
        return min((self.prefix.before(path) for path in paths), default=0)

    @contextmanager
    def _masked(self, weight: Weight, ratio: float, reads: Sequence[Read] | None) -> Iterator[nn.Module]:
        """The model with a share of one weight at zero: exactly that of its elements, rounded up."""
        tensor = self.parameters[weight.name]
        before = tensor.detach().clone()
        new = repaired(weight, before, ratio, reads) if reads and self.repair else thinned(weight, before, ratio, reads)
        try:
            with torch.no_grad():
                tensor.copy_(new)
            yield self.model
        finally:
            with torch.no_grad():
                tensor.copy_(before)

    @contextmanager
    def _without(self, block: Block) -> Iterator[nn.Module]:
        with without_blocks(self.model, [block]):
            yield self.model

    def measured(self, job: _Job) -> tuple[dict[str, float], float, float]:
        """The values of one changed model, and the passes and seconds that they took.

        Raises:
            _UncuttableError: where the change cannot be made.
            SecateurError: where what it gives cannot be measured.
        """
        begin = time.perf_counter()
        prefix, length = self.prefix, 1
        if prefix is not None:
            length = len(prefix.chain)
            self.passes += max(0, job.first - prefix.done) / length
            prefix.advance(job.first)
        with ExitStack() as stack:
            try:
                model = stack.enter_context(job.change())
            except SecateurError as error:
                raise _UncuttableError(str(error)) from error
            at = stack.enter_context(prefix.replaying()) if prefix is not None and job.first else None
            try:
                values = self.harm.values(model, None, at)
            except SecateurError as error:
                raise SecateurError(f"{job.key}: {error}") from error
        ran = (length - job.first) / length + (0 if self.harm.kept else 1)
        return values, ran, time.perf_counter() - begin

    def all(
        self, jobs: Sequence[_Job], state: State, left: dict[str, str], track: Track
    ) -> dict[str, Mapping[str, float]]:
        """The increases of all measurements by their keys; `left` takes those that cannot be made."""
        found: dict[str, Mapping[str, float]] = {}
        for job in track(sorted(jobs, key=lambda job: job.first), "what single cuts cost"):
            if job.key not in state.found:
                try:
                    state.add(job.key, *self.measured(job))
                except _UncuttableError as error:
                    left[job.key] = str(error)
                    continue
            found[job.key] = self.harm.increase(state.found[job.key])
        return found

    def cost(self, done: Sequence[_Job], state: State, shared: float) -> dict[str, float]:
        """Passes and measurements; `shared` passes are made once, with kept activations or without."""
        return {
            "passes": shared + self.passes + sum(state.passes[job.key] for job in done),
            "naive": shared + len(done) * (1 if self.harm.kept else 2),
            "measurements": len(done),
            "blocks": len(self.prefix.chain) if self.prefix is not None else 0,
            "resumed": sum(job.key in state.before for job in done),
        }


def thinned(weight: Weight, tensor: torch.Tensor, ratio: float, reads: Sequence[Read] | None) -> torch.Tensor:
    """A weight with a share of its elements at zero, rounded up: the smallest; with reads, wanda's in each row."""
    scores = tensor.abs().float()
    for read in reads or ():
        read.weight.put(scores, read.part, wanda(read.weight.matrix(tensor, read.part), read.gram).float())
    layout = Layout("tensor" if reads is None else "row")
    return tensor.masked_fill(~masks_of([weight], {weight.name: scores}, ratio, layout)[weight.name], 0)


def repaired(weight: Weight, tensor: torch.Tensor, ratio: float, reads: Sequence[Read]) -> torch.Tensor:
    """The same by ALPS: the best support, and the weights on it by least squares."""
    new = tensor.clone()
    parts = [read.weight.matrix(tensor, read.part) for read in reads]
    for read, matrix, zeros in zip(reads, parts, zeros_of([m.numel() for m in parts], ratio), strict=True):
        if read.gram is None:  # nothing was seen: the smallest go
            found = matrix.masked_fill(~mask_matrix(matrix.abs().float(), zeros, Layout()), 0)
        else:
            found = alps([matrix], read.gram.full(), [zeros], Layout())[1][0].to(tensor.dtype)
        read.weight.put(new, read.part, found)
    return new


def _sizes(axis: Axis, ratios: Sequence[float]) -> dict[int, list[str]]:
    """Units that stay of an axis -> the ratios that come to it; at least one unit of each group goes."""
    least = max(1, -(-axis.minimum // axis.groups))
    found: dict[int, list[str]] = {}
    for ratio in ratios:
        gone = min(max(1, math.floor(ratio * axis.per_group + 0.5)), axis.per_group - least)
        if gone > 0:
            found.setdefault(axis.size - gone * axis.groups, []).append(text_of(ratio))
    return found


def _unit_scores(
    model: nn.Module, chosen: Chosen, batches: Sequence[Batch], criterion: str | None, track: Track
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What the units of each axis are worth, and by which criterion."""
    ranked = {
        axis.name: criterion or (_READ if readers_of(model, chosen.traced, axis) else _UNREAD) for axis in chosen.axes
    }
    scores: dict[str, torch.Tensor] = {}
    for own in dict.fromkeys(ranked.values()):
        axes = [axis for axis in chosen.axes if ranked[axis.name] == own]
        scores |= criterion_scores(model, chosen.traced, axes, batches, own, None, 0, track)
    return scores, ranked


def _reads(
    model: nn.Module, weights: Sequence[Weight], batches: Sequence[Batch], masks: str, track: Track
) -> dict[str, list[Read]]:
    """What each weight reads, for wanda and alps."""
    if masks == "magnitude" or not weights:
        return {}

    def forward() -> None:
        for batch in track(batches, "what weights read"):
            run(model, batch)

    found: dict[str, list[Read]] = {}
    with evaluating(model), torch.no_grad(), plain_attention():
        groups = grams(forward, weights, dict(model.named_parameters()), full=masks == "alps")
    for read in (read for group in groups for read in group):
        found.setdefault(read.weight.name, []).append(read)
    return found


def _table(jobs: Sequence[_Job], found: Mapping[str, Mapping[str, float]], measure: str) -> dict[str, Any]:
    """The increases by one measure: of weights (losses), axes and blocks."""
    table: dict[str, Any] = {"losses": {}, "axes": {}, "blocks": {}}
    for job in jobs:
        for what, name, text in job.entries:
            if what == "blocks":
                table[what][name] = found[job.key][measure]
            else:
                table[what].setdefault(name, {})[text] = found[job.key][measure]
    return table


def _axes_told(
    chosen: Chosen, kept: Mapping[str, Mapping[str, int]], ranked: Mapping[str, str], losses: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    return {
        axis.name: {
            "kind": axis.kind,
            "size": axis.size,
            "block": axis.block,
            "criterion": ranked[axis.name],
            "kept": {text: kept[axis.name][text] for text in losses[axis.name]},
            "losses": losses[axis.name],
        }
        for axis in chosen.axes
        if axis.name in losses
    }
