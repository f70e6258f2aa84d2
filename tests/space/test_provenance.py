"""Where the whole numbers of a graph come from."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.space.provenance import Attribute, Operation, Tagged, made_sizes, tagging, value_of
from secateur.space.trace import export

A, B = Attribute("m", "a"), Attribute("m", "b")
numbers = st.integers(2, 200)


@given(numbers, numbers, numbers)
def test_arithmetic_remembers_what_it_was_made_of(a: int, b: int, c: int) -> None:
    """The value is that of plain numbers, and the expression gives it again."""
    x, y = Tagged(a, A), Tagged(b, B)
    cases: list[tuple[Any, int]] = [
        (x * y, a * b),
        (c * x + y, c * a + b),
        (x // y - c, a // b - c),
        (c - x, c - a),
    ]
    for made, plain in cases:
        assert made == plain
        assert value_of(made.origin, {A: a, B: b}) == plain


def test_other_arithmetic_gives_plain_numbers() -> None:
    x = Tagged(9, A)
    for made in (x / 2, x**0.5, x * 1.5, -x):
        assert not isinstance(made, Tagged)
    assert x * True == 9


def test_copies_mean_the_same_and_what_is_stored_is_plain() -> None:
    x = Tagged(9, A)
    assert copy.deepcopy([x])[0].origin == A
    assert type(pickle.loads(pickle.dumps(x))) is int  # our own bytes


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sizes = 3, [4, 2]
        self.up = nn.Linear(5, 18)

    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.up(x).view(x.shape[0], self.heads, -1).split(self.sizes, -1)
        return a.sum(-1), b.reshape(-1, self.heads * self.sizes[1])


def test_each_node_knows_the_attributes_behind_its_numbers() -> None:
    model = Heads()
    program, recorder = export(model, torch.zeros(7, 5))
    found = {}
    for node in program.graph.nodes:
        for place, number in enumerate(node.args[1] if len(node.args) > 1 and isinstance(node.args[1], list) else ()):
            source = recorder.source(node.name, node.args[1], place)
            if source is not None:
                found[str(node.target), place, number] = source
    heads, last = Attribute("", "heads"), Attribute("", "sizes", 1)
    assert found["aten.view.default", 1, 3] == heads
    assert found["aten.split_with_sizes.default", 0, 4] == Attribute("", "sizes", 0)
    assert found["aten.split_with_sizes.default", 1, 2] == last
    assert found["aten.reshape.default", 1, 6] == Operation("*", heads, last)
    assert type(model.heads) is int
    assert [type(n) for n in model.sizes] == [int, int]


def test_numbers_are_given_back_when_a_trace_fails() -> None:
    model = Heads()
    with pytest.raises(RuntimeError), tagging(model):
        assert isinstance(model.heads, Tagged)
        raise RuntimeError
    assert type(model.heads) is int


def test_a_constructor_says_what_its_parameters_have_for_sizes() -> None:
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=80, vocab_size=320,
        num_hidden_layers=1,
    )  # fmt: skip
    made = made_sizes(LlamaForCausalLM, copy.deepcopy(config))
    field = {name: Attribute("config", name, None, is_config=True) for name in vars(config)}
    assert made["model.layers.0.mlp.up_proj.weight"] == (field["intermediate_size"], field["hidden_size"])
    assert made["model.layers.0.self_attn.k_proj.weight"] == (
        Operation("*", field["num_key_value_heads"], field["head_dim"]),
        field["hidden_size"],
    )
    assert type(config.hidden_size) is int
