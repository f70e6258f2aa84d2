"""Activation importance: how strongly the units of every axis fire on calibration data, in one forward pass.

The reduction is Minitron's (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge
Distillation", arXiv:2407.14679): R(X) = sqrt(sum over samples of (mean over the sequence of |X|)^2), in float32.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.mode import evaluating
from secateur.load.shared import shared
from secateur.load.through import Through, shown, whole_passes
from secateur.progress import Track, quiet
from secateur.score.experts import Mixture
from secateur.space import Axis, Slice, Space

Batch = torch.Tensor | Mapping[str, torch.Tensor]
KINDS = (
    *("hidden", "ffn", "heads", "kv_groups", "experts", "expert_ffn", "shared_expert_ffn"),
    *("ssm_heads", "ssm_head_dim", "ssm_channels"),
)
"""Kinds of axes that are scored where nothing else is asked for."""


@dataclass(frozen=True)
class Scores:
    """Importance of everything that can be cut; higher = keep."""

    axes: Mapping[str, torch.Tensor]
    """Axis name -> float32 [size]."""
    blocks: Mapping[str, float]
    """Layer name -> block influence, 1 - mean cosine of its input and output (Men et al. 2024, arXiv:2403.03853)."""
    samples: int
    tokens: int


class _Watch:
    """Accumulates reductions while the model runs."""

    def __init__(self, batches: Sequence[Batch], mixtures: Mapping[str, Mixture]) -> None:
        self.facts = [_facts(batch) for batch in batches]
        self.mixtures = mixtures
        self.energy: dict[str, torch.Tensor] = {}
        self.cosine: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None
        self.samples = 0
        """Rows of the batch that runs."""
        self.turned = False
        """Whether activations are [sequence, batch, channels]."""
        self.counts = False
        """Whether what runs is to be taken in."""

    def at(self, index: int | None) -> None:
        """Say which batch runs."""
        self.counts = index is not None
        if index is not None:
            self.samples, self.mask = self.facts[index].samples, self.facts[index].mask
        self.inputs.clear()

    def _sums(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        yield "energy", self.energy
        yield "cosine", self.cosine
        for path, mixture in self.mixtures.items():
            yield f"experts of {path}", mixture.energy

    def state(self) -> dict[str, torch.Tensor]:
        """All sums, by name."""
        found = {f"{kind}:{key}": total for kind, sums in self._sums() for key, total in sums.items()}
        for path, mixture in self.mixtures.items():
            found |= {f"saliency:{path}": mixture.saliency.clone(), f"routed:{path}": mixture.routed.clone()}
        return found

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put sums back."""
        for kind, sums in self._sums():
            sums.clear()
            sums |= {name.removeprefix(f"{kind}:"): x for name, x in state.items() if name.startswith(f"{kind}:")}
        for path, mixture in self.mixtures.items():
            mixture.saliency, mixture.routed = state[f"saliency:{path}"].clone(), state[f"routed:{path}"].clone()

    def reduce(self, key: str, x: torch.Tensor) -> None:
        """Add sum over samples of (mean over the sequence of |x|)^2 to what is known of `key`."""
        if not self.counts:
            return
        x = x.detach().transpose(0, 1) if self.turned and x.dim() == 3 else x.detach()
        if x.dim() == 2:  # mixtures flatten samples and positions into rows
            x = x.reshape(self.samples, -1, x.shape[1]) if len(x) % max(1, self.samples) == 0 else x[:, None]
        x = x.flatten(1, -2).abs()
        if self.mask is None:
            mean = x.mean(1, dtype=torch.float32)
        else:
            weight = self.mask.to(x.device, torch.float32)[..., None]
            mean = (x.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
        total = mean.square().sum(0)
        self.energy[key] = self.energy[key] + total if key in self.energy else total

    def compare(self, key: str, after: torch.Tensor) -> None:
        """Add the cosines between a layer's input and output, summed over positions."""
        if not self.counts:
            return
        cosine = torch.cosine_similarity(self.inputs.pop(key).detach().float(), after.detach().float(), dim=-1)
        if self.mask is not None:
            cosine = cosine * (self.mask.T if self.turned else self.mask).to(cosine)
        total = cosine.sum(dtype=torch.float64)
        self.cosine[key] = self.cosine[key] + total if key in self.cosine else total


def activation_scores(
    model: nn.Module,
    space: Space,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis] | None = None,
    layers: bool = True,
    through: Through = whole_passes,
    track: Track = quiet,
) -> Scores:
    """Score axes and layers by what they do on calibration data.

    hidden: R of every norm's output except the last, summed over the norms. ffn, shared_expert_ffn, ssm_channels: R of
    the input of the projection that reads the units. heads, kv_groups: R of the same, L2 over the columns of each unit.
    ssm_heads, ssm_head_dim: R of the x that the input projection makes, L2 over the channels of each unit (Taghibakhshi
    et al. 2025, "Efficient Hybrid Language Model Compression through Group-Aware SSM Pruning", arXiv:2504.11409).
    experts, expert_ffn: see `score.experts`.

    Args:
        model: the dense model, on its device.
        space: its Space.
        batches: token ids [batch, sequence], or dicts of arguments; one row is one sample. A zero in an
            ``attention_mask`` leaves the position out.
        axes: which axes to score; None for all of the kinds in `KINDS`.
        layers: whether to measure the layers' block influence.
        through: how the data goes through the model.
        track: shows progress.

    Raises:
        SecateurError: without any batch, with more processes than samples, where activations are not finite (names the
            module), or where a mixture of experts cannot be observed.
    """
    wanted = [a for a in space.axes if a.kind in KINDS] if axes is None else axes
    norms = {axis.name: [n.module for n in space.norms if n.axis == axis.name][:-1] for axis in wanted}
    where = {axis.name: _places(space, axis, norms[axis.name]) for axis in wanted}
    _check_seen(model, wanted, where)
    mixtures = _mixtures(model, space, wanted)
    given = list(batches)
    if not given:
        raise SecateurError("there is no calibration batch to score with")
    own = shared(given)
    watch = _Watch(own, mixtures)
    watch.turned = getattr(model, "sequence_first", False)
    handles = _hook(model, watch, [key for found in where.values() for key, _ in found])
    handles += _hook_mixtures(watch, mixtures) + _hook_layers(model, watch, space if layers else None)
    try:
        with world.as_one(), evaluating(model), torch.inference_mode():
            shown(through, track, "scoring")(model, own, watch)
    finally:
        for handle in handles:
            handle.remove()
    if world.split() or getattr(model, "stages", None) is not None:  # each stage of a pipeline has seen its own
        watch.restore(world.add_up_named(watch.state()))
    for key, energy in watch.energy.items():
        if not bool(torch.isfinite(energy).all()):
            place, _, module = key.partition(":")
            raise SecateurError(f"NaN or infinite activations at the {place} of {module}: check the weights and dtype")
    for name, total in watch.cosine.items():
        if not bool(torch.isfinite(total)):
            raise SecateurError(f"NaN or infinite activations in {name}: check the weights and dtype")
    watch.energy |= {f"experts:{name}": e for m in mixtures.values() for name, e in m.energy.items()}
    scores = {}
    for axis in wanted:
        mixture = mixtures.get(_mixture_of(space, axis) or "") if axis.kind == "experts" else None
        scores[axis.name] = _axis_score(axis, watch, where[axis.name]) if mixture is None else mixture.scores()
        if not bool(torch.isfinite(scores[axis.name]).all()):
            raise SecateurError(f"NaN or infinite activations in {axis.name}: check the weights and dtype")
    facts = [_facts(batch) for batch in given]
    tokens = sum(fact.tokens for fact in facts)
    influence = {name: 1 - float(total) / tokens for name, total in watch.cosine.items()}
    return Scores(scores, influence, sum(fact.samples for fact in facts), int(tokens))


@dataclass(frozen=True)
class _Facts:
    """What is to be known of a batch."""

    samples: int
    tokens: float
    mask: torch.Tensor | None
    """None where all positions count."""


def _facts(batch: Batch) -> _Facts:
    arguments = {"": batch} if isinstance(batch, torch.Tensor) else {k: v for k, v in batch.items() if k != "labels"}
    first, mask = next(iter(arguments.values())), arguments.get("attention_mask")
    if mask is not None and bool(mask.all()):
        mask = None
    return _Facts(int(first.shape[0]), float(first.numel() if mask is None else mask.sum()), mask)


def _places(space: Space, axis: Axis, norms: Sequence[str]) -> list[tuple[str, Slice | None]]:
    """What is measured for an axis: (key of an activation, which of its columns the units are; None = all)."""
    if axis.kind == "hidden":
        return [(f"output:{module}", None) for module in norms]
    if axis.kind == "experts":
        return []
    if axis.kind in ("ssm_heads", "ssm_head_dim"):
        flat = [r for r in space.readers if len(space.tensor(r.parameter).shape) == 2]  # no convolution
        made = {(r.parameter, r.out_dim): r.module for r in flat}
        wide = [s for s in axis.slices if (s.parameter, s.dim) in made and _width(axis, s) == _width(axis)]
        if wide:  # the gate comes first and x second, where one projection makes both
            return [(f"output:{made[wide[-1].parameter, wide[-1].dim]}", wide[-1])]
    read = list(space.consumers(axis))
    if axis.kind == "ssm_channels":
        read = read[-1:]  # what the scan gives, gated; small projections read the channels before it
    stacked = {router.parameter for router in space.routers}
    return [(f"experts:{s.parameter}" if s.parameter in stacked else f"input:{r.module}", s) for r, s in read]


def _check_seen(
    model: nn.Module, wanted: Sequence[Axis], where: Mapping[str, Sequence[tuple[str, Slice | None]]]
) -> None:
    """Raise SecateurError where a module multiplies more than once, so that its input need not be what is asked for."""
    for axis in wanted:
        for key, _ in where[axis.name]:
            place, _, module = key.partition(":")
            if place == "input" and not hasattr(model.get_submodule(module), "weight"):
                raise SecateurError(
                    f"{axis.name} cannot be scored: {module} multiplies several weights; skip {axis.kind}"
                )


def _width(axis: Axis, part: Slice | None = None) -> int:
    """Rows of each unit; the most that any slice has."""
    return max(int(s.rows().shape[1]) for s in ([part] if part is not None else axis.slices))


def _mixture_of(space: Space, axis: Axis) -> str | None:
    """The module that runs the experts of an axis, or the experts that the axis lies in."""
    own = {part.parameter for part in axis.slices}
    return next((r.module for r in space.routers if r.parameter in own), None)


def _mixtures(model: nn.Module, space: Space, wanted: Sequence[Axis]) -> dict[str, Mixture]:
    found: dict[str, Mixture] = {}
    stacked = {router.parameter for router in space.routers}
    for path in dict.fromkeys(r.module for r in space.routers):
        axes = [a for a in wanted if a.kind in ("experts", "expert_ffn") and _mixture_of(space, a) == path]
        if not axes:
            continue
        module = model.get_submodule(path)
        reads = [(r.parameter, r.in_dim) for a in axes if a.kind == "expert_ffn" for r, _ in space.consumers(a)]
        widths = {
            name.removeprefix(f"{path}."): space.parameters[name].shape[d] for name, d in reads if name in stacked
        }
        experts = space.axis(next(r.axis for r in space.routers if r.module == path)).size
        found[path] = Mixture(path, module, experts, widths)
    return found


def _hook_mixtures(watch: _Watch, mixtures: Mapping[str, Mixture]) -> list[Any]:
    handles = []
    for mixture in mixtures.values():

        def see(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, of: Mixture = mixture
        ) -> None:
            if watch.counts:
                of.see(args, kwargs, output, watch.samples, watch.mask)

        handles.append(mixture.module.register_forward_hook(see, with_kwargs=True))
    return handles


def _hook(model: nn.Module, watch: _Watch, keys: Sequence[str]) -> list[Any]:
    handles = []
    for key in dict.fromkeys(keys):
        place, _, module = key.partition(":")

        def see_input(_: nn.Module, args: tuple[Any, ...], *, key: str = key) -> None:
            watch.reduce(key, args[0])

        def see_output(_: nn.Module, __: Any, output: Any, *, key: str = key) -> None:
            watch.reduce(key, output[0] if isinstance(output, tuple) else output)

        if place == "input":
            handles.append(model.get_submodule(module).register_forward_pre_hook(see_input))
        elif place == "output":
            handles.append(model.get_submodule(module).register_forward_hook(see_output))
    return handles


def _hook_layers(model: nn.Module, watch: _Watch, space: Space | None) -> list[Any]:
    handles = []
    for name in [] if space is None else [block.name for block in space.layers()]:

        def see_before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, key: str = name) -> None:
            if watch.counts:
                watch.inputs[key] = args[0] if args else kwargs["hidden_states"]

        def see_after(_: nn.Module, __: Any, output: Any, *, key: str = name) -> None:
            watch.compare(key, output[0] if isinstance(output, tuple) else output)

        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(see_before, with_kwargs=True))
        handles.append(layer.register_forward_hook(see_after))
    return handles


def _axis_score(axis: Axis, watch: _Watch, where: Sequence[tuple[str, Slice | None]]) -> torch.Tensor:
    parts = []
    for key, part in where:
        if key not in watch.energy:
            raise SecateurError(f"{axis.name} cannot be scored: {key.partition(':')[2]} was never called")
        activity = watch.energy[key].sqrt()
        parts.append(activity if part is None else activity[part.rows().to(activity.device)].square().sum(1).sqrt())
    if not parts:
        raise SecateurError(f"no module reads the units of {axis.name}: it cannot be scored by activations")
    return torch.stack(parts).sum(0).cpu()
