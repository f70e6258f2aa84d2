"""Search with a residual stream that may get narrower."""

from typing import Any

import pytest
import torch
from tiny import tiny, tokens

from secateur.errors import SecateurError
from secateur.methods.verbs import plan, prune

DATA = [tokens(4, 12)]
QUICK: dict[str, Any] = {"method": "search", "rotate": True, "levels": 3, "probes": 0, "trials": 0, "round_to": 4}


def test_a_rotated_stream_meets_the_budget_and_is_no_plan_without_its_weights() -> None:
    model = tiny("llama", dtype=torch.float32)
    result = prune(model, "params=45%", data=DATA, **QUICK)
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in result.model.parameters()) <= 0.45 * whole
    told = result.report["hidden"]
    config: Any = result.model.config
    assert told["pruned"] == config.hidden_size < told["dense"]
    assert result.plan.origin["basis"] == "rotated"
    with pytest.raises(SecateurError, match="means nothing without its weights: use prune"):
        plan(model, "params=45%", data=DATA, **QUICK)


def test_streams_between_layer_norms_are_refused() -> None:
    with pytest.raises(SecateurError, match="norm"):
        prune(tiny("gpt2", dtype=torch.float32), "params=80%", data=DATA, **QUICK)
