"""Activation importance: how strongly the units of every axis fire on calibration data, in one forward pass.

The reduction is Minitron's (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge
Distillation", arXiv:2407.14679): R(X) = sqrt(sum over samples of (mean over the sequence of |X|)^2), in float32.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.load.mode import evaluating
from secateur.progress import Track, quiet
from secateur.space import Axis, Space

Batch = torch.Tensor | Mapping[str, torch.Tensor]


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

    def __init__(self) -> None:
        self.energy: dict[str, torch.Tensor] = {}
        self.cosine: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None
        self.tokens = 0.0

    def reduce(self, key: str, x: torch.Tensor) -> None:
        """Add sum over samples of (mean over the sequence of |x|)^2 to what is known of `key`."""
        x = x.detach()
        if x.dim() == 2:
            x = x[:, None]
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
        cosine = torch.cosine_similarity(self.inputs.pop(key).detach().float(), after.detach().float(), dim=-1)
        if self.mask is not None:
            cosine = cosine * self.mask.to(cosine)
        total = cosine.sum(dtype=torch.float64)
        self.cosine[key] = self.cosine[key] + total if key in self.cosine else total


def activation_scores(
    model: nn.Module,
    space: Space,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis] | None = None,
    layers: bool = True,
    track: Track = quiet,
) -> Scores:
    """Score axes and layers by what they do on calibration data.

    hidden: R of every norm's output except the last, summed over the norms. ffn: R of the input of the projection
    that reads the units. heads, kv_groups: R of the same, L2 over the columns of each unit.

    Args:
        model: the dense model, on its device.
        space: its Space.
        batches: token ids [batch, sequence], or dicts of arguments; one row is one sample. A zero in an
            ``attention_mask`` leaves the position out.
        axes: which axes to score; None for all of the kinds hidden, ffn, heads and kv_groups.
        layers: whether to measure the layers' block influence.
        track: shows progress.

    Raises:
        SecateurError: without any batch, or where activations are not finite (names the module).
    """
    wanted = [a for a in space.axes if a.kind in ("hidden", "ffn", "heads", "kv_groups")] if axes is None else axes
    readers = {axis.name: [(r.module, s) for r, s in space.consumers(axis)] for axis in wanted if axis.kind != "hidden"}
    norms = {axis.name: [n.module for n in space.norms if n.axis == axis.name][:-1] for axis in wanted}
    watch = _Watch()
    handles = _hook(model, watch, readers, norms, [b.name for b in space.layers()] if layers else [])
    samples = 0
    try:
        with evaluating(model), torch.inference_mode():
            for batch in track(list(batches), "scoring"):
                samples += _forward(model, batch, watch)
    finally:
        for handle in handles:
            handle.remove()
    if samples == 0:
        raise SecateurError("there is no calibration batch to score with")
    for key, energy in watch.energy.items():
        if not bool(torch.isfinite(energy).all()):
            place, _, module = key.partition(":")
            raise SecateurError(f"NaN or infinite activations at the {place} of {module}: check the weights and dtype")
    for name, total in watch.cosine.items():
        if not bool(torch.isfinite(total)):
            raise SecateurError(f"NaN or infinite activations in {name}: check the weights and dtype")
    scores = {axis.name: _axis_score(axis, watch, space, norms[axis.name]) for axis in wanted}
    influence = {name: 1 - float(total) / watch.tokens for name, total in watch.cosine.items()}
    return Scores(scores, influence, samples, int(watch.tokens))


def _forward(model: nn.Module, batch: Batch, watch: _Watch) -> int:
    device = next(model.parameters()).device
    arguments = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    arguments = {key: value.to(device) for key, value in arguments.items() if key != "labels"}
    first = next(iter(arguments.values()))
    watch.mask = arguments.get("attention_mask")
    if watch.mask is not None and bool(watch.mask.all()):
        watch.mask = None
    watch.tokens += float(first.numel() if watch.mask is None else watch.mask.sum())
    extra: dict[str, Any] = {"use_cache": False} if hasattr(model, "config") else {}
    model(**arguments, **extra)
    return int(first.shape[0])


def _hook(
    model: nn.Module,
    watch: _Watch,
    readers: Mapping[str, Sequence[tuple[str, Any]]],
    norms: Mapping[str, Sequence[str]],
    layers: Sequence[str],
) -> list[Any]:
    handles = []
    for module in dict.fromkeys(m for found in readers.values() for m, _ in found):

        def see_input(_: nn.Module, args: tuple[Any, ...], *, key: str = f"input:{module}") -> None:
            watch.reduce(key, args[0])

        handles.append(model.get_submodule(module).register_forward_pre_hook(see_input))
    for module in dict.fromkeys(m for found in norms.values() for m in found):

        def see_output(_: nn.Module, __: Any, output: torch.Tensor, *, key: str = f"output:{module}") -> None:
            watch.reduce(key, output)

        handles.append(model.get_submodule(module).register_forward_hook(see_output))
    for name in layers:

        def see_before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, key: str = name) -> None:
            watch.inputs[key] = args[0] if args else kwargs["hidden_states"]

        def see_after(_: nn.Module, __: Any, output: Any, *, key: str = name) -> None:
            watch.compare(key, output[0] if isinstance(output, tuple) else output)

        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(see_before, with_kwargs=True))
        handles.append(layer.register_forward_hook(see_after))
    return handles


def _axis_score(axis: Axis, watch: _Watch, space: Space, norms: Sequence[str]) -> torch.Tensor:
    if axis.kind == "hidden":
        parts = [watch.energy[f"output:{module}"].sqrt() for module in norms]
    else:
        parts = []
        for reader, part in space.consumers(axis):
            activity = watch.energy[f"input:{reader.module}"].sqrt()
            parts.append(activity[part.rows().to(activity.device)].square().sum(1).sqrt())
    if not parts:
        raise SecateurError(f"no module reads the units of {axis.name}: it cannot be scored by activations")
    return torch.stack(parts).sum(0).cpu()
