"""Whether a stock class can have given sizes in every layer, and which sizes one number of its config ties together."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import torch

from secateur.choose.cost import gone_parameters, lengths
from secateur.choose.rank import plan_for_sizes
from secateur.cut.config import with_head_dim
from secateur.cut.names import new_name, renumbered
from secateur.cut.solve import Made, configs_for, shapes_of
from secateur.errors import SecateurError
from secateur.load.megatron import Opened
from secateur.space import Space, evaluate
from secateur.space.provenance import made_sizes


class Uniform:
    """A model class and its config, asked for other sizes; nothing but meta tensors is made.

    GPT-2's config cannot set a head dimension, so its hidden size and heads must be cut together; Llama's rejects a
    hidden size that its heads do not divide; DeepSeek's has one number for the width of routed and of shared experts.

    Args:
        model: the dense model.
        space: its Space.
    """

    def __init__(self, model: Any, space: Space) -> None:
        self.model, self.space = model, space
        self.scores = {a.name: torch.arange(a.per_group, 0, -1.0).repeat(a.groups) for a in space.axes}
        self.known: dict[tuple[tuple[str, int], ...], bool] = {}

    def describes(self, sizes: Mapping[str, int]) -> bool:
        """Whether some config gives these sizes by kind; other kinds keep theirs. Layers are not looked at."""
        key = tuple(sorted(sizes.items()))
        if key not in self.known:
            self.known[key] = self._has_config(sizes, self._spare)
        return self.known[key]

    @cached_property
    def _made(self) -> Made | None:
        """What sizes come from in the constructor; None where it cannot be seen."""
        try:
            return made_sizes(type(self.model), copy.deepcopy(with_head_dim(self.model.config)))
        except Exception:  # noqa: BLE001 - some constructors do what tagged numbers cannot
            return None

    @cached_property
    def _spare(self) -> tuple[str, ...]:
        """Layers that look like one before them: without those the answer is the same, and sooner there."""
        seen: set[Any] = set()
        spare = []
        for layer in self.space.layers():
            prefix = f"{layer.name}."
            own = {n.removeprefix(prefix): p.shape for n, p in self.space.parameters.items() if n.startswith(prefix)}
            shape = tuple(sorted(own.items()))
            spare += [layer.name] if shape in seen else []
            seen.add(shape)
        return tuple(spare) if spare and self._has_config({}, tuple(spare)) else ()

    def _has_config(self, sizes: Mapping[str, int], dropped: Sequence[str]) -> bool:
        try:
            plan = plan_for_sizes(self.space, self.scores, sizes, dropped)
        except SecateurError:
            return False  # groups cannot share such a size
        if isinstance(self.model, Opened):
            return True  # each size has a field of its own
        gone, at, moved = gone_parameters(self.space, plan), lengths(self.space, plan), renumbered(self.space, plan)
        wanted = {
            str(new_name(name, moved)): tuple(int(evaluate(dim, at)) for dim in parameter.dims)
            for name, parameter in self.space.parameters.items()
            if name not in gone
        }
        configs = configs_for(self.model, plan, self.space, self._made or {})
        return any(shapes_of(type(self.model), config) == wanted for config in configs)

    def ties(self, dense: Mapping[str, int]) -> dict[str, str]:
        """Kind -> the kind that it follows in proportion, since one number of the config sets both.

        Args:
            dense: sizes of the model by kind.
        """
        kinds = [kind for kind in _TIED if dense.get(kind, 1) > 1]
        bound = [k for k in kinds if not any(self.describes({k: size}) for size in _trials(self.space, dense, k))]
        found: dict[str, str] = {}
        for leader, follower in combinations(bound, 2):
            if follower != "hidden" and follower not in found and leader not in found:
                trials = [both(dense, leader, size, follower) for size in _trials(self.space, dense, leader)]
                if any(sizes is not None and self.describes(sizes) for sizes in trials):
                    found[follower] = leader
        return found

    def completed(self, sizes: Mapping[str, int], dense: Mapping[str, int]) -> dict[str, int] | None:
        """The sizes, and those of kinds that have to go along, as a config has them; None where none does."""
        if self.describes(sizes):
            return dict(sizes)
        trial = dict(sizes)
        for follower, leader in self.ties(dense).items():
            for a, b in ((leader, follower), (follower, leader)):
                if a in trial and b not in trial:
                    trial |= both(dense, a, trial[a], b) or {}
        for kind in (None, "ssm_heads", "ssm_head_dim"):  # whose product is a multiple of the hidden size, in some
            extra = {} if kind is None else _following(trial, dense, kind)
            if extra is not None and self.describes({**trial, **extra}):
                return {**trial, **extra}
        return None


_TIED = ("hidden", "ffn", "expert_ffn", "shared_expert_ffn", "ssm_channels")
"""Kinds that configs may have one number for: a leader before those that follow it."""


def _trials(space: Space, dense: Mapping[str, int], kind: str) -> list[int]:
    """Some smaller sizes: odd ones, and ones that other sizes will divide."""
    groups = max((axis.groups for axis in space.of_kind(kind)), default=1)
    sizes = [dense[kind] - part for part in (dense[kind] // 4, dense[kind] // 8, 1)]
    return [size for size in dict.fromkeys(sizes) if 0 < size < dense[kind] and size % groups == 0]


def both(dense: Mapping[str, int], leader: str, size: int, follower: str) -> dict[str, int] | None:
    """Sizes of two kinds, cut in one proportion; None where that is no whole number."""
    scaled, rest = divmod(dense[follower] * size, dense[leader])
    return {leader: size, follower: scaled} if rest == 0 and scaled else None


def _following(sizes: Mapping[str, int], dense: Mapping[str, int], kind: str) -> dict[str, int] | None:
    if "hidden" not in sizes or kind not in dense or kind in sizes:
        return None
    return both(dense, "hidden", sizes["hidden"], kind)
