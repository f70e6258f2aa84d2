"""Batch-norm statistics taken anew: against sums by hand and torch's own way, and what is left untouched."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_nets import Mlp, Residual, pairs, pictures, shaken
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from secateur.errors import SecateurError
from secateur.mend.batch_norm import adapt_batch_norm


def batches(count: int = 4, size: int = 3) -> list[torch.Tensor]:
    return [2 * pictures(size, seed=seed, dtype=torch.float64) + 0.5 for seed in range(count)]


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return shaken(Residual(), seed=seed, dtype=torch.float64)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def slow_statistics(model: Any, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network written out: each norm's own mean and variance of every batch, then the mean over the batches."""
    sums: dict[str, torch.Tensor] = {}

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        own = x.transpose(0, 1).flatten(1)
        mean = own.sum(1) / own.shape[1]
        squares = ((own - mean[:, None]) ** 2).sum(1)
        for key, value in (("running_mean", mean), ("running_var", squares / (own.shape[1] - 1))):
            sums[f"{name}.{key}"] = sums.get(f"{name}.{key}", torch.zeros_like(value)) + value / len(data)
        layer = model.get_submodule(name)
        wide = [v[None, :, None, None] for v in (mean, squares / own.shape[1], layer.weight, layer.bias)]
        return (x - wide[0]) / torch.sqrt(wide[1] + layer.eps) * wide[2] + wide[3]

    with torch.no_grad():
        for x in data:
            stream = functional.relu(norm("bn", model.conv(x)))
            norm("bn2", model.second(functional.relu(norm("bn1", model.first(stream)))))
    return sums


def test_the_statistics_are_those_of_the_batches() -> None:
    model, data = net(), batches()
    before, expected = state(model), slow_statistics(net(), batches())
    assert adapt_batch_norm(model, data) == 3
    after = state(model)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(before[name], value, rtol=1e-2)
    for name in ("bn", "bn1", "bn2"):
        assert int(after[f"{name}.num_batches_tracked"]) == 4
    assert same(
        {n: t for n, t in before.items() if "running" not in n and "tracked" not in n},
        {n: t for n, t in after.items() if "running" not in n and "tracked" not in n},
    )


def test_torch_comes_to_the_same() -> None:
    ours, theirs = net(), net()
    data = [*batches(3), pictures(2, seed=8, dtype=torch.float64)]  # the last one smaller: it counts as much
    adapt_batch_norm(ours, data)
    update_bn(data, theirs)
    assert same(state(ours), state(theirs))


def test_batches_may_be_pairs_and_a_generator() -> None:
    ours, theirs = net(), net()
    given = pairs((3, 2), dtype=torch.float64)

    def loader() -> Iterator[Any]:
        yield from given

    assert adapt_batch_norm(ours, loader()) == 3
    adapt_batch_norm(theirs, [x for x, _ in given])
    assert same(state(ours), state(theirs))


class Dropping(nn.Module):
    """Dropout before a norm, and a norm that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.bn, self.idle = nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4)
        self.fixed = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fixed(self.bn(self.drop(x)))


def test_all_else_runs_as_in_evaluation_and_is_as_before() -> None:
    model = Dropping().train()
    model.bn.eval()  # frozen by its owner
    model.idle.running_mean = torch.full((4,), 7.0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert adapt_batch_norm(model, [x]) == 1
    torch.testing.assert_close(model.bn.running_mean, x.mean(0))  # dropout would have changed it
    assert model.idle.running_mean.tolist() == [7.0] * 4
    assert (model.bn.momentum, model.idle.momentum) == (0.3, 0.1)
    assert [m.training for m in (model, model.drop, model.bn, model.idle, model.fixed)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert not model.bn._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_twice_is_the_same() -> None:
    once, twice = net(), net()
    adapt_batch_norm(once, batches())
    for _ in range(2):
        adapt_batch_norm(twice, batches())
    assert same(state(once), state(twice))


def test_progress_over_the_batches() -> None:
    told = []

    def track(items: Any, what: str) -> Any:
        told.append((len(items), what))
        return items

    adapt_batch_norm(net(), batches(2), track=track)
    assert told == [(2, "batch norm")]


WIDE = pictures(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there are no batches"),
        ([WIDE, torch.full_like(WIDE, float("inf"))], "statistics of bn are not finite after batch 1"),
        (WIDE, r"needs batches, such as \[tensor\] or a data loader, not one tensor"),
        ("self", "not one str"),
        ([WIDE, (WIDE, WIDE, WIDE)], "not 3 things"),
    ],
)
def test_bad_batches_leave_the_model_as_it_was(data: Any, message: str) -> None:
    model = net()
    model.bn.train()
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(SecateurError, match=message):
        adapt_batch_norm(model, data)
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(m.momentum == 0.1 and not m._forward_pre_hooks for m in (model.bn, model.bn1, model.bn2))


def test_one_value_for_a_channel_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SecateurError, match=r"1 gets one value for each channel, \[1, 4\].*drop_last=True"):
        adapt_batch_norm(model, [torch.randn(5, 3), torch.randn(1, 3)])
    assert same(state(model), before)


def test_an_error_of_the_model_leaves_it_as_it_was() -> None:
    model = net()
    before = state(model)
    with pytest.raises(RuntimeError):
        adapt_batch_norm(model, [WIDE, WIDE[:, :2]])
    assert same(state(model), before)


def test_a_model_without_batch_norm() -> None:
    with pytest.raises(SecateurError, match="Mlp has no batch norm that keeps running statistics"):
        adapt_batch_norm(Mlp(), [torch.zeros(2, 4)])


def test_no_batch_reaches_one() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(SecateurError, match="no batch reaches a batch norm"):
        adapt_batch_norm(Around(), [torch.zeros(2, 4)])
