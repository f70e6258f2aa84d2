"""Weights that rest on disk: what is changed is written, whoever shares it, and what rests is left alone."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from secateur.load.shards import Shard, write_shard
from secateur.load.store import Store, held, made, store_of, strided


class Tied(nn.Module):
    """An embedding whose table is that of the head, which has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


def streamed(folder: Path) -> tuple[Tied, Store, dict[str, torch.Tensor]]:
    """A model whose weights are made of a file whenever they are loaded."""
    model = Tied()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    write_shard(folder / "all.safetensors", values)
    shard = Shard(folder / "all.safetensors")
    entries = {name: made(partial(shard.read, name), value, (shard,)) for name, value in values.items()}
    return model, Store(model, entries, folder / "changed", work=folder), values


def test_the_bias_of_a_tied_head_is_written(tmp_path: Path) -> None:
    model, store, values = streamed(tmp_path)
    with held(model, "head"), torch.no_grad():
        model.head.bias.add_(1)
    with held(model):
        assert torch.equal(model.head.bias, values["head.bias"] + 1)
        assert torch.equal(model.embed.weight, values["embed.weight"])
    assert store.is_written("head")
    assert not store.is_written("embed")


def test_a_tied_weight_is_written_where_it_comes_first(tmp_path: Path) -> None:
    model, store, values = streamed(tmp_path)
    with held(model, "head"), torch.no_grad():
        model.head.weight.mul_(2)
    with held(model):
        assert torch.equal(model.embed.weight, values["embed.weight"] * 2)
    assert store.is_written("embed")
    assert not store.is_written("head")


def test_traces_see_strides_of_memory(tmp_path: Path) -> None:
    model, _, values = streamed(tmp_path)
    assert not model.head.weight.is_contiguous()
    with strided(model):
        assert all(p.is_contiguous() for p in model.parameters())
    assert bool(torch.isnan(model.head.weight).all())
    with held(model, "embed"), strided(model):  # what is loaded stays
        assert torch.equal(model.embed.weight, values["embed.weight"])
        assert model.head.bias.is_contiguous()
    store = store_of(model)
    assert store is not None
    assert all(p.data_ptr() == store.entries[name].rest.data_ptr() for name, p in store.parameters.items())


def test_a_pass_leaves_nothing_loaded(tmp_path: Path) -> None:
    model, store, values = streamed(tmp_path)
    ids = torch.tensor([[1, 2]])
    expected = nn.functional.linear(values["embed.weight"][ids], values["embed.weight"], values["head.bias"])
    assert torch.equal(model(ids), expected)
    assert bool(torch.isnan(model.head.bias).all())
    assert store.valueless().keys() == set(model.parameters())
