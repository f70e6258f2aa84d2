"""All plain models by name: how each is made, from Python and as `module:callable`, and what it takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import plain_blocks
import plain_cnns
import plain_detect
import plain_language
import plain_mobile
import plain_nets
import plain_ops
import plain_pixels
import plain_pyramids
import plain_sequences
import plain_vits
import plain_weights
from plain_parts import Inputs
from torch import nn


@dataclass(frozen=True)
class Spec:
    """One architecture.

    Attributes:
        constructor: `module:callable`, importable with this folder on the path; it takes no argument.
        make: calls it; the model has random weights (seed torch first) and is in evaluation mode.
        inputs: makes one forward pass's inputs, positional as a tuple or by keyword as a dict.
    """

    constructor: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    def __call__(self) -> tuple[nn.Module, Inputs]:
        return self.make(), self.inputs()


FILES = (
    plain_cnns, plain_blocks, plain_mobile, plain_vits, plain_pyramids, plain_detect, plain_pixels, plain_sequences,
    plain_language, plain_nets, plain_weights, plain_ops,
)  # fmt: skip


def _evaluating(make: Callable[[], nn.Module]) -> nn.Module:
    return make().eval()


def _specs() -> Iterator[tuple[str, Spec]]:
    for file in FILES:
        for make, inputs in file.TABLE.items():
            yield make.__name__, Spec(f"{file.__name__}:{make.__name__}", partial(_evaluating, make), inputs)


MODELS: dict[str, Spec] = dict(_specs())


def __getattr__(name: str) -> Callable[[], nn.Module]:
    """Find every constructor here too, so that `plain_models:NAME` can be imported."""
    constructors: dict[str, Callable[[], nn.Module]] = {make.__name__: make for file in FILES for make in file.TABLE}
    if name in constructors:
        return constructors[name]
    raise AttributeError(f"no plain model is called {name!r}")
