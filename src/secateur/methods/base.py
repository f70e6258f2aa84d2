"""What every method gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.rescore import MaskScores
from secateur.space import Space

_UNTRACED = Space((), (), {}, (), (), (), (), (), (), ())


@dataclass(frozen=True)
class Decision:
    """A method's result: the plan, and how it came about."""

    plan: Plan
    space: Space = _UNTRACED
    """The Space that the plan cuts; an empty one where it only masks."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the report tells beside the plan: candidates, calibration, seconds. JSON values only."""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the method repaired: parameters of the cut model and their new values. Empty where `pruned` has them."""
    pruned: nn.Module | None = None
    """The cut model with all repairs, where deciding has made it already: nothing is left to apply."""
    scores: MaskScores | None = None
    """What masks were chosen by, where the method was asked to keep that."""
    base: nn.Module | None = None
    """What the plan cuts, where that is not the model itself but the same function in another basis."""
    mend: str | None = None
    """How the cut is repaired where the user does not say; None = least squares where there is data."""
