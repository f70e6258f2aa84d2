"""Latency as a cost of choices: what a table says is what the clock predicts, and a limit is kept by measurement."""

import dataclasses
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Mobile, pictures, shaken
from timers import Counter, clock_of, counting_clock
from tiny import tiny, tokens
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.plan import Kept, Plan
from secateur.choose.slots import make_slots
from secateur.choose.table import Choice, Slot, Table
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.measure.clock import Clock
from secateur.measure.latency import Timing, time_models
from secateur.methods.base import Decision
from secateur.methods.search import search
from secateur.methods.timing import latency_terms, timing_inputs
from secateur.space import Space

IDS = list(torch.split(tokens(6, 10), 2))


@cache
def clock(name: str) -> Clock:
    if name == "mobile":
        return clock_of(shaken(Mobile()), pictures())
    model = tiny("llama", dtype=torch.float32, num_key_value_heads=4, attn_implementation="eager")
    return clock_of(model, {"input_ids": tokens()})  # products of attention are a rest, which follows its leaves


def slots_of(space: Space, *, levels: int, uniform: bool) -> list[Slot]:
    axes = [axis for axis in space.axes if axis.kind in ("ffn", "heads", "kv_groups", "channels")]
    return make_slots(space, axes, {a.name: 1 for a in axes}, levels=levels, uniform=uniform, drop=True)


def plan_of(space: Space, slots: Sequence[Slot], choice: Choice) -> Plan:
    """The first units of each group stay."""
    levels = [slot.levels[i] for slot, i in zip(slots, choice, strict=True)]
    kept = {}
    for name, size in ((name, size) for level in levels for name, size in level.sizes.items()):
        axis = space.axis(name)
        units = (group * axis.per_group + unit for group in range(axis.groups) for unit in range(size))
        kept[name] = Kept(axis.kind, axis.size, tuple(units))
    return Plan(kept, tuple(block for level in levels for block in level.dropped))


def choices(slots: Sequence[Slot], count: int) -> list[Choice]:
    generator = np.random.default_rng(0)
    return [tuple(int(generator.integers(len(slot.levels))) for slot in slots) for _ in range(count)]


@pytest.mark.parametrize(("name", "uniform"), [("llama", True), ("llama", False), ("mobile", False)])
def test_what_a_table_says_is_what_the_clock_predicts(name: str, uniform: bool) -> None:
    own = clock(name)
    slots = slots_of(own.space, levels=4, uniform=uniform)  # at most as many as lengths that are timed
    assert name == "mobile" or any(level.dropped for slot in slots for level in slot.levels)
    table = Table(tuple(slots), (), {"latency": latency_terms(own, own.space, slots, {})})
    seen = set()
    for choice in (table.whole, *choices(slots, 40)):
        predicted = own.predict(plan_of(own.space, slots, choice))
        assert table.cost("latency", choice) == pytest.approx(predicted, rel=1e-9)
        seen.add(predicted)
    assert len(seen) > 5
    assert table.cost("latency", table.whole) == pytest.approx(own.dense.median)


def test_between_the_lengths_that_are_timed_times_are_interpolated() -> None:
    """Products of sizes are what the timer counts in this model: multilinear, so nothing is lost between."""
    own = clock("llama")
    grids: dict[str, list[int]] = {}
    slots = slots_of(own.space, levels=17, uniform=False)
    terms = latency_terms(own, own.space, slots, grids)
    assert all(len(lengths) <= 4 for lengths in grids.values())
    assert max(len(slot.levels) for slot in slots) > 10
    table, timed = Table(tuple(slots), (), {"latency": terms}), len(own.table.entries)
    for choice in choices(slots, 10):
        predicted = own.predict(plan_of(own.space, slots, choice))
        assert table.cost("latency", choice) == pytest.approx(predicted, rel=1e-9)
    assert len(own.table.entries) > timed
    timed = len(own.table.entries)
    latency_terms(own, own.space, slots_of(own.space, levels=40, uniform=False), grids)
    assert len(own.table.entries) == timed  # the grid is made once


# A limit that is kept by measurement


@cache
def llama() -> Any:
    return tiny("llama", dtype=torch.float32)


@cache
def limited(slower: tuple[float, ...]) -> Decision:
    """A search under a limit of 70%, where the n-th result takes so many times what its products say."""
    made = iter(slower)
    space = discover(llama())
    kept = counting_clock(llama(), space, timing_inputs(llama(), IDS, None))

    def timing(models: Sequence[nn.Module], *args: Any, **options: Any) -> list[Timing]:
        dense, cut = time_models(models, *args, **{**options, "repeats": 1, "warmup": 0})
        return [dense, dataclasses.replace(cut, median=cut.median * next(made))]

    with pytest.MonkeyPatch.context() as patched:
        searching = sys.modules["secateur.methods.searching"]
        patched.setattr(searching, "discover", lambda *_: space)
        patched.setattr(searching, "Clock", lambda *_, **__: kept)
        patched.setattr(sys.modules["secateur.methods.timing"], "time_models", timing)
        found = search(llama(), Budget.parse("latency=70%"), IDS, uniform=False, levels=6, probes=0, trials=8)
    assert next(made, None) is None, "each is timed once"
    return found


def test_a_limit_that_is_kept_is_not_tightened() -> None:
    details = limited((1.0,)).details
    told = details["latency"]
    assert len(told["tried"]) == 1
    assert told["measured"] == pytest.approx(told["predicted"], rel=0.01)
    assert 0.95 * told["limit"] < told["measured"] <= told["limit"] == pytest.approx(0.7 * told["dense"])
    assert details["levels"]["measured"] > 0


def test_a_limit_is_tightened_until_the_result_keeps_it() -> None:
    fits, decision = limited((1.0,)), limited((1.2, 1.2))
    told, levels = decision.details["latency"], decision.details["levels"]
    first, last = told["tried"]
    assert first["measured"] > 1.02 * told["limit"]
    assert last["measured"] <= 1.02 * told["limit"]
    assert 0.9 * told["limit"] < last["measured"]
    assert last["predicted"] <= told["limit"] / 1.2 < first["predicted"]
    assert (told["measured"], told["predicted"]) == (last["measured"], last["predicted"])
    assert decision.plan != fits.plan
    assert "measured" not in levels, "that was of a choice that was given up"
    assert levels["expected"] > fits.details["levels"]["expected"]


def test_after_three_times_the_report_says_what_is_measured() -> None:
    told = limited((1.2, 1.4, 1.6)).details["latency"]
    assert len(told["tried"]) == 3
    assert told["measured"] == told["tried"][-1]["measured"] > 1.02 * told["limit"]


# What is timed


def test_what_is_timed() -> None:
    assert timing_inputs(llama(), IDS, None)["input_ids"].shape == (1, 10)  # type: ignore[index,call-overload]
    given = timing_inputs(llama(), IDS, None, batch=3, length=7)
    assert given["input_ids"].shape == (3, 7)  # type: ignore[index,call-overload]
    assert timing_inputs(llama(), [{"input_ids": IDS[0]}], None)["input_ids"].shape == (1, 128)  # type: ignore[index,call-overload]
    net, x = Mobile(), pictures()
    assert timing_inputs(net, [], x) is x
    with pytest.raises(SecateurError, match="a latency budget needs inputs"):
        timing_inputs(net, [], None)


def test_the_timer_counts() -> None:
    with torch.no_grad():
        assert Counter()(lambda: nn.Linear(3, 5)(torch.zeros(2, 3))) == 30
