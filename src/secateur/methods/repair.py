"""Repair a cut model in closed form: least squares to what the dense model computes, or the bias alone.

Weights that lost inputs are fitted anew, one after the other in the order of the forward pass, each on what the weights
before it, already fitted, give it. Where a result is added to a residual stream, it is fitted to all that the sum
lacks, so each layer also makes up for the errors of those before it. Least squares after a cut: He et al. 2017
(arXiv:1707.06168); the sequential, asymmetric target: Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks
for Classification and Detection" (arXiv:1505.06798). The bias alone: An et al. 2024, FLAP (arXiv:2312.11983).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur import world
from secateur.choose.plan import Plan
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, run, samples_of, size_of
from secateur.load.mode import evaluating
from secateur.load.store import held, store_of
from secateur.load.through import shown, whole_passes
from secateur.mend.damping import enough
from secateur.mend.least_squares import Fit, Moments, lost_mean
from secateur.methods.counterparts import Pair, Where, counterparts
from secateur.methods.residual import Followed, Way, correction
from secateur.methods.rows import matched, read_key, used, wide
from secateur.methods.together import Job, Means, fitted, over_all, with_probe
from secateur.progress import Track, quiet
from secateur.space import Space
from secateur.space.products import Product, Products, plain_attention
from secateur.space.weights import Part
from secateur.walk import Stage, through, walk, whole

MENDS = ("least_squares", "bias", "none")
DAMPING = 1e-3


def check_mend(mend: str) -> None:
    """Raise SecateurError for a way to repair that there is not."""
    if mend not in MENDS:
        raise SecateurError(f"mend: there is no repair {mend!r}{nearest(mend, MENDS)}")


@torch.inference_mode(mode=False)  # what is written into must be plain tensors, whoever calls
def repair(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    space: Space,
    batches: Sequence[Batch],
    *,
    mend: str = "least_squares",
    damping: float | None = None,
    track: Track = quiet,
) -> dict[str, Any]:
    """Repair what a cut left, in place, on calibration data; nothing is trained.

    ``least_squares``: every weight that lost inputs, and every one after the first loss whose result is added to a
    residual stream, becomes the W that minimises the sum over rows of |t - W x|^2 + d |W - W0|^2. x is what it reads in
    the cut model, t what the dense model has there (with a residual stream, less what the stream holds already), W0
    what the cut left, d `damping` times the mean of x^2. Where a bias is there to take it, an intercept goes in; so
    it does into the running mean of a batch norm that follows. ``bias``: only the mean of what is lost is put back.

    Args:
        dense: the model before the cut; it stays as it is.
        pruned: what `apply` made of it.
        plan: that was applied.
        space: that it cuts.
        batches: calibration data.
        mend: least_squares, bias or none.
        damping: of the ridge, as a share; at least 0. None = 0.001, and more for weights with few rows for their
            columns (see `mend.damping.enough`).
        track: shows progress.

    Returns:
        For the report, JSON values only. ``method``, ``damping``, ``samples``, ``seconds``; ``weights``: how much of
        its target each one misses ``before`` and ``after``, and ``by``, what it was fitted to (its ``rows``, the
        ``residual`` sum, or ``dense`` inputs alone, where rows of the two models are not the same: experts); where
        there are any, ``batch_norms_refolded``, ``no_bias``, ``few_rows``, ``more_damping``, and ``left``: what was not
        repaired -> why.

    Raises:
        SecateurError: for an unknown `mend`, no batches, a bad damping, and activations that are not finite.
    """
    check_mend(mend)
    if mend == "none":
        return {"method": "none"}
    if not batches:
        raise SecateurError(f"mend {mend} needs calibration data: give data, or mend none")
    if damping is not None and not 0 <= damping < float("inf"):
        raise SecateurError(f"damping must be at least 0, not {damping:g}")
    begin = time.perf_counter()
    with _still(dense, pruned):
        pairs, left = counterparts(dense, pruned, plan, space, batches[0])
        work = _Repair(dense, pruned, batches, damping, track)
        work.told["left"] |= left
        if mend == "bias":
            work.biases([pair for pair in pairs if pair.lossy])
        else:
            work.walk([pair for pair in pairs if pair.late])
    told = {key: value for key, value in work.told.items() if value or key == "weights"}
    head = {"method": mend, **({"damping": work.least} if mend == "least_squares" else {})}
    return {**head, "samples": sum(map(size_of, batches)), **told, "seconds": time.perf_counter() - begin}


@contextmanager
def _still(*models: nn.Module) -> Iterator[None]:
    """Two walks at once end in any order: what each sets back must be what is set here."""
    with ExitStack() as stack, torch.no_grad(), plain_attention():
        for model in models:
            stack.enter_context(evaluating(model))
        yield


@dataclass
class _Member:
    """A weight of a stage, and what the first batch told of it."""

    pair: Pair
    parts: Sequence[Part]
    """Of the cut weight, as products are made with them."""
    where: Mapping[Part, Where]
    reads: tuple[Any, ...]
    """What each product reads; members with the same one product's worth share their sums."""
    aligned: bool
    """Rows of the two models go with each other."""
    sums: int
    """Sums of a residual stream that are corrected."""
    once: bool
    """Every part is used exactly once, so that a pass may end after the last of them."""
    norm: torch.Tensor | None
    """Running mean that takes an intercept."""


@dataclass
class _Group:
    """Members that are fitted together, because they read the same."""

    members: list[_Member]
    moments: dict[Part, Moments] = field(default_factory=dict)
    """By the part of the first member."""


class _Repair:
    def __init__(
        self, dense: nn.Module, pruned: nn.Module, batches: Sequence[Batch], damping: float | None, track: Track
    ) -> None:
        self.dense, self.pruned, self.damping, self.track = dense, pruned, damping, track
        self.batches, self.probes = with_probe(batches)
        self.least = DAMPING if damping is None else damping
        self.before, self.after = dict(dense.named_parameters()), dict(pruned.named_parameters())
        self.norms: dict[str, torch.Tensor] = {}
        self.told: dict[str, Any] = {
            "weights": {}, "batch_norms_refolded": [], "no_bias": [], "few_rows": {}, "more_damping": {}, "left": {}
        }  # fmt: skip

    # --- least squares ---

    def walk(self, pairs: Sequence[Pair]) -> None:
        """Fit all weights in the order of the forward pass."""
        if not pairs:
            return
        self.norms = self._norms(pairs)
        by_name = {pair.pruned.name: pair for pair in pairs}
        one, two = [pair.dense for pair in pairs], [pair.pruned for pair in pairs]
        steps = walk(self.pruned, self.batches, two, track=self.track, what="mending, block by block", name="mend")
        done: set[str] = set()
        # Closed here whatever happens: a walk that ends later would set back modes that are no longer those it found.
        with closing(walk(self.dense, self.batches, one, name="mend-dense")) as before, closing(steps) as after:
            for stage in after:
                own = [by_name[w.name] for w in stage.weights]
                other = next(before, None)
                if other is None or {w.name for w in other.weights} != {pair.dense.name for pair in own}:
                    break
                if stage.done:
                    self.told = stage.recall()[1]
                else:
                    self._stage(other, stage, own)
                    stage.keep({}, self.told)
                done |= {pair.pruned.name for pair in own}
        rest = [pair for pair in pairs if pair.pruned.name not in done]
        if rest and store_of(self.pruned) is not None:
            raise SecateurError(
                f"{rest[0].pruned.name} cannot be mended while the model is streamed, for the cut changed what follows "
                "what: mend none, or prune it in memory"
            )
        if rest:  # the cut changed what follows what: the two models are run whole
            first, second = (
                Stage("the rest", (), partial(whole, model, self.batches)) for model in (self.dense, self.pruned)
            )
            self._stage(first, second, rest)

    def _norms(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Weights whose results go at once into a batch norm of their own -> its running mean."""
        if store_of(self.pruned) is not None and not any(isinstance(m, _BatchNorm) for m in self.pruned.modules()):
            return {}  # a pass would load every block
        watch = Followed({p.pruned.name: self.after[p.pruned.name] for p in pairs})
        with watch:
            run(self.pruned, samples_of(self.batches[0])[0])
        found = {(p.weight, id(way.norm)): way.norm for way in watch.ways for p in way.products}
        weights, norms = [name for name, _ in found], [id(norm) for norm in found.values()]
        return {
            name: norm
            for (name, _), norm in found.items()
            if norm is not None and weights.count(name) == 1 and norms.count(id(norm)) == 1
        }

    def _stage(self, before: Stage, after: Stage, pairs: Sequence[Pair]) -> None:
        for group in self._groups(before, after, pairs):
            if group.members[0].aligned and self._fit_both(before, after, group):
                self._put(group)
                continue
            for member in group.members:
                if member.pair.lossy:
                    alone = _Group([replace(member, aligned=False, sums=0)])
                    self._fit_dense(before, alone)
                    self._put(alone)

    def _groups(self, before: Stage, after: Stage, pairs: Sequence[Pair]) -> list[_Group]:
        """What is to be fitted, in the order of use, by the first batch."""
        one = Followed({p.dense.name: self.before[p.dense.name] for p in pairs}, check=True)
        two = Followed({p.pruned.name: self.after[p.pruned.name] for p in pairs}, check=True)
        for stage, watch in ((before, one), (after, two)):
            with closing(stage.passes()) as steps, watch:
                next(steps)
        found: list[_Group] = []
        order = list(dict.fromkeys(p.weight for way in two.ways for p in way.products))
        by_name = {pair.pruned.name: pair for pair in pairs}
        for name in [*order, *(name for name in by_name if name not in order)]:
            member = self._member(by_name[name], one.ways, two.ways)
            if member is None:
                continue
            if found and _together(found[-1].members[0], member):
                found[-1].members.append(member)
            else:
                found.append(_Group([member]))
        return found

    def _member(self, pair: Pair, before: Sequence[Way], after: Sequence[Way]) -> _Member | None:
        """What is known of a weight; None where it is not to be fitted, or cannot be."""
        own, other = used(after, pair.pruned.name), used(before, pair.dense.name)
        parts = list(dict.fromkeys(p.part for _, p in own)) or pair.pruned.parts()
        stacked = len(pair.pruned.rows) + len(pair.pruned.columns) < len(pair.pruned.shape)
        if stacked:
            parts = pair.pruned.parts()
        dense_parts = list(dict.fromkeys(p.part for _, p in other)) if not stacked else pair.dense.parts()
        where = {part: place for part in parts if (place := pair.where(part, dense_parts)) is not None}
        fits = len(where) == len(parts) and all(
            p.columns == weight.columns for weight, used in ((pair.pruned, own), (pair.dense, other)) for _, p in used
        )
        if not fits:
            if pair.lossy:
                self.told["left"][pair.pruned.name] = "it is used in ways that do not agree"
            return None
        aligned = not stacked and matched(own, other, where) is not None
        sums = 0
        if aligned:
            ways = [way for way, _ in (*own, *other)]
            sums = 0 if any(way.astray for way in ways) else min(len(way.added) for way in ways)
        if not pair.lossy and not sums:
            return None
        once = len(own) == len(parts) and len(other) >= len(own)
        reads = tuple(read_key(p) for _, p in own)
        norm = None if pair.bias is not None else self.norms.get(pair.pruned.name)
        return _Member(pair, parts, where, reads, aligned, sums, once, norm)

    def _fit_both(self, before: Stage, after: Stage, group: _Group) -> bool:
        """Add up what a group reads in the cut model and what the dense one makes of it; False where rows differ."""
        members = group.members
        sums = min(m.sums for m in members)
        count = None
        if all(m.once and m.pair.dense.groups == 1 for m in members):
            count = sum(len(m.parts) for m in members)
        for member in members:
            member.sums = sums
        one = {m.pair.dense.name: self.before[m.pair.dense.name] for m in members}
        two = {m.pair.pruned.name: self.after[m.pair.pruned.name] for m in members}
        alike = True
        with world.as_one(), closing(before.passes()) as dense_steps, closing(after.passes()) as steps:
            for index in range(len(self.batches)):
                with Followed(one, products=count, sums=sums) as then:
                    next(dense_steps)
                with Followed(two, products=count, sums=sums) as now:
                    next(steps)
                alike = index < self.probes or self._add(group, then, now)
                if not alike:
                    break
        if world.split():
            alike = all(world.gathered(alike))
        if alike:
            group.moments = over_all(group.moments, group.members[0].parts)
        return alike

    def _add(self, group: _Group, before: Followed, after: Followed) -> bool:
        found = []
        for member in group.members:
            both = matched(
                used(after.ways, member.pair.pruned.name), used(before.ways, member.pair.dense.name), member.where
            )
            if both is None:
                return False
            found.append(both)
        for row in zip(*found, strict=True):  # the same product of each member
            (_, product), _ = row[0]
            x = wide(product.read())
            read: dict[Any, torch.Tensor] = {}
            targets = []
            for member, ((own_way, own), (way, other)) in zip(group.members, row, strict=True):
                key = read_key(other)
                if key not in read:
                    read[key] = wide(other.read())
                if len(read[key]) != len(x):
                    return False
                place = member.where[own.part]
                t = read[key] @ self._matrix(member.pair, place, read[key]).T
                if member.sums:
                    if min(len(own_way.added), len(way.added)) < member.sums:
                        return False
                    (now, factor), (then, _) = (
                        own_way.residual(own, member.sums),
                        way.residual(other, member.sums),
                    )
                    t += correction(then[:, place.rows.to(then.device)], now, factor)
                targets.append(t)
            self._take(group, product.part, x, torch.cat(targets, 1))
        return True

    def _fit_dense(self, before: Stage, group: _Group) -> None:
        """Add up what a weight reads in the dense model: columns that stay, and what all of them give."""
        pair, where = group.members[0].pair, group.members[0].where
        back = {place.part: (part, place) for part, place in where.items()}
        done = 0

        def see(product: Product) -> None:
            if done >= self.probes and product.part in back and product.operand.numel():
                part, place = back[product.part]
                x = wide(product.read())
                t = x @ self._matrix(pair, place, x).T
                self._take(group, part, x[:, place.columns.to(x.device)], t)

        with world.as_one(), Products({pair.dense.name: self.before[pair.dense.name]}, see):
            for _ in before.passes():
                done += 1
        group.moments = over_all(group.moments, group.members[0].parts)

    def _matrix(self, pair: Pair, place: Where, like: torch.Tensor) -> torch.Tensor:
        """Rows of the dense weight that stay, with all columns, in the type of what they meet."""
        matrix = pair.dense.matrix(self.before[pair.dense.name].detach(), place.part)
        return matrix[place.rows.to(matrix.device)].to(like)

    def _take(self, group: _Group, part: Part, x: torch.Tensor, t: torch.Tensor) -> None:
        if part not in group.moments:
            group.moments[part] = Moments.zeros(x.shape[1], t.shape[1], x.device)
        group.moments[part].add(x, t)

    def _put(self, group: _Group) -> None:
        """Fit the members, part by part, and write them into the cut model."""
        begin = 0
        places: list[tuple[_Member, Part]] = []
        jobs: list[Job] = []
        for member in group.members:
            width = 0
            for key, part in zip(group.members[0].parts, member.parts, strict=True):
                width = len(member.where[part].rows)
                if key in group.moments:
                    places.append((member, part))
                    jobs.append(self._job(member, part, group.moments[key].some(begin, begin + width)))
            begin += width  # several members have one part each
        found: dict[str, list[tuple[Fit, int, int]]] = {m.pair.pruned.name: [] for m in group.members}
        for (member, part), job, fit in zip(places, jobs, fitted(jobs), strict=True):
            pair = member.pair
            tensor = self.after[pair.pruned.name]
            pair.pruned.put(tensor, part, fit.weight.to(tensor.dtype))
            if fit.shift is not None:
                self._shift(pair, part, member.norm, fit.shift)
            found[pair.pruned.name].append((fit, job.moments.rows, len(job.moments.squares)))
        for member in group.members:
            self._tell(member, found[member.pair.pruned.name])

    def _job(self, member: _Member, part: Part, moments: Moments) -> Job:
        """The fit of a part."""
        pair, name = member.pair, member.pair.pruned.name
        if not bool(torch.isfinite(moments.squares).all() and torch.isfinite(moments.cross).all()):
            raise SecateurError(f"NaN or infinite activations at the input of {name}: check the weights and dtype")
        holds = pair.bias is not None or member.norm is not None
        asked = enough(DAMPING, moments.rows, len(moments.squares)) if self.damping is None else self.damping
        return Job(moments, pair.pruned.matrix(self.after[name], part), asked, holds)

    def _tell(self, member: _Member, fits: Sequence[tuple[Fit, int, int]]) -> None:
        name = member.pair.pruned.name
        if not fits:
            self.told["left"][name] = "no calibration data reaches it"
            return
        before, after, total = (sum(getattr(fit, key) for fit, _, _ in fits) for key in ("before", "after", "total"))
        by = "residual" if member.sums else "rows" if member.aligned else "dense"
        told = {"before": before / (total or 1.0), "after": after / (total or 1.0), "by": by}
        if len(fits) < len(member.parts):
            told["without_data"] = len(member.parts) - len(fits)
        self.told["weights"][name] = told
        _, rows, columns = min(fits, key=lambda fit: fit[1] / fit[2])
        if rows < columns:
            self.told["few_rows"][name] = [rows, columns]
        used = max(fit.damping for fit, _, _ in fits)
        if used > self.least:
            self.told["more_damping"][name] = used
        if member.norm is not None:
            self.told["batch_norms_refolded"].append(name)

    def _shift(self, pair: Pair, part: Part, norm: torch.Tensor | None, shift: torch.Tensor) -> None:
        """Add to the bias, or take from the running mean of the batch norm that follows."""
        place = pair.bias_places(part)
        if pair.bias is not None:
            bias = self.after[pair.bias]
            bias[place] = (bias[place].double() + shift).to(bias.dtype)
        elif norm is not None:
            norm[place] = (norm[place].double() - shift).to(norm.dtype)

    # --- the bias alone ---

    def biases(self, pairs: Sequence[Pair]) -> None:
        """Put the mean of what is lost into biases and batch norms; means are those of the dense model."""
        if not pairs:
            return
        norms = self._norms(pairs)
        watch, own = Means({pair.dense.name: pair for pair in pairs}), self.batches[self.probes :]
        with world.as_one(), Products({pair.dense.name: self.before[pair.dense.name] for pair in pairs}, watch.see):
            if store_of(self.dense) is None:
                shown(whole_passes, self.track, "mending the biases")(self.dense, own, watch)
            else:
                through(self.dense, own, watch, name="mend-means", track=self.track)
        watch.join()
        for pair in pairs:
            norm = norms.get(pair.pruned.name)
            if pair.bias is None and norm is None:
                self.told["no_bias"].append(pair.pruned.name)
            else:
                sums = {part: s for (name, part), s in watch.sums.items() if name == pair.dense.name}
                bias = [] if pair.bias is None else [pair.bias]
                with held(self.pruned, names=bias), held(self.dense, names=[pair.dense.name]):
                    self._put_means(pair, norm, sums)

    def _put_means(self, pair: Pair, norm: torch.Tensor | None, sums: Mapping[Part, tuple[torch.Tensor, int]]) -> None:
        name, seen = pair.pruned.name, 0
        for part in pair.pruned.parts():
            place = pair.where(part, sums)
            if place is None:
                continue
            total, rows = sums[place.part]
            if not bool(torch.isfinite(total).all()):
                raise SecateurError(f"NaN or infinite activations at the input of {name}: check the weights and dtype")
            matrix = pair.dense.matrix(self.before[pair.dense.name].detach(), place.part)
            gone = torch.ones(matrix.shape[1], dtype=torch.bool)
            gone[place.columns] = False
            shift = lost_mean(matrix[place.rows.to(matrix.device)], gone.to(matrix.device), total / rows)
            self._shift(pair, part, None if pair.bias else norm, shift)
            seen += 1
        if not seen:
            self.told["left"][name] = "no calibration data reaches it"
            return
        self.told["weights"][name] = {"by": "bias"}
        if pair.bias is None:
            self.told["batch_norms_refolded"].append(name)


def _together(one: _Member, other: _Member) -> bool:
    """Whether two weights of one part each read the same."""
    alone = len(one.reads) == 1 and one.aligned and other.aligned
    return alone and one.reads == other.reads
