"""Coordinate Minitron on the bundled model at the sizes whose perplexity is known from an independent implementation.

Run: .venv/bin/python benchmarks/reference.py (about two minutes). Fails where a figure is more than 2% off.
"""

import sys
from typing import Any

import torch
from common import bundled_model, record, tokens

from secateur import Plan, apply, discover
from secateur.choose.rank import plan_for_sizes
from secateur.measure.quality import perplexity
from secateur.score import activation_scores

LAYER = "model.layers.{}"
EXPECTED: list[tuple[dict[str, int], tuple[int, ...], float]] = [
    ({}, (), 15.99),
    ({"ffn": 384}, (), 21.24),
    ({"ffn": 256}, (), 54.89),
    ({"ffn": 128}, (), 474.8),
    ({"heads": 3}, (), 39.15),
    ({"hidden": 168}, (), 29.78),
    ({"hidden": 144}, (), 93.43),
    ({"hidden": 168, "ffn": 384}, (), 46.15),
    ({"hidden": 144, "ffn": 384}, (), 151.3),
    ({"heads": 4, "kv_groups": 2}, (), 22.33),
    *[({}, (i,), p) for i, p in enumerate((8495, 35.96, 24.26, 20.52, 22.00, 42.30))],
]


def main() -> None:
    """Cut to each size and compare."""
    model = bundled_model()
    space = discover(model)
    scores = activation_scores(model, space, torch.split(tokens("calib_ids.npy"), 16))
    held_out = list(torch.split(tokens("val_ids.npy"), 16))
    rows: list[dict[str, Any]] = []
    for sizes, layers, expected in EXPECTED:
        plan: Plan = plan_for_sizes(space, scores.axes, sizes, tuple(LAYER.format(i) for i in layers))
        pruned = apply(model, plan, space=space) if sizes or layers else model
        found = perplexity(pruned, held_out)
        params = sum(p.numel() for p in pruned.parameters())
        rows.append({"sizes": sizes, "without_layers": layers, "params": params, "expected": expected,
                     "perplexity": round(found, 3)})  # fmt: skip
    record("reference", {"what": "held-out perplexity of coordinate Minitron, float32", "rows": rows})
    if any(abs(row["perplexity"] / row["expected"] - 1) > 0.02 for row in rows):
        sys.exit("a figure is more than 2% off")


if __name__ == "__main__":
    main()
