"""Sizes that kernels dislike: found in the weights themselves, with the nearest that would do."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.choose.plan import Kept, Plan
from secateur.cut import apply
from secateur.ship.shapes import nearest_multiples, shape_advice
from secateur.space import discover

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}


def llama(**options: Any) -> Any:
    """A Llama without values."""
    config = AutoConfig.for_model("llama", **{**SIZES, "num_hidden_layers": 2, "vocab_size": 50, **options})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def told(model: nn.Module) -> list[tuple[str, list[int], str, list[int]]]:
    return [(f.dim, f.values, f.who, f.good) for f in shape_advice(model)]


def test_a_model_of_good_sizes() -> None:
    assert told(llama()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"intermediate_size": 2816 + 128}, [("inputs of mlp.down_proj", [2944], "GGUF", [2816, 3072])]),
        (
            {"intermediate_size": 2816 + 8},
            [
                ("inputs of mlp.down_proj", [2824], "GGUF", [2816, 2848]),
                ("outputs of mlp.gate_proj and mlp.up_proj", [2824], "FP8", [2816, 2832]),
                ("inputs of mlp.down_proj", [2824], "FP8", [2816, 2832]),
            ],
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            [("num_attention_heads", [4], "tensor parallelism", [8])],
        ),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 8},
            [("head_dim of self_attn", [32], "attention kernels", [64])],
        ),
        (
            {"num_attention_heads": 8, "head_dim": 192},
            [("head_dim of self_attn", [192], "attention kernels", [128, 256])],
        ),
    ],
)
def test_what_each_kernel_dislikes(options: dict[str, Any], expected: list[Any]) -> None:
    assert told(llama(**options)) == expected


def test_layers_that_were_cut_differently() -> None:
    """The weights count, not the config."""
    dense = tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=512)
    space = discover(dense)
    axes = [axis.name for axis in space.axes if axis.kind == "ffn"]
    plan = Plan({name: Kept("ffn", 512, tuple(range(n))) for name, n in zip(axes, (100, 256), strict=True)})
    model = apply(dense, plan, space=space)
    found = {(f.dim, f.who): f for f in shape_advice(model)}
    finding = found["inputs of mlp.down_proj", "GGUF"]
    assert (finding.values, finding.good) == ([100], [96, 128])
    assert "stay 16-bit" in str(finding)
    assert found["outputs of mlp.gate_proj and mlp.up_proj", "FP8"].values == [100]
    values = [dataclasses.asdict(f) for f in found.values()]
    assert json.loads(json.dumps(values)) == values


def test_other_models() -> None:
    model = nn.Sequential(nn.Linear(24, 100), nn.ReLU(), nn.Linear(100, 3))
    assert told(model) == [
        ("outputs of 0", [100], "tensor cores", [96, 104]),
        ("inputs of 2", [100], "tensor cores", [96, 104]),
    ]
    assert told(nn.Conv2d(3, 16, 3)) == []
    dims = {f.dim for f in shape_advice(tiny("gpt2", dtype=torch.float32))}
    assert "inputs of transformer.h.*.mlp.c_proj" in dims, "Conv1D of transformers is stored transposed"


def test_nearest_multiples() -> None:
    assert nearest_multiples(100, 32) == [96, 128]
    assert nearest_multiples(7, 32) == [32]


def test_channels_between_convolutions_are_blocks_of_sixteen() -> None:
    good = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 16, 1))
    assert told(good) == []
    cut = nn.Sequential(nn.Conv2d(3, 30, 3), nn.Conv2d(30, 24, 3), nn.Conv2d(24, 12, 1), nn.Conv2d(12, 16, 1))
    assert [(f.values, f.good, "half the speed" in f.why) for f in shape_advice(cut)] == [
        ([12], [16], False),
        ([24], [16, 32], False),
        ([30], [16, 32], True),
    ]
