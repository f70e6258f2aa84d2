"""What a survey finds, against hooks and least squares written out; and what comes back from disk."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture
from safetensors.torch import load_file, save_file
from small_nets import Mlp, Residual, pictures, shaken
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional

from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.methods.survey import Consumer, Survey, load_survey, refitted
from secateur.methods.surveying import survey
from secateur.space import Space, discover

GPT2 = "transformer.h.0.mlp.c_proj.weight"


@cache
def mixtral() -> tuple[Any, Space]:
    model = mixture("mixtral", dtype=torch.float32)
    return model, discover(model)


def made(model: Any, data: Any, *, inputs: Any = None, without: tuple[str, ...] = ("hidden", "head_dim")) -> Survey:
    space = mixtral()[1] if model is mixtral()[0] else discover(model, inputs)
    return survey(model, space, [a for a in space.axes if a.kind not in without], data, inputs=inputs)


@cache
def of_gpt2() -> Survey:
    return made(tiny("gpt2", dtype=torch.float32), list(torch.split(tokens(8, 12), 3)))


@cache
def of_llama() -> Survey:
    model = tiny("llama", dtype=torch.float32, num_attention_heads=8, num_key_value_heads=4)
    return made(model, [tokens(8, 12)])


@cache
def of_residual() -> Survey:
    return made(shaken(Residual()), [pictures(4), pictures(3, seed=8)], inputs=pictures())


def consumer(found: Survey, name: str) -> Consumer:
    (own,) = [c for c in found.consumers if c.weight.name == name]
    return own


def met(model: nn.Module, path: str, batches: list[torch.Tensor]) -> torch.Tensor:
    """What comes into a module, float64 [rows, features] or [samples, channels, ...]."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, given, __: seen.append(given[0].double()))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return torch.cat([x.flatten(0, -2) if x.dim() == 3 else x for x in seen])


# Moments


def test_second_moments_are_those_that_hooks_see() -> None:
    found = of_gpt2()
    own = consumer(found, GPT2)
    X = met(found.model, "transformer.h.0.mlp.c_proj", list(torch.split(tokens(8, 12), 3)))
    assert own.shifts  # it has a bias
    torch.testing.assert_close(own.mean.double(), X.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.second.double(), torch.cov(X.T, correction=0), rtol=1e-3, atol=1e-5)
    llama = of_llama()
    X = met(llama.model, "model.layers.1.mlp.down_proj", [tokens(8, 12)])
    own = consumer(llama, "model.layers.1.mlp.down_proj.weight")
    assert not own.shifts
    torch.testing.assert_close(own.second.double(), X.T @ X / len(X), rtol=1e-3, atol=1e-5)


def test_a_convolution_meets_patches() -> None:
    found = of_residual()
    own = consumer(found, "first.weight")
    x = met(found.model, "first", [pictures(4), pictures(3, seed=8)])
    patches = functional.unfold(x, 3, padding=1).reshape(len(x), 8, 9, -1).permute(0, 3, 2, 1).flatten(0, 1).flatten(1)
    assert own.shifts  # a batch norm lies behind it
    torch.testing.assert_close(own.second.double(), torch.cov(patches.T, correction=0), rtol=1e-3, atol=1e-5)
    assert own.axes["conv.channels"].tolist() == list(range(8)) * 9


def test_units_of_columns_are_those_that_a_cut_takes() -> None:
    """The columns of a unit are those that are gone from the weight of the cut model."""
    found = of_llama()
    for own in (c for c in found.consumers if ".0." in c.weight.name):  # the other layer is alike
        W = found.parameters[own.weight.name].detach()
        for axis in own.axes:
            plan = found.plan({axis: 1})
            stays = found.stays(own, {axis: 1})
            pruned = apply(found.model, plan, space=found.space).get_parameter(own.weight.name)
            assert torch.equal(pruned.detach(), own.weight.matrix(W, own.part)[:, stays])


# Repair


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("name", [GPT2, "transformer.h.0.attn.c_proj.weight"])
def test_repair_is_ridge_regression(name: str, damping: float) -> None:
    """Least |Y - X_S W'|^2 / n + d |W' - W_S|^2 with Y what the dense columns gave, by lstsq on stacked rows."""
    found = of_gpt2()
    own = consumer(found, name)
    W = own.weight.matrix(found.parameters[name].detach(), own.part)
    stays = torch.rand(W.shape[1], generator=torch.Generator().manual_seed(0)) < 0.6
    new, shift = refitted(W, own, stays, damping)
    X = met(found.model, name.removesuffix(".weight"), list(torch.split(tokens(8, 12), 3)))
    n, mean = len(X), X.mean(0)
    ridge = damping * (X - mean).square().mean()
    Xs, Y, few = (X - mean)[:, stays], (X - mean) @ W.double().T, int(stays.sum())
    rows = torch.cat([Xs, (n * ridge).sqrt() * torch.eye(few, dtype=torch.float64)])
    wanted = torch.cat([Y, (n * ridge).sqrt() * W[:, stays].double().T])
    exact = torch.linalg.lstsq(rows, wanted).solution.T
    tolerance = 2e-2 if damping < 1e-4 else 1e-3  # second moments are float32
    assert float((new[:, stays].double() - exact).norm() / exact.norm()) < tolerance
    assert bool((new[:, ~stays] == 0).all())
    lost = X @ (W - new).double().T
    torch.testing.assert_close(shift.double(), lost.mean(0), rtol=1e-3, atol=1e-4)
    better = float((lost - lost.mean(0)).square().sum())
    assert better < float(((X - mean)[:, ~stays] @ W.double()[:, ~stays].T).square().sum())


def test_nothing_left_and_nothing_gone() -> None:
    own = consumer(of_gpt2(), GPT2)
    W = own.weight.matrix(of_gpt2().parameters[GPT2].detach(), own.part)
    whole, none = refitted(W, own, torch.ones(80, dtype=torch.bool), 1e-3)
    assert torch.equal(whole, W)
    assert not none.any()
    nothing, shift = refitted(W, own, torch.zeros(80, dtype=torch.bool), 1e-3)
    assert not nothing.any()
    torch.testing.assert_close(shift, W @ own.mean, rtol=1e-4, atol=1e-6)


def test_inputs_that_are_all_zero_do_no_harm() -> None:
    own = consumer(of_gpt2(), GPT2)
    dead = Consumer(own.weight, own.part, own.axes, own.second * 0, own.mean * 0, own.output, own.shifts)
    new, _ = refitted(torch.ones(3, 80), dead, torch.arange(80) < 40, 1e-3)
    torch.testing.assert_close(new, (torch.arange(80) < 40).float().expand(3, -1))


def test_biases_take_up_the_shift_and_nothing_else_changes() -> None:
    found = of_gpt2()
    axis = "transformer.h.0.mlp.ffn"
    tensors = found.tensors({axis: 30})
    assert set(tensors) == {GPT2, "transformer.h.0.mlp.c_proj.bias"}
    new, shift = found.solved(number(found, GPT2), {axis: 30})
    assert torch.equal(tensors[GPT2], new.T)  # Conv1D is the other way round
    torch.testing.assert_close(
        tensors["transformer.h.0.mlp.c_proj.bias"],
        found.parameters["transformer.h.0.mlp.c_proj.bias"].detach() + shift,
    )
    assert int((new.abs().sum(0) > 0).sum()) == 30
    assert found.tensors({axis: 80}) == {}
    assert found.tensors({axis: 30}, weights=["other"]) == {}


def test_the_bias_of_each_expert_takes_up_its_own_shift() -> None:
    found = made(mixture("gpt_oss", dtype=torch.float32), [tokens(8, 12)], without=("hidden", "head_dim", "experts"))
    name, axis = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.expert_ffn"
    tensors, bias = found.tensors({axis: 30}), f"{name}_bias"
    assert set(tensors) == {name, bias}
    shifts = [found.solved(i, {axis: 30})[1] for i, c in enumerate(found.consumers) if c.weight.name == name]
    torch.testing.assert_close(tensors[bias], found.parameters[bias].detach() + torch.stack(shifts))
    assert all(bool(shift.any()) for shift in shifts)


def number(found: Survey, name: str) -> int:
    return next(i for i, c in enumerate(found.consumers) if c.weight.name == name)


def test_the_loss_is_what_the_output_gradients_say() -> None:
    found = of_gpt2()
    own, i = consumer(found, GPT2), number(found, GPT2)
    sizes = {"transformer.h.0.mlp.ffn": 30}
    new, _ = found.solved(i, sizes)
    W = own.weight.matrix(found.parameters[GPT2].detach(), own.part)
    X = met(found.model, "transformer.h.0.mlp.c_proj", [tokens(8, 12)]).float()
    assert own.output is not None
    d = (X - X.mean(0)) @ (new - W).T
    assert found.lost(i, sizes) == pytest.approx(float(((d @ own.output) * d).sum(1).mean()) / 2, rel=1e-3)
    assert found.axis_loss(sizes) == found.lost(i, sizes)
    bare = X @ (W * ~found.stays(own, sizes)).T
    assert found.lost(i, sizes, repaired=False) == pytest.approx(
        float(((bare @ own.output) * bare).sum(1).mean()) / 2, rel=1e-3
    )
    assert found.lost(i, sizes) < found.lost(i, sizes, repaired=False)


def test_a_sublayer_that_is_gone_loses_all_that_it_gave() -> None:
    """Its bias, too, and no other bias makes up for it."""
    found = of_gpt2()
    own = consumer(found, GPT2)
    X = met(found.model, "transformer.h.0.mlp.c_proj", [tokens(8, 12)]).float()
    Y = X @ found.parameters[GPT2].detach() + found.parameters["transformer.h.0.mlp.c_proj.bias"].detach()
    assert own.output is not None
    expected = float(((Y @ own.output) * Y).sum(1).mean()) / 2
    assert found.gone_loss(["transformer.h.0.mlp.ffn"]) == pytest.approx(expected, rel=1e-3)


def test_experts_count_by_the_tokens_that_they_meet() -> None:
    found = made(mixtral()[0], [tokens(8, 12)], without=("hidden", "experts"))
    own = [c for c in found.consumers if c.weight.name == "model.layers.0.mlp.experts.down_proj"]
    assert len(own) == 6
    router = met(found.model, "model.layers.0.mlp.gate", [tokens(8, 12)])
    chosen = (router @ found.parameters["model.layers.0.mlp.gate.weight"].detach().double().T).topk(2, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=6) / len(router)
    outputs = [c.output for c in own]
    assert all(x is not None for x in outputs)
    traces = torch.tensor([float(x.trace()) for x in outputs if x is not None])
    torch.testing.assert_close(traces / traces.sum(), (counts / counts.sum()).float(), rtol=1e-3, atol=1e-4)


# Orders and plans


def test_kept_units_shrink_one_by_one_in_every_group() -> None:
    found = of_llama()
    for name in found.orders:
        axis = found.space.axis(name)
        before = set(range(axis.size))
        for n in range(axis.per_group - 1, 0, -1):
            units = found.kept(axis, n).tolist()
            assert units == sorted(set(units))
            assert set(units) < before
            assert [sum(u // axis.per_group == g for u in units) for g in range(axis.groups)] == [n] * axis.groups
            before = set(units)


def test_plans_leave_out_what_dropped_blocks_take_along() -> None:
    found = of_llama()
    sizes = {f"model.layers.{i}.mlp.ffn": 20 for i in (0, 1)} | {"model.layers.1.self_attn.heads": 1}
    assert set(found.plan(sizes).kept) == set(sizes)
    plan = found.plan(sizes, ["model.layers.0.mlp"])
    assert (set(plan.kept), plan.dropped) == (set(sizes) - {"model.layers.0.mlp.ffn"}, ("model.layers.0.mlp",))
    assert set(found.plan(sizes, ["model.layers.1"]).kept) == {"model.layers.0.mlp.ffn"}
    assert found.plan({name: 80 for name in sizes if "ffn" in name}).kept == {}
    plan.check(found.space)


class Twice(nn.Module):
    """What the first layer gives is read in two places of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other, self.down = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(17, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(x))
        return self.down(torch.cat([h, torch.tanh(self.other(x)), h], -1))  # type: ignore[no-any-return]


def test_what_is_read_twice_goes_twice() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(40, 4)
    found = made(model, [x], inputs=x)
    own = consumer(found, "down.weight")
    assert own.axes["up.ffn"].tolist() == [*range(6), *[-1] * 5, *range(6)]
    stays = found.stays(own, {"up.ffn": 2})
    assert int(stays.sum()) == 9
    pruned = apply(model, found.plan({"up.ffn": 2}), space=found.space, inputs=x)
    assert pruned.get_parameter("down.weight").shape == (3, 9)


# What could not be surveyed


def test_what_nothing_reads_is_left_out_and_said() -> None:
    found = made(mixtral()[0], [tokens(2, 6)], without=("hidden", "heads", "kv_groups"))
    assert found.left == {f"model.layers.{i}.mlp.experts": "nothing that is multiplied with reads it" for i in range(2)}
    assert set(found.orders) == {f"model.layers.{i}.mlp.expert_ffn" for i in range(2)}


def test_few_rows_are_said() -> None:
    model = shaken(Mlp())
    data = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert made(model, [data], inputs=data).thin == ("mid.weight",)  # 10 columns there, 7 in down
    assert made(model, [data, data[:1]], inputs=data).thin == ()


def test_errors() -> None:
    model, space = of_residual().model, of_residual().space
    axes = list(space.axes)
    with pytest.raises(SecateurError, match="a survey needs data"):
        survey(model, space, axes, [])
    for option in ("damping", "order_damping"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(SecateurError, match=f"{option} {value} must be above 0 and finite"):
                survey(model, space, axes, [pictures()], **{option: value})  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match=r"not finite|infinite"):
        survey(model, space, axes, [pictures() * float("nan")])
    with pytest.raises(SecateurError, match="no weight reads the axes that may be cut"):
        survey(model, space, [], [pictures()])


def test_the_model_stays_as_it_is() -> None:
    model, x = shaken(Residual()).train(), pictures(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made(model, [x], inputs=x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# On disk


@pytest.mark.parametrize("make", [of_gpt2, of_residual], ids=["gpt2", "residual"])
def test_what_was_saved_decides_and_repairs_the_same(make: Any, tmp_path: Path) -> None:
    found = make()
    found.save(tmp_path)
    again = load_survey(tmp_path, found.model, found.space)
    sizes = {name: max(1, found.space.axis(name).per_group // 2) for name in found.orders}
    plan = found.plan(sizes)
    assert again.plan(sizes) == plan
    one, other = found.repaired(sizes, plan), again.repaired(sizes, plan)
    assert one.keys() == other.keys()
    assert one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert again.axis_loss(sizes) == found.axis_loss(sizes)
    assert (again.identity, again.left, again.thin) == (found.identity, found.left, found.thin)
    assert (again.samples, again.damping) == (found.samples, found.damping)


def test_a_survey_of_another_model_is_refused(tmp_path: Path) -> None:
    found = of_residual()
    found.save(tmp_path)
    other = shaken(Residual(), seed=1)
    with pytest.raises(
        SecateurError, match=rf"^the survey in {tmp_path} was made of another model \(unnamed\): make one"
    ):
        load_survey(tmp_path, other, found.space)


def broken(found: Survey, folder: Path, **changes: Any) -> Space:
    found.save(folder)
    content = json.loads((folder / "survey.json").read_text()) | changes
    (folder / "survey.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return found.space


def test_an_expert_that_no_token_meets_is_sliced_as_it_is() -> None:
    found = made(mixtral()[0], [tokens(1, 2)], without=("hidden", "experts"))
    name, axis = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.expert_ffn"
    assert axis in found.orders
    idle = [c for c in found.consumers if c.weight.name == name and not c.second.any()]
    assert 2 <= len(idle) < 6  # two tokens meet two experts each
    sizes = {axis: 30}
    new = found.tensors(sizes)[name]
    for own in idle:
        W = own.weight.matrix(found.parameters[name].detach(), own.part)
        assert torch.equal(own.weight.matrix(new, own.part), W * found.stays(own, sizes))
    assert name in found.thin


@pytest.mark.parametrize("missing", ["identity", "samples", "damping", "left", "thin", "axes", "consumers", "format"])
def test_an_entry_that_is_missing_is_an_error(missing: str, tmp_path: Path) -> None:
    space = broken(of_residual(), tmp_path, **{missing: None})
    with pytest.raises(SecateurError, match="no readable survey in"):
        load_survey(tmp_path, of_residual().model, space)


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    found = of_residual()
    with pytest.raises(SecateurError, match="no readable survey in"):
        load_survey(tmp_path, found.model, found.space)
    space = broken(found, tmp_path, format=99)
    with pytest.raises(SecateurError, match=r"survey.json is not a survey of format 1"):
        load_survey(tmp_path, found.model, space)
    for text in ("{", "[]", "3"):
        (tmp_path / "survey.json").write_text(text)
        with pytest.raises(SecateurError, match="no readable survey in"):
            load_survey(tmp_path, found.model, space)
    found.save(tmp_path)
    tensors = load_file(tmp_path / "survey.safetensors")
    for name in ("0:second", "order:conv.channels", "0:output"):
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "survey.safetensors")
        with pytest.raises(SecateurError, match=f"no readable survey in .*{name}"):
            load_survey(tmp_path, found.model, space)
    (tmp_path / "survey.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SecateurError, match="no readable survey in"):
        load_survey(tmp_path, found.model, space)
