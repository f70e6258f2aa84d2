"""Minitron: width and depth pruning of language models by activation importance.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (arXiv:2407.14679) and
Sreenivas et al. 2024, "LLM Pruning and Distillation in Practice: The Minitron Approach" (arXiv:2408.11796); state-space
layers after Taghibakhshi et al. 2025 (arXiv:2504.11409), experts after Lasby et al. 2025 (REAP, arXiv:2510.13999).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import UNIFORM_KINDS, Workload, least_cost, uniform_cost
from secateur.choose.plan import Plan
from secateur.choose.rank import plan_for_sizes
from secateur.choose.search import MEASURES, Candidate, Grid, check_reachable, choices, search
from secateur.cut import apply
from secateur.cut.config import Sizes, field_of, kinds_of, sizes_of
from secateur.cut.uniform import Uniform, both
from secateur.errors import SecateurError, nearest
from secateur.load.megatron import Opened
from secateur.load.model import sliding_window
from secateur.measure.quality import Batch, Metric
from secateur.methods.base import Decision
from secateur.methods.sensitivity import Influence, Ladder, Sensitivity
from secateur.methods.study import Study
from secateur.progress import Track, quiet
from secateur.score.activation import Scores
from secateur.score.cache import Cache
from secateur.space import Space, discover

KINDS = (*UNIFORM_KINDS, "layers")
_ROW_BYTES = 16
"""What the rows of both operands of `torch._grouped_mm` must be multiples of."""
_JOINT = ("hidden", "heads", "kv_groups", "ssm_heads", "ssm_head_dim", "ssm_channels")
"""Kinds of which a config may reject some combinations; each of the others can be cut by itself."""


def minitron(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch],
    *,
    max_width_cut: float = 0.4,
    max_depth_cut: float = 0.2,
    divisors: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
    top_k: int = 10,
    score: Metric | None = None,
    score_samples: int = 64,
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    presorted: bool = False,
    measure: bool = True,
    cache: Path | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by Minitron: exact dims, or the best architecture within a budget.

    With a budget, all architectures within the greatest allowed cuts are enumerated and ranked by an expected KL:
    for each kind of axis the share of importance energy that goes, weighed by one measured probe of that kind, plus
    the measured KL of the dropped layers. The best `top_k` are cut for real and scored; the best score wins.

    With measure=False one pass that scores the axes and layers is all (see `Influence` for what takes the place of KL).

    Args:
        model: a Hugging Face causal language model.
        budget: limits on params, active_params and memory, or exact dims; not both.
        data: calibration token rows [batch, sequence]; each row is one sample.
        max_width_cut: the largest share of any width (hidden size, FFN, heads, experts...) that may go.
        max_depth_cut: the largest share of layers that may go.
        divisors: kind -> multiples of which sizes may be; Minitron's (hidden 256, ffn 512, experts 8, ssm_head_dim 8,
            layers 2) by default, halved until there are eight sizes to choose from.
        skip: kinds that keep their size.
        top_k: how many candidates are really scored.
        score: what scores them; the KL to the dense model on the first `score_samples` rows by default.
        score_samples: calibration rows for the KL of probes, dropped layers and candidates.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        presorted: the model's units are in order of importance already: keep the first ones, without scoring.
        measure: whether dropped layers, probes and candidates are measured by passes of the whole model; otherwise
            importance alone decides: layers of the least block influence go, and the least expected loss wins.
        cache: folder that keeps scores and sensitivities, keyed by all that they depend on.
        track: shows progress.

    Raises:
        SecateurError: for options that contradict, dims that do not fit, a budget that cannot be met.
    """
    if not measure:
        _check_unmeasured(score, score_samples, top_k)
    workload = Workload(kv_batch, kv_seq_len, sliding_window(_config(model)), stored_dtype)
    study = Study(model, discover(model), data, score_samples, Cache(cache), track)
    if budget.dims:
        if budget.limits or budget.n_m:
            raise SecateurError(f"give either exact dims or a budget, not both: {budget}")
        return _exact(study, Uniform(model, study.space), budget.dims, presorted, stored_dtype, measure)
    unserved = [m for m in budget.limits if m not in MEASURES] + (["n:m"] if budget.n_m else [])
    if unserved or not budget.limits:
        what = f"a budget of {unserved[0]} is not served by minitron" if unserved else "no budget and no dims are given"
        raise SecateurError(f"{what}: it takes {', '.join(MEASURES)}, or exact dims")
    if top_k < 1:
        raise SecateurError(f"top_k must be at least 1, not {top_k}")
    uniform = Uniform(model, study.space)
    grid = _grid(uniform, max_width_cut, max_depth_cut, divisors or {}, skip, stored_dtype)
    return _search(study, uniform, budget, grid, workload, score, top_k, presorted, measure)


def _check_unmeasured(score: Metric | None, score_samples: int, top_k: int) -> None:
    """Raise SecateurError for options of measurements where nothing is to be measured."""
    given = inspect.signature(minitron).parameters
    options = {"score": score, "score_samples": score_samples, "top_k": top_k}
    for name, value in options.items():
        if value != given[name].default:
            shown = value.name if isinstance(value, Metric) else value
            raise SecateurError(
                f"measure=False goes by importance alone, and {name} {shown} is about measurements: give one of them"
            )


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not (hasattr(type(model), "from_pretrained") or isinstance(model, Opened)):
        raise SecateurError(
            f"minitron needs a language model of Hugging Face or Megatron-Core, not a {type(model).__name__}; use the "
            "method structural"
        )
    return config


def _exact(
    study: Study,
    uniform: Uniform,
    dims: Mapping[str, int],
    presorted: bool,
    stored: torch.dtype | None,
    measure: bool,
) -> Decision:
    """Cut to exact sizes."""
    sizes, by_name = _target_sizes(uniform, _config(study.model), dims, stored), sizes_of(study.space)
    dense = {kind: size for kind in KINDS if (size := by_name.get(kind)) is not None}
    asked = {kind: size for kind, size in sizes.items() if kind != "layers"}
    widths = uniform.completed(asked, dense)
    if widths is None:
        raise SecateurError(_indescribable(study, Sizes(**{kind: sizes.get(kind, dense.get(kind)) for kind in KINDS})))
    drop = dense["layers"] - sizes["layers"] if "layers" in sizes else 0
    scores = study.scores(layers=drop > 0, presorted=presorted, kinds=list(widths))
    ladder: Ladder = [((), 0.0)]
    if drop:
        ladder = study.depth(scores, drop) if measure else study.shallow(scores, drop)
    if len(ladder) <= drop:
        raise SecateurError(f"dims: of {dense['layers']} layers at most {len(ladder) - 1} can be dropped, not {drop}")
    plan = plan_for_sizes(study.space, scores.axes, widths, ladder[-1][0])
    told = [[len(names), loss] for names, loss in ladder[1:]]
    if measure:
        return _decision(study, plan, scores, {"depth_kl": told})
    return _decision(study, plan, scores, {"depth": {"measured": False, "influence": told}}, measure=False)


def _indescribable(study: Study, wanted: Sizes) -> str:
    """Why no stock config has these sizes, in the words of the config class where it has any."""
    config, whole = _config(study.model), sizes_of(study.space)
    words = {k: field_of(config, k, whole.get(k)) or k for k in KINDS}
    shown = ", ".join(f"{words[k]}={wanted.get(k)}" for k in KINDS if wanted.get(k) is not None)
    rule = ""
    if wanted.hidden and wanted.heads and wanted.hidden % wanted.heads:
        rule = f": {wanted.heads} heads do not divide a hidden size of {wanted.hidden}"
    head_dim = (whole.hidden or 0) // (whole.heads or 1)
    if (
        not rule
        and wanted.heads
        and not hasattr(config, "head_dim")
        and (wanted.hidden or 0) != head_dim * (wanted.heads or 0)
    ):
        rule = f": with a fixed head dimension of {head_dim}, hidden must be {head_dim} x heads"
    return f"dims: {type(config).__name__} cannot describe {shown}{rule}"


def _search(
    study: Study, uniform: Uniform, budget: Budget, grid: Grid, workload: Workload, score: Metric | None, top_k: int,
    presorted: bool, measure: bool,
) -> Decision:  # fmt: skip
    """Find the best architecture within a budget."""
    kinds = [kind for kind in grid.dense if kind != "layers"]
    valid = _validity(uniform, grid)
    check_reachable(grid, least_cost(study.space, workload, kinds), budget, valid)
    cut = [kind for kind, sizes in grid.choices.items() if len(sizes) > 1]
    scores = study.scores(layers=not measure or "layers" in cut, presorted=presorted, kinds=cut)
    sensitivity = study.sensitivity(scores, grid, presorted=presorted) if measure else study.influence(scores, grid)
    grid = _droppable(grid, sensitivity)
    cost = uniform_cost(study.space, workload, kinds, [names for names, _ in sensitivity.depth])
    loss = sensitivity.loss(study.space, scores, grid.dense)
    best, feasible = search(grid, cost, budget, loss, valid, top_k if measure else 1)
    if isinstance(sensitivity, Influence):
        return _unmeasured(study, best[0], feasible, grid, scores, sensitivity)
    metric = score or Metric("kl", study.kl, higher_is_better=False)
    ranked: list[tuple[Candidate, Plan, float]] = []
    with study.timed("candidates"):
        for candidate in study.track(best, f"scoring {len(best)} of {feasible:,} candidates by {metric.name}"):
            plan = _plan_of(study.space, candidate, grid, scores, sensitivity)
            own = None if score is None else score.function(apply(study.model, plan, space=study.space))
            value = study.candidate_kl(plan) if own is None else own
            ranked.append((candidate, plan, value))
    chosen = ranked[0]
    for entry in ranked[1:]:  # of equal scores the one of the least expected KL stays
        chosen = entry if metric.better(entry[2], chosen[2]) else chosen
    told = {"score": metric.name, "higher_is_better": metric.higher_is_better, "feasible": feasible}
    table = [
        {**_row(study, grid, candidate), "expected_kl": candidate.loss, "score": value, "chosen": entry is chosen}
        for entry in ranked
        for candidate, _, value in [entry]
    ]
    probes = {"weight": dict(sensitivity.weight), "depth_kl": [[len(n), kl] for n, kl in sensitivity.depth[1:]]}
    told = {"kinds": _kinds_told(study, grid), **told, "candidates": table, "probes": probes}
    return _decision(study, chosen[1], scores, {"search": told})


def _unmeasured(
    study: Study, candidate: Candidate, feasible: int, grid: Grid, scores: Scores, proxy: Influence
) -> Decision:
    """The candidate that importance alone chooses."""
    told = {
        "kinds": _kinds_told(study, grid),
        "measured": False,
        "feasible": feasible,
        "candidates": [{**_row(study, grid, candidate), "expected_loss": candidate.loss, "chosen": True}],
        "influence": {"layers": dict(scores.blocks), "depth": [[len(n), loss] for n, loss in proxy.depth[1:]]},
    }
    plan = _plan_of(study.space, candidate, grid, scores, proxy)
    return _decision(study, plan, scores, {"search": told}, measure=False)


def _kinds_told(study: Study, grid: Grid) -> list[str]:
    """The kinds of a search, one for each word of the config: one number may set several."""
    config = _config(study.model)
    words: dict[str, str] = {}
    for kind in grid.dense:
        words.setdefault(next(iter(named(config, {kind: 0}, grid.dense))), kind)
    return list(words.values())


def _row(study: Study, grid: Grid, candidate: Candidate) -> dict[str, Any]:
    """A candidate's sizes and costs, for the report."""
    return {
        "sizes": named(_config(study.model), {kind: candidate.sizes[kind] for kind in grid.dense}, grid.dense),
        "params": candidate.costs.params,
        "active_params": candidate.costs.active_params,
        "memory": candidate.costs.memory,
    }


def _validity(uniform: Uniform, grid: Grid) -> Callable[[Mapping[str, int]], bool]:
    """Whether the stock config can have such sizes; asked once for each that it may reject."""
    joint = [kind for kind in grid.dense if kind in _JOINT]

    def valid(sizes: Mapping[str, int]) -> bool:
        return uniform.describes({kind: sizes[kind] for kind in joint if kind in sizes})

    return valid


def _droppable(grid: Grid, sensitivity: Sensitivity | Influence) -> Grid:
    """The same without depths that the greedy removal could not reach."""
    if "layers" not in grid.choices:
        return grid
    least = grid.dense["layers"] - max(0, len(sensitivity.depth) - 1)
    layers = [size for size in grid.choices["layers"] if size >= least]
    return Grid(grid.dense, {**grid.choices, "layers": layers}, grid.ties)


def _plan_of(
    space: Space, candidate: Candidate, grid: Grid, scores: Scores, sensitivity: Sensitivity | Influence
) -> Plan:
    sizes = {kind: size for kind, size in candidate.sizes.items() if size != grid.dense[kind]}
    if "kv_groups" in sizes:
        sizes["heads"] = candidate.sizes["heads"]
    kept_layers = sizes.pop("layers", None)
    dropped = () if kept_layers is None else sensitivity.depth[grid.dense["layers"] - kept_layers][0]
    return plan_for_sizes(space, scores.axes, sizes, dropped)


def _decision(
    study: Study, plan: Plan, scores: Scores, details: Mapping[str, Any], *, measure: bool = True
) -> Decision:
    calibration = {"samples": scores.samples, "tokens": scores.tokens}
    if measure:
        calibration["score_samples"] = sum(map(_count, study.rows))
    return Decision(plan, study.space, {**details, "calibration": calibration, "seconds": dict(study.seconds)})


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)


def named(config: Any, sizes: Mapping[str, int], dense: Mapping[str, int]) -> dict[str, int]:
    """Sizes under the config's own names, as far as it has any; `dense` are the model's sizes by kind."""
    return {field_of(config, kind, dense[kind]) or kind: size for kind, size in sizes.items()}


def _grid(
    uniform: Uniform,
    width: float,
    depth: float,
    divisors: Mapping[str, int],
    skip: Sequence[str],
    stored: torch.dtype | None = None,
) -> Grid:
    for name, cut in (("max_width_cut", width), ("max_depth_cut", depth)):
        if not 0 <= cut < 1:
            raise SecateurError(f"{name} must be at least 0 and below 1, not {cut}")
    space, config = uniform.space, _config(uniform.model)
    sizes = sizes_of(space)
    dense = {kind: size for kind in KINDS if (size := sizes.get(kind)) is not None}
    uneven = [kind for kind in UNIFORM_KINDS if space.of_kind(kind) and kind not in dense]
    skipped = {kind for name in skip if name not in uneven for kind in _kinds(config, name, sizes, "skip")}
    differing = [kind for kind in uneven if kind not in skip]
    if differing:
        raise SecateurError(
            f"the layers differ in {', '.join(differing)}: minitron needs the same sizes in every layer, or skip it"
        )
    steps = {kind: step for name, step in divisors.items() for kind in _kinds(config, name, sizes, "divisors")}
    clash = skipped & set(steps)
    if clash:
        raise SecateurError(f"{clash.pop()} is both skipped and given a divisor")
    found = {}
    for kind, size in dense.items():
        cut = 0.0 if kind in skipped else depth if kind == "layers" else width
        multiple, least = _multiple(uniform, kind, stored), max((a.minimum for a in space.of_kind(kind)), default=1)
        own = choices(kind, size, cut, steps.get(kind), multiple=multiple, minimum=least) if cut else [size]
        found[kind] = own if len(own) > 1 else [size]
    return _tied(uniform, Grid(dense, found)).thinned()


def _multiple(uniform: Uniform, kind: str, stored: torch.dtype | None) -> int:
    """What sizes of a kind must be multiples of: groups share units evenly, and grouped products want 16-byte rows."""
    axes = [axis for axis in uniform.space.of_kind(kind) if axis.parent is None]
    found = lcm(*(axis.groups for axis in axes))
    stacked = {router.parameter for router in uniform.space.routers}
    inner = [part.parameter for axis in axes for part in axis.slices if part.parameter in stacked and part.dim > 0]
    if inner and getattr(uniform.model.config, "_experts_implementation", None) == "grouped_mm":
        bytes_ = min(t.itemsize for t in (uniform.space.parameters[inner[0]].dtype, stored) if t is not None)
        found = lcm(found, max(1, _ROW_BYTES // bytes_))
    return found


def _tied(uniform: Uniform, grid: Grid) -> Grid:
    """Kinds that one number of the config sets are cut together, or not at all where one of them is skipped."""
    ties = uniform.ties(grid.dense)
    found = dict(grid.choices)
    for follower, leader in ties.items():
        pairs = [both(grid.dense, leader, size, follower) for size in found[leader]]
        fitting = [pair for pair in pairs if pair is not None]
        if len(found[follower]) == 1:
            fitting = fitting[:1]
        found[leader] = [pair[leader] for pair in fitting]
    for follower, leader in ties.items():
        found[follower] = [grid.dense[follower] * size // grid.dense[leader] for size in found[leader]]
    return Grid(grid.dense, found, ties)


def _kinds(config: Any, name: str, dense: Sizes, option: str) -> tuple[str, ...]:
    """Kinds by their own name or the config's."""
    known = [kind for kind in KINDS if dense.get(kind) is not None]
    try:
        kinds = kinds_of(config, name, dense)
    except SecateurError as error:
        raise SecateurError(f"{option}: there is no kind {name!r}{nearest(name, known)}") from error
    for kind in kinds:
        if kind not in known:
            raise SecateurError(f"{option}: this model has no {kind}; it has {', '.join(known)}")
    return kinds


def _target_sizes(uniform: Uniform, config: Any, dims: Mapping[str, int], stored: torch.dtype | None) -> dict[str, int]:
    """Exact dims, by kind, checked against the model's."""
    dense = sizes_of(uniform.space)
    sizes: dict[str, int] = {}
    for name, size in dims.items():
        for found in kinds_of(config, name, dense):
            alone = found == "kv_groups" and dense.kv_groups is None  # each head has its own keys: one number for both
            kind = "heads" if alone else found
            have = dense.get(kind)
            if have is None:
                raise SecateurError(f"dims: the {kind} of this model cannot be cut, so {name}={size} cannot be set")
            if size > have:
                raise SecateurError(f"dims: {name}={size} is above the current size of {have}")
            if sizes.get(kind, size) != size:
                raise SecateurError(f"dims: {kind} is given twice, as {sizes[kind]} and {size}")
            least = max((axis.minimum for axis in uniform.space.of_kind(kind)), default=1)
            multiple = _multiple(uniform, kind, stored)
            if size < least:
                raise SecateurError(f"dims: {name}={size} leaves fewer {kind} than the {least} that a router needs")
            if size != have and size % multiple:
                raise SecateurError(
                    f"dims: {name}={size} must be a multiple of {multiple} (groups, or rows of 16 bytes)"
                )
            sizes[kind] = size
    if all(dense.get(kind) == size for kind, size in sizes.items()):
        raise SecateurError(f"dims {dict(dims)} are the model's own: nothing would be cut")
    if dense.heads and dense.kv_groups:
        per_group = dense.heads // dense.kv_groups
        groups = sizes.get("kv_groups", dense.kv_groups)
        if groups != dense.kv_groups:
            sizes.setdefault("heads", per_group * groups)
        heads = sizes.get("heads", dense.heads)
        if heads % groups:
            raise SecateurError(f"dims: {heads} heads are not divisible by {groups} KV groups")
        if heads // groups > per_group:
            raise SecateurError(
                f"dims: {heads} heads over {groups} KV groups are {heads // groups} in each, the model has {per_group}"
            )
    return sizes
