"""Vision transformers of several resolutions: windows, reduced keys, pools, and convolutions between."""

from typing import Any

import torch
from plain_parts import ConvBN, Head, Table, image
from plain_vits import Attention, Block, Mlp, RelativeAttention, Swap, TokenMean
from torch import Tensor, nn
from torch.nn import functional


def _windows(x: Tensor, side: int) -> Tensor:
    batch, high, wide, channels = x.shape
    x = x.view(batch, high // side, side, wide // side, side, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, side * side, channels)


def _unwindow(windows: Tensor, side: int, high: int, wide: int) -> Tensor:
    batch = int(windows.shape[0] / (high * wide / side / side))
    x = windows.view(batch, high // side, wide // side, side, side, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, high, wide, -1)


class SwinBlock(nn.Module):
    """Attention in windows, the image rolled before and after when shifted."""

    mask: Tensor | None

    def __init__(self, width: int, heads: int, head_dim: int, inner: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = 4, shift
        self.norm1, self.attn = nn.LayerNorm(width), RelativeAttention(width, heads, head_dim)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, inner)
        regions = _windows(torch.arange(64.0).view(1, 8, 8, 1) // 30, self.side).squeeze(-1)
        apart = (regions.unsqueeze(1) - regions.unsqueeze(2)) != 0
        self.register_buffer("mask", torch.zeros(4, 16, 16).masked_fill(apart, -100.0) if shift else None)

    def forward(self, x: Tensor) -> Any:
        _, high, wide, _ = x.shape
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = _unwindow(self.attn(_windows(y, self.side), self.mask), self.side, high, wide)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Every second row and column, four of them side by side."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, x: Tensor) -> Any:
        parts = [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 20, 4, 4)
        self.stage1 = nn.Sequential(SwinBlock(20, 3, 6, 44, 0), SwinBlock(20, 3, 6, 36, 2))
        self.merge, self.stage2 = PatchMerging(20, 34), SwinBlock(34, 4, 7, 70, 0)
        self.norm, self.head = nn.LayerNorm(34), nn.Linear(34, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stage1(self.embed(x).permute(0, 2, 3, 1))
        x = self.norm(self.stage2(self.merge(x)))
        return self.head(x.mean([1, 2]))


class CosineAttention(nn.Module):
    """Swin v2: cosine similarity, a clamped temperature, the bias of positions from a small MLP."""

    places: Tensor

    def __init__(self, width: int, heads: int, head_dim: int, side: int = 4) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.cpb = nn.Sequential(nn.Linear(2, 22), nn.ReLU(inplace=True), nn.Linear(22, heads, bias=False))
        steps = torch.arange(side * side, dtype=torch.float32)
        self.register_buffer("places", torch.stack([steps[:, None] - steps, steps - steps[:, None]], -1) / 9)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        weights = weights * torch.clamp(self.logit_scale, max=4.6).exp()
        weights = weights + 16 * torch.sigmoid(self.cpb(self.places).permute(2, 0, 1)).unsqueeze(0)
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class ReducedAttention(nn.Module):
    """PVT: keys and values from a smaller image."""

    def __init__(self, width: int, heads: int, head_dim: int, ratio: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q, self.kv, self.proj = nn.Linear(width, inner), nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.sr, self.norm, self.scale = nn.Conv2d(width, width, ratio, ratio), nn.LayerNorm(width), head_dim**-0.5

    def forward(self, x: Tensor) -> Any:
        batch, length, width = x.shape
        side = int(length**0.5)
        q = self.q(x).reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3)
        small = self.sr(x.permute(0, 2, 1).reshape(batch, width, side, side)).reshape(batch, width, -1)
        kv = self.kv(self.norm(small.permute(0, 2, 1))).reshape(batch, -1, 2, self.heads, q.shape[-1])
        k, v = kv.permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class ConvPositions(nn.Module):
    """Twins and CPVT: positions from a depthwise convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 3, 1, 1, groups=width)

    def forward(self, x: Tensor) -> Any:
        batch, length, width = x.shape
        side = int(length**0.5)
        grid = x.transpose(1, 2).view(batch, width, side, side)
        return (self.proj(grid) + grid).flatten(2).transpose(1, 2)


class Tokens(nn.Module):
    """Patches, as tokens [batch, places, width]."""

    def __init__(self, i: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(i, width, patch, patch), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Any:
        if x.dim() == 3:
            batch, length, width = x.shape
            x = x.transpose(1, 2).reshape(batch, width, int(length**0.5), -1)
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class FocalModulation(nn.Module):
    """FocalNet: one projection gives query, context and gates; the context is summed over growing kernels."""

    def __init__(self, width: int, levels: int = 2) -> None:
        super().__init__()
        self.levels, self.width = levels, width
        self.f, self.h = nn.Linear(width, 2 * width + levels + 1), nn.Conv2d(width, width, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3 + 2 * n, padding=1 + n, groups=width), nn.GELU())
            for n in range(levels)
        )
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        x = self.f(x).permute(0, 3, 1, 2).contiguous()
        q, context, gates = torch.split(x, [self.width, self.width, self.levels + 1], 1)
        total = torch.zeros_like(q)
        for n, layer in enumerate(self.layers):
            context = layer(context)
            total = total + context * gates[:, n : n + 1]
        total = total + functional.gelu(context.mean((2, 3), keepdim=True)) * gates[:, self.levels :]
        return self.proj((q * self.h(total)).permute(0, 2, 3, 1))


class FocalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 22, 4, 4)
        self.body = nn.Sequential(Block(22, FocalModulation(22), 50), Block(22, FocalModulation(22), 40))
        self.fc = nn.Linear(22, 10)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))


class ImageAttention(nn.Module):
    """CoAtNet and others: 1 x 1 convolutions for projections; attention over places, keys first."""

    def __init__(self, width: int, heads: int, key: int, value: int) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        self.qkv, self.proj = nn.Conv2d(width, heads * (2 * key + value), 1), nn.Conv2d(heads * value, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Any:
        batch, _, high, wide = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, self.heads, -1, high * wide)
        q, k, v = qkv.split([self.key, self.key, self.value], dim=2)
        weights = (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(dim=-1)
        return x + self.proj((v @ weights.transpose(-2, -1)).reshape(batch, -1, high, wide))


class LinearBN(nn.Sequential):
    """LeViT: Linear and BatchNorm1d over the flattened tokens."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o))

    def forward(self, x: Tensor) -> Any:
        x = self[0](x)
        return self[1](x.flatten(0, 1)).reshape_as(x)


class LevitBlock(nn.Module):
    """Keys narrower than values, a bias per head and distance, hardswish."""

    index: Tensor

    def __init__(self, width: int, heads: int, key: int, value: int, inner: int) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        self.qkv, self.proj = LinearBN(width, heads * (2 * key + value)), LinearBN(heads * value, width)
        self.fc1, self.fc2, self.act = LinearBN(width, inner), LinearBN(inner, width), nn.Hardswish()
        self.attention_biases = nn.Parameter(torch.zeros(heads, 16))
        places = torch.arange(16)
        self.register_buffer("index", (places[:, None] - places).abs())

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, self.heads, -1)
        q, k, v = (y.transpose(1, 2) for y in qkv.split([self.key, self.key, self.value], dim=3))
        weights = q @ k.transpose(-2, -1) * self.key**-0.5 + self.attention_biases[:, self.index]
        y = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, self.heads * self.value)
        x = x + self.proj(self.act(y))
        return x + self.fc2(self.act(self.fc1(x)))


class MobileVitBlock(nn.Module):
    """Patches unfolded so that attention sees the same place of every patch, then folded back and joined."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.conv_kxk, self.conv_1x1 = ConvBN(width, width, 3, act=nn.SiLU), nn.Conv2d(width, tokens, 1, bias=False)
        self.transformer = Block(tokens, Attention(tokens, 3, 8), 46)
        self.norm, self.proj = nn.LayerNorm(tokens), ConvBN(tokens, width, 1, act=nn.SiLU)
        self.fusion, self.patch = ConvBN(2 * width, width, 3, act=nn.SiLU), 2

    def forward(self, x: Tensor) -> Any:
        y = self.conv_1x1(self.conv_kxk(x))
        p, (batch, width, high, wide) = self.patch, y.shape
        rows, columns = high // p, wide // p
        y = y.reshape(batch * width * rows, p, columns, p).transpose(1, 2)
        y = y.reshape(batch, width, rows * columns, p * p).transpose(1, 3).reshape(batch * p * p, rows * columns, -1)
        y = self.norm(self.transformer(y))
        y = y.contiguous().view(batch, p * p, rows * columns, -1).transpose(1, 3)
        y = y.reshape(batch * width * rows, columns, p, p).transpose(1, 2).reshape(batch, width, high, wide)
        return self.fusion(torch.cat((x, self.proj(y)), dim=1))


class EfficientFormerBlock(nn.Module):
    """Pool mixing and an MLP of convolutions with batch norms."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(ConvBN(width, inner, 1, act=nn.GELU), ConvBN(inner, width, 1, act=nn.Identity))
        self.scale = nn.Parameter(0.4 * torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Any:
        x = x + self.scale * (functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
        return x + self.scale * self.mlp(x)


class GridAttention(nn.Module):
    """MaxViT: attention in blocks, then over a grid that steps across the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block, self.grid = Block(width, Attention(width, 3, 7), 40), Block(width, CosineAttention(width, 2, 9), 52)

    def forward(self, x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1)
        batch, high, wide, width = x.shape
        x = _unwindow(self.block(_windows(x, 4)), 4, high, wide)
        x = x.reshape(batch, 4, high // 4, 4, wide // 4, width).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, width)
        x = self.grid(x).reshape(batch, high // 4, wide // 4, 4, 4, width)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, high, wide, width).permute(0, 3, 1, 2)


def swin() -> nn.Module:
    return Swin()


def pvt() -> nn.Module:
    first, second = Block(18, ReducedAttention(18, 2, 8, 2), 44), Block(30, ReducedAttention(30, 3, 9, 2), 64)
    return nn.Sequential(Tokens(3, 18, 4), first, Tokens(18, 30, 2), second, TokenMean(30))


def twins() -> nn.Module:
    blocks = [Block(24, Attention(24, 3, 8), 40), ConvPositions(24), Block(24, ReducedAttention(24, 2, 9, 4), 52)]
    return nn.Sequential(Tokens(3, 24, 4), *blocks, TokenMean(24))


def focalnet() -> nn.Module:
    return FocalNet()


def coatnet() -> nn.Module:
    return nn.Sequential(ConvBN(3, 14, 3, 2), ConvBN(14, 26, 3, 2), ImageAttention(26, 3, 7, 10), Head(26))


def levit() -> nn.Module:
    stem = [ConvBN(3, 12, 3, 2, act=nn.Hardswish), ConvBN(12, 16, 3, 2, act=nn.Hardswish), nn.Conv2d(16, 26, 3, 2, 1)]
    return nn.Sequential(
        *stem, nn.Flatten(2), Swap(), LevitBlock(26, 3, 5, 11, 52), LevitBlock(26, 4, 6, 9, 40), TokenMean(26)
    )


def mobilevit() -> nn.Module:
    return nn.Sequential(ConvBN(3, 14, 3, 2, act=nn.SiLU), ConvBN(14, 20, 3, 2), MobileVitBlock(20, 28), Head(20))


def efficientformer() -> nn.Module:
    convolutional = [ConvBN(3, 16, 3, 2), EfficientFormerBlock(16, 40), ConvBN(16, 30, 3, 4)]
    block = Block(30, Attention(30, 3, 8), 70, scaled=True)
    return nn.Sequential(*convolutional, nn.Flatten(2), Swap(), block, TokenMean(30))


def maxvit() -> nn.Module:
    return nn.Sequential(ConvBN(3, 12, 3, 2), ConvBN(12, 24, 3, 2), GridAttention(24), Head(24))


TABLE: Table = {
    swin: image(),
    pvt: image(),
    twins: image(),
    focalnet: image(),
    coatnet: image(),
    levit: image(),
    mobilevit: image(),
    efficientformer: image(),
    maxvit: image(),
}
