"""Sound, series, video and recurrent nets: 1-D and 3-D convolutions, LSTM, GRU and their cells."""

from typing import Any

import torch
from plain_parts import SqueezeExcite, Table, floats, ids, joined
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


class WaveNet(nn.Module):
    """Dilated convolutions, a gate of tanh and sigmoid, a residual and a skip from one split."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.residual = nn.Conv1d(1, 18, 1), 18
        self.filters = nn.ModuleList(nn.Conv1d(18, 14, 2, dilation=2**n) for n in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(18, 14, 2, dilation=2**n) for n in range(3))
        self.both = nn.ModuleList(nn.Conv1d(14, 18 + 24, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 30, 1), nn.ReLU(), nn.Conv1d(30, 16, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.start(x)
        skips: Any = 0
        for n, (f, g, both) in enumerate(zip(self.filters, self.gates, self.both, strict=True)):
            padded = functional.pad(x, (2**n, 0))
            y = both(torch.tanh(f(padded)) * torch.sigmoid(g(padded)))
            x = x + y[:, : self.residual]
            skips = skips + y[:, self.residual :]
        return self.end(skips)


class TcnBlock(nn.Module):
    """Weight norm as a parametrisation; the causal surplus is cut off."""

    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        self.chop = 2 * dilation
        self.conv1 = parametrizations.weight_norm(nn.Conv1d(i, o, 3, padding=self.chop, dilation=dilation))
        self.conv2 = parametrizations.weight_norm(nn.Conv1d(o, o, 3, padding=self.chop, dilation=dilation))
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x: Tensor) -> Any:
        y = functional.relu(self.conv1(x)[:, :, : -self.chop].contiguous())
        y = functional.relu(self.conv2(y)[:, :, : -self.chop])
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.linear = nn.Sequential(TcnBlock(5, 16, 1), TcnBlock(16, 26, 2)), nn.Linear(26, 7)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.body(x)[:, :, -1])


class SpeechEncoder(nn.Module):
    """wav2vec 2 and Whisper at the front: strided convolutions, norms of both kinds, positions by convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(1, 24, 10, 5, bias=False), nn.GroupNorm(24, 24)
        self.conv2, self.norm2 = nn.Conv1d(24, 30, 3, 2), nn.LayerNorm(30)
        self.places = parametrizations.weight_norm(nn.Conv1d(30, 30, 4, padding=2, groups=5), dim=2)
        self.layer = nn.TransformerEncoderLayer(30, 3, 56, batch_first=True, norm_first=True)
        self.ctc = nn.Linear(30, 12)

    def forward(self, x: Tensor) -> Any:
        x = functional.gelu(self.norm1(self.conv1(x)))
        x = self.norm2(functional.gelu(self.conv2(x)).transpose(1, 2))
        x = x + functional.gelu(self.places(x.transpose(1, 2))[:, :, :-1]).transpose(1, 2)
        return self.ctc(self.layer(x)).log_softmax(-1)


class Conformer(nn.Module):
    """Half-step MLPs around attention and a convolution with GLU and batch norm."""

    def __init__(self, width: int = 28) -> None:
        super().__init__()
        self.ff1, self.ff2 = self._mlp(width, 50), self._mlp(width, 62)
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.conv_norm, self.point1 = nn.LayerNorm(width), nn.Conv1d(width, 2 * 22, 1)
        self.depth, self.batch_norm = nn.Conv1d(22, 22, 7, padding=3, groups=22), nn.BatchNorm1d(22)
        self.point2, self.last = nn.Conv1d(22, width, 1), nn.LayerNorm(width)
        self.head = nn.Linear(width, 9)

    @staticmethod
    def _mlp(width: int, inner: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Any:
        x = x + 0.5 * self.ff1(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        y = functional.glu(self.point1(self.conv_norm(x).transpose(1, 2)), dim=1)
        x = x + self.point2(functional.silu(self.batch_norm(self.depth(y)))).transpose(1, 2)
        return self.head(self.last(x + 0.5 * self.ff2(x)))


class Seanet(nn.Module):
    """EnCodec and DAC: the activation `x + sin(ax)^2 / a` with one `a` per channel; down and up in time."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.alpha = nn.Conv1d(1, 16, 7, 2, 3), nn.Parameter(torch.ones(1, 16, 1))
        self.deep, self.up = nn.Conv1d(16, 26, 4, 2, 1), nn.ConvTranspose1d(26, 14, 4, 2, 1)
        self.beta, self.out = nn.Parameter(torch.ones(14)), nn.ConvTranspose1d(14, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.down(x)
        x = x + (self.alpha * x).sin().pow(2) / (self.alpha.abs() + 1e-6)
        x = self.up(functional.elu(self.deep(x)))
        beta = self.beta.exp().unsqueeze(0).unsqueeze(-1)
        return torch.tanh(self.out(x + torch.sin(x * beta) ** 2 / (beta + 1e-6)))


class R2Plus1(nn.Module):
    """Space and time apart: 1 x 3 x 3, then 3 x 1 x 1."""

    def __init__(self, i: int, middle: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv3d(i, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False), nn.BatchNorm3d(middle),
            nn.ReLU(), nn.Conv3d(middle, o, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False), nn.BatchNorm3d(o),
        )  # fmt: skip
        self.short = nn.Conv3d(i, o, 1, stride) if i != o or stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return functional.relu(self.conv(x) + self.short(x))


class SlowFast(nn.Module):
    """A slow path with many channels, a fast one with few, joined sideways."""

    def __init__(self) -> None:
        super().__init__()
        self.slow1, self.fast1 = nn.Conv3d(3, 20, (1, 5, 5), (1, 2, 2), (0, 2, 2)), nn.Conv3d(3, 6, 5, (1, 2, 2), 2)
        self.side = nn.Conv3d(6, 12, (5, 1, 1), (4, 1, 1), (2, 0, 0))
        self.slow2, self.fast2 = R2Plus1(32, 18, 36), R2Plus1(6, 8, 10)
        self.fc = nn.Linear(46, 8)

    def forward(self, x: Tensor) -> Any:
        slow, fast = functional.relu(self.slow1(x[:, :, ::4])), functional.relu(self.fast1(x))
        slow, fast = self.slow2(torch.cat([slow, self.side(fast)], 1)), self.fast2(fast)
        return self.fc(torch.cat([slow.mean([2, 3, 4]), fast.mean([2, 3, 4])], dim=1))


class Shift(nn.Module):
    """TSM: a few channels come from the frame before and the frame after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fold = nn.Conv2d(3, 24, 3, 2), nn.Conv2d(24, 32, 3, 2), 6
        self.gate, self.fc = SqueezeExcite(32, 7), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Any:
        batch, frames = x.shape[:2]
        x = torch.unflatten(functional.relu(self.conv1(x.flatten(0, 1))), 0, (batch, frames))
        out = torch.zeros_like(x)
        out[:, :-1, : self.fold] = x[:, 1:, : self.fold]
        out[:, 1:, self.fold : 2 * self.fold] = x[:, :-1, self.fold : 2 * self.fold]
        out[:, :, 2 * self.fold :] = x[:, :, 2 * self.fold :]
        y = self.gate(functional.relu(self.conv2(out.flatten(0, 1))))
        return self.fc(y.mean((2, 3)).view(batch, frames, -1).mean(1))


class Recurrent(nn.Module):
    """Words, a recurrent layer, a classifier of its last output."""

    def __init__(self, rnn: nn.Module, out: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.drop, self.fc = nn.Embedding(50, 18), rnn, nn.Dropout(0.2), nn.Linear(out, 6)

    def forward(self, tokens: Tensor) -> Any:
        y, _ = self.rnn(self.embed(tokens))
        return self.fc(self.drop(y[:, -1]))


class LastState(nn.Module):
    """The final state of the LSTM instead of its output; time first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(7, 26), nn.Linear(26, 6)

    def forward(self, x: Tensor) -> Any:
        _, (h, _) = self.lstm(x.transpose(0, 1))
        return self.fc(h[-1])


class CellLoop(nn.Module):
    """A loop over LSTMCell and GRUCell in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.first, self.second = 22, nn.LSTMCell(7, 22), nn.GRUCell(22, 16)
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Any:
        h, c = x.new_zeros(x.size(0), self.hidden), x.new_zeros(x.size(0), self.hidden)
        g = x.new_zeros(x.size(0), self.second.hidden_size)
        outs = []
        for t in range(x.size(1)):
            h, c = self.first(x[:, t], (h, c))
            g = self.second(h, g)
            outs.append(self.fc(g))
        return torch.stack(outs, dim=1)


class HandCell(nn.Module):
    """An LSTM written out: one projection of four gates, chunked."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h, self.fc = nn.Linear(7, 4 * 20), nn.Linear(20, 4 * 20, bias=False), nn.Linear(20, 6)
        self.h0 = nn.Parameter(torch.zeros(1, 20))

    def forward(self, x: Tensor) -> Any:
        h = self.h0.expand(x.shape[0], -1)
        c = torch.zeros_like(h)
        for step in x.unbind(1):
            i, f, g, o = (self.x2h(step) + self.h2h(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.fc(h)


class Crnn(nn.Module):
    """Text in images: columns of a feature map (height x channels) read by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 20, 3, (4, 2), 1), nn.ReLU())
        self.map, self.rnn, self.fc = nn.Linear(20 * 2, 24), nn.LSTM(24, 18, bidirectional=True), nn.Linear(36, 11)

    def forward(self, x: Tensor) -> Any:
        x = self.cnn(x).permute(3, 0, 1, 2).flatten(2)
        y, _ = self.rnn(torch.relu(self.map(x)))
        return self.fc(y)


class Seq2Seq(nn.Module):
    """Encoder, decoder that starts from its state, additive attention."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 14), nn.Embedding(36, 16)
        self.encoder, self.decoder = nn.GRU(14, 22, batch_first=True), nn.GRU(16, 22, batch_first=True)
        self.w, self.u, self.v = nn.Linear(22, 18, bias=False), nn.Linear(22, 18), nn.Linear(18, 1, bias=False)
        self.out = nn.Linear(44, 36)

    def forward(self, source: Tensor, target: Tensor) -> Any:
        memory, state = self.encoder(self.source(source))
        y, _ = self.decoder(self.target(target), state)
        energy = self.v(torch.tanh(self.w(y).unsqueeze(2) + self.u(memory).unsqueeze(1))).squeeze(-1)
        return self.out(torch.cat([y, torch.bmm(energy.softmax(-1), memory)], dim=-1))


def wavenet() -> nn.Module:
    return WaveNet()


def tcn() -> nn.Module:
    return Tcn()


def speech_encoder() -> nn.Module:
    return SpeechEncoder()


def conformer() -> nn.Module:
    return Conformer()


def codec() -> nn.Module:
    return Seanet()


def keyword_spotting() -> nn.Module:
    """M5: a root Sequential of 1-D convolutions, batch norms and pools."""
    return nn.Sequential(
        nn.Conv1d(1, 14, 16, 4), nn.BatchNorm1d(14), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(14, 26, 3),
        nn.BatchNorm1d(26), nn.ReLU(), nn.AvgPool1d(2), nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(78, 8),
    )  # fmt: skip


def c3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(12, 20, 3, padding=1), nn.ReLU(),
        nn.MaxPool3d(2), nn.Flatten(), nn.Linear(20 * 4 * 9, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 8),
    )  # fmt: skip


def r2plus1d() -> nn.Module:
    head = [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 8)]
    return nn.Sequential(R2Plus1(3, 10, 16, 2), R2Plus1(16, 18, 16), R2Plus1(16, 22, 32, 2), *head)


def slowfast() -> nn.Module:
    return SlowFast()


def temporal_shift() -> nn.Module:
    return Shift()


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM(18, 24, batch_first=True), 24)


def lstm_deep() -> nn.Module:
    return Recurrent(nn.LSTM(18, 20, 2, batch_first=True, dropout=0.1), 20)


def lstm_bidirectional() -> nn.Module:
    return Recurrent(nn.LSTM(18, 16, 2, batch_first=True, bidirectional=True), 32)


def lstm_projected() -> nn.Module:
    return Recurrent(nn.LSTM(18, 28, batch_first=True, proj_size=12), 12)


def lstm_state() -> nn.Module:
    return LastState()


def gru() -> nn.Module:
    return Recurrent(nn.GRU(18, 22, batch_first=True, bias=False), 22)


def gru_bidirectional() -> nn.Module:
    return Recurrent(nn.GRU(18, 14, batch_first=True, bidirectional=True), 28)


def rnn_relu() -> nn.Module:
    return Recurrent(nn.RNN(18, 26, 2, nonlinearity="relu", batch_first=True), 26)


def cell_loop() -> nn.Module:
    return CellLoop()


def lstm_by_hand() -> nn.Module:
    return HandCell()


def crnn() -> nn.Module:
    return Crnn()


def seq2seq() -> nn.Module:
    return Seq2Seq()


WORDS = ids(50, (3, 7))
STEPS = floats((3, 6, 7))
VIDEO = floats((2, 3, 8, 12, 12))
TABLE: Table = {
    wavenet: floats((2, 1, 20)),
    tcn: floats((2, 5, 15)),
    speech_encoder: floats((2, 1, 120)),
    conformer: floats((2, 11, 28)),
    codec: floats((2, 1, 32)),
    keyword_spotting: floats((2, 1, 200)),
    c3d: VIDEO,
    r2plus1d: VIDEO,
    slowfast: VIDEO,
    temporal_shift: floats((2, 4, 3, 16, 16)),
    lstm: WORDS,
    lstm_deep: WORDS,
    lstm_bidirectional: WORDS,
    lstm_projected: WORDS,
    lstm_state: STEPS,
    gru: WORDS,
    gru_bidirectional: WORDS,
    rnn_relu: WORDS,
    cell_loop: STEPS,
    lstm_by_hand: STEPS,
    crnn: floats((2, 1, 16, 24)),
    seq2seq: joined(ids(40, (2, 7)), ids(36, (2, 5))),
}
