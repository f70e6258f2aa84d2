"""Search with a residual stream that may get narrower."""

from pathlib import Path
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["hidden"]}, "rotate cuts the hidden size, and ignore='hidden' keeps it: leave one of them out"),
        ({"ignore": ["ffn", "hid*"]}, r"and ignore='hid\*' keeps it"),
        ({"only": ["hidden"]}, "only='hidden' leaves nothing else: name more in only"),
        ({"round_to": {"hidden": 0}}, "round_to of hidden must be at least 1, not 0"),
        ({"survey": Path("somewhere")}, "rotate goes with data, without a survey"),
    ],
)
def test_options_that_contradict_a_rotation(options: dict[str, Any], message: str) -> None:
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(SecateurError, match=message):
        prune(model, "params=80%", data=DATA, **{**QUICK, **options})


def test_what_is_named_beside_the_hidden_size_is_searched() -> None:
    """And of what that is a multiple is its own."""
    model = tiny("llama", dtype=torch.float32)
    options = {**QUICK, "only": ["hidden", "ffn"], "round_to": {"hidden": 4, "ffn": 8}, "drop": False}
    result = prune(model, "params=50%", data=DATA, **options)
    config: Any = result.model.config
    assert {kept.kind for kept in result.plan.kept.values()} == {"hidden", "ffn"}
    assert set(result.report["hidden"]["expected"]) == {"48", "44", "40", "36", "32"}
    assert config.intermediate_size % 8 == 0
    assert config.num_attention_heads == model.config.num_attention_heads
