"""What has been measured of one dense model on one set of data; kept in a cache when there is one."""

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from secateur.choose.cost import UNIFORM_KINDS
from secateur.choose.plan import Plan
from secateur.choose.search import Grid
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.model import fingerprint, fingerprint_data
from secateur.measure.quality import Batch, Reference, compare
from secateur.methods.sensitivity import (
    Influence,
    Ladder,
    Sensitivity,
    drop_layers,
    least_influence,
    probe_kinds,
)
from secateur.progress import Track
from secateur.score.activation import Scores, activation_scores
from secateur.score.cache import Cache, Entry
from secateur.space import Space
from secateur.walk import way


class Study:
    """A dense model, its Space and calibration data, and measurements on them.

    Args:
        model: the dense model.
        space: its Space.
        data: calibration batches.
        samples: rows that KL is measured on.
        cache: where measurements are kept.
        track: shows progress.
    """

    def __init__(
        self, model: nn.Module, space: Space, data: Sequence[Batch], samples: int, cache: Cache, track: Track
    ) -> None:
        if not data:
            raise SecateurError("there is no calibration data")
        if samples < 1:
            raise SecateurError(f"score_samples must be at least 1, not {samples}")
        self.model, self.space, self.data, self.cache, self.track = model, space, data, cache, track
        self.rows = _first_rows(data, samples)
        self.seconds: dict[str, float] = {}

    @cached_property
    def reference(self) -> Reference:
        """The dense model's logits on the rows."""
        return Reference(self.model, self.rows, track=self.track)

    def kl(self, pruned: nn.Module) -> float:
        """KL of a pruned model to the dense one on the rows, in nats per token."""
        return compare(pruned, self.reference).kl

    @cached_property
    def identity(self) -> dict[str, str]:
        """All that every measurement depends on."""
        parameter = next(self.model.parameters())
        return {
            "model": fingerprint(self.model),
            "data": fingerprint_data(self.data),
            "rows": fingerprint_data(self.rows),
            "device": parameter.device.type,
            "secateur": importlib.metadata.version("secateur"),
            "torch": str(torch.__version__),
            "transformers": importlib.metadata.version("transformers"),
            "attention": str(getattr(getattr(self.model, "config", None), "_attn_implementation", None)),
        }

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that the body takes to `seconds`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begin

    def scores(self, *, layers: bool, presorted: bool, kinds: Sequence[str] = UNIFORM_KINDS) -> Scores:
        """Importance of the axes of some kinds, and of the layers where those may go.

        With `presorted`, units count as ordered by importance already, the best first, and are not scored.
        """
        axes = [axis for axis in self.space.axes if axis.kind in kinds]
        in_order = {axis.name: torch.arange(axis.per_group, 0, -1.0).repeat(axis.groups) for axis in axes}
        if presorted and not layers:
            return Scores(in_order, {}, 0, 0)

        def compute() -> Entry:
            wanted = [] if presorted else axes
            found = activation_scores(
                self.model, self.space, self.data, axes=wanted, layers=layers, track=self.track,
                through=way(self.model, "scores", self.track),
            )  # fmt: skip
            return dict(found.axes), {"blocks": dict(found.blocks), "samples": found.samples, "tokens": found.tokens}

        with self.timed("scoring"):
            tensors, values = self._cached(
                compute, what="activation", layers=layers, presorted=presorted, kinds=sorted(kinds)
            )
        return Scores(in_order if presorted else tensors, values["blocks"], values["samples"], values["tokens"])

    def depth(self, scores: Scores, count: int) -> Ladder:
        """Up to `count` layers dropped one after the other, each removal re-measured."""

        def compute() -> Entry:
            ladder = drop_layers(self.model, self.space, scores, count, self.kl, self.track)
            return {}, {"ladder": [[list(names), kl] for names, kl in ladder]}

        with self.timed("depth"):
            _, values = self._cached(compute, what="depth", count=count, blocks=dict(scores.blocks))
        return [(tuple(names), kl) for names, kl in values["ladder"]]

    def influence(self, scores: Scores, grid: Grid) -> Influence:
        """What a search that measures nothing goes by; sizes that no kind may change cost nothing."""
        most = grid.dense["layers"] - min(grid.choices["layers"]) if "layers" in grid.choices else 0
        return Influence(list(grid.probes()), self.shallow(scores, most) if "layers" in grid.choices else [])

    def shallow(self, scores: Scores, count: int) -> Ladder:
        """Up to `count` layers dropped by block influence alone."""
        with self.timed("depth"):
            return least_influence(self.model, self.space, scores, count, self.track)

    def sensitivity(self, scores: Scores, grid: Grid, *, presorted: bool) -> Sensitivity:
        """What one cut of each kind, and the dropped layers, really cost."""

        def compute() -> Entry:
            return {}, {"weight": probe_kinds(self.model, self.space, scores, grid, self.kl, self.track)}

        with self.timed("probing"):
            sizes = {kind: list(found) for kind, found in grid.choices.items()}
            _, values = self._cached(compute, what="probes", choices=sizes, presorted=presorted)
        ladder = self.depth(scores, grid.dense["layers"] - min(grid.choices["layers"])) if "layers" in sizes else []
        return Sensitivity(values["weight"], ladder)

    def candidate_kl(self, plan: Plan) -> float:
        """KL of the model that a plan makes."""

        def compute() -> Entry:
            return {}, {"kl": self.kl(apply(self.model, plan, space=self.space))}

        kept = {name: list(k.units) for name, k in plan.kept.items()}
        return float(self._cached(compute, what="candidate", kept=kept, dropped=list(plan.dropped))[1]["kl"])

    def _cached(self, compute: Any, **parts: Any) -> Entry:
        if self.cache.folder is None:
            return compute()  # type: ignore[no-any-return]
        return self.cache.get({**self.identity, **parts}, compute)


def _first_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first rows of the data, in the batches that they come in."""
    taken: list[Batch] = []
    for batch in batches:
        if rows <= 0:
            break
        if isinstance(batch, torch.Tensor):
            taken.append(batch[:rows])
            rows -= len(batch)
        else:
            taken.append({name: value[:rows] for name, value in batch.items()})
            rows -= len(next(iter(batch.values())))
    return taken
