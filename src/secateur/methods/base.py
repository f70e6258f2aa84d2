"""What every method gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.choose.plan import Plan
from secateur.space import Space


@dataclass(frozen=True)
class Decision:
    """A method's result: the plan, and how it came about."""

    plan: Plan
    space: Space
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the report tells beside the plan: candidates, calibration, seconds. JSON values only."""
