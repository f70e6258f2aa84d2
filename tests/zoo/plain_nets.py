"""Tables, recommendations, points, graphs and control."""

from collections import OrderedDict
from typing import Any

import torch
from plain_parts import Table, floats, ids, joined, keywords
from torch import Tensor, nn
from torch.nn import functional


class Highway(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        gate = torch.sigmoid(self.gate(x))
        return gate * torch.relu(self.transform(x)) + (1 - gate) * x


class Maxout(nn.Module):
    """The largest of k projections."""

    def __init__(self, i: int, o: int, pieces: int) -> None:
        super().__init__()
        self.pieces, self.fc = pieces, nn.Linear(i, o * pieces)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x).view(x.shape[0], -1, self.pieces).max(dim=-1).values


class Polynomials(nn.Module):
    """A KAN-like layer: Chebyshev features of every input, contracted with coefficients [in, out, degree]."""

    def __init__(self, i: int, o: int, degree: int) -> None:
        super().__init__()
        self.degree, self.coefficients = degree, nn.Parameter(torch.randn(i, o, degree + 1) * 0.2)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(x)
        terms = [torch.ones_like(x), x]
        for _ in range(2, self.degree + 1):
            terms.append(2 * x * terms[-1] - terms[-2])
        return torch.einsum("bid,iod->bo", torch.stack(terms, dim=-1), self.coefficients)


class Dlrm(nn.Module):
    """Bags of words and dense features, their dot products, an MLP on top."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(7, 26), nn.ReLU(), nn.Linear(26, 12), nn.ReLU())
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, 12, mode="sum") for n in (30, 41, 23))
        self.top = nn.Sequential(nn.Linear(12 + 6, 34), nn.ReLU(), nn.Linear(34, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, bags: Tensor) -> Any:
        x = self.bottom(dense)
        rows = [table(bags[:, n]) for n, table in enumerate(self.tables)]
        joined = torch.cat([x, *rows], dim=1).view(x.shape[0], -1, x.shape[1])
        dots = torch.bmm(joined, joined.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, dots[:, i, j]], dim=1))


class WideDeep(nn.Module):
    """Embeddings side by side into an MLP, a linear model and a factorisation machine beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, w) for n, w in ((20, 10), (30, 10), (25, 10)))
        self.wide, self.deep = nn.Linear(6, 1), nn.Sequential(nn.Linear(36, 44), nn.ReLU(), nn.BatchNorm1d(44))
        self.last = nn.Sequential(nn.Dropout(0.1), nn.Linear(44, 28), nn.ReLU(), nn.Linear(28, 1))

    def forward(self, numbers: Tensor, classes: Tensor) -> Any:
        rows = torch.stack([table(classes[:, n]) for n, table in enumerate(self.tables)], 1)
        pairs = 0.5 * (rows.sum(1).pow(2) - rows.pow(2).sum(1)).sum(1, keepdim=True)
        deep = self.last(self.deep(torch.cat([numbers, rows.flatten(1)], 1)))
        return torch.sigmoid(self.wide(numbers) + pairs + deep)


class TwoTower(nn.Module):
    """Users and items; cosine similarity; the item's table is a mean of bags."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.bag = nn.Embedding(40, 18), nn.EmbeddingBag(50, 14, mode="mean")
        self.left = nn.Sequential(nn.Linear(18, 30), nn.SELU(), nn.Linear(30, 16))
        self.right = nn.Sequential(nn.Linear(14, 26), nn.SELU(), nn.Linear(26, 16))

    def forward(self, users: Tensor, items: Tensor) -> Any:
        a, b = self.left(self.user(users)), self.right(self.bag(items))
        return functional.cosine_similarity(a, b), torch.mm(a, b.t())


class Siamese(nn.Module):
    """One net for both inputs; the distance of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 14, 5, 2), nn.ReLU(), nn.Conv2d(14, 22, 3, 2), nn.ReLU(), nn.Flatten())
        self.fc, self.out = nn.Linear(22 * 4, 20), nn.Linear(20, 1)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        a, b = self.fc(self.net(a)), self.fc(self.net(b))
        return self.out(torch.abs(a - b)), functional.pairwise_distance(a, b)


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(6, 14), nn.Linear(7, 18), nn.Bilinear(14, 18, 11)
        self.out = nn.Linear(11, 3)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.out(torch.relu(self.both(torch.tanh(self.a(a)), torch.tanh(self.b(b)))))


class Gcn(nn.Module):
    """Graph convolution over a dense adjacency, bare weights, normalised in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1, self.bias1 = nn.Parameter(torch.randn(9, 22) * 0.3), nn.Parameter(torch.zeros(22))
        self.weight2, self.bias2 = nn.Parameter(torch.randn(22, 4) * 0.3), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, adjacency: Tensor) -> Any:
        adjacency = adjacency.abs() + torch.eye(adjacency.shape[0], dtype=x.dtype)
        adjacency = adjacency / adjacency.sum(1, keepdim=True)
        x = functional.relu(torch.spmm(adjacency, torch.mm(x, self.weight1)) + self.bias1)
        return functional.log_softmax(adjacency @ (x @ self.weight2) + self.bias2, dim=1)


class GatLayer(nn.Module):
    """Attention over neighbours: a score that is a sum of two, per head."""

    def __init__(self, i: int, heads: int, o: int) -> None:
        super().__init__()
        self.heads, self.o = heads, o
        self.w = nn.Linear(i, heads * o, bias=False)
        self.a_source, self.a_target = nn.Parameter(torch.randn(heads, o)), nn.Parameter(torch.randn(heads, o))

    def forward(self, x: Tensor, near: Tensor) -> Any:
        h = self.w(x).view(-1, self.heads, self.o)
        source, target = (h * self.a_source).sum(-1), torch.einsum("nho,ho->nh", h, self.a_target)
        scores = functional.leaky_relu(source.unsqueeze(1) + target.unsqueeze(0), 0.2)
        weights = scores.masked_fill(~near.unsqueeze(-1), -1e9).softmax(dim=1)
        return torch.einsum("ijh,jho->iho", weights, h).flatten(1)


class Gat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2, self.fc = GatLayer(9, 3, 8), GatLayer(24, 2, 7), nn.Linear(14, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Any:
        near = (adjacency + adjacency.t()) > -0.5
        return self.fc(functional.elu(self.layer2(functional.elu(self.layer1(x, near)), near)))


class MessagePassing(nn.Module):
    """Edges as lists: gather the ends, an MLP over both, a sum into the target by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message = nn.Linear(9, 16), nn.Sequential(nn.Linear(32, 26), nn.ReLU(), nn.Linear(26, 18))
        self.update, self.out = nn.GRUCell(18, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        h = self.embed(x)
        for _ in range(2):
            sent = self.message(torch.cat([h[edges[0]], h.index_select(0, edges[1])], -1))
            got = torch.zeros(h.shape[0], sent.shape[1], dtype=h.dtype).index_add(0, edges[1], sent)
            h = self.update(got, h)
        return self.out(h)


class DeepSets(nn.Module):
    """An MLP per element, sum, mean and maximum over the set, a second MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(5, 24), nn.ELU(), nn.Linear(24, 18), nn.ELU())
        self.rho = nn.Sequential(nn.Linear(3 * 18, 22), nn.ELU(), nn.Linear(22, 3))

    def forward(self, x: Tensor) -> Any:
        x = self.phi(x)
        return self.rho(torch.cat([x.sum(1), x.mean(1), x.amax(dim=1)], -1))


class PointNet(nn.Module):
    """A small net predicts a 3 x 3 transform; local and global features are joined per point."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2, self.t3 = nn.Conv1d(3, 14, 1), nn.Conv1d(14, 24, 1), nn.Linear(24, 9)
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.conv3 = nn.Conv1d(16, 34, 1), nn.Conv1d(16 + 34, 26, 1)
        self.last = nn.Conv1d(26, 4, 1)

    def forward(self, x: Tensor) -> Any:
        batch, _, points = x.size()
        t = torch.max(functional.relu(self.t2(functional.relu(self.t1(x)))), 2, keepdim=True)[0]
        t = self.t3(t.view(batch, -1)).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        x = torch.bmm(x.transpose(2, 1), t).transpose(2, 1)
        local = functional.relu(self.bn1(self.conv1(x)))
        whole = torch.max(self.conv2(local), 2, keepdim=True)[0].expand(-1, -1, points)
        return self.last(functional.relu(self.conv3(torch.cat([local, whole], 1)))).transpose(2, 1).contiguous()


class RadianceField(nn.Module):
    """NeRF: features of positions, a skip in the middle, a density and a colour."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(15, 24), nn.Linear(24, 28), nn.Linear(28 + 15, 30)])
        self.alpha, self.feature = nn.Linear(30, 1), nn.Linear(30, 20)
        self.view, self.rgb = nn.Linear(23, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        places, views = torch.split(x, [3, 3], dim=-1)
        encoded = torch.cat([places, *(f(places * 2**n) for n in range(2) for f in (torch.sin, torch.cos))], -1)
        h = encoded
        for n, layer in enumerate(self.layers):
            h = functional.relu(layer(torch.cat([encoded, h], -1) if n == 2 else h))
        colour = functional.relu(self.view(torch.cat([self.feature(h), views], -1)))
        return torch.cat([self.rgb(colour), self.alpha(h)], -1)


class ActorCritic(nn.Module):
    """A trunk with several heads, one of them a duel; outputs in a tuple of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict(fc1=nn.Linear(8, 34), act1=nn.Tanh(), fc2=nn.Linear(34, 26), act2=nn.Tanh())
        )
        self.actor, self.value, self.advantage = nn.Linear(26, 4), nn.Linear(26, 1), nn.Linear(26, 4)
        self.log_std = nn.Parameter(torch.zeros(4))

    def forward(self, observation: Tensor) -> Any:
        x = self.trunk(observation)
        advantage = self.advantage(x)
        q = self.value(x) + advantage - advantage.mean(1, keepdim=True)
        # With `validate_args` left on, the distribution asks for values and no export can follow.
        policy = torch.distributions.Normal(self.actor(x), self.log_std.exp(), validate_args=False)
        return policy.mean, policy.scale, q, x.new_tensor(1.0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 34), nn.ReLU(), nn.Linear(34, 22), nn.LeakyReLU(), nn.Linear(22, 5))


def mlp_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(9, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 24), nn.BatchNorm1d(24, affine=False), nn.Tanh(),
        nn.AlphaDropout(0.1), nn.Linear(24, 5),
    )  # fmt: skip


def nested_sequential() -> nn.Module:
    first = nn.Sequential(
        nn.Linear(9, 26), nn.Sequential(nn.GELU(), nn.Linear(26, 18), nn.Sequential(nn.LayerNorm(18)))
    )
    return nn.Sequential(nn.Identity(), first, nn.Sequential(), nn.Sequential(nn.SiLU(), nn.Linear(18, 5)))


def highway() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 26), Highway(26), Highway(26), nn.Linear(26, 5))


def maxout() -> nn.Module:
    return nn.Sequential(Maxout(9, 22, 3), Maxout(22, 16, 2), nn.Linear(16, 5))


def kan() -> nn.Module:
    return nn.Sequential(Polynomials(9, 14, 3), nn.LayerNorm(14), Polynomials(14, 18, 2), Polynomials(18, 4, 3))


def dlrm() -> nn.Module:
    return Dlrm()


def wide_and_deep() -> nn.Module:
    return WideDeep()


def two_tower() -> nn.Module:
    return TwoTower()


def siamese() -> nn.Module:
    return Siamese()


def bilinear() -> nn.Module:
    return BilinearPair()


def gcn() -> nn.Module:
    return Gcn()


def gat() -> nn.Module:
    return Gat()


def message_passing() -> nn.Module:
    return MessagePassing()


def deep_sets() -> nn.Module:
    return DeepSets()


def pointnet() -> nn.Module:
    return PointNet()


def nerf() -> nn.Module:
    return RadianceField()


def actor_critic() -> nn.Module:
    return ActorCritic()


ROWS = floats((3, 9))
GRAPH = floats((6, 9), (6, 6))
TABLE: Table = {
    mlp: ROWS,
    mlp_batchnorm: ROWS,
    nested_sequential: ROWS,
    highway: ROWS,
    maxout: ROWS,
    kan: ROWS,
    dlrm: joined(floats((3, 7)), ids(23, (3, 3, 4))),
    wide_and_deep: joined(floats((3, 6)), ids(20, (3, 3))),
    two_tower: joined(ids(40, (3,)), ids(50, (3, 4))),
    siamese: floats((2, 1, 16, 16), (2, 1, 16, 16)),
    bilinear: keywords(a=floats((3, 6)), b=floats((3, 7))),
    gcn: GRAPH,
    gat: GRAPH,
    message_passing: joined(floats((6, 9)), ids(6, (2, 10))),
    deep_sets: floats((2, 8, 5)),
    pointnet: floats((2, 3, 15)),
    nerf: floats((11, 6)),
    actor_critic: floats((3, 8)),
}
