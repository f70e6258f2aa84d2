"""Detectors: YOLO, SSD, feature pyramids, heads shared by the levels, DETR. They return lists, tuples and dicts."""

from collections.abc import Sequence
from typing import Any

import torch
from plain_parts import ConvBN, SqueezeExcite, Table, image
from torch import Tensor, nn
from torch.nn import functional

Modules = Sequence[nn.Module]


def _silu(i: int, o: int, k: int = 1, s: int = 1) -> nn.Module:
    return ConvBN(i, o, k, s, act=nn.SiLU)


class Focus(nn.Module):
    """Every second pixel, four times, side by side."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = _silu(4 * i, o, 3)

    def forward(self, x: Tensor) -> Any:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.conv(torch.cat(parts, 1))


class Bottle(nn.Module):
    def __init__(self, i: int, o: int, inner: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = _silu(i, inner), _silu(inner, o, 3), shortcut and i == o

    def forward(self, x: Tensor) -> Any:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    def __init__(self, i: int, o: int, inner: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = _silu(i, inner), _silu(i, inner), _silu(2 * inner, o)
        self.m = nn.Sequential(*(Bottle(inner, inner, inner, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Any:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """The output of every block is kept and joined."""

    def __init__(self, i: int, o: int, inner: int, n: int = 1, shortcut: bool = True, split: bool = False) -> None:
        super().__init__()
        self.c, self.split = inner, split
        self.cv1, self.cv2 = _silu(i, 2 * inner), _silu((2 + n) * inner, o)
        self.m = nn.ModuleList(Bottle(inner, inner, inner - 2, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Any:
        y = list(self.cv1(x).split((self.c, self.c), 1) if self.split else self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Sppf(nn.Module):
    def __init__(self, i: int, o: int, inner: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = _silu(i, inner), _silu(4 * inner, o), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect5(nn.Module):
    """YOLOv5: anchors x (box, object, classes), decoded; raw maps returned beside."""

    def __init__(self, widths: tuple[int, ...], classes: int = 4, anchors: int = 3) -> None:
        super().__init__()
        self.na, self.no = anchors, classes + 5
        self.m = nn.ModuleList(nn.Conv2d(w, self.no * self.na, 1) for w in widths)

    def forward(self, x: list[Tensor]) -> Any:
        raw, decoded = [], []
        for level, conv in zip(x, self.m, strict=True):
            y = conv(level)
            bs, _, ny, nx = y.shape
            y = y.view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            raw.append(y)
            xy, wh, conf = torch.split(y.sigmoid(), [2, 2, self.no - 4], 4)
            decoded.append(torch.cat((xy * 2 - 0.5, (wh * 2) ** 2, conf), 4).view(bs, self.na * nx * ny, self.no))
        return torch.cat(decoded, 1), raw


class Detect8(nn.Module):
    """YOLOv8: a distribution per side of the box (DFL), its mean by a fixed convolution."""

    def __init__(self, widths: tuple[int, ...], classes: int = 5, bins: int = 6) -> None:
        super().__init__()
        self.nc, self.reg_max = classes, bins
        self.cv2 = nn.ModuleList(nn.Sequential(_silu(w, 18, 3), nn.Conv2d(18, 4 * bins, 1)) for w in widths)
        self.cv3 = nn.ModuleList(nn.Sequential(_silu(w, 14, 3), nn.Conv2d(14, classes, 1)) for w in widths)
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    def forward(self, x: list[Tensor]) -> Any:
        maps = [torch.cat((a(y), b(y)), 1) for y, a, b in zip(x, self.cv2, self.cv3, strict=True)]
        batch = maps[0].shape[0]
        joined = torch.cat([m.view(batch, self.nc + 4 * self.reg_max, -1) for m in maps], 2)
        box, score = torch.split(joined, [4 * self.reg_max, self.nc], 1)
        places = box.shape[-1]
        box = self.dfl(box.view(batch, 4, self.reg_max, places).transpose(2, 1).softmax(1)).view(batch, 4, places)
        return torch.cat((box, score.sigmoid()), 1), maps


class Yolo(nn.Module):
    """Backbone, a neck that goes up and down again, three scales."""

    def __init__(self, stem: nn.Module, stages: Modules, up: Modules, down: Modules) -> None:
        super().__init__()
        self.stem = stem
        self.stage3, self.stage4, self.stage5 = stages
        self.lateral, self.up4, self.lateral3, self.up3 = up
        self.shrink3, self.down4, self.shrink4, self.down5, self.detect = down
        self.upsample = nn.Upsample(None, 2, "nearest")

    def forward(self, x: Tensor) -> Any:
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        p5 = self.lateral(self.stage5(p4))
        n4 = self.lateral3(self.up4(torch.cat((self.upsample(p5), p4), 1)))
        n3 = self.up3(torch.cat((self.upsample(n4), p3), 1))
        m4 = self.down4(torch.cat([self.shrink3(n3), n4], 1))
        m5 = self.down5(torch.cat([self.shrink4(m4), p5], 1))
        return self.detect([n3, m4, m5])


class Pyramid(nn.Module):
    """FPN: lateral 1 x 1 convolutions, sums from the top down, 3 x 3 after; and one more level below."""

    def __init__(self, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.body = nn.ModuleList(ConvBN(i, o, 3, 2) for i, o in zip((3, *widths), widths, strict=False))
        self.inner = nn.ModuleList(nn.Conv2d(w, out, 1) for w in widths[1:])
        self.layer = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in widths[1:])

    def forward(self, x: Tensor) -> Any:
        features = []
        for layer in self.body:
            x = layer(x)
            features.append(x)
        last = self.inner[-1](features[-1])
        outs = [self.layer[-1](last)]
        for n in range(len(self.inner) - 2, -1, -1):
            side = self.inner[n](features[n + 1])
            last = side + functional.interpolate(last, size=side.shape[-2:], mode="nearest")
            outs.insert(0, self.layer[n](last))
        outs.append(functional.max_pool2d(outs[-1], 1, 2, 0))
        return outs


class FpnClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn, self.fc = Pyramid((12, 20, 34), 26), nn.Linear(3 * 26, 10)

    def forward(self, x: Tensor) -> Any:
        return self.fc(torch.cat([y.mean((2, 3)) for y in self.fpn(x)], 1))


class RetinaNet(nn.Module):
    """One classification tower and one box tower, used on every level."""

    def __init__(self, classes: int = 4, anchors: int = 3) -> None:
        super().__init__()
        self.fpn, self.classes = Pyramid((12, 20, 34), 22), classes
        self.cls = nn.Sequential(nn.Conv2d(22, 28, 3, 1, 1), nn.ReLU(), nn.Conv2d(28, anchors * classes, 3, 1, 1))
        self.box = nn.Sequential(nn.Conv2d(22, 18, 3, 1, 1), nn.ReLU(), nn.Conv2d(18, anchors * 4, 3, 1, 1))

    def _rows(self, y: Tensor, last: int) -> Tensor:
        batch, _, high, wide = y.shape
        y = y.view(batch, -1, last, high, wide).permute(0, 3, 4, 1, 2)
        return y.reshape(batch, -1, last)

    def forward(self, x: Tensor) -> Any:
        levels = self.fpn(x)
        logits = torch.cat([self._rows(self.cls(y), self.classes) for y in levels], dim=1)
        return {"cls_logits": logits, "bbox": torch.cat([self._rows(self.box(y), 4) for y in levels], dim=1)}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Fcos(nn.Module):
    """A tower with GroupNorm for all levels; one scalar per level; the norm of the tower is GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fpn, self.scales = Pyramid((14, 18, 30), 24), nn.ModuleList(Scale() for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(24, 32, 3, 1, 1), nn.GroupNorm(4, 32), nn.ReLU(inplace=True))
        self.logits, self.reg, self.centre = (nn.Conv2d(32, n, 3, padding=1) for n in (5, 4, 1))

    def forward(self, x: Tensor) -> Any:
        logits, boxes, centres = [], [], []
        for scale, level in zip(self.scales, self.fpn(x), strict=True):
            y = self.tower(level)
            logits.append(self.logits(y))
            boxes.append(functional.softplus(scale(self.reg(y))))
            centres.append(self.centre(y))
        return logits, boxes, centres


class L2Norm(nn.Module):
    """SSD: each place divided by its norm, times a learnt scale per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 5.0))

    def forward(self, x: Tensor) -> Any:
        return self.weight.view(1, -1, 1, 1) * functional.normalize(x)


class Ssd(nn.Module):
    """A head of its own for each scale."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.classes, self.first, self.norm = classes, ConvBN(3, 16, 3, 4), L2Norm(16)
        self.extras = nn.ModuleList([ConvBN(16, 26, 3, 2), nn.Sequential(ConvBN(26, 12, 1), ConvBN(12, 22, 3, 2))])
        boxes = (4, 6, 6)
        self.loc = nn.ModuleList(nn.Conv2d(w, b * 4, 3, 1, 1) for w, b in zip((16, 26, 22), boxes, strict=True))
        self.conf = nn.ModuleList(nn.Conv2d(w, b * classes, 3, 1, 1) for w, b in zip((16, 26, 22), boxes, strict=True))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        sources = [self.norm(x)]
        for layer in self.extras:
            x = layer(x)
            sources.append(x)
        loc = [f(y).permute(0, 2, 3, 1).contiguous() for f, y in zip(self.loc, sources, strict=True)]
        conf = [f(y).permute(0, 2, 3, 1).contiguous() for f, y in zip(self.conf, sources, strict=True)]
        places = torch.cat([y.view(y.size(0), -1) for y in loc], 1)
        classes = torch.cat([y.view(y.size(0), -1) for y in conf], 1)
        return places.view(places.size(0), -1, 4), classes.view(classes.size(0), -1, self.classes).softmax(-1)


class BiFpn(nn.Module):
    """EfficientDet: sums weighed by positive scalars that are learnt, separable convolutions, shared heads."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.down = ConvBN(3, width, 3, 4, act=nn.SiLU), ConvBN(width, width, 3, 2, act=nn.SiLU)
        self.w1, self.w2 = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        self.up, self.out = _separable(width), _separable(width)
        self.head, self.classes = SqueezeExcite(width, 6), nn.Conv2d(width, 9, 1)

    def forward(self, x: Tensor) -> Any:
        p3 = self.stem(x)
        p4 = self.down(p3)
        w = functional.relu(self.w1)
        w = w / (torch.sum(w, dim=0) + 1e-4)
        up = self.up(w[0] * p3 + w[1] * functional.interpolate(p4, scale_factor=2.0))
        w2 = self.w2.softmax(0)
        out = self.out(torch.stack([p4, functional.max_pool2d(up, 2), p4], -1) @ w2)
        return [self.classes(self.head(y)) for y in (up, out)]


def _separable(width: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1, groups=width), ConvBN(width, width, 1))


class Detr(nn.Module):
    """Learnt queries against the places of an image through `nn.Transformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.conv = ConvBN(3, 20, 7, 8), nn.Conv2d(20, 24, 1)
        self.transformer = nn.Transformer(24, 3, 1, 1, 44, batch_first=True)
        self.query_pos = nn.Parameter(torch.rand(7, 24))
        self.row_embed, self.col_embed = nn.Parameter(torch.rand(10, 12)), nn.Parameter(torch.rand(10, 12))
        self.linear_class = nn.Linear(24, 5)
        self.linear_bbox = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 4))

    def forward(self, inputs: Tensor) -> Any:
        h = self.conv(self.backbone(inputs))
        H, W = h.shape[-2:]
        columns = self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1)
        rows = self.row_embed[:H].unsqueeze(1).repeat(1, W, 1)
        pos = torch.cat([columns, rows], dim=-1).flatten(0, 1).unsqueeze(0)
        queries = self.query_pos.unsqueeze(0).repeat(inputs.shape[0], 1, 1)
        h = self.transformer(pos + 0.1 * h.flatten(2).permute(0, 2, 1), queries)
        return {"pred_logits": self.linear_class(h), "pred_boxes": self.linear_bbox(h).sigmoid()}


def yolov5() -> nn.Module:
    stages = [
        nn.Sequential(_silu(12, 20, 3, 2), C3(20, 20, 10, 2)),
        nn.Sequential(_silu(20, 28, 3, 2), C3(28, 28, 14)),
        nn.Sequential(_silu(28, 40, 3, 2), C3(40, 40, 18), Sppf(40, 36, 16)),
    ]
    up = [_silu(36, 24), C3(52, 26, 12, 1, False), _silu(26, 18), C3(38, 22, 11, 1, False)]
    down = [_silu(22, 18, 3, 2), C3(36, 30, 13, 1, False), _silu(30, 24, 3, 2), C3(48, 42, 15, 1, False)]
    return Yolo(Focus(3, 12), stages, up, [*down, Detect5((22, 30, 42))])


def yolov8() -> nn.Module:
    stages = [
        nn.Sequential(_silu(12, 20, 3, 2), C2f(20, 20, 10, 2)),
        nn.Sequential(_silu(20, 28, 3, 2), C2f(28, 28, 14, split=True)),
        nn.Sequential(_silu(28, 40, 3, 2), C2f(40, 40, 18), Sppf(40, 36, 16)),
    ]
    up = [nn.Identity(), C2f(64, 26, 12, 1, False), nn.Identity(), C2f(46, 22, 11, 1, False)]
    down = [_silu(22, 18, 3, 2), C2f(44, 30, 13, 1, False), _silu(30, 24, 3, 2), C2f(60, 42, 15, 1, False)]
    return Yolo(_silu(3, 12, 3, 2), stages, up, [*down, Detect8((22, 30, 42))])


def fpn_classifier() -> nn.Module:
    return FpnClassifier()


def retinanet() -> nn.Module:
    return RetinaNet()


def fcos() -> nn.Module:
    return Fcos()


def ssd() -> nn.Module:
    return Ssd()


def efficientdet() -> nn.Module:
    return BiFpn()


def detr() -> nn.Module:
    return Detr()


TABLE: Table = {
    yolov5: image(),
    yolov8: image(),
    fpn_classifier: image(),
    retinanet: image(),
    fcos: image(),
    ssd: image(),
    efficientdet: image(),
    detr: image(),
}
