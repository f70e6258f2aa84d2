"""Masks in the company of copies, averages, wrappers and unusual modules."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import slow_sparsity as slow
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from secateur.train import Constant, sparsify, strip

HERE = Path(__file__).parent


def zeros_fit(model: nn.Module, masks: dict[str, torch.Tensor]) -> bool:
    found = dict(model.named_parameters())
    return all(not found[n][~m].any() for n, m in masks.items())


def test_two_ranks_have_the_same_masks(tmp_path: Path) -> None:
    runs = list(slow.RUNS)
    command = [sys.executable, str(HERE / "ranks_sparsity.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    outs = [tmp_path / f"rank{r}.pt" for r in range(2)]
    started = [
        subprocess.Popen(
            [*command, str(r), str(tmp_path / "meet"), str(outs[r]), *runs], env=env, stderr=subprocess.PIPE
        )
        for r in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    first, second = (torch.load(out, weights_only=True) for out in outs)
    for run in runs:
        model = slow.net()
        s = slow.start(run, model)
        slow.train(model, s, slow.adam(s), range(10))
        alone = s.masks()
        for kind in ("masks", "weights"):
            assert all(torch.equal(first[run][kind][n], second[run][kind][n]) for n in first[run][kind]), run
        size = sum(m.numel() for m in alone.values())
        close = sum(int((first[run]["masks"][n] == m).sum()) for n, m in alone.items()) / size
        assert close > 0.97, (run, close)  # the mean over two halves rounds otherwise than that over the whole
        assert any(not m.all() for m in alone.values())


@pytest.mark.parametrize("run", slow.RUNS)
def test_deep_copies_live_their_own_lives(run: str) -> None:
    model = slow.net()
    s = slow.start(run, model)
    slow.train(model, s, slow.adam(s), range(9))
    model.eval()
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    x = slow.batch(50)[0]
    expected = model(x)
    assert torch.equal(twin(x), expected)
    strip(twin)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)  # torch's own removal breaks the classes that copies share
    assert list(twin.state_dict()) == list(slow.net().state_dict())
    masks = s.masks()
    s.finalize()
    assert torch.equal(other(x), expected)
    strip(other, masks)
    assert zeros_fit(other, masks)
    assert zeros_fit(model, masks)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("run", ["magnitude", "movement", "movement-soft", "rb", "sr_ste"])
def test_averaged_models_strip_to_exact_zeros(run: str, buffers: bool) -> None:
    model = slow.net()
    s = slow.start(run, model)
    ema: Any = get_ema_multi_avg_fn  # torch does not say its type
    average = AveragedModel(model, multi_avg_fn=ema(0.9), use_buffers=buffers)
    slow.train(model, s, slow.adam(s), range(12), lambda: average.update_parameters(model))
    masks = s.masks()
    if run in ("magnitude", "movement", "sr_ste") and not buffers:
        plain = strip(copy.deepcopy(average.module))
        assert zeros_fit(plain, masks)
    strip(average, masks)
    assert zeros_fit(average.module, masks)
    assert type(average.module[0]) is nn.Linear  # type: ignore[index]
    moved = dict(average.module.named_parameters())["0.weight"]
    assert not torch.equal(moved, s.plain_state_dict()["0.weight"])
    s.finalize()
    assert list(average.module.state_dict()) == list(model.state_dict())


def test_a_state_dict_goes_through_a_file_while_training() -> None:
    model = slow.net()
    s = slow.start("movement", model)
    slow.train(model, s, slow.adam(s), range(8))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = slow.net(seed=4)
    slow.start("movement", other)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = slow.batch(3)[0]
    assert torch.equal(other(x), model(x))
    plain = slow.net(seed=5)
    plain.load_state_dict(s.plain_state_dict())
    assert torch.equal(plain(x), model(x))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = slow.net(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x)
        result: torch.Tensor = self.out(y)
        return result


@pytest.mark.parametrize("run", ["magnitude", "movement", "rb", "sr_ste"])
def test_activations_may_be_recomputed(run: str) -> None:
    gradients = []
    for training in (True, False):
        torch.manual_seed(0)
        model = Recomputed()
        s = slow.start(run, model)
        model.training = training  # of the outer module alone: it says whether activations are recomputed
        for _ in range(4):
            s.step()
        (model(slow.batch(0)[0]) - slow.batch(0)[1]).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None or b is not None)
    assert any(g is not None and g.any() for g in gradients[0])


@pytest.mark.parametrize("run", slow.RUNS)
def test_autocast(run: str) -> None:
    model = slow.net()
    s = slow.start(run, model)
    optimizer = slow.adam(s)
    for i in range(9):
        x, y = slow.batch(i)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        (loss.float() + s.loss()).backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        s.step()
    masks = s.masks()
    s.finalize()
    assert zeros_fit(model, masks)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(self.attention(x, x, x)[0])
        return result


def test_multihead_attention_reads_masked_projections() -> None:
    torch.manual_seed(0)
    model = Attention()
    order = list(model.state_dict())
    s = sparsify(model, "sparsity=50%", schedule=Constant())
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "encoder.linear1.weight"} <= set(s.names)
    x = torch.randn(3, 5, 8)
    model(x).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("original"))
    plain = Attention()
    plain.load_state_dict(s.plain_state_dict())
    for both in (model, plain):
        both.eval()
    with torch.no_grad():  # the fused path of evaluation too
        assert torch.allclose(model(x), plain(x), atol=1e-6)
    s.finalize()
    assert list(model.state_dict()) == order
    assert type(model.attention) is nn.MultiheadAttention


class Shared(nn.Module):
    """One weight in two modules, one module used twice, and one parameter that is a root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.twice(torch.tanh(self.twice(self.second(torch.relu(self.first(x))))))
        return result


@pytest.mark.parametrize("run", ["magnitude", "movement", "rb", "sr_ste"])
def test_shared_weights_share_their_mask(run: str) -> None:
    torch.manual_seed(0)
    model = Shared()
    keys = list(model.state_dict())
    s = slow.start(run, model)
    assert s.names == ["first.weight", "twice.weight"]
    assert len(s.scores()) in (0, 2)
    holders: list[Any] = [model.first, model.second]
    assert holders[0].parametrizations.weight[0] is holders[1].parametrizations.weight[0]
    optimizer = slow.adam(s)
    for i in range(9):
        x = slow.batch(i)[0]
        (model(x).square().mean() + s.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        s.step()
    twin = strip(copy.deepcopy(model), s.masks())
    plain = s.plain_state_dict()
    assert plain["first.weight"] is plain["second.weight"]
    s.finalize()
    for each in (model, twin):
        found = dict(each.named_parameters(remove_duplicate=False))
        assert found["first.weight"] is found["second.weight"]
        assert list(each.state_dict()) == keys
    assert s.statistics()["size"] == 128


def test_a_root_that_owns_its_weight_and_grouped_convolutions() -> None:
    root = nn.Linear(8, 4)
    s = sparsify(root, "sparsity=50%", schedule=Constant())
    assert s.names == list(s.plain_state_dict())[:1] == ["weight"]
    s.finalize()
    assert type(root) is nn.Linear
    assert [n for n, _ in root.named_parameters()] == ["weight", "bias"]
    conv = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 2))
    s = sparsify(conv, "n:m=2:4", schedule=Constant())
    assert conv(torch.randn(1, 8, 5, 5)).shape == (1, 4, 4, 4)
    groups = s.masks()["0.weight"].permute(0, 2, 3, 1).reshape(-1, 4)  # along the inputs
    assert (groups.sum(1) == 2).all()


def test_the_decay_of_sr_ste_counts_once_however_often_a_module_is_used() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    s = sparsify(model, "n:m=2:4", method="sr_ste", decay=0.5)
    x = torch.zeros(1, 8)
    (model(model(x)).sum() + s.loss()).backward()
    entry: Any = model[0]
    weight = entry.parametrizations.weight.original
    assert torch.allclose(weight.grad, 0.5 * weight.detach() * ~s.masks()["0.weight"])


def test_masks_move_with_the_model_and_print() -> None:
    model = slow.net()
    s = slow.start("rb", model)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    s.step()
    assert model(slow.batch(0)[0].double()).dtype == torch.float64
    assert "Masked(gates, shape=(16, 8))" in str(model)
