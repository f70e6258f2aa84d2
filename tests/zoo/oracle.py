"""The generic oracle: the dense model with the removed units zeroed, whose norms see the kept units alone.

It knows nothing of how the product finds axes: which units are gone is read off the values (exact zeros).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from outputs import outputs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.choose.plan import Plan
from secateur.space import Axis, Space

aten = torch.ops.aten
_FAR = -1e9  # the logit of an expert that is not there


class MismatchError(AssertionError):
    """The cut model is not the dense one with units taken away."""


def check(model: Any, cut: Any, space: Space, plan: Plan, inputs: Mapping[str, Any]) -> float:
    """Largest relative difference between the cut model and the oracle.

    Raises:
        MismatchError: the outputs differ, or the cut changed nothing at all.
    """
    want, precise = expected_outputs(model, space, plan, inputs)
    with torch.no_grad():
        got, dense = outputs(cut, inputs), outputs(model, inputs)
    if len(got) == len(want):  # hidden states beside the logits shrink with what they are made of
        beside = [i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a.shape[:-1] == b.shape[:-1]]
        same = [i for i in beside if got[i].shape == want[i].shape]
        if same:
            got, want, dense = ([x[i] for i in same] for x in (got, want, dense))
    if [tuple(x.shape) for x in got] != [tuple(x.shape) for x in want]:
        raise MismatchError(f"output shapes {[tuple(x.shape) for x in got]}, expected {[tuple(x.shape) for x in want]}")
    worst = 0.0
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if not bool(torch.isfinite(mine).eq(torch.isfinite(theirs)).all()):
            raise MismatchError(f"output {number} is not finite where it should be")
        finite = torch.isfinite(theirs)
        scale = float(theirs[finite].abs().max()) if finite.any() else 0.0
        error = float((mine - theirs)[finite].abs().max()) if finite.any() else 0.0
        worst = max(worst, error / (scale + 1e-12))
    if worst > (1e-8 if precise else 1e-4):
        raise MismatchError(f"outputs differ from the oracle by {worst:.1e} of their largest value")
    if all(torch.equal(a, b) for a, b in zip(want, dense, strict=True)):
        raise MismatchError("the oracle equals the dense model: the cut changes nothing")
    return worst


def expected_outputs(
    model: Any, space: Space, plan: Plan, inputs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], bool]:
    """What the cut model should return, and whether all of it was computed in float64."""
    reference = copy.deepcopy(model)
    tensors = {**dict(reference.named_buffers()), **dict(reference.named_parameters(remove_duplicate=False))}
    routers: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for name, kept in plan.kept.items():
            axis = space.axis(name)
            gone = torch.tensor([u for u in range(axis.size) if u not in set(kept.units)], dtype=torch.int64)
            _zero(axis, gone, tensors, routers)
    _drop(reference, space, plan)
    dense = _KeptOnly([])
    with torch.no_grad(), dense:
        outputs(model, inputs)
    mode = _KeptOnly(routers, dense.zeros)
    with torch.no_grad(), mode:
        result = outputs(reference, inputs)
    return result, not mode.imprecise


def _zero(
    axis: Axis,
    gone: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    routers: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    for part in axis.slices:
        tensor = tensors[part.parameter]
        rows = part.rows()[gone].flatten()
        biased = axis.kind == "experts" and tensor.dim() == 1
        tensor.index_fill_(part.dim, rows, _FAR if biased else 0)
        if axis.kind == "experts" and tensor.dim() == 2 and part.dim == 0 and part.inner == 1:
            routers.append((tensor, rows))


def _drop(reference: Any, space: Space, plan: Plan) -> None:
    for block in space.blocks:
        if block.name in plan.dropped:
            hook = _pass_through if block.kind == "layers" else _nothing
            reference.get_submodule(block.name).register_forward_hook(hook, with_kwargs=True)
            for idle in block.idle:
                reference.get_submodule(idle).register_forward_hook(_nothing, with_kwargs=True)


def _pass_through(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _nothing(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


class _KeptOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Statistics over positions that hold anything else than zeros, and routers that cannot choose removed experts."""

    def __init__(
        self, routers: list[tuple[torch.Tensor, torch.Tensor]], dense: list[torch.Tensor | None] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = dense
        self.zeros: list[torch.Tensor | None] = []
        self.imprecise = False
        self.routers = {_place(t): rows for t, rows in routers}
        self.masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.alive: list[torch.Tensor] = []
        self.rules: dict[Any, Callable[..., Any]] = {
            aten.native_layer_norm.default: self.layer_norm,
            aten.native_group_norm.default: self.group_norm,
            aten._fused_rms_norm.default: self.rms_norm,
            aten.mean.dim: self.mean,
            aten.var.correction: self.var,
            aten.std.correction: lambda *a, **k: self.var(*a, **k).sqrt(),
            aten.var_mean.correction: lambda x, *a, **k: (self.var(x, *a, **k), self.mean(x, *a, **_less(k))),
            aten.sub.Tensor: self.sub,
            aten.div.Tensor: self.div,
            aten._weight_norm_interface.default: lambda *a: tuple(
                x.nan_to_num(0) for x in aten._weight_norm_interface.default(*a)
            ),
        }

    def _mask(self, x: torch.Tensor, dim: Any) -> torch.Tensor | None:
        """Positions that are not removed; what is zero in the dense model too is there."""
        mask = _kept(x, dim)
        if self.dense is None:
            self.zeros.append(mask)
            return None
        before = self.dense.pop(0) if self.dense else None
        return mask if mask is None or before is None or before.shape != mask.shape else mask | ~before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        result = rule(*args, **kwargs) if rule is not None else func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.bfloat16):
            self.imprecise = True
        return self._routed(func, args, result) if self.routers else result

    def _routed(self, func: Any, args: Any, result: Any) -> Any:
        if func is aten._to_copy.default and _place(args[0]) in self.routers:
            self.routers[_place(result)] = self.routers[_place(args[0])]
            self.alive.append(result)
        elif func in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default):
            for arg in args:
                if isinstance(arg, torch.Tensor) and _place(arg) in self.routers and arg.dim() > 1:
                    result = result.index_fill(-1, self.routers[_place(arg)], _FAR)
        return result

    # --- statistics ---

    def mean(self, x: torch.Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
        x = x if dtype is None else x.to(dtype)
        mask = self._mask(x, dim)
        if mask is None:
            return aten.mean.dim(x, dim, keepdim)  # type: ignore[no-any-return]
        total = x.sum(dim, keepdim=True) / mask.sum(_dims(x, dim), keepdim=True).clamp(min=1)
        self.masks[id(total)] = (total, mask)
        if keepdim:
            return total
        for d in sorted(_dims(x, dim), reverse=True):
            total = total.squeeze(d)
        return total

    def sub(self, a: Any, b: Any, *, alpha: Any = 1) -> torch.Tensor:
        """What is centred stays zero where it was."""
        result: torch.Tensor = aten.sub.Tensor(a, b, alpha=alpha)
        mean, mask = self.masks.get(id(b), (None, None))
        return result * mask if mean is b and mask is not None and result.dim() == mask.dim() else result

    def div(self, a: Any, b: Any) -> torch.Tensor:
        """A removed row of a normalised weight is nothing by nothing."""
        result: torch.Tensor = aten.div.Tensor(a, b)
        nothing = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and bool(torch.isnan(result).any())
        return torch.where((a == 0) & (b == 0), torch.zeros_like(result), result) if nothing else result

    def var(self, x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> torch.Tensor:
        mask = self._mask(x, dim)
        if mask is None:
            return aten.var.correction(x, dim, correction=correction, keepdim=keepdim)  # type: ignore[no-any-return]
        dims = _dims(x, dim)
        count = mask.sum(dims, keepdim=True).clamp(min=1)
        centred = (x - x.sum(dims, keepdim=True) / count) * mask
        result = centred.pow(2).sum(dims, keepdim=True) / (count - (1 if correction is None else correction))
        return result if keepdim else result.reshape([n for d, n in enumerate(x.shape) if d not in dims])

    def layer_norm(self, x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[torch.Tensor, ...]:
        dims = list(range(x.dim() - len(shape), x.dim()))
        mask = self._mask(x, dims)
        if self.dense is not None and weight is not None and bool((weight == 0).any()):
            mask = (weight != 0).expand(x.shape)  # units may hold something, and be removed all the same
        if mask is None:
            return aten.native_layer_norm.default(x, shape, weight, bias, eps)  # type: ignore[no-any-return]
        count = mask.sum(dims, keepdim=True).clamp(min=1)
        mean = (x * mask).sum(dims, keepdim=True) / count
        var = ((x - mean) * mask).pow(2).sum(dims, keepdim=True) / count
        rstd = (var + eps).rsqrt()
        result = (x - mean) * mask * rstd
        result = result if weight is None else result * weight
        return (result if bias is None else result + bias), mean, rstd

    def rms_norm(self, x: torch.Tensor, shape: Any, weight: Any, eps: Any) -> tuple[torch.Tensor, ...]:
        dims = list(range(x.dim() - len(shape), x.dim()))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        rstd = (self.mean(x.pow(2), dims, True) + eps).rsqrt()
        return (x * rstd if weight is None else x * rstd * weight), rstd

    def group_norm(
        self, x: torch.Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, group: int, eps: float
    ) -> tuple[torch.Tensor, ...]:
        grouped = x.reshape(n, group, c // group, hw)
        mask = (grouped != 0).any(0, keepdim=True).any(-1, keepdim=True).expand(1, group, c // group, hw)
        count = mask.sum((2, 3), keepdim=True).clamp(min=1)
        mean = grouped.sum((2, 3), keepdim=True) / count
        rstd = (((grouped - mean) * mask).pow(2).sum((2, 3), keepdim=True) / count + eps).rsqrt()
        result = ((grouped - mean) * mask * rstd).reshape(x.shape)
        shape = (1, c, *[1] * (x.dim() - 2))
        result = result if weight is None else result * weight.reshape(shape)
        return (
            (result if bias is None else result + bias.reshape(shape)),
            mean.reshape(n, group),
            rstd.reshape(n, group),
        )


def _less(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k == "keepdim"}


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _dims(x: torch.Tensor, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(x.dim()))
    return sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))


def _kept(x: torch.Tensor, dim: Any) -> torch.Tensor | None:
    """Which positions of the reduced dims hold anything, broadcast against x; None where all do."""
    dims = _dims(x, dim)
    others = [d for d in range(x.dim()) if d not in dims]
    if not others or not x.is_floating_point():
        return None
    nonzero = x != 0
    if len(dims) == 1 and dims[0] == x.dim() - 1 and x.dim() >= 4:
        others = others[:-1]  # groups or heads side by side, which need not have lost the same positions
    elif len(dims) == 1 and dims[0] == x.dim() - 1 and x.dim() == 3:
        pairs = nonzero.any(0, keepdim=True)  # [tokens, groups, channels]
        if not bool(pairs.all()) and bool((nonzero == pairs).all()):
            return pairs.expand(x.shape)
    mask = nonzero
    for d in others:
        mask = mask.any(d, keepdim=True)
    return None if bool(mask.all()) else mask.expand(x.shape)
