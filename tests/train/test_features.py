"""Blocks of models, which belong together, and what they give."""

from typing import Any

import heal
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from secateur.choose.plan import Plan
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.train.features import block_names, matched, rows_of, watching
from secateur.train.objective import Distilling
from secateur.train.settings import Distillation
from secateur.train.teacher import Live


def deep(layers: int, **options: Any) -> Any:
    return heal.llama(num_hidden_layers=layers, **options)


def test_blocks_of_models() -> None:
    assert block_names(deep(3)) == [f"model.layers.{i}" for i in range(3)]
    assert block_names(heal.net()) == ["blocks.0", "blocks.1"]
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=2, num_attention_heads=1, intermediate_size=4)
    assert block_names(BertModel(config)) == ["encoder.layer.0", "encoder.layer.1"]
    assert block_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


def pairs(*numbers: tuple[int, int]) -> list[tuple[str, str]]:
    return [(f"model.layers.{a}", f"model.layers.{b}") for a, b in numbers]


def test_blocks_that_belong_together() -> None:
    assert matched(deep(3), deep(3), None, None) == pairs((0, 0), (1, 1), (2, 2))
    assert matched(deep(6), deep(2), None, None) == pairs((0, 2), (1, 5))  # the last with the last
    plan = Plan(dropped=("model.layers.1", "model.layers.4"))
    assert matched(deep(6), deep(4), None, plan) == pairs((0, 0), (1, 2), (2, 3), (3, 5))
    assert matched(deep(4), deep(3), {"model.layers.2": "model.norm"}, None) == [("model.layers.2", "model.norm")]


def test_a_depth_cut_maps_by_its_plan() -> None:
    dense = deep(4)
    plan = Plan(dropped=("model.layers.1", "model.layers.2"))
    student = apply(dense, plan)
    found = matched(dense, student, None, plan)
    assert found == pairs((0, 0), (1, 3))
    for a, b in found:
        one, two = student.get_submodule(a), dense.get_submodule(b)
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("teacher", "student", "layers", "says"),
    [
        (2, 3, None, "the student has 3 blocks and the teacher 2: give layers"),
        (2, 2, {"model.layers.7": "model.norm"}, "layers: the student has no module 'model.layers.7'"),
        (2, 2, {"model.norm": "model.layer.0"}, "layers: the teacher has no module 'model.layer.0'; did you mean"),
    ],
)
def test_blocks_that_cannot_be_matched(teacher: int, student: int, layers: Any, says: str) -> None:
    with pytest.raises(SecateurError) as error:
        matched(deep(teacher), deep(student), layers, None)
    assert says in str(error.value)


def test_models_without_blocks() -> None:
    with pytest.raises(SecateurError, match="no blocks are found"):
        matched(nn.Linear(2, 2), nn.Linear(2, 2), None, None)


def test_watching_leaves_no_hook() -> None:
    model, ids = deep(2), heal.rows(2)
    model(ids, output_hidden_states=True)  # transformers has hooks of its own for that
    before = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt), watching(model, ["model.layers.0", "model.norm"]) as seen:
        out = model(ids, output_hidden_states=True)
        raise KeyboardInterrupt
    assert torch.equal(seen["model.layers.0"], out.hidden_states[1])
    assert torch.equal(seen["model.norm"], out.hidden_states[-1])
    assert [len(m._forward_hooks) for m in model.modules()] == before
    with (
        pytest.raises(SecateurError, match="not a tensor: leave it out of layers"),
        watching(model, ["model"]),
    ):
        model(ids)


def test_rows_of_features() -> None:
    real = torch.tensor([[True, False, True], [True, True, False]])
    own, wanted = torch.arange(12.0).view(2, 3, 2), torch.zeros(2, 3, 5)
    x, y = rows_of(own, wanted, real)
    assert (list(x.shape), list(y.shape)) == ([4, 2], [4, 5])
    assert x[:, 0].tolist() == [0, 4, 6, 8]
    x, y = rows_of(torch.arange(24.0).view(2, 3, 2, 2), torch.zeros(2, 5, 2, 2), None)  # channels are the second
    assert (list(x.shape), list(y.shape)) == ([8, 3], [8, 5])
    assert x[0].tolist() == [0, 4, 8]
    assert list(rows_of(torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 3), None)[0].shape) == [18, 4]
    for other in (torch.ones(2, 4, 5), torch.ones(3, 3, 2), torch.ones(2, 3)):
        with pytest.raises(SecateurError, match="say which modules to compare"):
            rows_of(own, other, None)


def test_features_of_a_cnn_whose_channels_are_cut() -> None:
    teacher, student, batch = heal.net(), heal.net(seed=3, inside=3), heal.pictures(4)
    found = matched(teacher, student, None, None)[:1]
    objective = Distilling(Live(teacher, 1.0, None, {}), Distillation(kl=0, hidden=1.0), found)
    objective.begin(student, batch, None)
    assert {n: list(m.weight.shape) for n, m in objective.state().maps.items()} == {"0": [6, 3]}  # type: ignore[operator,union-attr]
    losses = objective(student, batch, None)
    assert set(losses) == {"loss", "hidden"}
    assert 0 < float(losses["hidden"].detach()) < 1.05  # a linear map is no worse than the mean
    losses["loss"].backward()  # type: ignore[no-untyped-call]
    assert student.stem.weight.grad is not None


def test_attention_of_fewer_heads() -> None:
    teacher, student, ids = heal.llama(), heal.llama(seed=2, num_attention_heads=2, num_key_value_heads=1), heal.rows(2)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    objective = Distilling(
        Live(teacher, 1.0, None, {}), Distillation(attention=1.0), matched(teacher, student, None, None)
    )
    losses = objective(student, ids, None)
    assert float(losses["attention"].detach()) > 0
    own = Distilling(Live(teacher, 1.0, None, {}), Distillation(attention=1.0), matched(teacher, teacher, None, None))
    assert float(own(teacher, ids, None)["attention"].detach()) == pytest.approx(0, abs=1e-6)
