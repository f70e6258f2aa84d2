"""Nets whose output is an image: segmentation, super-resolution, style, generators, autoencoders, diffusion."""

import math
from typing import Any

import torch
from plain_parts import ConvBN, Table, floats, image, joined
from torch import Tensor, nn
from torch.nn import functional


def _double(i: int, o: int) -> nn.Module:
    return nn.Sequential(ConvBN(i, o), ConvBN(o, o))


class UNet(nn.Module):
    """Skips are joined; upwards by interpolation or by a transposed convolution, padded to fit."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.inc, self.down1 = _double(3, 12), nn.Sequential(nn.MaxPool2d(2), _double(12, 22))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), _double(22, 34))
        self.transposed = transposed
        self.up1 = nn.ConvTranspose2d(34, 18, 2, 2) if transposed else nn.Conv2d(34, 18, 1)
        self.up2 = nn.ConvTranspose2d(26, 14, 2, 2) if transposed else nn.Conv2d(26, 14, 1)
        self.conv1, self.conv2, self.outc = _double(40, 26), _double(26, 16), nn.Conv2d(16, 5, 1)

    def _up(self, x: Tensor, layer: nn.Module, skip: Tensor) -> Tensor:
        x = layer(x)
        if not self.transposed:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = functional.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Any:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.conv1(self._up(self.down2(x2), self.up1, x2))
        return self.outc(self.conv2(self._up(x, self.up2, x1)))


class Unpooling(nn.Module):
    """SegNet: max-unpool with the places of the maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.dec2, self.dec1 = ConvBN(3, 14), ConvBN(14, 24), ConvBN(24, 14), ConvBN(14, 5)
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)

    def forward(self, x: Tensor) -> Any:
        x, first = self.pool(self.enc1(x))
        x, second = self.pool(self.enc2(x))
        return self.dec1(self.unpool(self.dec2(self.unpool(x, second)), first))


class Aspp(nn.Module):
    """DeepLabV3: dilated branches and the mean of the whole image, blown up again."""

    def __init__(self, i: int, branch: int, o: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvBN(i, branch, 1), ConvBN(i, branch + 2, d=2), ConvBN(i, branch + 4, d=4)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, 9, 1), nn.ReLU())
        self.project = nn.Sequential(ConvBN(3 * branch + 6 + 9, o, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        size = x.shape[-2:]
        mean = functional.interpolate(self.pool(x), size=size, mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(conv(x) for conv in self.convs), mean], dim=1))


class DeepLab(nn.Module):
    """v3+: low-level features join before the classifier; an auxiliary output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = ConvBN(3, 16, 3, 2), nn.Sequential(ConvBN(16, 30, 3, 2), ConvBN(30, 30, d=2))
        self.aspp, self.squeeze = Aspp(30, 11, 20), ConvBN(16, 7, 1)
        self.classifier, self.aux = nn.Sequential(ConvBN(27, 18), nn.Conv2d(18, 5, 1)), nn.Conv2d(30, 5, 1)

    def forward(self, x: Tensor) -> Any:
        size = x.shape[-2:]
        low = self.low(x)
        high = self.high(low)
        y = functional.interpolate(self.aspp(high), size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.classifier(torch.cat([y, self.squeeze(low)], 1))
        return {
            "out": functional.interpolate(y, size=size, mode="bilinear", align_corners=False),
            "aux": functional.interpolate(self.aux(high), size=size, mode="bicubic", align_corners=False),
        }


class LightHead(nn.Module):
    """LRASPP: a gate from a large pool; two classifiers added."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = ConvBN(3, 14, 3, 2), ConvBN(14, 28, 3, 2, act=nn.Hardswish)
        self.cbr = ConvBN(28, 18, 1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(28, 18, 1, bias=False), nn.Sigmoid())
        self.low_classifier, self.high_classifier = nn.Conv2d(14, 5, 1), nn.Conv2d(18, 5, 1)

    def forward(self, x: Tensor) -> Any:
        low = self.low(x)
        high = self.high(low)
        y = functional.interpolate(self.cbr(high) * self.scale(high), size=low.shape[-2:], mode="bilinear")
        return self.low_classifier(low) + self.high_classifier(y)


class PyramidPooling(nn.Module):
    """PSPNet: pools of several sizes beside the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBN(3, 14, 3, 2), ConvBN(14, 26, 3, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(26, 7 + n, 1), nn.ReLU()) for n in (1, 2, 3)
        )
        self.end = nn.Sequential(ConvBN(26 + 27, 20), nn.Dropout2d(0.1), nn.Conv2d(20, 5, 1), nn.LogSoftmax(dim=1))

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        size = (x.size(2), x.size(3))
        return self.end(torch.cat([functional.interpolate(f(x), size, mode="bilinear") for f in self.stages] + [x], 1))


class SegFormer(nn.Module):
    """Mix-FFN (a depthwise convolution inside the MLP) at two resolutions, a Linear decoder over both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed1, self.embed2 = nn.Conv2d(3, 18, 7, 4, 3), nn.Conv2d(18, 32, 3, 2, 1)
        self.ffn1, self.ffn2 = MixFfn(18, 40), MixFfn(32, 60)
        self.linear1, self.linear2 = nn.Linear(18, 22), nn.Linear(32, 22)
        self.fuse, self.predict = ConvBN(44, 26, 1), nn.Conv2d(26, 5, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.ffn1(self.embed1(x))
        b = self.ffn2(self.embed2(a))
        outs = []
        for level, linear in ((a, self.linear1), (b, self.linear2)):
            batch, _, high, wide = level.shape
            y = linear(level.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(batch, -1, high, wide)
            outs.append(functional.interpolate(y, size=a.shape[2:], mode="bilinear", align_corners=False))
        return self.predict(self.fuse(torch.cat(outs[::-1], dim=1)))


class MixFfn(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)
        self.dw = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner)

    def forward(self, x: Tensor) -> Any:
        batch, width, high, wide = x.shape
        y = self.fc1(self.norm(x.flatten(2).transpose(1, 2)))
        y = self.dw(y.transpose(1, 2).view(batch, -1, high, wide)).flatten(2).transpose(1, 2)
        y = self.fc2(functional.gelu(y))
        return x + y.transpose(1, 2).reshape(batch, width, high, wide)


class Hourglass(nn.Module):
    """Down and up with sums; the prediction goes back into the features; two stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.skip = ConvBN(3, 24, 7, 2), ConvBN(24, 24), ConvBN(24, 24, 1)
        self.predict, self.back = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        outs = []
        for _ in range(2):  # the same modules in both stacks
            low = self.inside(functional.max_pool2d(x, 2))
            y = self.skip(x) + functional.interpolate(low, scale_factor=2)
            outs.append(self.predict(y))
            x = x + y + self.back(outs[-1])
        return outs


class Edsr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 22, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(22, n, 3, padding=1), nn.ReLU(True), nn.Conv2d(n, 22, 3, padding=1))
            for n in (18, 28)
        )
        self.tail = nn.Sequential(nn.Conv2d(22, 4 * 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.head(x)
        y = x
        for block in self.body:
            y = y + block(y).mul(0.1)
        return self.tail(x + y)


class Srgan(nn.Module):
    """PReLU with one slope and with one per channel; two shuffles, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 20, 9, padding=4), nn.PReLU())
        self.block2 = nn.Sequential(nn.Conv2d(20, 20, 3, 1, 1), nn.BatchNorm2d(20), nn.PReLU(20), nn.Conv2d(20, 20, 1))
        self.up = nn.Sequential(
            nn.Conv2d(20, 48, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(12),
            nn.Conv2d(12, 36, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(9), nn.Conv2d(9, 3, 9, padding=4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        x = self.block1(x)
        return (torch.tanh(self.up(x + self.block2(x))) + 1) / 2


class Esrgan(nn.Module):
    """Dense blocks inside residual ones; nearest upsampling; pixels unshuffled at the start."""

    def __init__(self, width: int = 20, growth: int = 9) -> None:
        super().__init__()
        self.unshuffle, self.first = nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, 1, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width + n * growth, growth, 3, 1, 1) for n in range(3))
        self.join, self.last = nn.Conv2d(width + 3 * growth, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.first(self.unshuffle(x))
        known = x
        for conv in self.convs:
            known = torch.cat((known, functional.leaky_relu(conv(known), 0.2)), 1)
        x = x + self.join(known) * 0.2
        return self.last(functional.interpolate(x, scale_factor=2, mode="nearest"))


class StyleTransfer(nn.Module):
    """Instance norm with weights, reflected borders."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.ReflectionPad2d(4), nn.Conv2d(3, 12, 9), nn.InstanceNorm2d(12, affine=True), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(12, 26, 3, 2), nn.InstanceNorm2d(26, affine=True), nn.ReLU(),
        )  # fmt: skip
        self.res = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(26, 18, 3), nn.InstanceNorm2d(18), nn.ReLU(),
            nn.ReplicationPad2d(1), nn.Conv2d(18, 26, 3), nn.InstanceNorm2d(26),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(26, 14, 3), nn.InstanceNorm2d(14),
            nn.ReLU(), nn.ZeroPad2d(4), nn.Conv2d(14, 3, 9),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        x = self.down(x)
        return self.up(x + self.res(x))


class Autoencoder(nn.Module):
    """Convolutions to a flat code and back; with `variational`, a mean, a variance and their noise."""

    def __init__(self, variational: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 4, 2, 1), nn.ELU(), nn.Conv2d(12, 22, 4, 2, 1), nn.ELU())
        self.flat, self.unflat = nn.Flatten(), nn.Unflatten(1, (22, 6, 6))
        self.fc_mu, self.fc_var = nn.Linear(22 * 36, 14), nn.Linear(22 * 36, 14) if variational else None
        self.fc_back = nn.Linear(14, 22 * 36)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(22, 16, 4, 2, 1), nn.Softplus(),
            nn.ConvTranspose2d(16, 3, 3, 2, 1, output_padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        y = self.flat(self.encoder(x))
        z = mean = self.fc_mu(y)
        if self.fc_var is None:
            return self.decoder(self.unflat(self.fc_back(z)))
        log_var = self.fc_var(y)
        if self.training:
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(log_var)
        return self.decoder(self.unflat(self.fc_back(z))), mean, log_var


class TimeBlock(nn.Module):
    """Diffusion: GroupNorm, convolutions, the time added or as a scale and a shift."""

    def __init__(self, i: int, o: int, time: int, scale_shift: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, padding=1)
        self.scale_shift, self.time = scale_shift, nn.Linear(time, 2 * o if scale_shift else o)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Any:
        y = self.conv1(functional.silu(self.norm1(x)))
        t = self.time(functional.silu(time))[:, :, None, None]
        if self.scale_shift:
            scale, shift = torch.chunk(t, 2, dim=1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + t)
        return self.skip(x) + self.conv2(functional.silu(y))


class PlaceAttention(nn.Module):
    """Attention over the places, by einsum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = (
            nn.GroupNorm(4, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Any:
        batch, width, *size = x.shape
        flat = x.reshape(batch, width, -1)
        q, k, v = self.qkv(self.norm(flat)).chunk(3, dim=1)
        weights = torch.einsum("bct,bcs->bts", q * width**-0.25, k * width**-0.25).softmax(dim=-1)
        y = torch.einsum("bts,bcs->bct", weights, v)
        return (flat + self.proj(y)).reshape(batch, width, *size)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 30), nn.SiLU(), nn.Linear(30, 26))
        self.first, self.down1 = nn.Conv2d(3, 16, 3, padding=1), TimeBlock(16, 16, 26, False)
        self.shrink, self.down2 = nn.Conv2d(16, 16, 3, 2, 1), TimeBlock(16, 28, 26, True)
        self.attention, self.middle = PlaceAttention(28), TimeBlock(28, 28, 26, True)
        self.up2, self.grow = TimeBlock(56, 20, 26, False), nn.ConvTranspose2d(20, 20, 4, 2, 1)
        self.up1, self.end = TimeBlock(36, 24, 26, False), nn.Sequential(nn.GroupNorm(4, 24), nn.SiLU())
        self.last = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        steps = torch.exp(-math.log(100) * torch.arange(8, dtype=x.dtype, device=x.device) / 8)
        angles = t[:, None] * steps[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        h1 = self.down1(self.first(x), time)
        h2 = self.attention(self.down2(self.shrink(h1), time))
        y = self.up2(torch.cat([self.middle(h2, time), h2], 1), time)
        return self.last(self.end(self.up1(torch.cat([self.grow(y), h1], 1), time)))


def unet() -> nn.Module:
    return UNet(transposed=False)


def unet_transposed() -> nn.Module:
    return UNet(transposed=True)


def segnet() -> nn.Module:
    return Unpooling()


def deeplab() -> nn.Module:
    return DeepLab()


def lraspp() -> nn.Module:
    return LightHead()


def pspnet() -> nn.Module:
    return PyramidPooling()


def segformer() -> nn.Module:
    return SegFormer()


def hourglass() -> nn.Module:
    return Hourglass()


def espcn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 26, 5, padding=2), nn.Tanh(), nn.Conv2d(26, 14, 3, padding=1), nn.Tanh(),
        nn.Conv2d(14, 9, 3, padding=1), nn.PixelShuffle(3), nn.Sigmoid(),
    )  # fmt: skip


def edsr() -> nn.Module:
    return Edsr()


def srgan() -> nn.Module:
    return Srgan()


def esrgan() -> nn.Module:
    return Esrgan()


def style_transfer() -> nn.Module:
    return StyleTransfer()


def dcgan() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(18, 36, 4, 1, 0, bias=False), nn.BatchNorm2d(36), nn.ReLU(True),
        nn.ConvTranspose2d(36, 24, 4, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(True),
        nn.ConvTranspose2d(24, 12, 4, 2, 1, groups=2), nn.BatchNorm2d(12), nn.ReLU(True),
        nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    return Autoencoder(variational=False)


def vae() -> nn.Module:
    return Autoencoder(variational=True)


def diffusion_unet() -> nn.Module:
    return Diffusion()


TABLE: Table = {
    unet: image(24),
    unet_transposed: image(24),
    segnet: image(24),
    deeplab: image(),
    lraspp: image(),
    pspnet: image(24),
    segformer: image(),
    hourglass: image(24),
    espcn: image(12, 1),
    edsr: image(12),
    srgan: image(12),
    esrgan: image(24),
    style_transfer: image(24),
    dcgan: floats((2, 18, 1, 1)),
    autoencoder: image(24),
    vae: image(24),
    diffusion_unet: joined(image(16), floats((2,))),
}
