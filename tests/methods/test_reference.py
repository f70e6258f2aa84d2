"""Coordinate Minitron on the bundled model agrees with an independent implementation (benchmarks/reference.py: all)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur import apply, discover
from secateur.choose.rank import plan_for_sizes
from secateur.load.model import load_model
from secateur.measure.quality import perplexity
from secateur.score import activation_scores

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "pydoc-llama"


def tokens(name: str) -> list[torch.Tensor]:
    return list(torch.split(torch.from_numpy(np.load(MODEL / name).astype(np.int64)), 16))


@pytest.fixture(scope="module")
def scored() -> tuple[Any, Any, Any]:
    """The bundled model in float32, its Space, and its scores on all calibration rows."""
    model = load_model(MODEL, dtype="float32")[0]
    space = discover(model)
    return model, space, activation_scores(model, space, tokens("calib_ids.npy"))


@pytest.mark.parametrize(
    ("sizes", "dropped", "params", "expected"),
    [
        ({"hidden": 168, "ffn": 384}, (), 2_088_072, 46.15),
        ({"heads": 3}, (), 2_607_552, 39.15),
        ({"heads": 4, "kv_groups": 2}, (), 2_607_552, 22.33),
        ({}, ("model.layers.3",), 2_422_848, 20.52),
    ],
)
def test_perplexity_at_known_sizes(
    scored: tuple[Any, Any, Any], sizes: dict[str, int], dropped: tuple[str, ...], params: int, expected: float
) -> None:
    model, space, scores = scored
    pruned = apply(model, plan_for_sizes(space, scores.axes, sizes, dropped), space=space)
    assert sum(p.numel() for p in pruned.parameters()) == params
    assert perplexity(pruned, tokens("val_ids.npy")) == pytest.approx(expected, rel=0.002)


def test_block_influence(scored: tuple[Any, Any, Any]) -> None:
    influence = list(scored[2].blocks.values())
    # The reference is rounded to three digits.
    assert influence[:5] == pytest.approx([1.049, 0.125, 0.087, 0.076, 0.089], abs=5.1e-4)
