"""The arithmetic of distillation: how far a student is from what its teacher said, as tensors alone.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from secateur import world
from secateur.train.shares import total

_CHUNK_ELEMENTS = 2**24  # logits that are in float32 at a time: 64 MiB for each temporary


@dataclass(frozen=True)
class Signal:
    """What a teacher says of P predictions.

    Attributes:
        logs: log probabilities at the temperature, [P, V], up to a constant for each prediction; or those of the k
            largest [P, k].
        classes: V.
        which: the classes that these are, whole numbers [P, k]; None = all of them, in order.
    """

    logs: torch.Tensor
    classes: int
    which: torch.Tensor | None = None

    def some(self, part: slice) -> "Signal":
        """Those of some predictions."""
        return Signal(self.logs[part], self.classes, None if self.which is None else self.which[part])

    def at(self, device: torch.device) -> "Signal":
        """The same on a device."""
        which = None if self.which is None else self.which.to(device)
        return Signal(self.logs.to(device), self.classes, which)

    def small(self) -> "Signal":
        """The same on the CPU in half the bytes, where only the largest are kept."""
        return self if self.which is None else Signal(self.logs.half().cpu(), self.classes, self.which.int().cpu())


def signal_of(logits: torch.Tensor, temperature: float, top_k: int | None) -> Signal:
    """Turn a teacher's logits [P, V] into what the student learns from.

    All of them stay as they are, as a view where the temperature is 1: `forward_kl` takes them by chunks. Of the k
    largest, in float32, each chunk is looked at on its own.
    """
    classes = logits.shape[-1]
    if top_k is None or top_k >= classes:
        return Signal(logits if temperature == 1 else logits.float() / temperature, classes)
    step = max(1, _CHUNK_ELEMENTS // classes)
    found = [
        torch.log_softmax(part.float() / temperature, dim=-1).topk(top_k, dim=-1) for part in torch.split(logits, step)
    ]
    return Signal(torch.cat([f.values for f in found]), classes, torch.cat([f.indices for f in found]))


def forward_kl(logits: torch.Tensor, signal: Signal, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of each prediction, in nats, at a temperature: [P].

    Of a teacher's k largest, all other classes count as one: that is the KL of the coarser distributions, and so never
    above the full one.

    Args:
        logits: the student's, [P, V].
        signal: the teacher's.
        temperature: that the signal was taken at.
    """
    own = torch.log_softmax(logits.float() / temperature, dim=-1)
    logs = signal.logs.float()
    if signal.which is None:
        return functional.kl_div(own, logs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    which = signal.which.long()
    kept = (logs.exp() * (logs - own.gather(-1, which))).sum(-1)
    rest = (1 - logs.exp().sum(-1)).clamp(min=0)
    # Not from 1 minus a sum: that has no digits, and no gradient, where the student is sure of the k.
    rest_own = own.scatter(-1, which, -torch.inf).logsumexp(-1)
    return kept + torch.xlogy(rest, rest) - rest * rest_own


def in_chunks(
    count: int, width: int, part: Callable[[slice], tuple[torch.Tensor, ...]], *, grad: bool
) -> tuple[torch.Tensor, ...]:
    """Sum what `part` gives over slices of predictions, so that few of them are in float32 at a time.

    Args:
        count: predictions.
        width: classes.
        part: slice -> tensors of fixed number, each a sum over the slice.
        grad: keep nothing of a slice for the backward pass but compute it again there.
    """
    step = max(1, _CHUNK_ELEMENTS // width)
    if count <= step:
        return part(slice(0, count))
    totals: list[torch.Tensor] = []
    for start in range(0, count, step):
        piece = slice(start, min(start + step, count))
        found = checkpoint(part, piece, use_reentrant=False) if grad else part(piece)
        totals = list(found) if not totals else [a + b for a, b in zip(totals, found, strict=True)]
    return tuple(totals)


def relative_distance(own: torch.Tensor, wanted: torch.Tensor, *, over_all: bool = False) -> torch.Tensor:
    """Squared distance of rows [P, D] over the spread of the wanted ones around their mean: 1 for the mean itself.

    Where there is no spread, as of one row alone, over their size.

    Args:
        own: rows.
        wanted: rows.
        over_all: of several processes, each gives its part of the distance of all their rows together.
    """
    own, wanted = own.float(), wanted.float()
    shared = over_all and world.size() > 1
    mean = wanted.mean(0)
    if shared:
        sums = torch.cat([wanted.double().sum(0), wanted.new_full((1,), len(wanted), dtype=torch.float64)])
        world.add_up([sums])
        mean = (sums[:-1] / sums[-1]).float()
    spread, size = (wanted - mean).square().sum(), wanted.square().sum()
    if shared:
        world.add_up([spread, size])
    spread = torch.where(spread > 1e-6 * size, spread, size).clamp(min=1e-12)
    return (own - wanted).square().sum() / spread


def attention_kl(own: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """KL between the attention of a teacher and a student, each averaged over its heads; mean over queries.

    Of several processes, each gives its part of the mean over the queries of all.

    Args:
        own: the student's probabilities, [B, heads, Q, K].
        wanted: the teacher's, of any number of heads.
        real: which queries count, bool [B, Q]; None = all.
    """
    student, teacher = own.float().mean(1), wanted.float().mean(1)
    each = (torch.xlogy(teacher, teacher) - teacher * student.clamp(min=1e-9).log()).sum(-1)
    counted = each if real is None else each[real]
    if world.size() == 1:
        return counted.mean()
    return counted.sum() / total(counted.numel(), counted.device)
