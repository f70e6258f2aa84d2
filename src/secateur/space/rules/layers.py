"""Rules of neural network operators: convolutions, norms, pools, recurrent layers, pixel shuffles."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import fx

from secateur.space.dims import Term, Var, add_role, concat, freeze, is_live, narrow, product, resolve, size_of, unify
from secateur.space.flow import Flow, Value, Work, module_of, op_name, shape_of
from secateur.space.rules.base import argument, fixed, note_read, one, where

# --- convolutions ---


def convolution(flow: Flow, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, *_: Any) -> Value:
    """[batch, channels, space...] with weight [out, in / groups, kernel...]; each group reads its own inputs."""
    groups = argument(node, "groups", 6, 1)
    return _convolve(flow, node, x, weight, bias, groups, transposed=False)


def conv_transpose(flow: Flow, node: fx.Node, x: Value, weight: Value, bias: Value | None = None, *_: Any) -> Value:
    """As `convolution`, with weight [in, out / groups, kernel...]."""
    return _convolve(flow, node, x, weight, bias, argument(node, "groups", 6, 1), transposed=True)


def convolution_general(flow: Flow, node: fx.Node, x: Value, weight: Value, bias: Value | None, *_: Any) -> Value:
    """``aten.convolution``: either of the two."""
    return _convolve(flow, node, x, weight, bias, int(str(node.args[8])), transposed=bool(node.args[6]))


def _convolve(
    flow: Flow, node: fx.Node, x: Value, weight: Value, bias: Value | None, groups: int, *, transposed: bool
) -> Value:
    reason = f"{where(node)}: its channels cannot be cut alike"
    batched = len(x.dims) == len(weight.dims)
    channels = x.dims[1 if batched else 0]
    stored_in, stored_out = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    shape = shape_of(node.meta["val"])
    if groups == 1:
        unify(channels, stored_in, reason)
        out = resolve(stored_out)
    else:
        group = Var(groups)
        flow.note_literals(node, [groups], [group], "groups")
        whole, part = (stored_in, stored_out) if transposed else (stored_out, stored_in)
        own = Var(size_of(whole) // groups) if size_of(whole) > groups else one(node)
        unify(whole, product([group, own]), reason)
        beside = product([group, part])
        if transposed:
            unify(channels, whole, reason)
            out = beside
        else:
            unify(channels, beside, reason)
            out = resolve(whole)
    if bias is not None:
        unify(bias.dims[0], out, f"{where(node)}: its bias cannot be cut")
    for term in (channels, out):
        add_role(term, "channels")
    for dim in weight.dims[2:]:
        freeze(dim, "the kernel of a convolution")
    for dim in x.dims[2 if batched else 1 :]:
        freeze(dim, f"{where(node)}: space")
    note_read(flow, node, weight, 0 if transposed else 1, 1 if transposed else 0)
    space = tuple(fixed(node, n) for n in shape[2 if batched else 1 :])
    lead = (*x.dims[:1], resolve(out)) if batched else (resolve(out),)
    spread = x.dims[2 if batched else 1 :] if transposed else space
    flow.work.append(
        Work(module_of(node), (*lead, resolve(stored_out if transposed and groups > 1 else stored_in)),
             prod(size_of(d) for d in (*spread, *weight.dims[2:])))
    )  # fmt: skip
    return Value((*lead, *space))


# --- norms ---


def batch_norm(
    flow: Flow, node: fx.Node, x: Value, weight: Value | None, bias: Value | None, mean: Value | None,
    var: Value | None, training: bool, *_: Any,
) -> Value:  # fmt: skip
    """Each channel by itself; statistics of the batch are taken over everything else."""
    return _per_channel(flow, node, x, (weight, bias, mean, var), over_batch=training)


def instance_norm(
    flow: Flow, node: fx.Node, x: Value, weight: Value | None = None, bias: Value | None = None,
    mean: Value | None = None, var: Value | None = None, *_: Any,
) -> Value:  # fmt: skip
    """Each channel of each sample by itself."""
    return _per_channel(flow, node, x, (weight, bias, mean, var), over_batch=True)


def _per_channel(flow: Flow, node: fx.Node, x: Value, beside: Sequence[Any], *, over_batch: bool) -> Value:
    for parameter in beside:
        if isinstance(parameter, Value):
            unify(x.dims[1], parameter.dims[0], f"{where(node)}: its parameters cannot be cut")
    for dim in x.dims[2:] if over_batch else ():
        freeze(dim, f"{where(node)}: every unit counts in its statistics")
    return Value(tuple(resolve(d) for d in x.dims))


def group_norm(
    flow: Flow, node: fx.Node, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Statistics over the channels of a group: each group must keep the same number."""
    reason = f"{where(node)}: its groups cannot be cut alike"
    channels = x.dims[1]
    for parameter in (weight, bias):
        if isinstance(parameter, Value):
            unify(channels, parameter.dims[0], f"{where(node)}: its parameters cannot be cut")
    if groups == 1:
        within: Term = resolve(channels)
    else:
        group = Var(groups)
        within = Var(size_of(channels) // groups) if size_of(channels) > groups else one(node)
        unify(channels, product([group, within]), reason)
        flow.note_literals(node, [groups], [group], "groups")
        add_role(within, "grouped")
    if is_live(within):
        flow.norms.append((module_of(node), within))
    return Value(tuple(resolve(d) for d in x.dims))


def prelu(flow: Flow, node: fx.Node, x: Value, weight: Value) -> Value:
    """A slope for each channel, or one for all."""
    if size_of(weight.dims[0]) != 1:
        unify(x.dims[1 if len(x.dims) > 1 else 0], weight.dims[0], f"{where(node)}: its slopes cannot be cut")
    return Value(tuple(resolve(d) for d in x.dims))


def weight_norm(flow: Flow, node: fx.Node, direction: Value, length: Value, dim: int = 0) -> Value:
    """``g * v / |v|``, the norm taken over all dimensions but one."""
    axis = dim % len(direction.dims)
    unify(direction.dims[axis], length.dims[axis] if len(length.dims) > 1 else length.dims[0], where(node))
    for i, other in enumerate(direction.dims):
        if i != axis and is_live(other):
            flow.norms.append((module_of(node), other))
    return Value(tuple(resolve(d) for d in direction.dims), direction.source)


# --- space ---


def spatial(count: int) -> Any:
    """A rule for what works on each channel by itself: the last `count` dimensions change, the others pass."""

    def rule(_: Flow, node: fx.Node, x: Value, *__: Any, **___: Any) -> Any:
        metas = node.meta["val"]
        for dim in x.dims[-count:]:
            freeze(dim, f"{where(node)}: space")

        def result(meta: Any) -> Value:
            return Value((*x.dims[:-count], *(fixed(node, n) for n in shape_of(meta)[-count:])))

        return [result(m) for m in metas] if isinstance(metas, list | tuple) else result(metas)

    return rule


def pad(_: Flow, node: fx.Node, x: Value, widths: Sequence[int], *__: Any, **___: Any) -> Value:
    """What is padded with becomes segments that stay; dimensions without padding pass."""
    shape = shape_of(node.meta["val"])
    dims: list[Term] = list(x.dims)
    constant = len(node.args) < 3 or node.args[2] == "constant" or isinstance(node.args[2], int | float)
    for i in range(len(widths) // 2):
        axis = len(dims) - 1 - i
        before, after = widths[2 * i], widths[2 * i + 1]
        if before == after == 0:
            continue
        if not is_live(dims[axis]) or min(before, after) < 0 or not constant:
            freeze(dims[axis], f"{where(node)}: padded with its own units")
            dims[axis] = fixed(node, shape[axis])
        else:
            parts = [fixed(node, before), dims[axis], fixed(node, after)]
            dims[axis] = concat([p for p, n in zip(parts, (before, 1, after), strict=True) if n])
    return Value(tuple(dims))


def pixel_shuffle(flow: Flow, node: fx.Node, x: Value, factor: int) -> Value:
    """[.., C*r*r, H, W] -> [.., C, H*r, W*r]."""
    *lead, channels, _, _ = x.dims
    *_, height, width = shape_of(node.meta["val"])
    out = Var(size_of(channels) // factor**2)
    unify(channels, product([out, Var(factor**2, frozen=where(node))]), f"{where(node)}: channels and space mix")
    return Value((*lead, resolve(out), fixed(node, height), fixed(node, width)))


def pixel_unshuffle(flow: Flow, node: fx.Node, x: Value, factor: int) -> Value:
    """[.., C, H*r, W*r] -> [.., C*r*r, H, W]."""
    *lead, channels, _, _ = x.dims
    *_, height, width = shape_of(node.meta["val"])
    out = product([channels, Var(factor**2, frozen=where(node))])
    return Value((*lead, out, fixed(node, height), fixed(node, width)))


def channel_shuffle(flow: Flow, node: fx.Node, x: Value, groups: int) -> Value:
    """[B, g*c, ...] -> [B, c*g, ...]."""
    group, rest = Var(groups), Var(size_of(x.dims[1]) // groups)
    unify(x.dims[1], product([group, rest]), f"{where(node)}: its groups cannot be cut alike")
    flow.note_literals(node, [groups], [group], "groups")
    return Value((x.dims[0], product([rest, group]), *x.dims[2:]))


def im2col(_: Flow, node: fx.Node, x: Value, kernel: Sequence[int], *__: Any) -> Value:
    """[B, C, H, W] -> [B, C*kh*kw, positions]."""
    patches = product([x.dims[-3], Var(prod(kernel), frozen=where(node))])
    return Value((*x.dims[:-3], patches, fixed(node, shape_of(node.meta["val"])[-1])))


def col2im(_: Flow, node: fx.Node, x: Value, size: Sequence[int], kernel: Sequence[int], *__: Any) -> Value:
    """[B, C*kh*kw, positions] -> [B, C, H, W]."""
    channels = Var(size_of(x.dims[-2]) // prod(kernel))
    unify(x.dims[-2], product([channels, Var(prod(kernel), frozen=where(node))]), where(node))
    return Value((*x.dims[:-2], resolve(channels), *(fixed(node, n) for n in shape_of(node.meta["val"])[-2:])))


def unfold(_: Flow, node: fx.Node, x: Value, dim: int, *__: Any) -> Value:
    """Windows over one dimension, in a new last one."""
    axis = dim % len(x.dims)
    freeze(x.dims[axis], f"{where(node)}: windows over its units")
    shape = shape_of(node.meta["val"])
    return Value((*x.dims[:axis], fixed(node, shape[axis]), *x.dims[axis + 1 :], fixed(node, shape[-1])))


def glu(_: Flow, node: fx.Node, x: Value, dim: int = -1) -> Value:
    """The first half times the sigmoid of the second: the halves are cut alike."""
    axis = dim % len(x.dims)
    half = size_of(x.dims[axis]) // 2
    first, second = (
        narrow(x.dims[axis], a, a + half, f"{where(node)}: halves across its units") for a in (0, half)
    )  # fmt: skip
    unify(first, second, f"{where(node)}: its halves cannot be cut alike")
    return Value((*x.dims[:axis], resolve(first), *x.dims[axis + 1 :]))


# --- recurrent ---

_GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}


def recurrent(
    flow: Flow, node: fx.Node, x: Value, state: Any, weights: Sequence[Value], has_biases: bool, layers: int,
    _: float, __: bool, bidirectional: bool, batch_first: bool,
) -> list[Value]:  # fmt: skip
    """LSTM, GRU, RNN: weights [gates * hidden, in] and [gates * hidden, hidden] for each layer and direction."""
    reason = f"{where(node)}: its layers cannot be cut alike"
    states: list[Value] = list(state) if isinstance(state, list) else [state]
    gates = Var(_GATES[op_name(node)], frozen="the gates of a recurrent layer")
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    projected = each == (5 if has_biases else 3)
    positions = prod(size_of(d) for d in x.dims[:-1])
    features: Term = x.dims[-1]
    for layer in range(layers):
        outs: list[Term] = []
        for direction in range(directions):
            own = weights[(layer * directions + direction) * each :][:each]
            hidden = Var(size_of(own[0].dims[0]) // gates.size)
            for weight in own[: each - projected]:
                unify(weight.dims[0], product([gates, hidden]), reason)
            unify(own[0].dims[1], features, reason)
            out: Term = hidden if not projected else own[-1].dims[0]
            if projected:
                unify(own[-1].dims[1], hidden, reason)
                note_read(flow, node, own[-1], 1, 0)
            unify(own[1].dims[1], out, reason)
            for held, term in zip(states, (out, hidden), strict=False):
                unify(held.dims[-1], term, f"{where(node)}: the state that it starts with cannot be cut")
            for weight in own[:2]:
                note_read(flow, node, weight, 1, 0)
                flow.work.append(Work(module_of(node), weight.dims, positions))
            outs.append(resolve(out))
        features = concat(outs) if directions > 1 else outs[0]
    shapes = [shape_of(meta) for meta in node.meta["val"]]
    ends = [Value((*(fixed(node, n) for n in s[:-1]), v.dims[-1])) for s, v in zip(shapes[1:], states, strict=True)]
    return [Value((*x.dims[:-1], features)), *ends]


def layer_norm(
    flow: Flow, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    *_: Any,
) -> Value:  # fmt: skip
    """Layer and RMS norm over the last dimensions; parameters go with what is normalised."""
    last = x.dims[-len(shape) :]
    for parameter in (weight, bias):
        if isinstance(parameter, Value):
            for own, dim in zip(parameter.dims, last, strict=True):
                unify(dim, own, f"{where(node)}: its parameters cannot be cut")
    flow.norms += [(module_of(node), dim) for dim in last if len(shape) == 1 or is_live(dim)]
    flow.note_literals(node, shape, last)
    return Value(tuple(resolve(d) for d in x.dims))
