"""Refinement: losses of single cuts do not add up, so levels are switched under the true loss of the whole.

A switch takes one slot down and lets others up, so that the budget stays used. Sieberling et al. 2024, "EvoPress"
(arXiv:2410.14649): many offspring on few samples, the best of them on all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.choose.table import Choice, Table
from secateur.progress import Track, quiet

BORN, OFFSPRING, SURVIVORS = 64, 8, 2
"""Of each generation: drawn, tried on few samples, and on all."""


@dataclass(frozen=True)
class Refined:
    """What came out.

    Attributes:
        choice: The best that was seen.
        loss: Its true loss, on all samples.
        history: (trials so far, best loss), whenever a better one was found; the first is the start.
    """

    choice: Choice
    loss: float
    history: Sequence[tuple[int, float]]


def refine(
    table: Table,
    start: Choice,
    limits: Mapping[str, float],
    few: Callable[[Choice], float],
    every: Callable[[Choice], float],
    *,
    trials: int,
    seed: int = 0,
    track: Track = quiet,
) -> Refined:
    """Switch levels as long as the true loss falls.

    Args:
        table: costs, and what single levels are expected to lose: switches that it finds hopeless are rare.
        start: a choice within the limits.
        limits: measure -> the most that it may be.
        few: true loss of a choice on a part of the samples.
        every: on all of them.
        trials: how many choices may be tried.
        seed: of the switches.
        track: shows progress.

    Returns:
        A choice that loses no more than the start.
    """
    draw = np.random.default_rng(seed)
    best, least = start, every(start)
    history = [(0, least)]
    seen = {start}
    tried = 0
    for _ in track(range(-(-trials // OFFSPRING)), "switching levels"):
        born = {_switched(table, best, limits, draw) for _ in range(BORN)}
        able = sorted(child for child in born if child is not None and child not in seen)
        # Those of the least expected loss, give or take: what the table finds hopeless is rarely worth a trial.
        order = sorted(able, key=lambda child: table.lost(child) * draw.uniform(0.8, 1.2))
        offspring = order[: min(OFFSPRING, trials - tried)]
        seen |= set(offspring)
        tried += len(offspring)
        if not offspring:
            break
        ranked = sorted((few(child), i) for i, child in enumerate(offspring))
        for _, i in ranked[:SURVIVORS]:
            loss = every(offspring[i])
            if loss < least:
                best, least = offspring[i], loss
                history.append((tried, least))
    return Refined(best, least, history)


def _switched(table: Table, choice: Choice, limits: Mapping[str, float], draw: np.random.Generator) -> Choice | None:
    """One slot (or two) goes down a level or two; then others climb as long as the limits allow it."""
    new = list(choice)
    slots = draw.permutation(len(new))
    down = [int(s) for s in slots if new[s] + 1 < len(table.slots[s].levels)][: int(draw.integers(1, 3))]
    if not down:
        return None
    for s in down:
        steps = int(draw.integers(1, 3))
        new[s] = min(new[s] + steps, len(table.slots[s].levels) - 1)
    return fill(table, tuple(new), limits, draw, never=down)


def fill(
    table: Table,
    choice: Choice,
    limits: Mapping[str, float],
    draw: np.random.Generator | None = None,
    never: Sequence[int] = (),
) -> Choice | None:
    """Let slots climb while the limits hold: each time the one that wins most of the expected loss, or a random one.

    Returns:
        A choice within the limits; None where the given one is not.
    """
    if not table.fits(choice, limits):
        return None
    new = list(choice)
    closed = set(never)
    while True:
        open_ = [s for s in range(len(new)) if new[s] > 0 and s not in closed]
        gains = {}
        for s in open_:
            trial = (*new[:s], new[s] - 1, *new[s + 1 :])
            if table.fits(trial, limits):
                gains[s] = table.lost(tuple(new)) - table.lost(trial)
            else:
                closed.add(s)
        if not gains:
            return tuple(new)
        if draw is not None and draw.random() < 1 / 2:
            up = int(draw.choice(list(gains)))
        else:
            up = max(gains, key=lambda s: gains[s])
        new[up] -= 1
