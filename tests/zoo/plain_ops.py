"""Small nets around one way of writing things each: in place, padding, pools, indexing, reshaping, mixing."""

from collections.abc import Callable
from typing import Any

import torch
from plain_parts import ConvBN, Table, floats, image
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[[Tensor], Any]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 18, 3, 2), nn.Conv2d(18, 18, 3, 1, 1), nn.Conv2d(18, 26, 1)
        self.bias, self.fc = nn.Parameter(torch.randn(1, 26, 1, 1)), nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x).relu_()
        y = self.conv2(x)
        y.mul_(0.5).add_(x, alpha=2.0)
        y += x
        y = self.conv3(torch.relu_(y))
        y *= self.bias
        y.sub_(0.1).clamp_(min=-3.0, max=3.0).div_(2.0)
        y[:, :, 0] = 0.0
        return self.fc(y.sum(dim=(2, 3)))


class FlatLast(nn.Module):
    """NHWC from the first permute on, flattened with the channels last."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.conv, self.swap = nn.Conv2d(3, 14, 3, 2), swap
        self.fc1, self.fc2 = nn.Linear(49 * 14, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x))
        x = x.permute(0, 3, 2, 1).flatten(1) if self.swap else x.movedim(1, -1).reshape(x.size(0), -1)
        return self.fc2(torch.relu(self.fc1(x)))


class Taken(nn.Module):
    """Units told apart by slices of the last dimension: halves, thirds of a range, every second one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.k = how, 12
        self.up, self.down = nn.Linear(7, 24), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.up(x)
        if self.how == "halves":
            x = x[..., : self.k] * torch.sigmoid(x[..., self.k :])
        elif self.how == "strided":
            x = x[..., ::2] * x[..., 1::2].tanh()
        elif self.how == "narrow":
            x = x.narrow(-1, 0, self.k) + torch.narrow(x, -1, self.k, self.k)
        elif self.how == "pairs":
            x = x.view(*x.shape[:-1], -1, 2)
            x = x[..., 0] * x[..., 1]
        elif self.how == "unflatten":
            x = torch.unflatten(x, -1, (2, self.k)).prod(-2)
        elif self.how == "glu":
            x = functional.glu(x, dim=-1)
        else:
            x = torch.tensor_split(x, 2, dim=-1)[1] - x[..., : self.k]
        return self.down(x)


class Stacked(nn.Module):
    """`stack` and what undoes it; `where`, `clone`, `outer`, `addcmul`, `lerp`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 20), nn.Linear(7, 20), nn.Linear(20, 26)
        self.mix, self.row, self.column = nn.Parameter(torch.rand(2)), nn.Parameter(torch.randn(26)), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x).clone()
        both = torch.stack((a, b), dim=-1) * self.mix
        x = torch.where(both[..., 0] > 0, both[..., 0], both[..., 1] * 0.1)
        x = torch.lerp(x, torch.maximum(a, b), 0.3) + torch.addcmul(a, b, x, value=0.2)
        x = self.c(x)
        return self.column(x * torch.outer(torch.ones(x.shape[0], dtype=x.dtype), self.row))


class Addmm(nn.Module):
    """Weights [in, out] through addmm, baddbmm, matmul and mv."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(7, 22) * 0.3), nn.Parameter(torch.zeros(22))
        self.w2, self.b2 = nn.Parameter(torch.randn(3, 22, 14) * 0.3), nn.Parameter(torch.zeros(3, 1, 14))
        self.w3, self.v = nn.Parameter(torch.randn(14, 18) * 0.3), nn.Parameter(torch.randn(18))

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(torch.addmm(self.b1, x, self.w1, beta=0.5, alpha=2.0))
        x = torch.tanh(torch.baddbmm(self.b2, x.unsqueeze(0).repeat(3, 1, 1), self.w2)).mean(0)
        return torch.mv(torch.relu(torch.matmul(x, self.w3)), self.v)


class Einsum(nn.Module):
    """Attention and projections by einsum, weights of three dimensions, an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(14, 3, 8) * 0.3) for _ in range(3))
        self.o, self.up, self.down = (
            nn.Parameter(torch.randn(3, 8, 14) * 0.2), nn.Parameter(torch.randn(14, 30) * 0.2),
            nn.Parameter(torch.randn(30, 14) * 0.2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        q, k, v = (torch.einsum("b n d, d h e -> b h n e", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhie,bhje->bhij", q * 8**-0.5, k).softmax(-1)
        x = x + torch.einsum("bhij,bhje,hed->bid", weights, v, self.o)
        return torch.einsum("...f,fd->...d", torch.einsum("...d,df->...f", x, self.up).relu(), self.down)


class Padded(nn.Module):
    """Borders of every kind, and a pad of the channels themselves (PyramidNet's shortcut)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 3, 2, padding_mode="circular", padding=1)
        self.conv3, self.fc = nn.Conv2d(20, 26, 3, padding="same", padding_mode="reflect"), nn.Linear(26, 5)
        self.zero, self.constant = nn.ZeroPad2d((0, 1, 0, 1)), nn.ConstantPad2d(1, 0.5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv1(functional.pad(self.zero(x), (1, 0, 1, 0), mode="replicate")))
        short = functional.pad(functional.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 8))
        x = self.conv2(functional.pad(x, (0, 0))) + short
        return self.fc(self.constant(self.conv3(torch.relu(x))).mean((-1, -2)))


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lp, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.LPPool2d(2, 2), nn.Linear(16 * 5, 5)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.flatten = nn.Flatten(start_dim=1)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).square() + 0.1
        parts = [
            self.lp(x).amax((2, 3)), functional.adaptive_max_pool2d(x, 3).mean(dim=(2, 3)), x.std(dim=(2, 3)),
            self.flatten(functional.adaptive_avg_pool2d(self.upsample(x), 1)),
            x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3),
        ]  # fmt: skip
        return self.fc(torch.cat(parts, dim=1))


class LayerNormed(nn.Module):
    """LayerNorm over [C, H, W], BatchNorm without weights, GroupNorm of one group, an instance norm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 14, 3, 2), nn.LayerNorm([14, 7, 7])
        self.conv2, self.norm2 = nn.Conv2d(14, 22, 3), nn.BatchNorm2d(22, affine=False)
        self.conv3, self.norm3 = nn.Conv2d(22, 30, 3), nn.GroupNorm(1, 30)
        self.conv4, self.fc = nn.Conv2d(30, 18, 1), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Any:
        x = functional.gelu(self.norm1(self.conv1(x)))
        x = functional.gelu(self.norm2(self.conv2(x)))
        x = self.conv4(functional.gelu(self.norm3(self.conv3(x))))
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return self.fc(x.relu().mean((2, 3)))


class Slopes(nn.Module):
    """PReLU of every kind, and activations that have no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act1, self.fc2 = nn.Linear(7, 20), nn.PReLU(20), nn.Linear(20, 26)
        self.slope, self.fc3, self.act3 = nn.Parameter(torch.full((26,), 0.2)), nn.Linear(26, 18), nn.PReLU()
        self.fc4 = nn.Linear(18, 4)
        self.rest = nn.ModuleList([nn.CELU(), nn.Softsign(), nn.Hardtanh(), nn.LogSigmoid(), nn.Tanhshrink()])

    def forward(self, x: Tensor) -> Any:
        x = self.act1(self.fc1(x))
        x = self.act3(self.fc3(functional.prelu(self.fc2(x), self.slope)))
        for act in self.rest:
            x = act(x)
        return self.fc4(functional.threshold(x, -2.0, 0.0) + functional.softplus(x) + x.erf() + torch.rsub(x, 1.0))


class SoftPlaces(nn.Module):
    """A classifier for every place: Softmax2d, and the places it points at."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBN(3, 16, 3, 2), ConvBN(16, 24, 1))
        self.points, self.classes, self.soft = nn.Conv2d(24, 6, 1), nn.Conv2d(24, 5, 1), nn.Softmax2d()

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        heat = self.points(x).flatten(2).softmax(-1).view(x.size(0), -1, x.size(2), x.size(3))
        steps = torch.linspace(0, 1, x.size(3), dtype=x.dtype)
        where = torch.stack([(heat.sum(2) * steps).sum(-1), torch.einsum("bkhw,h->bk", heat, steps)], -1)
        return self.soft(self.classes(x)), where


class Unfolded(nn.Module):
    """Involution: a kernel per place and group, over unfolded patches; then a fold."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.groups, self.k = nn.Conv2d(3, 20, 3, 2, 1), 4, 3
        self.reduce, self.span, self.out = nn.Conv2d(20, 9, 1), nn.Conv2d(9, 9 * 4, 1), nn.Conv2d(20, 14, 1)
        self.unfold, self.fold = nn.Unfold(3, padding=1), nn.Fold(8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.into(x)
        batch, channels, high, wide = x.shape
        kernel = self.span(torch.relu(self.reduce(x))).view(batch, self.groups, 1, self.k**2, high, wide)
        patches = self.unfold(x).view(batch, self.groups, channels // self.groups, self.k**2, high, wide)
        mixed = kernel * patches
        y = self.fold(mixed.reshape(batch, channels * self.k**2, high * wide)) / 9
        return self.out(torch.relu(mixed.sum(3).view(batch, channels, high, wide) + y))


class Spectral(nn.Module):
    """FNet and GFNet: Fourier transforms over the tokens, weights per frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.weight = nn.Linear(7, 18), nn.Parameter(torch.randn(5, 18, 2) * 0.3)
        self.norm, self.out = nn.LayerNorm(18), nn.Sequential(nn.Linear(18, 30), nn.GELU(), nn.Linear(30, 3))

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.into(x))
        y = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.weight)
        return self.out(x + torch.fft.irfft(y, n=x.shape[1], dim=1, norm="ortho"))


class Coordinates(nn.Module):
    """CoordConv and deformation: places as channels, sampling by a predicted grid."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(
            nn.Conv2d(5, 12, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6)
        )
        self.conv, self.fc = nn.Conv2d(3, 20, 3, 2), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Any:
        batch, _, high, wide = x.shape
        rows = torch.linspace(-1, 1, high, dtype=x.dtype).view(1, 1, -1, 1).expand(batch, 1, high, wide)
        both = torch.cat([x, rows, rows.transpose(2, 3)], 1)
        theta = self.locate(both).view(-1, 2, 3)
        grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
        y = self.conv(functional.grid_sample(x, grid, align_corners=False))
        return self.fc(torch.relu(y).flatten(2).logsumexp(-1))


class Correlation(nn.Module):
    """Optical flow: all dot products of two feature maps, a convolution over them, a GRU of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.look = nn.Sequential(ConvBN(3, 14, 3, 2), nn.Conv2d(14, 20, 3, 2, 1)), nn.Conv2d(16, 18, 1)
        self.gates, self.new = nn.Conv2d(38, 40, 3, padding=1), nn.Conv2d(38, 20, 3, padding=1)
        self.flow = nn.Conv2d(20, 2, 3, padding=1)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        a, b = torch.chunk(self.encode(torch.cat([a, b], dim=0)), 2, dim=0)
        batch, width, high, wide = a.shape
        volume = torch.matmul(a.view(batch, width, -1).transpose(1, 2), b.view(batch, width, -1)) / width**0.5
        x, h = torch.relu(self.look(volume.view(batch, high, wide, -1).permute(0, 3, 1, 2))), torch.tanh(a)
        for _ in range(2):
            z, r = torch.sigmoid(self.gates(torch.cat([h, x], dim=1))).chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(self.new(torch.cat([r * h, x], dim=1)))
        return self.flow(h)


def in_place() -> nn.Module:
    return InPlace()


def nhwc_flatten() -> nn.Module:
    return FlatLast(swap=False)


def nwhc_flatten() -> nn.Module:
    return FlatLast(swap=True)


def slice_halves() -> nn.Module:
    return Taken("halves")


def slice_strided() -> nn.Module:
    return Taken("strided")


def slice_narrow() -> nn.Module:
    return Taken("narrow")


def slice_pairs() -> nn.Module:
    return Taken("pairs")


def slice_unflatten() -> nn.Module:
    return Taken("unflatten")


def slice_split() -> nn.Module:
    return Taken("split")


def glu() -> nn.Module:
    return Taken("glu")


def glu_module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 28, 3, 2), nn.GLU(dim=1), nn.Conv2d(14, 36, 3), nn.GLU(1), nn.Conv2d(18, 5, 1))


def stacked() -> nn.Module:
    return Stacked()


def addmm() -> nn.Module:
    return Addmm()


def einsum() -> nn.Module:
    return Einsum()


def padded() -> nn.Module:
    return Padded()


def pools() -> nn.Module:
    return Pools()


def layer_normed() -> nn.Module:
    return LayerNormed()


def slopes() -> nn.Module:
    return Slopes()


def soft_places() -> nn.Module:
    return SoftPlaces()


def involution() -> nn.Module:
    return Unfolded()


def fourier() -> nn.Module:
    return Spectral()


def spatial_transformer() -> nn.Module:
    return Coordinates()


def optical_flow() -> nn.Module:
    return Correlation()


ROWS = floats((2, 5, 7))
TABLE: Table = {
    in_place: image(16),
    nhwc_flatten: image(16),
    nwhc_flatten: image(16),
    slice_halves: ROWS,
    slice_strided: ROWS,
    slice_narrow: ROWS,
    slice_pairs: ROWS,
    slice_unflatten: ROWS,
    slice_split: ROWS,
    glu: ROWS,
    glu_module: image(16),
    stacked: floats((4, 7)),
    addmm: floats((4, 7)),
    einsum: floats((2, 5, 14)),
    padded: image(16),
    pools: image(12),
    layer_normed: image(16),
    slopes: floats((4, 7)),
    soft_places: image(16),
    involution: image(16),
    fourier: floats((2, 8, 7)),
    spatial_transformer: image(16),
    optical_flow: floats((2, 3, 16, 16), (2, 3, 16, 16)),
}
