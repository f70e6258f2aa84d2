"""Importance of routed experts and of their inner units, from what a mixture of experts does on calibration data.

Experts: REAP (Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
arXiv:2510.13999): the mean, over the tokens that the router sends to expert j, of gate_j(x) * ||f_j(x)||.

Units inside of the experts: Minitron's reduction of what the down projection reads (arXiv:2407.14679), over all pairs
of a token and an expert that it is sent to. The experts of a layer share one tensor, hence one order of units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import SecateurError

ROWS = 16_384
"""Pairs of a token and an expert that are worked out at a time, so that memory stays about that of a forward pass."""
_SLACK = 0.02
"""Share by which the experts' results may miss the module's: half precision adds up in another order."""


class Mixture:
    """What one module that runs stacked experts does; it is watched from outside, through its arguments alone.

    Such a module gets tokens, for each the numbers of its experts, and their gates. Called once more with every pair of
    a token and an expert as a row of its own and a gate of one, it gives each expert's own result. That the gated sum
    of those is what the module gave is checked on every call.
    """

    def __init__(self, path: str, module: nn.Module, experts: int, reads: Mapping[str, int]) -> None:
        """Watch the module at `path`; `reads` are its stacked weights whose input is asked for, with its length."""
        self.path, self.module = path, module
        weights = {f"{path}.{name}".lstrip("."): (module.get_parameter(name), width) for name, width in reads.items()}
        self.inputs = _Inputs(path, weights)
        self.saliency = torch.zeros(experts, dtype=torch.float64)
        self.routed = torch.zeros(experts, dtype=torch.float64)
        self.energy: dict[str, torch.Tensor] = {}
        """Stacked weight by its full name -> sum over samples of (mean over routed pairs of |input|)^2 [inputs]."""

    def scores(self) -> torch.Tensor:
        """REAP's saliency, float32 [experts]; zero for an expert that got no token."""
        return (self.saliency / self.routed.clamp_min(1)).float()

    def see(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, samples: int, mask: torch.Tensor | None
    ) -> None:
        """Take in one call.

        Args:
            args: what the module was called with.
            kwargs: the same, by name.
            output: what it gave.
            samples: rows of the batch.
            mask: [samples, positions], zeros where a position does not count; None = all count.

        Raises:
            SecateurError: where the call is not of the form that can be observed.
        """
        call = _call_of(self.path, args, kwargs)
        given = output[0] if isinstance(output, tuple) else output
        positions = len(call.index) // samples
        if samples * positions != len(call.index) or given.numel() != call.x.numel():
            raise _hidden(self.path, "its rows are not the tokens of the batch")
        given = given.reshape(call.x.shape)
        for sample in range(samples):
            rows = torch.arange(sample * positions, (sample + 1) * positions, device=call.x.device)
            rows = rows if mask is None else rows[mask[sample].to(rows.device) > 0]
            if len(rows):
                self._see_sample(call, given, rows)

    def _see_sample(self, call: "_Call", given: torch.Tensor, rows: torch.Tensor) -> None:
        for chunk in torch.split(rows, max(1, ROWS // call.index.shape[1])):
            index, gate = call.index[chunk], call.gate[chunk].float()
            with self.inputs:
                alone = call.each(self.path, self.module, chunk).float()
            if not bool(torch.isfinite(given[chunk]).all() & torch.isfinite(alone).all()):
                raise SecateurError(f"NaN or infinite activations in {self.path}: check the weights and dtype")
            off = float((torch.einsum("tkh,tk->th", alone, gate) - given[chunk].float()).norm())
            if not off <= _SLACK * float(given[chunk].float().norm()) + 1e-12:
                raise _hidden(self.path, "its experts' own results, weighed by their gates, are not what it gives")
            value = (gate * alone.norm(dim=-1)).double().flatten().cpu()
            self.saliency.index_add_(0, index.flatten().cpu(), value)
            self.routed.index_add_(0, index.flatten().cpu(), torch.ones_like(value))
        for name, mean in self.inputs.take().items():
            self.energy[name] = self.energy.get(name, torch.zeros(())) + mean.square().cpu()


@dataclass(frozen=True)
class _Call:
    """The arguments of a call, told apart."""

    x: torch.Tensor
    """[tokens, hidden]"""
    index: torch.Tensor
    """int [tokens, top k]"""
    gate: torch.Tensor
    """[tokens, top k]"""
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def each(self, path: str, module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """The result of every expert of some tokens by itself [rows, top k, hidden]."""
        top_k = self.index.shape[1]
        pairs = self.index[rows].reshape(-1, 1)
        new = {id(self.x): self.x[rows].repeat_interleave(top_k, 0), id(self.index): pairs}
        new[id(self.gate)] = torch.ones(pairs.shape, dtype=self.gate.dtype, device=self.gate.device)
        args = [new.get(id(value), value) for value in self.args]
        kwargs = {name: new.get(id(value), value) for name, value in self.kwargs.items()}
        try:
            found = module.forward(*args, **kwargs)  # not called: hooks have seen this one already
        except (RuntimeError, ValueError, IndexError) as error:
            raise _hidden(path, f"it does not take one expert for each row: {error}") from error
        found = found[0] if isinstance(found, tuple) else found
        return found.reshape(len(rows), top_k, -1)  # type: ignore[no-any-return]


def _call_of(path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
    flat = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    numbers = [x for x in flat if not x.is_floating_point() and x.dtype != torch.bool and x.dim() == 2]
    if len(numbers) == 1:
        (index,) = numbers
        floats = [x for x in flat if x.is_floating_point() and x.dim() == 2 and len(x) == len(index)]
        gates = [x for x in floats[1:] if x.shape == index.shape]
        if floats and len(gates) == 1:
            return _Call(floats[0], index, gates[0], args, kwargs)
    raise _hidden(path, "its arguments are not tokens [tokens, hidden], experts [tokens, k] and gates [tokens, k]")


def _hidden(path: str, why: str) -> SecateurError:
    return SecateurError(
        f"what the experts of {path} do cannot be observed ({why}): skip the kinds experts and expert_ffn"
    )


class _Inputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on: what the matrix products with some weights read, as means of |input| over its rows."""

    def __init__(self, path: str, weights: Mapping[str, tuple[nn.Parameter, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path, self.weights = path, weights
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = dict.fromkeys(weights, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; look at its other operand where a weight is one."""
        for name, (weight, width) in self.weights.items():
            if any(_same_storage(x, weight) for x in args):
                read = next((x for x in args if _is_input(x, weight, width)), None)
                if read is not None:
                    total = read.reshape(-1, width).abs().sum(0, dtype=torch.float32)
                    self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total
                    self.rows[name] += read.numel() // width
        return func(*args, **(kwargs or {}))

    def take(self) -> dict[str, torch.Tensor]:
        """The means since the last time, by weight.

        Raises:
            SecateurError: where no product with a weight was seen.
        """
        unseen = [name for name, rows in self.rows.items() if rows == 0]
        if unseen:
            raise _hidden(self.path, f"it does not multiply with {unseen[0]} itself, but perhaps with a copy")
        means = {name: total / self.rows[name] for name, total in self.sums.items()}
        self.sums, self.rows = {}, dict.fromkeys(self.weights, 0)
        return means


def _same_storage(x: Any, weight: nn.Parameter) -> bool:
    return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == weight.untyped_storage()._cdata


def _is_input(x: Any, weight: nn.Parameter, width: int) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or _same_storage(x, weight):
        return False
    return x.dim() > 1 and x.shape[-1] == width
