"""FLAP's importance: how much what a weight reads fluctuates around its mean, which a bias could stand in for.

An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv:2312.11983).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.mode import evaluating
from secateur.load.shared import shared
from secateur.load.store import held
from secateur.load.through import Through, shown, whole_passes
from secateur.progress import Track, quiet
from secateur.score.weights import Scores
from secateur.space import Axis, Space
from secateur.space.products import Product, Products, plain_attention

Place = tuple[str, tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]
"""A weight, the part of it, the dimensions of its columns and those of its rows."""


@dataclass
class Spread:
    """Mean and sum of squared distances from it, of rows that come in parts; both float64 [columns]."""

    rows: int
    mean: torch.Tensor
    squares: torch.Tensor

    def add(self, x: torch.Tensor) -> None:
        """Take in rows [n, columns], as Chan et al. 1983 join two samples: nothing large cancels."""
        wide = x.double()
        mean = wide.mean(0)
        squares = (wide - mean).square().sum(0)
        step, total = mean - self.mean, self.rows + len(x)
        self.squares += squares + step.square() * (self.rows * len(x) / total)
        self.mean += step * (len(x) / total)
        self.rows = total

    def variance(self) -> torch.Tensor:
        """Sample variance of each column."""
        return self.squares / max(1, self.rows - 1)


def fluctuation(
    model: nn.Module,
    space: Space,
    batches: Sequence[Batch],
    axes: Sequence[Axis] | None = None,
    *,
    through: Through = whole_passes,
    track: Track = quiet,
) -> Scores:
    """Sum over the columns j that read a unit of Var(x_j) * ||W_:j||^2; over all readers where there are several.

    The sample variance is that over all rows that the column meets: tokens, or of a convolution the positions of its
    kernel, with the zeros of its padding. Weights count in float32. Padding tokens count too.

    Args:
        model: the dense model; it runs in evaluation mode.
        space: its Space.
        batches: calibration data; targets and labels are left out.
        axes: which axes; None for all.
        through: how the data goes through the model.
        track: shows progress.

    Raises:
        SecateurError: without batches, with more processes than samples, for activations that are not finite, and for
            an axis that no weight reads.
    """
    if not batches:
        raise SecateurError("there is no calibration batch to see activations fluctuate on")
    wanted = space.axes if axes is None else axes
    readers = {axis.name: [part for _, part in space.consumers(axis)] for axis in wanted}
    for name, parts in readers.items():
        if not parts:
            raise SecateurError(f"{name} is read by no weight, so nothing of it fluctuates: ignore it (ignore: {name})")
    parameters = dict(model.named_parameters())
    watched = {part.parameter: parameters[part.parameter] for parts in readers.values() for part in parts}
    spreads = _spreads(model, batches, watched, shown(through, track, "fluctuations"))
    along: dict[tuple[str, int], torch.Tensor] = {}
    for name in dict.fromkeys(name for name, *_ in spreads):
        with held(model, names=[name]):
            for place in [place for place in spreads if place[0] == name]:
                columns, values = place[2], _of_columns(watched[name].detach(), place, spreads[place])
                for at, dim in enumerate(columns):
                    whole = along.setdefault((name, dim), torch.zeros(watched[name].shape[dim], dtype=torch.float64))
                    others = [other for other in range(len(columns)) if other != at]
                    whole[slice(*place[1][dim])] += (values.sum(others) if others else values).cpu()
    found: Scores = {}
    for axis in wanted:
        seen = [along[p.parameter, p.dim][p.rows()].sum(1) for p in readers[axis.name] if (p.parameter, p.dim) in along]
        if not seen:
            raise SecateurError(f"no calibration data reaches what reads {axis.name}: ignore it (ignore: {axis.name})")
        found[axis.name] = torch.stack(seen).sum(0)
    return found


class _Watch:
    """What the columns of every part of every watched weight meet."""

    def __init__(self) -> None:
        self.spreads: dict[Place, Spread] = {}
        self.counts = False

    def at(self, index: int | None) -> None:
        """Say whether what runs is to be taken in."""
        self.counts = index is not None

    def see(self, product: Product) -> None:
        """Take in one product."""
        if not self.counts or not product.operand.numel():  # an expert that is called without a token
            return
        place = (product.weight, product.part, product.columns, product.rows)
        x = product.read()
        if place not in self.spreads:
            zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.spreads[place] = Spread(0, zeros, zeros.clone())
        self.spreads[place].add(x)

    def state(self) -> dict[str, torch.Tensor]:
        """Rows, mean and squares of all places, in one tensor each."""
        return {
            json.dumps(place): torch.stack([torch.full_like(s.mean, s.rows), s.mean, s.squares])
            for place, s in self.spreads.items()
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        self.spreads = {}
        for text, (rows, mean, squares) in state.items():
            name, part, columns, outer = json.loads(text)
            place = (name, tuple((a, b) for a, b in part), tuple(columns), tuple(outer))
            self.spreads[place] = Spread(int(rows[0]), mean.clone(), squares.clone())

    def join(self) -> None:
        """Put those of all processes together, by Chan's formula about the mean of all: nothing large cancels."""
        own = self.state()
        # Sums first, so that all have the mean of all; then the squares about it.
        whole = world.add_up_named({t: torch.stack([rows, rows * mean]) for t, (rows, mean, _) in own.items()})
        means = {text: total / rows for text, (rows, total) in whole.items()}
        squares = {
            text: torch.zeros_like(mean)
            if text not in own
            else own[text][2] + own[text][0] * (own[text][1] - mean).square()
            for text, mean in means.items()
        }
        world.add_up(squares.values())
        self.restore({t: torch.stack([whole[t][0], means[t], squares[t]]) for t in whole})


def _spreads(
    model: nn.Module, batches: Sequence[Batch], watched: Mapping[str, torch.Tensor], through: Through
) -> dict[Place, Spread]:
    """What the columns of every part of every watched weight meet."""
    own, watch = shared(batches), _Watch()
    with world.as_one(), evaluating(model), torch.no_grad(), plain_attention(), Products(watched, watch.see):
        through(model, own, watch)
    if world.split():
        watch.join()
    for place, spread in watch.spreads.items():
        if not bool(torch.isfinite(spread.squares).all()):
            raise SecateurError(f"NaN or infinite activations at the input of {place[0]}: check the weights and dtype")
    return watch.spreads


def _of_columns(weight: torch.Tensor, place: Place, spread: Spread) -> torch.Tensor:
    """Variance times squared norm of each column, in the shape of the columns' dimensions, float64."""
    _, part, columns, rows = place
    own = weight[tuple(slice(*span) for span in part)].float()
    rest = [dim for dim in range(own.dim()) if dim not in (*columns, *rows)]  # an expert's number
    norms = own.permute(*columns, *rows, *rest).flatten(len(columns)).square().sum(-1)
    return spread.variance().reshape(norms.shape) * norms.double()


def standardised(scores: Scores) -> Scores:
    """(s - mean) / standard deviation within each axis, float64; zeros where all units are alike."""
    found = {}
    for name, values in scores.items():
        wide = values.double()
        spread = wide.std() if len(wide) > 1 else wide.new_zeros(())
        found[name] = (wide - wide.mean()) / spread if spread > 0 else torch.zeros_like(wide)
    return found
