"""A survey that is made stage by stage: its ladders, what it lets go of, and how it goes on after a kill."""

import gc
import json
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_nets import Residual, pictures, shaken
from test_survey import GPT2, consumer, met, of_gpt2
from tiny import tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.methods.survey import Survey, load_survey, refitted
from secateur.methods.surveying import Surveying, survey
from secateur.space import Space, discover
from secateur.walk import walk


@cache
def ladders_of_llama() -> tuple[Survey, Survey]:
    """With the moments and without; the same damping for order and repair."""
    model = tiny("llama", dtype=torch.float32, num_attention_heads=8, num_key_value_heads=4)
    space = discover(model)
    axes = [a for a in space.axes if a.kind not in ("hidden", "head_dim")]
    how: dict[str, Any] = {"damping": 1e-3, "order_damping": 1e-3}
    one, other = (survey(model, space, axes, [tokens(110, 40)], keep_moments=k, **how) for k in (True, False))
    return one, other


def test_ladders_tell_what_solving_each_size_tells() -> None:
    """But for what the damping itself counts for; with heads and KV groups that one matrix reads, together."""
    found, bare = ladders_of_llama()
    assert not found.by_ladder
    assert bare.by_ladder
    checked = 0
    for axis in (found.space.axis(name) for name in found.orders):
        for size in range(1, axis.per_group):
            one, other = found.axis_loss({axis.name: size}), bare.axis_loss({axis.name: size})
            assert one <= other * (1 + 2e-3)
            assert other <= 1.1 * one or axis.kind != "ffn"  # little is lost of heads that nothing trained
            sizes = {axis.name: size}
            damped = sum(found.lost(i, sizes) + ridge_of(found, i, sizes) for i in found.by_axis[axis.name])
            assert other == pytest.approx(damped, rel=2e-3)
            checked += 1
    heads, groups = "model.layers.1.self_attn.heads", "model.layers.1.self_attn.kv_groups"
    for sizes in ({heads: 1, groups: k} for k in (1, 2, 3)):
        (i,) = found.by_axis[heads]
        assert bare.axis_loss(sizes) == pytest.approx(found.lost(i, sizes) + ridge_of(found, i, sizes), rel=2e-3)
    assert checked > 100
    both = {"model.layers.0.mlp.ffn": 30, heads: 1}
    assert bare.axis_loss(both) == pytest.approx(sum(bare.axis_loss({n: k}) for n, k in both.items()))
    assert bare.axis_loss({heads: 2, groups: 4}) == 0


def ridge_of(found: Survey, i: int, sizes: dict[str, int]) -> float:
    """tr(G dW d dW')/2 with the damping d."""
    own = found.consumers[i]
    W = own.weight.matrix(found.parameters[own.weight.name].detach(), own.part)
    change = found.solved(i, sizes)[0] - W
    assert own.output is not None
    ridge = max(found.damping, own.damping) * float(own.second.diagonal().mean())
    return ridge * float((own.output * (change @ change.T)).sum()) / 2


def test_without_moments_there_are_the_same_orders_and_nothing_else() -> None:
    found, bare = ladders_of_llama()
    assert bare.orders.keys() == found.orders.keys()
    assert all(torch.equal(bare.orders[name], order) for name, order in found.orders.items())
    assert (bare.consumers, bare.moments, bare.gradients) == ((), False, True)
    sizes = {"model.layers.0.mlp.ffn": 30}
    assert bare.plan(sizes) == found.plan(sizes)
    for call in (lambda: bare.save(Path("nowhere")), lambda: bare.tensors(sizes), lambda: bare.gone_loss(list(sizes))):
        with pytest.raises(SecateurError, match="needs the second moments, which this survey did not keep"):
            call()


def stages_of(making: Surveying, data: list[torch.Tensor]) -> Any:
    return walk(making.model, data, making.weights)


def test_moments_are_let_go_after_each_stage() -> None:
    model = tiny("llama", dtype=torch.float32, num_hidden_layers=3)
    space = discover(model)
    making = Surveying(model, space, space.of_kind("ffn"), keep_moments=False)
    held: list[weakref.ref[torch.Tensor]] = []
    taken = making._take

    def take(*args: Any) -> None:
        taken(*args)
        held.extend(weakref.ref(c.second) for c in making.consumers.values())

    making._take = take  # type: ignore[method-assign,assignment]
    for count, stage in enumerate(stages_of(making, [tokens(4, 10)])):
        making.add(stage)
        gc.collect()
        assert not making.consumers
        assert len(making.orders) == len(held) == count + 1
        assert all(ref() is None for ref in held)
    assert making.finish([tokens(4, 10)]).consumers == ()


class Chain(nn.Module):
    """The channels of the stem run through all blocks of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def chain() -> tuple[nn.Module, Space, list[torch.Tensor]]:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(60, 4)
    return model, discover(model, x), [x]


def test_what_several_stages_read_waits_for_the_last() -> None:
    model, space, data = chain()
    wide = next(axis.name for axis in space.axes if axis.size == 6)
    making = Surveying(model, space, space.axes, inputs=data[0], keep_moments=False)
    counts = []
    for stage in stages_of(making, data):
        making.add(stage)
        counts.append((len(making.consumers), wide in making.orders, len(making.orders)))
    assert counts[:-1] == [(1 + i // 2, False, (i + 1) // 2) for i in range(6)]  # stages are single layers here
    assert counts[-1] == (0, True, 4)
    whole = survey(model, space, space.axes, data, inputs=data[0], gradients=False)
    found = making.finish(data)
    assert all(torch.equal(found.orders[name], order) for name, order in whole.orders.items())
    assert found.orders.keys() == whole.orders.keys()


@pytest.mark.parametrize("width", [4096, 2])
def test_what_was_found_until_a_kill_is_gone_on_from(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.methods.surveying.WIDE", width)
    model, space, data = chain()

    def new() -> Surveying:
        return Surveying(model, space, space.axes, inputs=data[0], keep_moments=False)

    making = new()
    kept: list[str] = []
    for stage in stages_of(making, data):
        making.add(stage)
        tensors, values = making.state()
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, tmp_path / f"{len(kept)}.safetensors")
        kept.append(json.dumps(values))
    whole = making.finish(data)
    for count, text in enumerate(kept):
        again = new()
        again.restore(load_file(tmp_path / f"{count}.safetensors"), json.loads(text))
        ran: list[int] = []
        for stage in stages_of(again, data):
            again.add(replace(stage, passes=counted(stage.passes, ran)))
        assert len(ran) == len(kept) - count - 1
        found = again.finish(data)
        for one, other in ((found.orders, whole.orders), (found.ladders, whole.ladders), (found.joint, whole.joint)):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
        assert (found.left, found.thin, found.samples) == (whole.left, whole.thin, whole.samples)


def counted(passes: Any, ran: list[int]) -> Any:
    def run() -> Any:
        ran.append(1)
        return passes()

    return run


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", ["llama", "residual"])
def test_wide_matrices_in_float32_find_what_narrow_ones_find(
    make: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make == "llama":
        model, data = tiny("llama", dtype=torch.float32, num_attention_heads=8, num_key_value_heads=4), [tokens(8, 12)]
        inputs: Any = None
    else:  # biases, batch norms, and axes of which one matrix reads two
        model, data, inputs = shaken(Residual()), [pictures(6)], pictures()
    space = discover(model, inputs)
    axes = [a for a in space.axes if a.kind not in ("hidden", "head_dim")]
    exact = survey(model, space, axes, data, inputs=inputs)
    monkeypatch.setattr("secateur.methods.surveying.WIDE", 2)
    monkeypatch.setattr("secateur.methods.survey.WIDE", 2)
    found = survey(model, space, axes, data, inputs=inputs, keep_moments=keep)
    assert found.by_ladder
    for name, lost in exact.ladders.items():
        torch.testing.assert_close(found.ladders[name], lost, rtol=2e-3, atol=1e-4 * float(lost[-1]))
    for name, lost in exact.joint.items():
        torch.testing.assert_close(found.joint[name], lost, rtol=2e-3, atol=1e-4 * float(lost.max()))
    assert bool(exact.joint) == (make == "llama")
    for one, other in zip(exact.consumers, found.consumers, strict=keep):
        torch.testing.assert_close(other.second, one.second, rtol=1e-4, atol=1e-5)  # it was not used up
        stays = torch.arange(len(one.mean)) % 3 > 0
        W = one.weight.matrix(found.parameters[one.weight.name].detach(), one.part)
        monkeypatch.setattr("secateur.methods.survey.WIDE", 4096)
        narrow = refitted(W, one, stays, 1e-2)
        monkeypatch.setattr("secateur.methods.survey.WIDE", 2)
        for a, b in zip(refitted(W, other, stays, 1e-2), narrow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_wide_fit_that_float32_cannot_do_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    own = consumer(of_gpt2(), GPT2)
    W = own.weight.matrix(of_gpt2().parameters[GPT2].detach(), own.part)
    base = torch.ones(80, 80) + 1e-9 * torch.eye(80)  # singular in float32
    hard = replace(own, second=base)
    stays = torch.arange(80) < 50
    exact, _ = refitted(W, hard, stays, 1e-9)
    monkeypatch.setattr("secateur.methods.survey.WIDE", 2)
    found, _ = refitted(W, hard, stays, 1e-9)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found.sum(1), exact.sum(1), rtol=1e-3, atol=1e-3)


def test_ladders_come_back_from_disk_and_older_surveys_do_without(tmp_path: Path) -> None:
    found, _ = ladders_of_llama()
    found.save(tmp_path)
    again = load_survey(tmp_path, found.model, found.space)
    for one, other in ((again.ladders, found.ladders), (again.joint, found.joint)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert again.gradients
    old = {n: t for n, t in load_file(tmp_path / "survey.safetensors").items() if not n.startswith(("ladder", "joint"))}
    save_file(old, tmp_path / "survey.safetensors")
    content = json.loads((tmp_path / "survey.json").read_text())
    del content["gradients"]
    for entry in content["consumers"]:
        del entry["number"]
    (tmp_path / "survey.json").write_text(json.dumps(content))
    old_one = load_survey(tmp_path, found.model, found.space)
    assert (old_one.ladders, old_one.joint, old_one.gradients) == ({}, {}, True)
    sizes = {"model.layers.0.mlp.ffn": 30}
    assert old_one.axis_loss(sizes) == found.axis_loss(sizes)


class NoBackward(torch.autograd.Function):
    """Passes on what it gets, once forward only."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        raise RuntimeError("a backward pass")


class Forward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(torch.tanh(self.up(x)))
        return NoBackward.apply(h) if h.requires_grad else h  # type: ignore[no-any-return,no-untyped-call]


def test_without_gradients_nothing_runs_backward() -> None:
    model, x = Forward(), torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    space = discover(model, x)
    found = survey(model, space, space.axes, [x], inputs=x, gradients=False)
    assert not found.gradients
    assert all(c.output is None for c in found.consumers)
    (i,) = found.by_axis["up.ffn"]
    new, _ = found.solved(i, {"up.ffn": 4})
    X = met(model, "down", [x])
    d = (X - X.mean(0)) @ (new - found.parameters["down.weight"].detach()).double().T
    assert found.lost(i, {"up.ffn": 4}) == pytest.approx(float(d.square().sum(1).mean()) / 2, rel=1e-3)
    with pytest.raises(RuntimeError, match="a backward pass"):
        survey(model, space, space.axes, [x], inputs=x)


class Fork(nn.Module):
    """Two layers read the very same; one reads two axes, of which a later one reads the second again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(4, 6), nn.Linear(4, 5)
        self.pair = nn.ModuleDict({"one": nn.Linear(6, 3), "two": nn.Linear(6, 3)})  # one stage for both
        self.layers = nn.ModuleList([nn.Linear(11, 3), nn.Linear(5, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, g = torch.tanh(self.up(x)), torch.tanh(self.other(x))
        y = self.pair["one"](h) + self.pair["two"](h)
        y = y + self.layers[0](torch.cat([h, g], -1))
        return y + self.layers[1](g)  # type: ignore[no-any-return]


def test_what_others_still_need_is_not_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Fork(), torch.randn(60, 4)
    space = discover(model, x)
    whole = survey(model, space, space.axes, [x], inputs=x)
    monkeypatch.setattr("secateur.methods.surveying.WIDE", 2)
    making = Surveying(model, space, space.axes, inputs=x, keep_moments=False)
    making.weigh([x])
    left = []
    for stage in stages_of(making, [x]):
        making.add(stage)
        left.append(sorted(c.weight.name for c in making.consumers.values()))
    assert left == [["pair.one.weight", "pair.two.weight"], ["layers.0.weight"], []]
    found = making.finish([x])
    assert found.orders.keys() == whole.orders.keys() == {"up.ffn", "other.ffn"}
    for name, lost in whole.ladders.items():
        assert torch.equal(found.orders[name], whole.orders[name])
        torch.testing.assert_close(found.ladders[name], lost, rtol=1e-3, atol=1e-5 * float(lost[-1]))
