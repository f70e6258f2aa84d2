"""Nets whose weights are bare, tied, shared, frozen, made by another net, parametrised, or kept in buffers."""

from collections.abc import Callable
from typing import Any

import torch
from plain_parts import Table, floats, image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.inner = nn.Linear(18, 30), nn.Linear(30, 12)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(30)), nn.Parameter(torch.zeros(18))

    def forward(self, x: Tensor) -> Any:
        code = torch.tanh(self.inner(torch.tanh(self.encoder(x))))
        x = torch.tanh(functional.linear(code, self.inner.weight.t(), self.bias1))
        return x @ self.encoder.weight + self.bias2


class Functional(nn.Module):
    """No modules at all: a dictionary of parameters and functions."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"conv": (14, 3, 3, 3), "bias": (14,), "scale": (14, 1, 1), "fc": (26, 14), "out": (26, 5)}
        self.p = nn.ParameterDict({name: nn.Parameter(torch.randn(shape) * 0.3) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Any:
        x = functional.conv2d(x, self.p["conv"], self.p["bias"], stride=2, padding=1)
        x = functional.relu(x * self.p["scale"]).mean(dim=[-2, -1])
        return functional.relu(functional.linear(x, self.p["fc"])) @ self.p["out"]


class Shared(nn.Module):
    """One block used twice, one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.up, self.down = nn.Linear(7, 22), nn.Linear(22, 36), nn.Linear(36, 22)
        self.again, self.out = nn.Linear(22, 36), nn.Linear(22, 3)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Any:
        x = self.into(x)
        x = x + self.down(functional.gelu(self.up(x)))
        x = x + self.down(functional.gelu(self.again(x)))
        return self.out(x)


class Symmetric(nn.Module):
    """A parametrisation of one's own: W + W'."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class FrozenBody(nn.Module):
    """Features without gradients, run under `no_grad`, and a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 14, 3, 2), nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 22, 3, 2))
        self.body.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(22, 30), nn.ReLU(), nn.Linear(30, 5))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = functional.relu(self.body(x)).mean((2, 3))
        return self.head(x.detach())


class LowRank(nn.Module):
    """LoRA beside a frozen Linear, and a weight that is a Kronecker product."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 26).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(8, 12) * 0.2), nn.Parameter(torch.randn(26, 8) * 0.2)
        self.left, self.right = nn.Parameter(torch.randn(2, 13)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Any:
        x = functional.gelu(self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * 0.5)
        return functional.linear(x, torch.kron(self.left, self.right))


class Hyper(nn.Module):
    """Weights made by another net, one set per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.make = 12, nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 9 * 12))
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Any:
        weights = self.make(condition).view(-1, 9, self.inner)
        return self.out(torch.relu(torch.einsum("bti,bij->btj", x, weights)))


class FrozenBatchNorm(nn.Module):
    """Detectron's: everything is a buffer."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 0.9)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Any:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1, 1)


class Normalised(nn.Module):
    """Buffers for the pixels' mean and deviation, and for a mask over units."""

    mean: Tensor
    std: Tensor
    alive: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.register_buffer("std", torch.rand(3, 1, 1) + 0.5, persistent=False)
        self.register_buffer("alive", (torch.arange(26) % 5 != 0).float())
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, 14, 3, 2), FrozenBatchNorm(14), nn.Conv2d(14, 26, 3)
        self.fc = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Any:
        x = functional.relu(self.norm1(self.conv1((x - self.mean) / self.std)))
        return self.fc(functional.relu(self.conv2(x)).mean((2, 3)) * self.alive)


class Codebook(nn.Module):
    """VQ-VAE: the nearest code stands for the output of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 14, 4, 4), nn.ReLU(), nn.Conv2d(14, 10, 1))
        self.codes = nn.Embedding(20, 10)
        self.decode = nn.Sequential(nn.ConvTranspose2d(10, 18, 4, 4), nn.ReLU(), nn.Conv2d(18, 3, 1))

    def forward(self, x: Tensor) -> Any:
        z = self.encode(x).permute(0, 2, 3, 1)
        near = torch.cdist(z.flatten(0, 2), self.codes.weight).argmin(dim=1)
        q = self.codes(near).view(z.shape)
        loss = functional.mse_loss(q, z.detach()) + 0.25 * functional.mse_loss(q.detach(), z)
        q = z + (q - z).detach()
        return self.decode(q.permute(0, 3, 1, 2)), near, loss


class Literal(nn.Module):
    """The most common tutorial of all: sizes written as numbers into `forward`, which no cut can update."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 60), nn.Linear(60, 42), nn.Linear(42, 10)

    def forward(self, x: Tensor) -> Any:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


def _norm_linear(i: int, o: int, how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(how(nn.Linear(i, o)), nn.ReLU())


def tied_autoencoder() -> nn.Module:
    return TiedAutoencoder()


def functional_dict() -> nn.Module:
    return Functional()


def shared_modules() -> nn.Module:
    return Shared()


def weight_norm() -> nn.Module:
    return nn.Sequential(
        _norm_linear(9, 26, parametrizations.weight_norm), _norm_linear(26, 18, parametrizations.weight_norm),
        nn.Linear(18, 5),
    )  # fmt: skip


def spectral_norm() -> nn.Module:
    """A discriminator."""
    first, second = nn.Conv2d(3, 14, 4, 2, 1), nn.Conv2d(14, 26, 4, 2, 1)
    return nn.Sequential(
        parametrizations.spectral_norm(first), nn.LeakyReLU(0.2), parametrizations.spectral_norm(second),
        nn.LeakyReLU(0.2), nn.Conv2d(26, 1, 4),
    )  # fmt: skip


def orthogonal() -> nn.Module:
    return nn.Sequential(
        _norm_linear(9, 20, parametrizations.orthogonal), nn.Linear(20, 26), nn.ReLU(), nn.Linear(26, 5)
    )


def symmetric() -> nn.Module:
    square = nn.Linear(18, 18)
    parametrize.register_parametrization(square, "weight", Symmetric())
    return nn.Sequential(nn.Linear(9, 18), nn.Tanh(), square, nn.Tanh(), nn.Linear(18, 24), nn.ReLU(), nn.Linear(24, 5))


def frozen_body() -> nn.Module:
    return FrozenBody()


def low_rank() -> nn.Module:
    return LowRank()


def hyper_network() -> nn.Module:
    return Hyper()


def buffers() -> nn.Module:
    return Normalised()


def vqvae() -> nn.Module:
    return Codebook()


def literal_sizes() -> nn.Module:
    return Literal()


ROWS = floats((3, 9))
TABLE: Table = {
    tied_autoencoder: floats((3, 18)),
    functional_dict: image(16),
    shared_modules: floats((3, 7)),
    weight_norm: ROWS,
    spectral_norm: image(16),
    orthogonal: ROWS,
    symmetric: ROWS,
    frozen_body: image(16),
    buffers: image(16),
    vqvae: image(16),
    literal_sizes: image(),
    low_rank: floats((3, 12)),
    hyper_network: floats((2, 5, 9), (2, 4)),
}
