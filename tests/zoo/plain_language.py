"""Sequence mixers written plainly: torch's own transformers, small language models, state spaces, experts."""

import math
from collections.abc import Callable
from typing import Any

import torch
from plain_parts import Table, floats, ids, joined, keywords
from torch import Tensor, nn
from torch.nn import functional


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class SwiGlu(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Any:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Grouped(nn.Module):
    """Llama's attention: rotary positions, fewer keys than queries."""

    def __init__(self, width: int, heads: int, groups: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.q, self.k = nn.Linear(width, heads * head_dim), nn.Linear(width, groups * head_dim)
        self.v, self.o = nn.Linear(width, groups * head_dim), nn.Linear(heads * head_dim, width)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.head_dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos + turned * sin

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.groups, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        steps = 100.0 ** -(torch.arange(0, self.head_dim, 2, dtype=x.dtype) / self.head_dim)
        angles = torch.outer(torch.arange(length, dtype=x.dtype), steps).repeat(1, 2)
        q, k = (self._rotate(y, angles.cos(), angles.sin()) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=1) for y in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).contiguous().view(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, width: int, mixer: nn.Module, mlp: nn.Module, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm(width), mixer, norm(width), mlp

    def forward(self, x: Tensor) -> Any:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, width: int, layers: list[nn.Module], norm: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(48, width), nn.ModuleList(layers)
        self.norm, self.head = norm, nn.Linear(width, 48, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class CausalSelfAttention(nn.Module):
    """nanoGPT: c_attn split by the width, a mask in a buffer."""

    bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Any:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = functional.softmax(att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class LinearAttention(nn.Module):
    """Keys times values first, by einsum, with elu + 1 for a kernel."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.o = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        state = torch.einsum("bshd,bshe->bhde", k, v)
        norm = torch.einsum("bshd,bhd->bsh", q, k.sum(1))
        return self.o((torch.einsum("bshd,bhde->bshe", q, state) / norm.unsqueeze(-1)).flatten(-2))


class Retention(nn.Module):
    """RetNet in its parallel form: a decay per head, GroupNorm over each head, a swish gate."""

    def __init__(self, width: int, heads: int, key: int, value: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, heads * key), nn.Linear(width, heads * key)
        self.v, self.g = nn.Linear(width, heads * value), nn.Linear(width, heads * value)
        self.norm, self.o = nn.GroupNorm(heads, heads * value), nn.Linear(heads * value, width)
        self.log_decay = nn.Parameter(torch.linspace(-1.0, -0.1, heads))

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        steps = torch.arange(length, dtype=x.dtype)
        apart = steps[:, None] - steps[None, :]
        decay = torch.where(apart >= 0, torch.exp(self.log_decay[:, None, None] * apart.clamp(min=0)), 0.0)
        y = (q @ k.transpose(-1, -2) * decay) @ v
        y = self.norm(y.transpose(1, 2).reshape(batch * length, -1)).view(batch, length, -1)
        return self.o(functional.silu(self.g(x)) * y)


class Mamba(nn.Module):
    """The selective scan as a loop."""

    def __init__(self, width: int, inner: int, state: int, rank: int) -> None:
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Any:
        length = x.shape[1]
        x, z = self.in_proj(x).split([self.inner, self.inner], dim=-1)
        x = functional.silu(self.conv1d(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        dt, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        dt, A = functional.softplus(self.dt_proj(dt)), -torch.exp(self.A_log)
        h, outs = x.new_zeros(x.shape[0], self.inner, self.state), []
        for t in range(length):
            decay = torch.exp(dt[:, t].unsqueeze(-1) * A)
            h = decay * h + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
            outs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
        y = torch.stack(outs, dim=1) + x * self.D
        return self.out_proj(y * functional.silu(z))


class TimeMix(nn.Module):
    """RWKV-4: the token before is mixed in; a running weighted mean per channel."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.shift, self.mix = nn.ZeroPad2d((0, 0, 1, -1)), nn.Parameter(torch.rand(3, 1, 1, width))
        self.decay, self.first = nn.Parameter(torch.rand(inner)), nn.Parameter(torch.rand(inner))
        self.key, self.value = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.receptance, self.output = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Any:
        before = self.shift(x)
        xk, xv, xr = (x * m + before * (1 - m) for m in self.mix)
        k, v, r = self.key(xk).clamp(max=4), self.value(xv), self.receptance(xr).sigmoid()
        up, down = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        outs, fade = [], torch.exp(-torch.exp(self.decay))
        for t in range(x.size(1)):
            bonus = torch.exp(self.first + k[:, t])
            outs.append((up + bonus * v[:, t]) / (down + bonus))
            grown = torch.exp(k[:, t])
            up, down = fade * up + grown * v[:, t], fade * down + grown
        return self.output(r * torch.stack(outs, 1))


class ChannelMix(nn.Module):
    """RWKV's MLP: squared ReLU and a gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.key, self.value, self.receptance = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Any:
        return torch.sigmoid(self.receptance(x)) * self.value(torch.square(torch.relu(self.key(x))))


class DenseExperts(nn.Module):
    """Every expert for every token, stacked weights, weighed by a softmax router; by bmm or by einsum."""

    def __init__(self, width: int, inner: int, experts: int, einsum: bool) -> None:
        super().__init__()
        self.router, self.experts, self.einsum = nn.Linear(width, experts, bias=False), experts, einsum
        self.up = nn.Parameter(torch.randn(experts, width, inner) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * 0.2)
        self.bias = nn.Parameter(torch.zeros(experts, 1, inner))

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        weights = self.router(flat).softmax(-1)
        if self.einsum:
            y = functional.gelu(torch.einsum("td,edf->tef", flat, self.up) + self.bias.squeeze(1))
            return torch.einsum("tef,efd,te->td", y, self.down, weights).view_as(x)
        y = flat.unsqueeze(0).expand(self.experts, -1, -1)
        y = torch.bmm(functional.gelu(torch.baddbmm(self.bias, y, self.up)), self.down)
        return (y * weights.t().unsqueeze(-1)).sum(0).view_as(x)


class ModuleExperts(nn.Module):
    """A list of experts and a shared one; the gate decides by top-k, the rest get a weight of zero."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.gate, self.shared = nn.Linear(width, experts, bias=False), SwiGlu(width, inner + 4)
        self.experts = nn.ModuleList(SwiGlu(width, inner) for _ in range(experts))

    def forward(self, x: Tensor) -> Any:
        scores = self.gate(x).softmax(dim=-1)
        values, chosen = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        y = self.shared(x)
        for n, expert in enumerate(self.experts):
            y = y + expert(x) * weights[..., n : n + 1]
        return y


class Perceiver(nn.Module):
    """Learnt latents ask a long input, then each other; the layer of latents is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 28))
        self.norm_in, self.norm, self.norm2 = nn.LayerNorm(11), nn.LayerNorm(28), nn.LayerNorm(28)
        self.cross = nn.MultiheadAttention(28, 4, kdim=11, vdim=11, batch_first=True)
        self.self_attention = nn.MultiheadAttention(28, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(28, 50), nn.GELU(), nn.Linear(50, 28)), nn.Linear(28, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.norm_in(x)
        z = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        z = z + self.cross(z, x, x, need_weights=False)[0]
        for _ in range(2):
            y = self.norm(z)
            z = z + self.self_attention(y, y, y, need_weights=False)[0]
            z = z + self.mlp(self.norm2(z))
        return self.head(z.mean(dim=1))


class Positions(nn.Module):
    """Sinusoids in a buffer, as in the tutorial."""

    pe: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        angles = torch.arange(20).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(100.0) / width))
        pe = torch.zeros(1, 20, width)
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(angles), torch.cos(angles)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.size(1)]


class EncoderClassifier(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, batch_first: bool, norm_first: bool, act: Any) -> None:
        super().__init__()
        self.embed, self.places, self.batch_first = nn.Embedding(48, width), Positions(width), batch_first
        layer = nn.TransformerEncoderLayer(
            width, heads, inner, 0.1, act, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.fc = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Any:
        x = self.places(self.embed(tokens) * math.sqrt(self.embed.embedding_dim))
        if self.batch_first:
            return self.fc(self.encoder(x).mean(1))
        return self.fc(self.encoder(x.transpose(0, 1)).mean(0))


class DecoderOnly(nn.Module):
    """`nn.TransformerDecoder` over a memory that is handed in, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Embedding(48, 24), nn.Linear(9, 24)
        layer = nn.TransformerDecoderLayer(24, 4, 46, batch_first=True, activation="gelu")
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(24, 48)

    def forward(self, tokens: Tensor, memory: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=memory.dtype)
        # Without `tgt_is_causal`, torch compares the mask with a causal one, and no export can follow the branch.
        y = self.decoder(self.embed(tokens), self.memory(memory), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


class Translation(nn.Module):
    """`nn.Transformer`, time first, with a mask of padding; source and target share an embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.transformer = nn.Embedding(48, 30, padding_idx=0), nn.Transformer(30, 3, 1, 1, 54)
        self.generator = nn.Linear(30, 48)
        self.generator.weight = self.embed.weight

    def forward(self, source: Tensor, target: Tensor) -> Any:
        padding = source == 0
        memory = self.transformer.encoder(self.embed(source).transpose(0, 1), src_key_padding_mask=padding)
        y = self.transformer.decoder(self.embed(target).transpose(0, 1), memory, memory_key_padding_mask=padding)
        return self.generator(y).transpose(0, 1)


class SelfAndCross(nn.Module):
    """Two `nn.MultiheadAttention`, time first, the second with keys and biases of its own; the weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.cross = (
            nn.MultiheadAttention(20, 5, bias=False),
            nn.MultiheadAttention(20, 4, kdim=8, vdim=12),
        )
        self.norm, self.out = nn.LayerNorm(20), nn.Linear(20, 7)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Any:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        y, weights = self.cross(self.norm(x), keys, values)
        return self.out(x + y), weights


def _gpt(tied: bool) -> nn.Module:
    def mlp(inner: int) -> nn.Module:
        return nn.Sequential(nn.Linear(28, inner), nn.GELU("tanh"), nn.Linear(inner, 28))

    layers: list[nn.Module] = [Layer(28, CausalSelfAttention(28, 4), mlp(n), nn.LayerNorm) for n in (56, 44)]
    return LanguageModel(28, layers, nn.LayerNorm(28), tied)


def _mixed(width: int, mixer: nn.Module, mlp: nn.Module) -> nn.Module:
    return LanguageModel(width, [Layer(width, mixer, mlp, RmsNorm)], nn.RMSNorm(width))


def gpt() -> nn.Module:
    return _gpt(tied=False)


def gpt_tied() -> nn.Module:
    return _gpt(tied=True)


def llama() -> nn.Module:
    return _mixed(30, Grouped(30, 6, 2, 8), SwiGlu(30, 44))


def linear_attention() -> nn.Module:
    return _mixed(26, LinearAttention(26, 3, 7), SwiGlu(26, 34))


def retnet() -> nn.Module:
    return _mixed(26, Retention(26, 4, 5, 9), SwiGlu(26, 30))


def mamba() -> nn.Module:
    return _mixed(22, Mamba(22, 36, 5, 3), SwiGlu(22, 28))


def rwkv() -> nn.Module:
    return _mixed(24, TimeMix(24, 30), ChannelMix(24, 50))


def experts_bmm() -> nn.Module:
    return _mixed(24, Grouped(24, 4, 4, 8), DenseExperts(24, 34, 5, einsum=False))


def experts_einsum() -> nn.Module:
    return _mixed(24, Grouped(24, 3, 1, 8), DenseExperts(24, 34, 5, einsum=True))


def experts_list() -> nn.Module:
    return _mixed(24, Grouped(24, 6, 3, 6), ModuleExperts(24, 20, 4))


def perceiver() -> nn.Module:
    return Perceiver()


def transformer_encoder() -> nn.Module:
    return EncoderClassifier(24, 3, 50, batch_first=True, norm_first=False, act="relu")


def transformer_encoder_prenorm() -> nn.Module:
    return EncoderClassifier(32, 4, 46, batch_first=False, norm_first=True, act=functional.silu)


def transformer_decoder() -> nn.Module:
    return DecoderOnly()


def transformer_pair() -> nn.Module:
    return Translation()


def multihead_attention() -> nn.Module:
    return SelfAndCross()


WORDS = ids(48, (2, 9))
TABLE: Table = {
    gpt: WORDS,
    gpt_tied: keywords(tokens=WORDS),
    llama: WORDS,
    linear_attention: WORDS,
    retnet: WORDS,
    mamba: ids(48, (2, 5)),
    rwkv: ids(48, (2, 5)),
    experts_bmm: WORDS,
    experts_einsum: WORDS,
    experts_list: WORDS,
    perceiver: floats((2, 15, 11)),
    transformer_encoder: WORDS,
    transformer_encoder_prenorm: WORDS,
    transformer_decoder: joined(ids(48, (2, 7)), floats((2, 5, 9))),
    transformer_pair: ids(48, (2, 9), (2, 7)),
    multihead_attention: floats((6, 2, 20), (9, 2, 8), (9, 2, 12)),
}
