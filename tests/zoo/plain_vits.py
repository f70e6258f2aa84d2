"""Vision transformers of one resolution, and the mixers that look like them."""

from typing import Any

import torch
from plain_parts import ConvBN, Head, Table, floats, image
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Fused qkv, heads of a fixed width, all by hand."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class WidthAttention(nn.Module):
    """As in DeiT's own code: the head's width is worked out from the width of the input; unbind; native kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, width: int, mixer: nn.Module, inner: int, scaled: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), mixer
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, inner)
        self.gamma1 = nn.Parameter(torch.full((width,), 0.1)) if scaled else 1.0
        self.gamma2 = nn.Parameter(torch.full((width,), 0.2)) if scaled else 1.0

    def forward(self, x: Tensor) -> Any:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int = 8) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Any:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Class token, learnt positions; DeiT has a second token and classifier."""

    def __init__(self, width: int, blocks: list[nn.Module], tokens: int = 1) -> None:
        super().__init__()
        self.patch_embed, self.tokens = PatchEmbed(width), nn.ParameterList()
        for _ in range(tokens):
            self.tokens.append(nn.Parameter(torch.randn(1, 1, width)))
        self.pos_embed = nn.Parameter(torch.randn(1, 16 + tokens, width) * 0.02)
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tokens))

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed(x)
        tokens = [token.expand(x.shape[0], -1, -1) for token in self.tokens]
        x = self.norm(self.blocks(torch.cat([*tokens, x], dim=1) + self.pos_embed))
        outs = [head(x[:, n]) for n, head in enumerate(self.heads)]
        return outs[0] if len(outs) == 1 else (outs[0] + outs[1]) / 2


class RelativeAttention(nn.Module):
    """BEiT: separate biases of q and v, and a table of relative positions that a buffer indexes."""

    index: Tensor

    def __init__(self, width: int, heads: int, head_dim: int, side: int = 4) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        self.register_buffer("index", _relative_index(side), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        batch, length, _ = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = functional.linear(x, self.qkv.weight, bias).reshape(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        places = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous()
        weights = weights + places.unsqueeze(0)
        if mask is not None:  # Swin: one mask per window
            count = mask.shape[0]
            weights = weights.view(batch // count, count, self.heads, length, length) + mask.unsqueeze(1).unsqueeze(0)
            weights = weights.view(-1, self.heads, length, length)
        weights = functional.softmax(weights, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def _relative_index(side: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()])
    apart = places[:, :, None] - places[:, None, :] + side - 1
    return apart[0] * (2 * side - 1) + apart[1]


class ClassAttention(nn.Module):
    """CaiT: only the class token asks."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(width, inner)
        self.proj, self.scale = nn.Linear(inner, width), head_dim**-0.5

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(batch, 1, self.heads, -1).permute(0, 2, 1, 3) * self.scale
        k, v = (f(x).reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3) for f in (self.k, self.v))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, 1, -1))


class TalkingHeads(Attention):
    """CaiT's self-attention: Linear layers across the heads, before and after the softmax."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__(width, heads, head_dim)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        weights = self.proj_l((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(dim=2)
        weights = self.proj_w(weights).permute(0, 3, 1, 2)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Cait(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = PatchEmbed(30), nn.Parameter(torch.randn(1, 1, 30))
        self.body = Block(30, TalkingHeads(30, 5, 8), 70, scaled=True)
        self.norm, self.last, self.fc = nn.LayerNorm(30), ClassAttention(30, 4, 6), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.embed(x))
        token = self.cls.expand(x.shape[0], -1, -1)
        token = token + self.last(self.norm(torch.cat((token, x), 1)))
        return self.fc(token[:, 0])


class CrossCovariance(nn.Module):
    """XCiT: attention between the channels of a head, of normalised q and k, with a temperature per head."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(batch, length, self.heads * self.head_dim))


class MixerBlock(nn.Module):
    """MLP-Mixer: one MLP across the tokens, one across the channels."""

    def __init__(self, tokens: int, width: int, token_inner: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.token_mlp = nn.LayerNorm(width), Mlp(tokens, token_inner)
        self.norm2, self.channel_mlp = nn.LayerNorm(width), Mlp(width, inner)

    def forward(self, x: Tensor) -> Any:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class SpatialGating(nn.Module):
    """gMLP: one half gates the other, after a Linear across the tokens."""

    def __init__(self, tokens: int, width: int, half: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * half), nn.Linear(half, width)
        self.norm, self.spatial = nn.LayerNorm(half), nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: Tensor) -> Any:
        u, v = functional.gelu(self.fc1(x)).chunk(2, dim=-1)
        return self.fc2(u * self.spatial(self.norm(v)))


class Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, width)), nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Any:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMlpBlock(nn.Module):
    """ResMLP: no norm but a scale and a shift; one Linear across the tokens."""

    def __init__(self, tokens: int, width: int, inner: int) -> None:
        super().__init__()
        self.aff1, self.aff2, self.tokens = Affine(width), Affine(width), nn.Linear(tokens, tokens)
        self.mlp, self.scale = Mlp(width, inner), nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Any:
        x = x + self.scale * self.tokens(self.aff1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.aff2(x))


class Swap(nn.Module):
    """Channels first to channels last, and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class TokenMean(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.norm(x).mean(dim=1))


class TorchvisionBlock(nn.Module):
    """As torchvision writes it: `nn.MultiheadAttention` and an MLP that is a Sequential."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.self_attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Any:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = self.drop(y) + x
        return x + self.mlp(self.ln_2(x))


class HeadList(nn.Module):
    """One module per head, their outputs joined, as in the tutorials."""

    def __init__(self, width: int, head_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.q = nn.ModuleList(nn.Linear(width, n, bias=False) for n in head_dims)
        self.k = nn.ModuleList(nn.Linear(width, n, bias=False) for n in head_dims)
        self.v = nn.ModuleList(nn.Linear(width, n, bias=False) for n in head_dims)
        self.proj = nn.Linear(sum(head_dims), width)

    def forward(self, x: Tensor) -> Any:
        outs = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            weights = torch.softmax(torch.bmm(q(x), k(x).mT) * 0.3, dim=-1)
            outs.append(weights.bmm(v(x)))
        return self.proj(torch.cat(outs, dim=-1))


class ModulatedBlock(nn.Module):
    """DiT: norms without weights; shifts, scales and gates come from the condition, six at once."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, 3, 8), Mlp(width, inner)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Any:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.attn(y)
        y = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(y)


class DiffusionTransformer(nn.Module):
    """Patches back to pixels by an einsum over a view of six dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.label = PatchEmbed(28, 4), nn.Embedding(10, 28)
        self.block, self.last = ModulatedBlock(28, 60), nn.Linear(28, 4 * 4 * 3)

    def forward(self, x: Tensor, label: Tensor) -> Any:
        side = x.shape[-1] // 4
        y = self.last(self.block(self.embed(x), self.label(label)))
        y = y.reshape(x.shape[0], side, side, 4, 4, 3)
        return torch.einsum("nhwpqc->nchpwq", y).reshape(x.shape[0], 3, side * 4, side * 4)


class ContrastivePair(nn.Module):
    """CLIP: an image tower and a text tower, projected, normalised, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = VisionTransformer(24, [Block(24, Attention(24, 3, 10), 40)])
        self.visual.heads = nn.ModuleList([nn.Identity()])
        self.token, self.place = nn.Embedding(50, 20), nn.Parameter(torch.randn(7, 20))
        self.text = nn.Sequential(Block(20, Attention(20, 4, 6), 44), nn.LayerNorm(20))
        self.image_projection = nn.Parameter(torch.randn(24, 18) * 0.2)
        self.text_projection = nn.Parameter(torch.randn(20, 18) * 0.2)
        self.logit_scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, image: Tensor, text: Tensor) -> Any:
        a = self.visual(image) @ self.image_projection
        x = self.text(self.token(text) + self.place)
        b = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection
        a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        logits = self.logit_scale.exp() * a @ b.t()
        return logits, logits.t()


def vit() -> nn.Module:
    return VisionTransformer(32, [Block(32, Attention(32, 4, 10), 56), Block(32, Attention(32, 3, 10), 72)])


def vit_by_width() -> nn.Module:
    return VisionTransformer(32, [Block(32, WidthAttention(32, 4), 56), Block(32, WidthAttention(32, 4), 72)])


def vit_torchvision() -> nn.Module:
    return VisionTransformer(36, [TorchvisionBlock(36, 3, 64), TorchvisionBlock(36, 4, 50)])


def deit() -> nn.Module:
    return VisionTransformer(28, [Block(28, Attention(28, 4, 8), 60)], tokens=2)


def beit() -> nn.Module:
    blocks = [Block(26, RelativeAttention(26, heads, 9), 48, scaled=True) for heads in (3, 5)]
    return nn.Sequential(PatchEmbed(26), *blocks, TokenMean(26))


def cait() -> nn.Module:
    return Cait()


def xcit() -> nn.Module:
    return nn.Sequential(PatchEmbed(30), Block(30, CrossCovariance(30, 4, 6), 66, scaled=True), TokenMean(30))


def vit_head_list() -> nn.Module:
    return nn.Sequential(PatchEmbed(26), Block(26, HeadList(26, (7, 9, 7)), 50), TokenMean(26))


def dit() -> nn.Module:
    return DiffusionTransformer()


def mlp_mixer() -> nn.Module:
    return nn.Sequential(PatchEmbed(28), MixerBlock(16, 28, 22, 50), MixerBlock(16, 28, 30, 44), TokenMean(28))


def gmlp() -> nn.Module:
    blocks = [Block(24, SpatialGating(16, 24, half), 40) for half in (18, 26)]
    return nn.Sequential(PatchEmbed(24), *blocks, TokenMean(24))


def resmlp() -> nn.Module:
    return nn.Sequential(PatchEmbed(26), ResMlpBlock(16, 26, 58), ResMlpBlock(16, 26, 34), TokenMean(26))


def clip_towers() -> nn.Module:
    return ContrastivePair()


def convolutional_vit() -> nn.Module:
    """A stem of convolutions, tokens, and back to an image."""
    stem = nn.Sequential(ConvBN(3, 14, 3, 2), ConvBN(14, 22, 3, 2), nn.Conv2d(22, 30, 1), nn.Flatten(2))
    tokens = nn.Sequential(Swap(), Block(30, Attention(30, 3, 12), 52), Swap())
    return nn.Sequential(stem, tokens, nn.Unflatten(2, (8, 8)), ConvBN(30, 20), Head(20))


def _clip_inputs() -> dict[str, Any]:
    (pixels,) = floats((3, 3, 32, 32))()
    return {"image": pixels, "text": torch.arange(21).reshape(3, 7) * 2}


def _dit_inputs() -> tuple[Any, ...]:
    (pixels,) = floats((2, 3, 16, 16))()
    return pixels, torch.tensor([3, 8])


TABLE: Table = {
    vit: image(),
    vit_by_width: image(),
    vit_torchvision: image(),
    deit: image(batch=3),
    beit: image(),
    cait: image(),
    xcit: image(),
    vit_head_list: image(),
    dit: _dit_inputs,
    mlp_mixer: image(),
    gmlp: image(),
    resmlp: image(),
    clip_towers: _clip_inputs,
    convolutional_vit: image(),
}
