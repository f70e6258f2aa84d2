"""The proof of an export: what runs the file gives what torch gives, on random inputs of other sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.progress import Track
from secateur.ship.example import Example, Tensors, without_cache


@dataclass(frozen=True)
class Exported:
    """What was exported, and how near it is to torch.

    Attributes:
        path: the file.
        bytes: of the file, and of the one with its tensors beside it, where there is one.
        inputs: name -> shape, with names for sizes that are open.
        outputs: the same.
        checked: shapes of the inputs that it was compared with torch on: input -> shape, for each trial.
        max_abs_error: largest absolute difference from torch, in the unit of the outputs.
        max_rel_error: the same over the largest absolute value of that output.
    """

    path: str
    bytes: int
    inputs: dict[str, list[int | str | None]]
    outputs: dict[str, list[int | str | None]]
    checked: list[dict[str, list[int]]]
    max_abs_error: float
    max_rel_error: float


class Agreement:
    """The largest differences between torch and what runs a file, so far.

    Attributes:
        largest: absolute.
        relative: over the largest absolute value of the output that it is in.
    """

    def __init__(self, model: nn.Module, runtime: str, tolerance: float | None) -> None:
        """Prepare the comparison.

        Args:
            model: in torch.
            runtime: what runs the file, for messages.
            tolerance: largest relative difference; None = 1e-4, of 16-bit floats 1e-2.
        """
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        self.limit = (1e-2 if half else 1e-4) if tolerance is None else tolerance
        self.name, self.runtime = type(model).__name__, runtime
        self.largest = self.relative = 0.0

    def add(self, where: str, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Compare one output.

        Args:
            where: its name, and on which inputs.
            ours: as torch gives it.
            theirs: as the runtime gives it.
            mask: 1 where a token is, [batch, tokens]: what comes out at padding means nothing.

        Raises:
            SecateurError: they differ, or torch's has values that nothing can be compared with.
        """
        expected, found = ours.detach().cpu().double(), theirs.detach().cpu().double()
        where = f"{self.name}: {where}"
        if found.shape != expected.shape:
            shapes = f"{list(found.shape)} in {self.runtime}, {list(expected.shape)} in torch"
            raise SecateurError(f"{where} has shape {shapes}")
        if mask is not None and expected.shape[:2] == mask.shape:
            expected, found = expected[mask.cpu().bool()], found[mask.cpu().bool()]
        if not bool(torch.isfinite(expected).all()):
            raise SecateurError(f"{where} has NaN or infinite values in torch: nothing can be compared with it")
        worst = float((found - expected).abs().max()) if expected.numel() else 0.0
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        share = worst / scale if scale else worst
        self.largest, self.relative = max(self.largest, worst), max(self.relative, share)
        if not share <= self.limit:
            raise SecateurError(
                f"{where} differs between {self.runtime} and torch by {worst:.3g}, {share:.2g} of its largest value "
                f"(tolerance {self.limit:g}): nothing was written"
            )


def compare(
    example: Example,
    call: Callable[[Tensors], Sequence[torch.Tensor]],
    names: Sequence[str],
    trials: Sequence[Tensors],
    agreement: Agreement,
    track: Track,
) -> None:
    """Compare a file with torch on fresh inputs.

    Args:
        example: the model and what it is called with.
        call: runs the file on inputs; its outputs in order.
        names: of the outputs.
        trials: inputs.
        agreement: gathers the differences.
        track: progress over the trials.

    Raises:
        SecateurError: they differ.
    """
    for trial in track(trials, f"comparing {agreement.runtime} with torch"):
        with without_cache(example.model):
            wanted = pytree.tree_leaves(example.model(**trial, **example.constants))
        results = call(trial)
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in trial.items())
        for name, ours, theirs in zip(names, [x for x in wanted if x is not None], results, strict=True):
            agreement.add(f"{name} on {shapes}", ours, theirs, trial.get("attention_mask"))


def shapes_of(trials: Sequence[Tensors]) -> list[dict[str, list[int]]]:
    """The shapes of the inputs of each trial."""
    return [{name: list(value.shape) for name, value in trial.items()} for trial in trials]
