"""Small plain modules, cut in half in float64, equal the zeroed originals; what cannot be followed is frozen."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.choose.cost import costs
from secateur.choose.plan import Kept, Plan
from secateur.cut import apply, prove
from secateur.errors import SecateurError
from secateur.space import Space, discover
from secateur.space.dims import (
    Var,
)

WHY = "because"


def var(size: int) -> Var:
    return Var(size)


# --- small plain modules ----------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 22), nn.Linear(22, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(functional.gelu(self.mid(functional.silu(self.up(x)))))


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 22
        self.both, self.down = nn.Linear(6, 44), nn.Linear(22, 3)

    def forward(self, x: torch.Tensor) -> Any:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


class FlatGlu(Glu):
    """The halves told apart by a view."""

    def forward(self, x: torch.Tensor) -> Any:
        both = self.both(x).view(x.shape[0], x.shape[1], 2, self.width)
        return self.down(functional.silu(both[..., 0, :]) * both[..., 1, :])


class FusedAttention(nn.Module):
    def __init__(self, *, scale: float | None = 0.5) -> None:
        super().__init__()
        self.scale, self.heads = scale, 5
        self.qkv, self.out = nn.Linear(6, 3 * 5 * 4), nn.Linear(5 * 4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (y.reshape(batch, length, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class GroupedAttention(nn.Module):
    """Three key-value heads for twelve query heads, the keys repeated one way or the other."""

    def __init__(self, repeat: str) -> None:
        super().__init__()
        self.repeat, self.times, self.width = repeat, 4, 6
        self.q, self.k, self.v = nn.Linear(5, 72), nn.Linear(5, 18), nn.Linear(5, 18)
        self.out = nn.Linear(72, 2)

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.width).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.repeat == "interleave":
            k, v = (y.repeat_interleave(self.times, 1) for y in (k, v))
        elif self.repeat == "expand":
            k, v = (
                y[:, :, None].expand(-1, -1, self.times, -1, -1).reshape(batch, -1, length, self.width) for y in (k, v)
            )
        native = self.repeat == "native"
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=native)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Addmm(nn.Module):
    """Weights as [in, out], as in Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 22)), nn.Parameter(torch.randn(22, 3))
        self.up_bias, self.down_bias = nn.Parameter(torch.randn(22)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.flatten(0, 1)
        return torch.addmm(self.down_bias, torch.tanh(torch.addmm(self.up_bias, flat, self.up)), self.down)


class Bare(nn.Module):
    """The same with `@`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 22)), nn.Parameter(torch.randn(22, 3))
        self.up_bias = nn.Parameter(torch.randn(22))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.tanh(x @ self.up + self.up_bias) @ self.down


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(37, 14), nn.Linear(14, 22), nn.Linear(22, 14)
        self.head = nn.Linear(14, 37, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        return self.head(x + self.down(functional.gelu(self.up(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 14
        self.into, self.a, self.b, self.out = nn.Linear(6, 14), nn.Linear(14, 9), nn.Linear(9, 14), nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.into(x)
        x = x + self.b(functional.relu(self.a(x)))
        return self.out(torch.cat([x.tanh(), x], -1)[..., : self.width] + x)


X = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(10).reshape(2, 5)
PLAIN: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "mlp": (Mlp, {"x": X}, {"up.ffn": 22, "mid.ffn": 10}),
    "glu": (Glu, {"x": X}, {"both.ffn": 22}),
    "glu by a view": (FlatGlu, {"x": X}, {"both.ffn": 22}),
    "fused attention": (FusedAttention, {"x": X}, {"qkv.heads": 5, "qkv.head_dim": 4}),
    **{
        f"grouped, {how}": (
            lambda how=how: GroupedAttention(how),
            {"x": X[..., :5]},
            {"kv_groups": 3, "heads": 12, "head_dim": 6},
        )
        for how in ("interleave", "expand", "native")
    },
    "addmm": (Addmm, {"x": X}, {"ffn": 22}),
    "bare parameters": (Bare, {"x": X}, {"ffn": 22}),
    "tied": (Tied, {"ids": IDS}, {"down.ffn": 14, "up.ffn": 22}),
    "residual": (Residual, {"x": X}, {"into.ffn": 14, "a.ffn": 9}),
}


def build(make: Any) -> Any:
    torch.manual_seed(3)
    return make().double().eval()


def cut_half(space: Space, axis_name: str) -> Plan:
    axis = space.axis(axis_name)
    generator = torch.Generator().manual_seed(axis.size)
    units: list[int] = []
    for group in range(axis.groups):
        order = torch.randperm(axis.per_group, generator=generator)[: max(1, axis.per_group // 2)]
        units += (order + group * axis.per_group).tolist()
    return Plan({axis.name: Kept(axis.kind, axis.size, tuple(sorted(units)))})


def zeroed_everywhere(model: Any, space: Space, plan: Plan) -> Any:
    """The dense module with the removed rows of every tensor at zero: activations of zero, read with zero."""
    reference = copy.deepcopy(model)
    parameters = dict(reference.named_parameters())
    for name, kept in plan.kept.items():
        axis = space.axis(name)
        gone = torch.tensor([u for u in range(axis.size) if u not in kept.units])
        for part in axis.slices:
            with torch.no_grad():
                parameters[part.parameter].index_fill_(part.dim, part.rows()[gone].flatten(), 0)
    return reference


@pytest.mark.parametrize("name", PLAIN)
def test_axes_of_plain_modules(name: str) -> None:
    make, inputs, expected = PLAIN[name]
    space = discover(build(make), inputs)
    assert {a.kind if name.startswith(("grouped", "addmm", "bare")) else a.name: a.size for a in space.axes} == expected
    for axis in space.axes:
        if axis.kind == "heads" and name.startswith("grouped"):
            assert (axis.groups, axis.parent) == (3, space.of_kind("kv_groups")[0].name)


@pytest.mark.parametrize("name", PLAIN)
def test_cut_plain_modules_equal_the_zeroed_ones(name: str) -> None:
    make, inputs, _ = PLAIN[name]
    model = build(make)
    space = discover(model, inputs)
    with torch.no_grad():
        dense = model(**inputs)
        for axis in space.axes:
            plan = cut_half(space, axis.name)
            new = apply(model, plan, space=space, inputs=inputs)
            expected = zeroed_everywhere(model, space, plan)(**inputs)
            assert float((new(**inputs) - expected).abs().max()) <= 1e-9, axis.name
            assert float((new(**inputs) - dense).abs().max()) > 1e-3, axis.name
            assert sum(p.numel() for p in new.parameters()) == costs(space, plan).params


def test_tied_weights_share_storage_after_the_cut() -> None:
    model = build(Tied)
    space = discover(model, {"ids": IDS})
    new: Any = apply(model, cut_half(space, "down.ffn"), space=space, inputs={"ids": IDS})
    assert new.head.weight is new.table.weight
    assert new.table.weight.shape == (37, 7)
    assert new.table.embedding_dim == new.head.in_features == 7


def test_default_scale_of_attention_is_not_changed_in_silence() -> None:
    """Without `scale`, torch divides by the square root of the head dimension: cutting it changes the result."""
    model = build(lambda: FusedAttention(scale=None))
    space = discover(model, {"x": X})
    for axis in space.of_kind("head_dim"):
        plan = cut_half(space, axis.name)
        try:
            new = apply(model, plan, space=space, inputs={"x": X})
        except SecateurError:
            continue
        expected = zeroed_everywhere(model, space, plan)(X)
        assert float((new(X) - expected).detach().abs().max()) <= 1e-9


class Odd(nn.Module):
    """Two projections with something in between."""

    def __init__(self, between: Any, width: int = 14, out: int = 14) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(6, width), nn.Linear(out, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.between(self.first(x)))


MIX = torch.randn(14, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FREEZING: dict[str, tuple[Any, str]] = {
    "einsum": (lambda x: torch.einsum("bsi,ij->bsj", x, MIX.to(x.device)), "written out in the code"),
    "kron": (lambda x: torch.kron(x, torch.ones(1, 1, 1, dtype=x.dtype)), "no rule for this operator"),
    "cumsum": (lambda x: x.cumsum(-1), "cumsum"),
    "sort": (lambda x: x.sort(-1).values, "sort"),
    "flip": (lambda x: x.flip(-1), "flip"),
    "roll": (lambda x: x.roll(1, -1), "roll"),
    "index": (lambda x: x[..., torch.arange(13, -1, -1)], "index"),
    "softmax": (lambda x: x.softmax(-1), "every unit depends on every other"),
    "every third": (lambda x: torch.cat([x[..., ::3], x[..., 1::3], x[..., 2::3]], -1), "every 3th unit"),
    "unbind": (lambda x: torch.stack(x.unbind(-1), -1), "taken apart"),
    "sum": (lambda x: x - x.sigmoid().sum(-1, keepdim=True), "makes something of zeros"),
    "amax": (lambda x: x - x.amax(-1, keepdim=True), "amax"),
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_cannot_be_followed_is_frozen_with_a_reason(name: str) -> None:
    between, reason = FREEZING[name]
    space = discover(build(lambda: Odd(between)), {"x": X})
    assert space.axes == ()
    reasons = [f.reason for f in space.frozen if (f.parameter, f.dim) == ("first.weight", 0)]
    assert any(reason in r for r in reasons), reasons
    assert any((f.parameter, f.dim) == ("second.weight", 1) for f in space.frozen)


FOLLOWED: dict[str, tuple[Any, int]] = {
    "every second": (lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1), 7),  # pairs go together
    "sum": (lambda x: x - x.sum(-1, keepdim=True), 14),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_is_cut(name: str) -> None:
    between, size = FOLLOWED[name]
    model = build(lambda: Odd(between))
    space = discover(model, {"x": X})
    (axis,) = space.axes
    assert axis.size == size
    plan = cut_half(space, axis.name)
    new = apply(model, plan, space=space, inputs={"x": X})
    assert float((new(X) - zeroed_everywhere(model, space, plan)(X)).detach().abs().max()) <= 1e-9


def test_einsum_with_a_parameter_is_a_contraction() -> None:
    class Einsum(Odd):
        def __init__(self) -> None:
            super().__init__(None, out=9)
            self.middle = nn.Parameter(torch.randn(14, 9))

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(torch.einsum("bsi,ij->bsj", self.first(x), self.middle))

    model = build(Einsum)
    space = discover(model, {"x": X})
    assert sorted(axis.size for axis in space.axes) == [9, 14]
    assert ("middle", 0, 1) in {(r.parameter, r.in_dim, r.out_dim) for r in space.readers}
    for axis in space.axes:
        plan = cut_half(space, axis.name)
        new = apply(model, plan, space=space, inputs={"x": X})
        assert float((new(X) - zeroed_everywhere(model, space, plan)(X)).detach().abs().max()) <= 1e-9


def test_inputs_and_outputs_are_frozen() -> None:
    frozen = {(f.parameter, f.dim): f.reason for f in discover(build(Mlp), {"x": X}).frozen}
    assert frozen["up.weight", 1] == "an input of the model"
    assert frozen["down.weight", 0] == frozen["down.bias", 0] == "an output of the model"


class Branching(nn.Module):
    """Its code looks at the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 14), nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(x)
        if y.sum() > 0:  # where the trace stops
            y = y * 2
        return self.down(y)


def test_what_stops_a_trace_is_named_with_the_line_and_a_way_out() -> None:
    with pytest.raises(SecateurError, match=r"test_plain_modules\.py:\d+ \(if y\.sum\(\) > 0.*torch\.where"):
        discover(build(Branching), {"x": X})


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 5, dtype=torch.float64), (torch.zeros(2, 3, 7, dtype=torch.float64),)]
)
def test_inputs_that_do_not_fit_are_said_to(inputs: Any) -> None:
    with pytest.raises(SecateurError, match="do not fit"):
        discover(build(Mlp), inputs)


def test_inputs_may_be_a_tensor_a_tuple_or_names() -> None:
    model = build(Mlp)
    found = [discover(model, inputs) for inputs in (X, (X,), {"x": X})]
    assert [a.name for a in found[0].axes] == [a.name for a in found[1].axes] == [a.name for a in found[2].axes]
    with pytest.raises(SecateurError, match="inputs must be a tensor"):
        discover(model, 3)  # type: ignore[arg-type]


class Scaled(nn.Module):
    """Works a scale out of the size of its heads: cutting them would change it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (f(x).view(*x.shape[:2], 3, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_a_trial_cut_freezes_what_code_does_not_follow() -> None:
    model, inputs = build(Scaled), torch.randn(2, 5, 12, dtype=torch.float64)
    assert "head_dim" in discover(model, inputs).kinds()
    proved = prove.discover(model, inputs)
    assert "head_dim" not in proved.kinds()
    assert any("trial cut failed" in f.reason and "constant" in f.reason for f in proved.frozen)
    assert all(names == () or "head_dim" not in " ".join(names) for p in proved.parameters.values() for names in p.size)
