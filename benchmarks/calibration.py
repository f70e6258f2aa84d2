"""What calibration costs beside the plain forward passes over the same tokens, in one run, in turns.

Run: .venv/bin/python benchmarks/calibration.py
"""

import time

import torch
from common import bundled_model, record, tokens

from secateur import discover
from secateur.score import activation_scores


def main() -> None:
    """Time plain and scored passes in turns; the ratio of the fastest of each is the result."""
    model = bundled_model()
    batches = list(torch.split(tokens("calib_ids.npy"), 8))
    space = discover(model)
    plain, scored = [], []
    for _ in range(5):
        begin = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(input_ids=batch, use_cache=False)
        plain.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        activation_scores(model, space, batches)
        scored.append(time.perf_counter() - begin)
    ratios = sorted(s / p for s, p in zip(scored, plain, strict=True))
    record(
        "calibration",
        {
            "what": "activation scores of all axes and layers against plain forward passes, 512 x 256 tokens",
            "plain_seconds": plain,
            "scored_seconds": scored,
            "ratio_of_fastest": min(scored) / min(plain),
            "median_ratio": ratios[len(ratios) // 2],
        },
    )


if __name__ == "__main__":
    main()
