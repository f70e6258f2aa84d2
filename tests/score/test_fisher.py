"""Second moments of gradients at outputs, against loops over samples and against the divergence that they stand for."""

from typing import Any

import pytest
import torch
from small_nets import Mlp, Residual, pictures, shaken
from tiny import tiny, tokens
from torch import nn

from secateur.errors import SecateurError
from secateur.score.fisher import output_gradients, outputs_and_kind


def inputs(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def one_sample(model: nn.Module, path: str, x: torch.Tensor, y: int) -> torch.Tensor:
    """Gradient of log p(y | x) at a module's output, by a zero that is added there; x is one sample."""
    added: list[torch.Tensor] = []

    def add(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        added.append(torch.zeros_like(output).requires_grad_())
        return output + added[-1]

    handle = model.get_submodule(path).register_forward_hook(add)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(model(x).log_softmax(-1)[0, y], added)
    handle.remove()
    return grad[0]


def drawn(model: nn.Module, batches: list[torch.Tensor], seed: int) -> list[int]:
    """Classes drawn from the model, batch by batch."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    for x in batches:
        with torch.no_grad():
            found += torch.multinomial(model(x).softmax(-1), 1, generator=generator)[:, 0].tolist()
    return found


def test_a_linear_layer_is_as_in_a_loop() -> None:
    model, batches = shaken(Mlp()), [inputs(5), inputs(3, 1)]
    found = output_gradients(model, ["up", "mid"], [(x, labels(len(x))) for x in batches], seed=7)
    classes = drawn(model, batches, 7)
    for path in ("up", "mid"):
        rows = torch.stack(
            [one_sample(model, path, x[None], y) for x, y in zip(torch.cat(batches), classes, strict=True)]
        )
        torch.testing.assert_close(found[path], rows.T @ rows / 8)


def test_a_convolution_adds_up_its_positions() -> None:
    model, x = shaken(Residual()), pictures(3)
    found = output_gradients(model, ["first", "second"], [(x, labels(3))], seed=2)
    for path in ("first", "second"):
        rows = [one_sample(model, path, one[None], y) for one, y in zip(x, drawn(model, [x], 2), strict=True)]
        flat = torch.stack(rows).permute(0, 2, 3, 1).flatten(0, 2)  # [positions of all samples, channels]
        torch.testing.assert_close(found[path], flat.T @ flat / 3)


def test_labels_do_not_matter() -> None:
    model, x = shaken(Mlp()), inputs(6)
    one, other = (output_gradients(model, ["mid"], [(x, labels(6) + i)])["mid"] for i in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, output_gradients(model, ["mid"], [(x, labels(6))], seed=1)["mid"])


def test_classes_are_drawn_as_the_model_would() -> None:
    """Over many draws, the mean is the expectation over the model's own probabilities."""
    model, x = shaken(Mlp()), inputs(6)
    found = output_gradients(model, ["mid"], [(x.repeat(700, 1), labels(4200))])["mid"]
    exact = torch.zeros_like(found)
    for one in x:
        for y, p in enumerate(model(one[None]).softmax(-1)[0].tolist()):
            g = one_sample(model, "mid", one[None], y)
            exact += p * torch.outer(g, g) / 6
    assert float((found - exact).norm() / exact.norm()) < 0.05


def kl(dense: torch.Tensor, other: torch.Tensor) -> float:
    p, q = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("path", ["up", "mid", "down"])
def test_the_estimate_is_the_divergence_of_a_small_change(path: str) -> None:
    torch.manual_seed(1)
    model, x = Mlp(), inputs(3000)
    moment = output_gradients(model, [path], [(x, labels(3000))])[path]
    seen: list[torch.Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        dense = model(x)
        handle.remove()
        weight: Any = module.weight
        change = 0.03 * torch.randn(weight.shape)
        C = seen[0].T @ seen[0] / 3000
        weight += change
        true = kl(dense, model(x))
    estimate = float((moment * (change @ C @ change.T)).sum()) / 2
    assert estimate == pytest.approx(true, rel=0.15)


def test_a_language_model_counts_tokens() -> None:
    """The mean over tokens: rows twice over change nothing, and the estimate is what a shift of the outputs costs."""
    model, ids = tiny("llama", dtype=torch.float32), tokens(8, 12)
    path = "lm_head"
    one = output_gradients(model, [path], [ids])[path]
    with torch.no_grad():
        dense = model(ids).logits
        shift = 0.2 * torch.randn(dense.shape[-1], generator=torch.Generator().manual_seed(0))
    estimate = float(shift @ one @ shift) / 2
    assert estimate == pytest.approx(kl(dense, dense + shift), rel=0.3)
    twice = output_gradients(model, [path], [ids, ids])[path]
    assert float(shift @ twice @ shift) / 2 == pytest.approx(estimate, rel=0.5)


class Numbers(nn.Module):
    """Gives numbers of some shape, and no probabilities."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.inner = nn.Linear(4, 6)
        self.last = nn.Linear(6, int(torch.Size(shape).numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x)).reshape(len(x), *self.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("paired", [False, True], ids=["inputs", "with numbers as targets"])
def test_numbers_are_judged_by_their_relative_squared_error(shape: tuple[int, ...], paired: bool) -> None:
    torch.manual_seed(0)
    model, x = Numbers(shape), inputs(3000)
    batch: Any = (x, torch.zeros(3000, *shape)) if paired else x
    moment = output_gradients(model, ["inner"], [batch])["inner"]
    with torch.no_grad():
        dense, shift = model(x), 0.1 * torch.randn(6)
        model.inner.bias.add_(shift)
        true = float((model(x) - dense).square().sum() / dense.square().sum()) / 2
    assert float(shift @ moment @ shift) / 2 == pytest.approx(true, rel=0.1)


def test_logits_may_be_said() -> None:
    model, x = shaken(Mlp()), inputs(6)
    said = output_gradients(model, ["mid"], [x], logits=True)["mid"]
    assert torch.equal(said, output_gradients(model, ["mid"], [(x, labels(6))])["mid"])
    numbers = output_gradients(model, ["mid"], [(x, labels(6))], logits=False)["mid"]
    assert torch.equal(numbers, output_gradients(model, ["mid"], [x])["mid"])
    assert not torch.allclose(said, numbers)


class InPlace(nn.Module):
    def __init__(self, *, inplace: bool, three: bool) -> None:
        super().__init__()
        self.inner, self.relu, self.last = nn.Linear(4, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)
        self.three = three

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None].expand(-1, 2, -1) if self.three else x
        return self.last(self.relu(self.inner(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("three", [False, True])
def test_what_is_changed_in_place_afterwards_counts_as_it_was(three: bool) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = InPlace(inplace=inplace, three=three)
        found.append(output_gradients(model, ["inner"], [(inputs(20), labels(20))])["inner"])
    assert torch.equal(found[0], found[1])


def test_the_model_stays_as_it_is() -> None:
    model = shaken(Residual()).train()
    model.first.weight.requires_grad_(requires_grad=False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        found = output_gradients(model, ["first", "fc"], [(pictures(3), labels(3))])
    assert set(found) == {"first", "fc"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["first.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "fc.weight")
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_an_error_leaves_the_model_as_it_is() -> None:
    model = shaken(Mlp()).requires_grad_(requires_grad=False)
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match="the model's outputs are not finite"):
        output_gradients(model, ["mid"], [inputs(2)])
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.aside = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aside(x)
        return self.used(x)  # type: ignore[no-any-return]


def test_modules_without_a_gradient_are_left_out() -> None:
    assert set(output_gradients(Unused(), ["used", "idle", "aside"], [inputs(2)])) == {"used"}
    assert output_gradients(Unused(), ["idle"], [inputs(2)]) == {}
    assert output_gradients(Unused(), [], [inputs(2)]) == {}


def test_a_result_without_a_tensor_is_an_error() -> None:
    with pytest.raises(SecateurError, match="the model returns a dict, of which no tensor can be compared"):
        outputs_and_kind({"a": 1})
    with pytest.raises(SecateurError, match="returns a tuple"):
        outputs_and_kind((torch.arange(3),))
