"""Image classifiers for small machines, and the convolutional nets that came after the transformers."""

from collections.abc import Callable
from typing import Any

import torch
from plain_parts import ConvBN, Head, SqueezeExcite, Table, image
from torch import Tensor, nn
from torch.nn import functional

Act = Callable[[], nn.Module]


class InvertedResidual(nn.Module):
    """MobileNet v2 and v3, MnasNet, EfficientNet: expand, depthwise, gate, project."""

    def __init__(
        self, i: int, o: int, inner: int, stride: int = 1, act: Act = nn.ReLU6, squeeze: int = 0, gate: Act = nn.Sigmoid
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvBN(i, inner, 1, act=act)] if inner != i else []
        layers.append(ConvBN(inner, inner, 3, stride, inner, act=act))
        if squeeze:
            layers.append(SqueezeExcite(inner, squeeze, gate))
        layers += [nn.Conv2d(inner, o, 1, bias=False), nn.BatchNorm2d(o)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and i == o

    def forward(self, x: Tensor) -> Any:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class FusedInverted(nn.Module):
    """EfficientNetV2: expansion and depthwise in one dense convolution; stochastic depth while training."""

    def __init__(self, i: int, o: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.expand, self.project = ConvBN(i, inner, 3, stride, act=nn.SiLU), ConvBN(inner, o, 1, act=nn.Identity)
        self.same, self.drop = stride == 1 and i == o, 0.2

    def forward(self, x: Tensor) -> Any:
        y = self.project(self.expand(x))
        if not self.same:
            return y
        if self.training:
            y = y * torch.empty(x.shape[0], 1, 1, 1, device=x.device).bernoulli_(1 - self.drop)
        return x + y


def _shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, high, wide = x.shape
    x = x.view(batch, groups, channels // groups, high, wide)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, high, wide)


class ShuffleV1(nn.Module):
    """Grouped 1 x 1 convolutions with a shuffle between; a strided unit joins the pooled input."""

    def __init__(self, i: int, o: int, inner: int, groups: int, stride: int) -> None:
        super().__init__()
        self.groups, self.stride = groups, stride
        out = o - i if stride == 2 else o
        self.compress = ConvBN(i, inner, 1, g=groups)
        self.depthwise = ConvBN(inner, inner, 3, stride, inner, act=nn.Identity)
        self.expand = ConvBN(inner, out, 1, g=groups, act=nn.Identity)

    def forward(self, x: Tensor) -> Any:
        y = self.expand(self.depthwise(_shuffle(self.compress(x), self.groups)))
        if self.stride == 2:
            return functional.relu(torch.cat([functional.avg_pool2d(x, 3, 2, 1), y], 1))
        return functional.relu(x + y)


class ShuffleV2(nn.Module):
    """Half of the channels pass, the other half is worked on, then both are shuffled."""

    def __init__(self, i: int, o: int, stride: int, native: bool = False) -> None:
        super().__init__()
        half, start = o // 2, i if stride == 2 else i // 2
        self.stride, self.native = stride, native
        self.branch2 = nn.Sequential(
            ConvBN(start, half, 1), ConvBN(half, half, 3, stride, half, act=nn.Identity), ConvBN(half, half, 1)
        )
        self.branch1 = (
            nn.Sequential(ConvBN(i, i, 3, 2, i, act=nn.Identity), ConvBN(i, half, 1)) if stride == 2 else None
        )

    def forward(self, x: Tensor) -> Any:
        if self.branch1 is None:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return functional.channel_shuffle(out, 2) if self.native else _shuffle(out, 2)


class RegNetBlock(nn.Module):
    """X; with squeeze-excite it is Y. The groups have a fixed width, so their number follows the channels."""

    def __init__(self, i: int, o: int, stride: int, squeeze: int = 0, group_width: int = 8) -> None:
        super().__init__()
        self.a, self.b = ConvBN(i, o, 1), ConvBN(o, o, 3, stride, o // group_width)
        self.se = SqueezeExcite(o, squeeze) if squeeze else nn.Identity()
        self.c = ConvBN(o, o, 1, act=nn.Identity)
        self.proj = ConvBN(i, o, 1, stride, act=nn.Identity) if i != o or stride > 1 else None

    def forward(self, x: Tensor) -> Any:
        y = self.c(self.se(self.b(self.a(x))))
        return functional.relu((x if self.proj is None else self.proj(x)) + y)


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over the channels of NCHW, through NHWC and back."""

    def forward(self, x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """v1: depthwise 7 x 7, Linear layers in NHWC, layer scale of shape [C, 1, 1]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.act(self.pwconv1(y))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


class Grn(nn.Module):
    """Global response norm: each channel over the mean of all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, 1, 1, width)), nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Any:
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtV2Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), Grn(inner), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Any:
        y = self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class Skip(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.fn = body

    def forward(self, x: Tensor) -> Any:
        return self.fn(x) + x


class StarBlock(nn.Module):
    """StarNet: the product of two projections."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dw1 = ConvBN(width, width, 7, g=width, act=nn.Identity)
        self.f1, self.f2 = nn.Conv2d(width, inner, 1), nn.Conv2d(width, inner, 1)
        self.g, self.dw2 = ConvBN(inner, width, 1, act=nn.Identity), nn.Conv2d(width, width, 7, padding=3, groups=width)

    def forward(self, x: Tensor) -> Any:
        y = self.dw1(x)
        return x + self.dw2(self.g(functional.relu6(self.f1(y)) * self.f2(y)))


class PoolFormerBlock(nn.Module):
    """MetaFormer with a pool for a mixer; GroupNorm of one group."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.pool = nn.GroupNorm(1, width), nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.norm2, self.fc1, self.fc2 = nn.GroupNorm(1, width), nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.scale1, self.scale2 = nn.Parameter(0.3 * torch.ones(width)), nn.Parameter(0.3 * torch.ones(width))

    def forward(self, x: Tensor) -> Any:
        y = self.norm1(x)
        x = x + self.scale1.unsqueeze(-1).unsqueeze(-1) * (self.pool(y) - y)
        y = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x + self.scale2[:, None, None] * y


def mobilenet_v1() -> nn.Module:
    layers: list[nn.Module] = [ConvBN(3, 12, 3, 2)]
    for i, o, stride in ((12, 20, 1), (20, 34, 2), (34, 46, 1)):
        layers += [ConvBN(i, i, 3, stride, i), ConvBN(i, o, 1)]
    return nn.Sequential(*layers, Head(46))


def mobilenet_v2() -> nn.Module:
    body = [InvertedResidual(14, 14, 14), InvertedResidual(14, 22, 40, 2), InvertedResidual(22, 22, 52)]
    return nn.Sequential(ConvBN(3, 14, 3, 2, act=nn.ReLU6), *body, ConvBN(22, 60, 1, act=nn.ReLU6), Head(60))


def mobilenet_v3() -> nn.Module:
    body = [
        InvertedResidual(14, 14, 14, 1, nn.ReLU, 6, nn.Hardsigmoid),
        InvertedResidual(14, 22, 36, 2, nn.Hardswish, 10, nn.Hardsigmoid),
        InvertedResidual(22, 22, 50, 1, nn.Hardswish, 12, nn.Hardsigmoid),
    ]
    classifier = [nn.Flatten(), nn.Linear(56, 64), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(64, 10)]
    return nn.Sequential(
        ConvBN(3, 14, 3, 2, act=nn.Hardswish), *body, ConvBN(22, 56, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1),
        *classifier,
    )  # fmt: skip


def mnasnet() -> nn.Module:
    body = [InvertedResidual(16, 24, 48, 2, nn.ReLU), InvertedResidual(24, 24, 32, 1, nn.ReLU, 8)]
    return nn.Sequential(ConvBN(3, 16, 3, 2), *body, Head(24))


def efficientnet() -> nn.Module:
    body = [InvertedResidual(12, 20, 44, 2, nn.SiLU, 3), InvertedResidual(20, 20, 60, 1, nn.SiLU, 5)]
    return nn.Sequential(ConvBN(3, 12, 3, 2, act=nn.SiLU), *body, ConvBN(20, 64, 1, act=nn.SiLU), Head(64))


def efficientnet_v2() -> nn.Module:
    body = [FusedInverted(12, 12, 26), FusedInverted(12, 18, 40, 2), InvertedResidual(18, 18, 54, 1, nn.SiLU, 6)]
    return nn.Sequential(ConvBN(3, 12, 3, 2, act=nn.SiLU), *body, Head(18))


def shufflenet_v1() -> nn.Module:
    units = [ShuffleV1(12, 36, 18, 3, 2), ShuffleV1(36, 36, 24, 3, 1), ShuffleV1(36, 36, 30, 3, 1)]
    return nn.Sequential(ConvBN(3, 12, 3, 2), *units, Head(36))


def shufflenet_v2() -> nn.Module:
    units = [ShuffleV2(12, 28, 2), ShuffleV2(28, 28, 1), ShuffleV2(28, 28, 1), ShuffleV2(28, 40, 2)]
    return nn.Sequential(ConvBN(3, 12, 3, 2), *units, ConvBN(40, 50, 1), Head(50))


def shufflenet_native() -> nn.Module:
    units = [ShuffleV2(12, 28, 2, native=True), ShuffleV2(28, 28, 1, native=True)]
    return nn.Sequential(ConvBN(3, 12, 3, 2), *units, Head(28))


def regnet_x() -> nn.Module:
    return nn.Sequential(ConvBN(3, 14, 3, 2), RegNetBlock(14, 24, 2), RegNetBlock(24, 24, 1), Head(24))


def regnet_y() -> nn.Module:
    return nn.Sequential(ConvBN(3, 14, 3, 2), RegNetBlock(14, 32, 2, 6), RegNetBlock(32, 48, 2, 9), Head(48))


def convnext() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelsFirstNorm(16, eps=1e-6))
    down = nn.Sequential(ChannelsFirstNorm(16, eps=1e-6), nn.Conv2d(16, 28, 2, 2))
    head = nn.Sequential(ChannelsFirstNorm(28, eps=1e-6), Head(28))
    return nn.Sequential(stem, ConvNeXtBlock(16, 64), down, ConvNeXtBlock(28, 50), ConvNeXtBlock(28, 112), head)


def convnext_v2() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 18, 4, 4), ChannelsFirstNorm(18))
    return nn.Sequential(stem, ConvNeXtV2Block(18, 40), ConvNeXtV2Block(18, 44), Head(18))


def convmixer() -> nn.Module:
    width = 26

    def block() -> nn.Module:
        across = nn.Conv2d(width, width, 5, groups=width, padding="same")
        spatial = Skip(nn.Sequential(across, nn.GELU(), nn.BatchNorm2d(width)))
        return nn.Sequential(spatial, nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    return nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.BatchNorm2d(width), block(), block(), Head(width))


def starnet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 18, 3, 2, act=nn.ReLU6), StarBlock(18, 36), StarBlock(18, 54), Head(18))


def poolformer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 22, 7, 4, 2), PoolFormerBlock(22, 44), PoolFormerBlock(22, 60), Head(22))


def depthwise_multiplier() -> nn.Module:
    """Two outputs for every input channel, then three."""
    return nn.Sequential(
        ConvBN(3, 12, 3, 2), ConvBN(12, 24, 3, 1, 12), ConvBN(24, 14, 1), nn.Conv2d(14, 42, 3, groups=14), nn.ReLU(),
        Head(42),
    )  # fmt: skip


TABLE: Table = {
    mobilenet_v1: image(),
    mobilenet_v2: image(),
    mobilenet_v3: image(24),
    mnasnet: image(),
    efficientnet: image(),
    efficientnet_v2: image(24),
    shufflenet_v1: image(),
    shufflenet_v2: image(),
    shufflenet_native: image(24, batch=3),
    regnet_x: image(),
    regnet_y: image(),
    convnext: image(),
    convnext_v2: image(),
    convmixer: image(),
    starnet: image(24),
    poolformer: image(),
    depthwise_multiplier: image(24),
}
