"""Minitron: width and depth pruning of language models by activation importance.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (arXiv:2407.14679) and
Sreenivas et al. 2024, "LLM Pruning and Distillation in Practice: The Minitron Approach" (arXiv:2408.11796).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import UNIFORM_KINDS, Workload, costs, uniform_cost
from secateur.choose.plan import Plan
from secateur.choose.rank import plan_for_sizes
from secateur.choose.search import MEASURES, Candidate, Grid, choices, search
from secateur.cut import apply
from secateur.cut.config import Sizes, describes, field_of, kind_of, sizes_of
from secateur.errors import SecateurError, nearest
from secateur.load.model import sliding_window
from secateur.measure.quality import Batch, Metric
from secateur.methods.base import Decision
from secateur.methods.sensitivity import Ladder, Sensitivity
from secateur.methods.study import Study
from secateur.progress import Track, quiet
from secateur.score.activation import Scores
from secateur.score.cache import Cache
from secateur.space import Space, discover

KINDS = (*UNIFORM_KINDS, "layers")


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
    cache: Path | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide a plan by Minitron: exact dims, or the best architecture within a budget.

    With a budget, all architectures within the greatest allowed cuts are enumerated and ranked by an expected KL:
    for each kind of axis the share of importance energy that goes, weighed by one measured probe of that kind, plus
    the measured KL of the dropped layers. The best `top_k` are cut for real and scored; the best score wins.

    Args:
        model: a Hugging Face causal language model.
        budget: limits on params, active_params and memory, or exact dims; not both.
        data: calibration token rows [batch, sequence]; each row is one sample.
        max_width_cut: the largest share of hidden size, FFN, heads or KV groups that may go.
        max_depth_cut: the largest share of layers that may go.
        divisors: kind -> multiples of which sizes may be; Minitron's (hidden 256, ffn 512, layers 2) by default,
            halved until there are eight sizes to choose from.
        skip: kinds that keep their size.
        top_k: how many candidates are really scored.
        score: what scores them; the KL to the dense model on the first `score_samples` rows by default.
        score_samples: calibration rows for the KL of probes, dropped layers and candidates.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        presorted: the model's units are in order of importance already: keep the first ones, without scoring.
        cache: folder that keeps scores and sensitivities, keyed by all that they depend on.
        track: shows progress.

    Raises:
        SecateurError: for options that contradict, dims that do not fit, a budget that cannot be met.
    """
    workload = Workload(kv_batch, kv_seq_len, sliding_window(_config(model)), stored_dtype)
    study = Study(model, discover(model), data, score_samples, Cache(cache), track)
    if budget.dims:
        if budget.limits or budget.n_m:
            raise SecateurError(f"give either exact dims or a budget, not both: {budget}")
        return _exact(study, _target_sizes(study.space, _config(model), budget.dims), presorted)
    unserved = [m for m in budget.limits if m not in MEASURES] + (["n:m"] if budget.n_m else [])
    if unserved or not budget.limits:
        what = f"a budget of {unserved[0]} is not served by minitron" if unserved else "no budget and no dims are given"
        raise SecateurError(f"{what}: it takes {', '.join(MEASURES)}, or exact dims")
    if top_k < 1:
        raise SecateurError(f"top_k must be at least 1, not {top_k}")
    grid = _grid(study.space, _config(model), max_width_cut, max_depth_cut, divisors or {}, skip)
    return _search(study, budget, grid, workload, score, top_k, presorted)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "from_pretrained"):
        raise SecateurError(
            f"minitron needs a Hugging Face language model, not a {type(model).__name__}; use the method structural"
        )
    return config


def _exact(study: Study, sizes: dict[str, int], presorted: bool) -> Decision:
    """Cut to exact sizes."""
    dense = sizes_of(study.space)
    wanted = Sizes(**{kind: sizes.get(kind, dense.get(kind)) for kind in KINDS})
    if not describes(study.model, study.space, wanted):
        raise SecateurError(_indescribable(study, wanted))
    drop = 0 if dense.layers is None or wanted.layers is None else dense.layers - wanted.layers
    scores = study.scores(layers=drop > 0, presorted=presorted)
    ladder: Ladder = study.depth(scores, drop) if drop else [((), 0.0)]
    widths = {kind: size for kind, size in sizes.items() if kind != "layers"}
    plan = plan_for_sizes(study.space, scores.axes, widths, ladder[-1][0])
    return _decision(study, plan, scores, {"depth_kl": [[len(names), kl] for names, kl in ladder[1:]]})


def _indescribable(study: Study, wanted: Sizes) -> str:
    """Why no stock config has these sizes, in the words of the config class where it has any."""
    config = _config(study.model)
    shown = ", ".join(f"{field_of(config, k)}={wanted.get(k)}" for k in KINDS if wanted.get(k) is not None)
    rule = ""
    if wanted.hidden and wanted.heads and wanted.hidden % wanted.heads:
        rule = f": {wanted.heads} heads do not divide a hidden size of {wanted.hidden}"
    whole = sizes_of(study.space)
    head_dim = (whole.hidden or 0) // (whole.heads or 1)
    if not rule and not hasattr(config, "head_dim") and (wanted.hidden or 0) != head_dim * (wanted.heads or 0):
        rule = f": with a fixed head dimension of {head_dim}, hidden must be {head_dim} x heads"
    return f"dims: {type(config).__name__} cannot describe {shown}{rule}"


def _search(
    study: Study, budget: Budget, grid: Grid, workload: Workload, score: Metric | None, top_k: int, presorted: bool
) -> Decision:
    """Find the best architecture within a budget."""
    cost = uniform_cost(study.space, workload)
    valid = _validity(study)
    search(grid, cost, budget, lambda _: 0.0, valid, 1)  # says so at once when the budget cannot be met
    scores = study.scores(layers=len(grid.choices.get("layers", ())) > 1, presorted=presorted)
    sensitivity = study.sensitivity(scores, grid, presorted=presorted)
    loss = sensitivity.loss(study.space, scores, grid.dense)
    best, feasible = search(grid, cost, budget, loss, valid, top_k)
    metric = score or Metric("kl", study.kl, higher_is_better=False)
    limits = {m: x.absolute(costs(study.space, Plan(), workload).of(m)) for m, x in budget.limits.items()}
    ranked: list[tuple[Candidate, Plan, float]] = []
    with study.timed("candidates"):
        for candidate in study.track(best, f"scoring {len(best)} of {feasible:,} candidates by {metric.name}"):
            plan = _plan_of(study.space, candidate, grid, scores, sensitivity)
            exact = costs(study.space, plan, workload)
            if all(exact.of(measure) <= limit for measure, limit in limits.items()):
                own = None if score is None else score.function(apply(study.model, plan, space=study.space))
                value = study.candidate_kl(plan) if own is None else own
                ranked.append((Candidate(candidate.sizes, exact, candidate.loss), plan, value))
    if not ranked:
        raise SecateurError("no candidate keeps the budget once layers are counted exactly: allow a greater --top-k")
    chosen = ranked[0]
    for entry in ranked[1:]:  # of equal scores the one of the least expected KL stays
        chosen = entry if metric.better(entry[2], chosen[2]) else chosen
    table = [
        {
            "sizes": named(_config(study.model), candidate.sizes),
            "params": candidate.costs.params,
            "memory": candidate.costs.memory,
            "expected_kl": candidate.loss,
            "score": value,
            "chosen": entry is chosen,
        }
        for entry in ranked
        for candidate, _, value in [entry]
    ]
    search_details = {
        "kinds": list(grid.dense),
        "score": metric.name,
        "higher_is_better": metric.higher_is_better,
        "feasible": feasible,
    }
    probes = {"weight": dict(sensitivity.weight), "depth_kl": [[len(n), kl] for n, kl in sensitivity.depth[1:]]}
    return _decision(study, chosen[1], scores, {"search": {**search_details, "candidates": table, "probes": probes}})


def _validity(study: Study) -> Callable[[Mapping[str, int]], bool]:
    """Whether the stock config can have such sizes; asked once for each hidden size, heads and KV groups."""
    known: dict[tuple[int | None, ...], bool] = {}

    def valid(sizes: Mapping[str, int]) -> bool:
        wanted = Sizes(**{kind: sizes.get(kind) for kind in KINDS})
        key = (wanted.hidden, wanted.heads, wanted.kv_groups)
        if key not in known:
            known[key] = describes(study.model, study.space, wanted)
        return known[key]

    return valid


def _plan_of(space: Space, candidate: Candidate, grid: Grid, scores: Scores, sensitivity: Sensitivity) -> Plan:
    sizes = {kind: size for kind, size in candidate.sizes.items() if size != grid.dense[kind]}
    if "kv_groups" in sizes:
        sizes["heads"] = candidate.sizes["heads"]
    kept_layers = sizes.pop("layers", None)
    dropped = () if kept_layers is None else sensitivity.depth[grid.dense["layers"] - kept_layers][0]
    return plan_for_sizes(space, scores.axes, sizes, dropped)


def _decision(study: Study, plan: Plan, scores: Scores, details: Mapping[str, Any]) -> Decision:
    calibration = {"samples": scores.samples, "tokens": scores.tokens, "score_samples": sum(map(_count, study.rows))}
    return Decision(plan, study.space, {**details, "calibration": calibration, "seconds": dict(study.seconds)})


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)


def named(config: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes under the config's own names."""
    return {str(field_of(config, kind)): size for kind, size in sizes.items()}


def _grid(
    space: Space, config: Any, width: float, depth: float, divisors: Mapping[str, int], skip: Sequence[str]
) -> Grid:
    for name, cut in (("max_width_cut", width), ("max_depth_cut", depth)):
        if not 0 <= cut < 1:
            raise SecateurError(f"{name} must be at least 0 and below 1, not {cut}")
    sizes = sizes_of(space)
    dense = {kind: size for kind in KINDS if (size := sizes.get(kind)) is not None}
    uneven = [kind for kind in UNIFORM_KINDS if space.of_kind(kind) and kind not in dense]
    if uneven:
        raise SecateurError(f"the layers differ in {', '.join(uneven)}: minitron needs the same sizes in every layer")
    skipped = {_kind(config, name, dense, "skip") for name in skip}
    steps = {_kind(config, name, dense, "divisors"): step for name, step in divisors.items()}
    clash = skipped & set(steps)
    if clash:
        raise SecateurError(f"{clash.pop()} is both skipped and given a divisor")
    found = {}
    for kind, size in dense.items():
        cut = 0.0 if kind in skipped else depth if kind == "layers" else width
        found[kind] = choices(kind, size, cut, steps.get(kind)) if cut else [size]
    return Grid(dense, found)


def _kind(config: Any, name: str, dense: Mapping[str, int], option: str) -> str:
    """A kind by its own name or the config's."""
    try:
        kind = kind_of(config, name)
    except SecateurError as error:
        raise SecateurError(f"{option}: there is no kind {name!r}{nearest(name, dense)}") from error
    if kind not in dense:
        raise SecateurError(f"{option}: this model has no {kind}; it has {', '.join(dense)}")
    return kind


def _target_sizes(space: Space, config: Any, dims: Mapping[str, int]) -> dict[str, int]:
    """Exact dims, by kind, checked against the model's."""
    dense = sizes_of(space)
    sizes: dict[str, int] = {}
    for name, size in dims.items():
        kind = kind_of(config, name)
        have = dense.get(kind)
        if kind == "kv_groups" and have is None:
            kind, have = "heads", dense.heads  # each head has its own keys: the two numbers are one
        if have is None:
            raise SecateurError(f"dims: the {kind} of this model cannot be cut, so {name}={size} cannot be set")
        if size > have:
            raise SecateurError(f"dims: {name}={size} is above the current size of {have}")
        if sizes.get(kind, size) != size:
            raise SecateurError(f"dims: {kind} is given twice, as {sizes[kind]} and {size}")
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
