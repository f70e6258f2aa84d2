"""Models that compute what a cut one would, without a cut: the weights that read what is gone are zeros."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.cut.apply import apply
from secateur.space import Axis, Space
from secateur.space.trace import Inputs

_LINEAR = ("channels", "ffn", "heads", "kv_groups", "hidden", "expert_ffn", "shared_expert_ffn")
"""Kinds of which a unit reaches the rest of the model through what reads it alone."""


class Pretence:
    """One copy of a model, at full width, that is made to compute what cut ones would, one after the other.

    Removed units are still worked out, but their readers have zeros for them, so nothing else sees them; the batch norm
    of a channel sees that channel alone, so its statistics come out as in the cut model too. Where a norm runs over
    the units, or nothing reads them, the model is really cut.

    Args:
        model: the dense model; it stays as it is.
        space: its Space.
        inputs: arguments for one forward pass, as for `discover`.
    """

    def __init__(self, model: nn.Module, space: Space, inputs: Inputs = None) -> None:
        self.model, self.space, self.inputs = model, space, inputs
        self.copy = copy.deepcopy(model)
        self._parameters = dict(self.copy.named_parameters())
        self._normed = {norm.axis for norm in space.norms}

    def exact(self, axis: Axis) -> bool:
        """Whether zeros at its readers are the same as a cut."""
        return axis.kind in _LINEAR and axis.name not in self._normed and any(True for _ in self.space.consumers(axis))

    @contextmanager
    def cut(self, plan: Plan) -> Iterator[nn.Module]:
        """A model that computes what the plan makes; it may be changed in place, and is put right afterwards.

        Raises:
            SecateurError: where a plan that cannot be pretended cannot be applied either.
        """
        axes = [self.space.axis(name) for name in plan.kept]
        if plan.dropped or plan.masks or not all(self.exact(axis) for axis in axes):
            yield apply(self.model, plan, space=self.space, inputs=self.inputs)
            return
        state = {name: tensor.clone() for name, tensor in self.copy.named_buffers()}
        before: dict[str, torch.Tensor] = {}
        try:
            with torch.no_grad():
                for axis in axes:
                    gone = torch.ones(axis.size, dtype=torch.bool)
                    gone[list(plan.kept[axis.name].units)] = False
                    for _, part in self.space.consumers(axis):
                        weight = self._parameters[part.parameter]
                        before.setdefault(part.parameter, weight.detach().clone())
                        weight.index_fill_(part.dim, part.rows()[gone].flatten().to(weight.device), 0)
            yield self.copy
        finally:
            with torch.no_grad():
                for name, values in before.items():
                    self._parameters[name].copy_(values)
                for name, buffer in self.copy.named_buffers():
                    buffer.copy_(state[name])
