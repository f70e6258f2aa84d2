"""Multiply-accumulates against torch's own counter, on dense and on cut models, to the digit."""

from typing import Any

import pytest
import torch
from small_nets import Mlp, Mobile, Residual, pictures, shaken
from tiny import random_plan, tiny, tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from secateur.choose.cost import Workload, costs, uniform_cost
from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.space import Space, discover


def counted(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> float:
    """Multiply-accumulates of one forward pass, by torch."""
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, **options)
    return float(counter.get_total_flops()) / 2


class Attention(nn.Module):
    """Self-attention and a mixing of positions, both without a module for the product."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> Any:
        mixed, _ = self.mix(x, x, x, need_weights=False)
        return self.down(torch.relu(self.up(mixed)))


NETS: dict[str, tuple[Any, Any]] = {
    "residual": (Residual, lambda batch: pictures(batch, 7)),
    "mobile": (Mobile, lambda batch: pictures(batch, 8)),
    "mlp": (Mlp, lambda batch: torch.randn(batch, 4)),
    "attention": (Attention, lambda batch: torch.randn(batch, 6, 12)),
}


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", NETS)
def test_plain_networks(name: str, batch: int) -> None:
    make, inputs = NETS[name]
    model, x = shaken(make()), inputs(batch)
    space = discover(model, x)
    assert costs(space, Plan()).macs * batch == counted(model, x) > 0
    assert costs(space, Plan()).flops == 2 * costs(space, Plan()).macs == costs(space, Plan()).of("flops")
    plan = random_plan(space, sorted({a.kind for a in space.axes}))
    cut = apply(model, plan, space=space, inputs=x)
    assert costs(space, plan).macs * batch == counted(cut, x) < counted(model, x)


def language(name: str) -> tuple[Any, Space, torch.Tensor]:
    """The rows have the shape that the model is traced with."""
    from secateur.space.inputs import example_inputs

    model = tiny(name, dtype=torch.float32)
    shape = example_inputs(model)["input_ids"].shape
    return model, discover(model), tokens(*shape)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_language_models_with_dropped_blocks(name: str) -> None:
    model, space, ids = language(name)
    assert costs(space, Plan()).macs * len(ids) == pytest.approx(counted(model, ids, use_cache=False), rel=1e-12)
    for kinds in (["ffn", "heads", "hidden"], ["layers"], ["attention", "ffn"], ["mlp"]):
        plan = random_plan(space, kinds)
        found = counted(apply(model, plan, space=space), ids, use_cache=False)
        assert costs(space, plan).macs * len(ids) == pytest.approx(found, rel=1e-12), kinds


def test_uniform_costs_have_them_too() -> None:
    _, space, _ = language("llama")
    sizes = {"hidden": 48, "ffn": 80, "heads": 2, "kv_groups": 2}
    assert uniform_cost(space, Workload())(sizes, 2).macs == pytest.approx(costs(space, Plan()).macs)
