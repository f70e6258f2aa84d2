"""Classic image classifiers: LeNet to ResNet and its many children, written plainly and small."""

from collections.abc import Callable
from typing import Any

import torch
from plain_parts import ConvBN, Head, SqueezeExcite, Table, image
from torch import Tensor, nn
from torch.nn import functional

Make = Callable[[int], nn.Module]


class LeNet(nn.Module):
    """As in the old tutorial: the flat size is counted in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 4 * 4, 60), nn.Linear(60, 42), nn.Linear(42, 10)

    def forward(self, x: Tensor) -> Any:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), (2, 2))
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        features = 1
        for size in x.size()[1:]:
            features *= size
        x = x.view(-1, features)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


class AlexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(12, 30, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(30, 44, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(44, 26, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(26 * 9, 64), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(64, 50), nn.ReLU(),
            nn.Linear(50, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Vgg(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for step in (12, "M", 20, 22, "M", 36, 28, "M"):
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(width, step, 3, padding=1))
            layers += [nn.BatchNorm2d(step)] if norm else []
            layers.append(nn.ReLU(inplace=True))
            width = step
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(28 * 16, 48), nn.ReLU(True), nn.Dropout(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int, gate: Make) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu, self.gate = nn.ReLU(inplace=True), gate(o)
        self.downsample: nn.Module | None = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Any:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.gate(self.bn2(self.conv2(out)))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(
        self, i: int, o: int, stride: int, inner: int, gate: Make, groups: int = 1, middle: Make | None = None
    ) -> None:
        super().__init__()
        self.reduce = ConvBN(i, inner, 1)
        self.middle = middle(inner) if middle else ConvBN(inner, inner, 3, stride, groups)
        self.expand, self.gate = ConvBN(inner, o, 1, act=nn.Identity), gate(o)
        self.shortcut = ConvBN(i, o, 1, stride, act=nn.Identity) if stride != 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        out = self.gate(self.expand(self.middle(self.reduce(x))))
        return functional.relu(out + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self, blocks: list[nn.Module], stem: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


def _basic(gate: Make) -> nn.Module:
    plan = [(16, 16, 1), (16, 16, 1), (16, 28, 2), (28, 28, 1), (28, 44, 2)]
    return ResNet([BasicBlock(i, o, s, gate) for i, o, s in plan], 16, 44)


def _plain(_: int) -> nn.Module:
    return nn.Identity()


def _bottlenecks(
    inner: tuple[int, int, int], gate: Make = _plain, groups: int = 1, middle: Make | None = None
) -> nn.Module:
    a, b, c = inner
    stride = 1 if middle else 2  # a special middle layer keeps the size
    blocks: list[nn.Module] = [
        Bottleneck(14, 40, 1, a, gate, groups, middle),
        Bottleneck(40, 40, 1, b, gate, groups, middle),
        Bottleneck(40, 56, stride, c, gate, groups, middle),
    ]
    return ResNet(blocks, 14, 56)


class EfficientChannel(nn.Module):
    """ECA: a convolution along the channels."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


class Cbam(nn.Module):
    """One MLP used on two poolings, then a gate per place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Any:
        gate = self.mlp(x.mean((2, 3))) + self.mlp(torch.amax(x, (2, 3)))
        x = x * torch.sigmoid(gate).unsqueeze(-1).unsqueeze(-1)
        places = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(places))


class SelectiveKernel(nn.Module):
    """SK: branches weighed against each other, per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBN(width, width, 3, d=d) for d in (1, 2))
        self.squeeze = ConvBN(width, 9, 1)
        self.excite = nn.ModuleList(nn.Conv2d(9, width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        outs = torch.stack([branch(x) for branch in self.branches], 1)
        inner = self.squeeze(outs.sum(1).mean((2, 3), keepdim=True))
        weights = torch.stack([layer(inner) for layer in self.excite], 1).softmax(1)
        return (outs * weights).sum(1)


class SplitAttention(nn.Module):
    """ResNeSt: a grouped convolution gives `radix` candidates of every channel."""

    def __init__(self, width: int, radix: int = 2) -> None:
        super().__init__()
        self.radix, self.width = radix, width
        self.conv = ConvBN(width, width * radix, 3, g=radix)
        self.fc1, self.fc2 = nn.Conv2d(width, 10, 1), nn.Conv2d(10, width * radix, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        batch, _, high, wide = x.shape
        x = x.reshape(batch, self.radix, -1, high, wide)
        gates = self.fc2(functional.relu(self.fc1(x.sum(1).mean((2, 3), keepdim=True))))
        gates = functional.softmax(gates.view(batch, self.radix, -1), dim=1).view(batch, self.radix, -1, 1, 1)
        return (x * gates).sum(dim=1)


class Hierarchical(nn.Module):
    """Res2Net: a split of the channels, each part fed with the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = width // 4
        self.convs = nn.ModuleList(ConvBN(self.part, self.part) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        parts = torch.split(x, self.part, 1)
        outs = [parts[0]]
        for conv, part in zip(self.convs, parts[1:], strict=True):
            outs.append(conv(part if len(outs) == 1 else part + outs[-1]))
        return torch.cat(outs, 1)


class NonLocal(nn.Module):
    """Dot-product attention between all places of the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(width, 11, 1) for _ in range(3))
        self.out = nn.Conv2d(11, width, 1)

    def forward(self, x: Tensor) -> Any:
        batch, _, high, wide = x.shape
        theta = self.theta(x).flatten(2).transpose(1, 2)
        weights = torch.softmax(torch.matmul(theta, self.phi(x).flatten(2)), -1)
        y = torch.matmul(weights, self.g(x).flatten(2).transpose(1, 2))
        return x + self.out(y.permute(0, 2, 1).contiguous().view(batch, -1, high, wide))


class PreActivation(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, padding=1, bias=False)
        # The deep-stem variant: the shortcut pools before it projects.
        self.short = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(i, o, 1)) if i != o else None

    def forward(self, x: Tensor) -> Any:
        y = functional.relu(self.bn1(x))
        short = x if self.short is None else self.short(y)
        y = self.conv1(y)
        if self.short is not None:
            y = functional.avg_pool2d(y, 2)
        return self.conv2(functional.relu(self.bn2(y))).add_(short)


class DenseLayer(nn.Module):
    def __init__(self, i: int, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, inner, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Any:
        x = self.conv1(functional.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(functional.relu(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 14, 3, 2, 1, bias=False)
        self.block1 = nn.ModuleList(DenseLayer(14 + 8 * n, 18, 8) for n in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(38), nn.ReLU(), nn.Conv2d(38, 20, 1), nn.AvgPool2d(2))
        self.block2 = nn.ModuleList(DenseLayer(20 + 8 * n, 22, 8) for n in range(2))
        self.norm, self.classifier = nn.BatchNorm2d(36), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block, after in ((self.block1, self.transition), (self.block2, self.norm)):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = after(torch.cat(features, 1))
        x = functional.adaptive_avg_pool2d(functional.relu(x, inplace=True), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class WeightedBlock(nn.Module):
    """RepVGG before it is fused: three branches and their sum."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.dense, self.point = ConvBN(i, o, 3, stride, act=nn.Identity), ConvBN(i, o, 1, stride, act=nn.Identity)
        self.identity = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Tensor) -> Any:
        rest = 0 if self.identity is None else self.identity(x)
        return functional.relu(self.dense(x) + self.point(x) + rest)


def lenet() -> nn.Module:
    return LeNet()


def alexnet() -> nn.Module:
    return AlexNet()


def vgg() -> nn.Module:
    return Vgg(norm=False)


def vgg_bn() -> nn.Module:
    return Vgg(norm=True)


def resnet_basic() -> nn.Module:
    return _basic(_plain)


def resnet_bottleneck() -> nn.Module:
    return _bottlenecks((12, 10, 18))


def resnext() -> nn.Module:
    return _bottlenecks((24, 24, 32), groups=4)


def wide_resnet() -> nn.Module:
    return _bottlenecks((36, 34, 48))


def se_resnet() -> nn.Module:
    return _bottlenecks((12, 16, 20), lambda width: SqueezeExcite(width, 7))


def eca_resnet() -> nn.Module:
    return _basic(EfficientChannel)


def cbam_resnet() -> nn.Module:
    return _basic(Cbam)


def sk_resnet() -> nn.Module:
    return _bottlenecks((12, 16, 20), middle=SelectiveKernel)


def resnest() -> nn.Module:
    return _bottlenecks((12, 16, 20), middle=SplitAttention)


def res2net() -> nn.Module:
    return _bottlenecks((12, 16, 20), middle=Hierarchical)


def nonlocal_resnet() -> nn.Module:
    return _bottlenecks((12, 16, 20), gate=NonLocal)


def preact_resnet() -> nn.Module:
    blocks = [PreActivation(12, 12), PreActivation(12, 26), PreActivation(26, 26)]
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), *blocks, nn.BatchNorm2d(26), nn.ReLU(), Head(26))


def densenet() -> nn.Module:
    return DenseNet()


def repvgg() -> nn.Module:
    blocks = [WeightedBlock(3, 14, 2), WeightedBlock(14, 14), WeightedBlock(14, 30, 2), WeightedBlock(30, 30)]
    return nn.Sequential(*blocks, Head(30))


TABLE: Table = {
    lenet: image(24, 1),
    alexnet: image(),
    vgg: image(),
    vgg_bn: image(),
    resnet_basic: image(),
    resnet_bottleneck: image(),
    resnext: image(),
    wide_resnet: image(),
    se_resnet: image(),
    eca_resnet: image(),
    cbam_resnet: image(),
    sk_resnet: image(),
    resnest: image(),
    res2net: image(),
    nonlocal_resnet: image(24),
    preact_resnet: image(24, batch=3),
    densenet: image(),
    repvgg: image(),
}
