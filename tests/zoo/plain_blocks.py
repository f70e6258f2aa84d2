"""Image classifiers made of branches: Inception, DLA, HRNet, CSP, OSA, and those with odd weights (NFNet, BiT)."""

from typing import Any

import torch
from plain_parts import ConvBN, Head, Table, image
from torch import Tensor, nn
from torch.nn import functional


class Inception(nn.Module):
    """Four branches side by side (GoogLeNet)."""

    def __init__(self, i: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.branch1 = ConvBN(i, one, 1)
        self.branch2 = nn.Sequential(ConvBN(i, three[0], 1), ConvBN(three[0], three[1]))
        self.branch3 = nn.Sequential(ConvBN(i, five[0], 1), ConvBN(five[0], five[1], 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvBN(i, pool, 1))

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """With the two auxiliary classifiers of the paper, all outputs returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBN(3, 16, 3, 2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(5))
        self.a = Inception(16, 8, (12, 14), (4, 6), 5)
        self.b = Inception(33, 10, (14, 18), (5, 7), 9)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), ConvBN(33, 9, 1), nn.Flatten(), nn.Linear(36, 10))
        self.head = Head(44)

    def forward(self, x: Tensor) -> Any:
        a = self.a(self.stem(x))
        return self.head(self.b(functional.max_pool2d(a, 3, 2, 1))), self.aux(a)


class Factorised(nn.Module):
    """Inception-v3: 1 x 7 and 7 x 1 convolutions, and a branch that forks again."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(i, 11, 1), nn.Conv2d(11, 13, (1, 7), padding=(0, 3)), nn.ReLU(),
            nn.Conv2d(13, 15, (7, 1), padding=(3, 0)), nn.BatchNorm2d(15, eps=0.001), nn.ReLU(),
        )  # fmt: skip
        self.fork = ConvBN(i, 12, 1)
        self.left, self.right = nn.Conv2d(12, 9, (1, 3), padding=(0, 1)), nn.Conv2d(12, 10, (3, 1), padding=(1, 0))
        self.pooled = ConvBN(i, 8, 1)

    def forward(self, x: Tensor) -> Any:
        fork = self.fork(x)
        forked = torch.cat([self.left(fork), self.right(fork)], 1)
        pooled = self.pooled(functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.long(x), forked, pooled], dim=1)


class Shrink(nn.Module):
    """Inception-v3's grid reduction: strided branches beside a pool of the input itself."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(ConvBN(i, 14, 1), nn.Conv2d(14, o, 3, 2))

    def forward(self, x: Tensor) -> Any:
        return torch.cat((self.conv(x), functional.max_pool2d(x, 3, stride=2)), 1)


class Fire(nn.Module):
    def __init__(self, i: int, squeeze: int, one: int, three: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(i, squeeze, 1)
        self.expand1x1, self.expand3x3 = nn.Conv2d(squeeze, one, 1), nn.Conv2d(squeeze, three, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = functional.relu(self.squeeze(x), inplace=True)
        return torch.cat([functional.relu(self.expand1x1(x)), functional.relu(self.expand3x3(x))], 1)


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBN(width, inner, 1, act=nn.Mish), ConvBN(inner, width, 3, act=nn.Mish))

    def forward(self, x: Tensor) -> Any:
        return x + self.body(x)


class CrossStage(nn.Module):
    """CSPDarknet: half of the channels go past the blocks; `fused` has one expansion and a chunk."""

    def __init__(self, i: int, o: int, part: int, fused: bool) -> None:
        super().__init__()
        self.down = ConvBN(i, o, 3, 2, act=nn.LeakyReLU)
        self.fused = fused
        if fused:
            self.expand = ConvBN(o, 2 * part, 1)
        else:
            self.short, self.long = ConvBN(o, part, 1, act=nn.Mish), ConvBN(o, part, 1, act=nn.Mish)
        self.blocks = nn.Sequential(Residual(part, part - 3), Residual(part, part + 2))
        self.end = ConvBN(2 * part, o, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.down(x)
        short, long = self.expand(x).chunk(2, dim=1) if self.fused else (self.short(x), self.long(x))
        return self.end(torch.cat([self.blocks(long), short], dim=1))


class Tree(nn.Module):
    """DLA: a tree of blocks whose root joins all of them."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.left1, self.left2 = ConvBN(i, o, 3, 2), ConvBN(o, o, 3)
        self.right1, self.right2 = ConvBN(o, o, 3), ConvBN(o, o, 3)
        self.project, self.root = ConvBN(i, o, 1, act=nn.Identity), ConvBN(2 * o + i, o, 1)

    def forward(self, x: Tensor) -> Any:
        bottom = functional.max_pool2d(x, 2, 2)
        left = self.left2(self.left1(x)) + self.project(bottom)
        right = self.right2(self.right1(left)) + left
        return self.root(torch.cat([right, left, bottom], 1)) + left


class HighResolution(nn.Module):
    """HRNet: branches of different resolution, each new one the sum of all, resampled."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = (12, 20, 34)
        self.stem, self.start = ConvBN(3, 18, 3, 2), nn.ModuleList()
        for n, width in enumerate(self.widths):
            self.start.append(ConvBN(18, width, 3, 2**n))
        self.fuse = nn.ModuleList(nn.ModuleList(self._path(i, o) for i in range(3)) for o in range(3))
        self.head = Head(sum(self.widths))

    def _path(self, i: int, o: int) -> nn.Module:
        wide, width = self.widths[i], self.widths[o]
        if i == o:
            return nn.Identity()
        if i > o:
            return nn.Sequential(ConvBN(wide, width, 1, act=nn.Identity), nn.Upsample(scale_factor=2 ** (i - o)))
        steps: list[nn.Module] = [ConvBN(wide, wide, 3, 2) for _ in range(o - i - 1)]
        return nn.Sequential(*steps, ConvBN(wide, width, 3, 2, act=nn.Identity))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        branches = [layer(x) for layer in self.start]
        paths: Any
        fused = []
        for paths in self.fuse:
            y = sum(path(branch) for path, branch in zip(paths, branches, strict=True))
            fused.append(torch.relu(y))
        size = fused[0].shape[-2:]
        grown = [functional.interpolate(y, size=size, mode="bilinear", align_corners=True) for y in fused[1:]]
        return self.head(torch.cat([fused[0], *grown], 1))


class OneShot(nn.Module):
    """VoVNet: every layer's output is joined once, at the end; effective squeeze-excite and a shortcut."""

    def __init__(self, i: int, inner: int, o: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvBN(i if n == 0 else inner, inner) for n in range(3))
        self.join, self.gate = ConvBN(i + 3 * inner, o, 1), nn.Conv2d(o, o, 1)
        self.same = i == o

    def forward(self, x: Tensor) -> Any:
        outs = [x]
        for layer in self.layers:
            outs.append(layer(outs[-1]))
        y = self.join(torch.cat(outs, dim=1))
        y = y * functional.hardsigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return y + x if self.same else y


class ScaledConv(nn.Conv2d):
    """NFNet's convolution: the weight is standardised by `batch_norm`, as timm does it."""

    def __init__(self, i: int, o: int, k: int, s: int = 1, g: int = 1) -> None:
        super().__init__(i, o, k, s, k // 2, groups=g)
        self.gain = nn.Parameter(torch.ones(o, 1, 1, 1))
        self.scale = (i // g * k * k) ** -0.5

    def forward(self, x: Tensor) -> Any:
        flat = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        weight = functional.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormFree(nn.Module):
    def __init__(self, width: int, inner: int, beta: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = ScaledConv(width, inner, 1), ScaledConv(inner, inner, 3, g=2)
        self.conv3, self.skip_gain, self.beta = ScaledConv(inner, width, 1), nn.Parameter(torch.ones(())), beta

    def forward(self, x: Tensor) -> Any:
        y = self.conv1(functional.gelu(x) * 1.7 * self.beta)
        y = self.conv3(functional.gelu(self.conv2(functional.gelu(y))))
        return x + y.mul_(self.skip_gain) * 0.2


class StandardConv(nn.Conv2d):
    """BiT's convolution: the weight is standardised by hand."""

    def forward(self, x: Tensor) -> Any:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-10)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BigTransfer(nn.Module):
    def __init__(self, i: int, o: int, inner: int, stride: int) -> None:
        super().__init__()
        self.gn1, self.conv1 = nn.GroupNorm(4, i), StandardConv(i, inner, 1, bias=False)
        self.gn2, self.conv2 = nn.GroupNorm(4, inner), StandardConv(inner, o, 3, stride, 1, bias=False)
        self.downsample = StandardConv(i, o, 1, stride, bias=False) if i != o else None

    def forward(self, x: Tensor) -> Any:
        out = functional.relu(self.gn1(x))
        short = x if self.downsample is None else self.downsample(out)
        return self.conv2(functional.relu(self.gn2(self.conv1(out)))) + short


class Separable(nn.Module):
    """Xception: depthwise then pointwise, no activation between."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False), nn.Conv2d(i, o, 1), nn.BatchNorm2d(o),
            nn.ReLU(), nn.Conv2d(o, o, 3, padding=1, groups=o, bias=False), nn.Conv2d(o, o, 1), nn.BatchNorm2d(o),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(i, o, 1, 2, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Any:
        return self.body(x) + self.skip(x)


class Ghost(nn.Module):
    """GhostNet: half of the channels come cheaply from the other half; surplus ones are sliced off."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.out, half = o, (o + 1) // 2
        self.primary, self.cheap = ConvBN(i, half, 1), ConvBN(half, half, 3, g=half)

    def forward(self, x: Tensor) -> Any:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.out, :, :]


def googlenet() -> nn.Module:
    return GoogLeNet()


def inception_v3() -> nn.Module:
    return nn.Sequential(ConvBN(3, 16, 3, 2), Factorised(16), Shrink(42, 20), Factorised(62), Head(42))


def squeezenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 14, 3, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(14, 6, 12, 10), Fire(22, 7, 16, 18), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(34, 9, 20, 20),
        nn.Dropout(0.5), nn.Conv2d(40, 10, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


def csp_darknet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 12), CrossStage(12, 28, 14, False), CrossStage(28, 36, 16, False), Head(36))


def csp_resnet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 12), CrossStage(12, 28, 14, True), CrossStage(28, 36, 16, True), Head(36))


def dla() -> nn.Module:
    return nn.Sequential(ConvBN(3, 16, 7), Tree(16, 26), Tree(26, 40), Head(40))


def hrnet() -> nn.Module:
    return HighResolution()


def vovnet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 18, 3, 2), OneShot(18, 12, 30), nn.MaxPool2d(3, 2), OneShot(30, 14, 30), Head(30))


def nfnet() -> nn.Module:
    return nn.Sequential(ScaledConv(3, 24, 3, 2), NormFree(24, 16, 1.0), NormFree(24, 20, 0.9), nn.GELU(), Head(24))


def bit_resnet() -> nn.Module:
    body = [BigTransfer(16, 32, 12, 2), BigTransfer(32, 32, 20, 1)]
    return nn.Sequential(StandardConv(3, 16, 7, 2, 3), *body, nn.GroupNorm(4, 32), nn.ReLU(), Head(32))


def xception() -> nn.Module:
    return nn.Sequential(ConvBN(3, 14, 3, 2), Separable(14, 22), Separable(22, 38), nn.ReLU(), Head(38))


def ghostnet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 12, 3, 2), Ghost(12, 30), Ghost(30, 25), Head(25))


TABLE: Table = {
    googlenet: image(),
    inception_v3: image(),
    squeezenet: image(),
    csp_darknet: image(),
    csp_resnet: image(24),
    dla: image(),
    hrnet: image(),
    vovnet: image(),
    nfnet: image(),
    bit_resnet: image(),
    xception: image(),
    ghostnet: image(),
}
