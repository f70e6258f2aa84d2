"""A timer that counts multiply-accumulates in place of seconds, so that predictions of latency are exact."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.cut.prove import discover
from secateur.measure.clock import Clock
from secateur.measure.latency import forward


class Counter:
    """A timer: one second for each multiply-accumulate."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, fn: Callable[[], object]) -> float:
        self.taken += 1
        with FlopCounterMode(display=False) as counted:
            fn()
        return float(counted.get_total_flops() / 2)


def counting_clock(model: nn.Module, *args: Any, **options: Any) -> Clock:
    """A `Clock` that counts; options go to it."""
    return Clock(model, *args, **{"timer": Counter(), "repeats": 1, "warmup": 0, **options})


def clock_of(model: nn.Module, inputs: Any, **options: Any) -> Clock:
    """The same, with the Space found."""
    return counting_clock(model, discover(model, None if hasattr(model, "config") else inputs), inputs, **options)


def counted(model: nn.Module, inputs: Any) -> float:
    """Multiply-accumulates of one forward pass."""
    with torch.no_grad():
        return Counter()(forward(model.eval(), inputs))
