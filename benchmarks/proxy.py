"""How well the search's proxy orders candidates: Spearman correlation with the measured KL.

Draws architectures of the bundled model at random from the default search space, cuts each for real, and compares
the order of five cheap rankings with that of the KL to the dense model on held-out tokens:

- expected KL: what the search uses, importance weighed by one probe for each kind (probes on calibration tokens),
- expected loss: what the search uses with measure=False, importance weighed by the layers' block influence,
- raw importance: the same without weights, every kind's lost energy and the dropped layers' block influence added up,
- size: the largest first, as ModelOpt ranks its candidates,
- random.

Run: .venv/bin/python benchmarks/proxy.py [CANDIDATES]
"""

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import bundled_model, record, tokens
from scipy.stats import spearmanr

from secateur import apply, discover
from secateur.choose.cost import Workload, uniform_cost
from secateur.choose.rank import lost_energy
from secateur.choose.search import Candidate, Grid, choices, cost_at, per_group
from secateur.cut.config import sizes_of
from secateur.cut.uniform import Uniform
from secateur.measure.quality import Reference, compare
from secateur.methods.minitron import KINDS, _plan_of, _validity
from secateur.methods.study import Study
from secateur.progress import quiet
from secateur.score.cache import Cache


def main() -> None:
    """Draw, cut, measure, compare."""
    wanted = int(sys.argv[1]) if sys.argv[1:] else 60
    model = bundled_model()
    space = discover(model)
    study = Study(model, space, list(torch.split(tokens("calib_ids.npy"), 8)), 64, Cache(None), quiet)
    dense = {kind: size for kind in KINDS if (size := sizes_of(space).get(kind)) is not None}
    grid = Grid(dense, {k: choices(k, n, 0.34 if k == "layers" else 0.4) for k, n in dense.items()})
    scores = study.scores(layers=True, presorted=False)
    sensitivity = study.sensitivity(scores, grid, presorted=False)
    expected = sensitivity.loss(space, scores, dense)
    unmeasured = study.influence(scores, grid).loss(space, scores, dense)
    cost, valid = uniform_cost(space, Workload()), _validity(Uniform(model, space), grid)
    points = [p for p in grid.points() if p != dense and valid(p)]
    random.seed(0)
    drawn = random.sample(points, wanted)
    reference = Reference(model, list(torch.split(tokens("val_ids.npy")[:96], 8)))

    def raw(sizes: Mapping[str, int]) -> float:
        total = sum(scores.blocks[name] for name in sensitivity.depth[dense["layers"] - sizes["layers"]][0])
        for kind in ("hidden", "ffn", "kv_groups"):
            total += lost_energy(space, scores.axes, kind, sizes[kind])
        return total + lost_energy(space, scores.axes, "heads", per_group(sizes) * dense["kv_groups"])

    whole = cost_at(cost, dense).params
    rows: list[dict[str, Any]] = []
    for sizes in drawn:
        costs = cost_at(cost, sizes)
        plan = _plan_of(space, Candidate(sizes, costs, 0.0), grid, scores, sensitivity)
        kl = compare(apply(model, plan, space=space), reference).kl
        rows.append({"sizes": sizes, "share": costs.params / whole, "kl": kl, "expected_kl": expected(sizes),
                     "expected_loss": unmeasured(sizes),
                     "raw": raw(sizes), "size": -costs.params, "random": random.random()})  # fmt: skip
    rankings = ("expected_kl", "expected_loss", "raw", "size", "random")
    result: dict[str, Any] = {
        "what": "Spearman correlation of cheap rankings with the measured KL on held-out tokens",
        "candidates": len(rows),
        "all": _correlations(rows, rankings),
    }
    for low in (0.4, 0.5, 0.6, 0.7, 0.8):
        near = [row for row in rows if low <= row["share"] < low + 0.1]
        if len(near) >= 8:
            result[f"{low:.0%} to {low + 0.1:.0%} of the parameters"] = {"candidates": len(near),
                                                                         **_correlations(near, rankings)}  # fmt: skip
    record("proxy", {**result, "rows": rows})


def _correlations(rows: Sequence[Mapping[str, Any]], rankings: Sequence[str]) -> dict[str, float]:
    kl = [row["kl"] for row in rows]
    return {name: round(float(spearmanr([row[name] for row in rows], kl).statistic), 3) for name in rankings}


if __name__ == "__main__":
    main()
