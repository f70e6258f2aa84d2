"""Taylor and Fisher against finite masks on what the readers of a unit read, and against slow loops."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from small_nets import Mlp, Residual, pairs, pictures, shaken
from tiny import tiny, tokens
from torch import nn
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.load.batches import default_loss
from secateur.score.gradients import fisher, taylor, taylor_squared
from secateur.space import Space, discover

READERS = {8: ("first", "fc"), 6: ("second",)}
"""Size of the axis -> the layers that read it. The stream is read by the block and, after the sum, by the head."""


@cache
def residual() -> tuple[Any, Space]:
    model = shaken(Residual(), dtype=torch.float64)
    return model, discover(model, pictures(dtype=torch.float64))


def masked_loss(net: nn.Module, layers: tuple[str, ...], unit: int, mask: float, x: Any, y: Any) -> float:
    def scale(_: nn.Module, args: tuple[Any, ...]) -> Any:
        scaled = args[0].clone()
        scaled[:, unit] *= mask
        return (scaled,)

    handles = [net.get_submodule(layer).register_forward_pre_hook(scale) for layer in layers]
    with torch.no_grad():
        value = float(functional.cross_entropy(net(x), y))
    for handle in handles:
        handle.remove()
    return value


def slopes(unit: int, size: int, step: float = 1e-5) -> list[float]:
    """dL/dm of one unit, for each sample, from two forward passes."""
    net, _ = residual()
    found = []
    for x, y in pairs((1, 1, 1, 1, 1), dtype=torch.float64):
        high, low = (masked_loss(net, READERS[size], unit, 1 + e, x, y) for e in (step, -step))
        found.append((high - low) / (2 * step))
    return found


@pytest.mark.parametrize(("criterion", "power"), [(taylor, 1), (fisher, 2)])
def test_mask_gradients_are_those_of_finite_masks(criterion: Callable[..., Any], power: int) -> None:
    net, space = residual()
    found = criterion(net, space, pairs(dtype=torch.float64))
    assert len(space.axes) == 2
    for axis in space.axes:
        for unit in range(axis.size):
            expected = sum(abs(slope) ** power for slope in slopes(unit, axis.size)) / 5
            assert float(found[axis.name][unit]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("criterion", [taylor, fisher])
def test_how_samples_are_batched_does_not_matter(criterion: Callable[..., Any]) -> None:
    net, space = residual()
    one, other = (criterion(net, space, pairs(sizes, dtype=torch.float64)) for sizes in ((3, 2), (1, 4)))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_taylor_squared_counts_weights_one_by_one() -> None:
    net, space = residual()
    batches = pairs((2, 2), dtype=torch.float64)
    found = taylor_squared(net, space, batches)
    loss = torch.stack([functional.cross_entropy(net(x), y) for x, y in batches]).mean()
    weights = {name: net.get_submodule(name).weight for name in ("first", "fc", "second")}
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for axis in space.axes:
        for unit in range(axis.size):
            products = [(weights[r] * gradients[r]).detach()[:, unit].square().sum() for r in READERS[axis.size]]
            assert float(found[axis.name][unit]) == pytest.approx(float(sum(products)), rel=1e-5)


def test_the_model_is_left_alone() -> None:
    net = shaken(Residual()).train()
    net.fc.weight.requires_grad_(False)
    net.fc.bias.grad = torch.ones(5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    space = discover(net, pictures())
    scores = fisher(net, space, pairs())
    assert all(float(values.min()) > 0 for values in scores.values())  # the frozen reader counts
    assert net.training
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["fc.bias"]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_loss_of_ones_own() -> None:
    net = shaken(Mlp())
    space = discover(net, torch.zeros(2, 4))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.mse_loss(model(batch), torch.zeros(len(batch), 3))

    scores = taylor(net, space, [x], loss=loss)
    doubled = taylor(net, space, [x], loss=lambda m, b: 2 * loss(m, b))
    for name in scores:
        torch.testing.assert_close(doubled[name], 2 * scores[name])


def test_language_models_have_their_own_loss() -> None:
    model = tiny("llama", dtype=torch.float32)
    space = discover(model)
    ids = tokens(2, 9)
    own = model(input_ids=ids, labels=ids).loss.item()
    assert default_loss(model, ids).item() == pytest.approx(own)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (torch.arange(12) < 9).long().expand(2, 12)
    assert default_loss(model, {"input_ids": padded, "attention_mask": mask}).item() == pytest.approx(own, rel=1e-5)
    axis = space.of_kind("ffn")[0]
    scores = fisher(model, space, [ids], [axis])
    weight = model.model.layers[0].mlp.down_proj.weight
    expected = torch.zeros(80)
    for row in ids:
        (gradient,) = torch.autograd.grad(model(input_ids=row[None], labels=row[None]).loss, [weight])
        expected += (weight * gradient).sum(0).detach().square() / 2
    assert list(scores) == [axis.name]
    torch.testing.assert_close(scores[axis.name], expected, rtol=1e-4, atol=1e-12)


def detached(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1]).detach()


def unreduced(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none").repeat(2)


def infinite(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1]) / 0


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "there is no calibration batch"),
        (pairs(), detached, "does not depend on the weights: is it detached"),
        (pairs(), unreduced, r"no scalar tensor but shape \[2\]"),
        (pairs(), infinite, "loss of batch 0 is inf"),
        ([pictures()], None, r"must be a pair \(inputs, targets\), or give a loss"),
        ([(pictures(), torch.zeros(2, 5))], None, r"targets are torch.float32 \[1, 5\].*give a loss"),
        ([[pictures()] * 3], None, "not 3 things"),
    ],
    ids=["none", "detached", "unreduced", "infinite", "unlabelled", "float", "triple"],
)
def test_what_cannot_be(batches: Any, loss: Any, message: str) -> None:
    net = shaken(Residual())
    space = discover(net, pictures())
    with pytest.raises(SecateurError, match=message):
        taylor(net, space, batches, loss=loss)
    assert all(p.requires_grad for p in net.parameters())


def test_a_language_model_without_a_head_needs_a_loss() -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(tiny("llama", device="meta").config)
    with pytest.raises(SecateurError, match="give a loss"):
        default_loss(model, tokens(1, 5))
