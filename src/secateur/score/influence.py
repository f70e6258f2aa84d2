"""Block influence of layers and sub-layers: how far each turns the residual stream.

Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (arXiv:2403.03853);
sub-layers as in He et al. 2024, "What Matters in Transformers? Not All Attention is Needed" (arXiv:2406.15786).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.load.mode import evaluating
from secateur.load.shared import shared
from secateur.load.through import Through, shown, whole_passes
from secateur.progress import Track, quiet
from secateur.space import Block


def influence(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    *,
    track: Track = quiet,
    through: Through = whole_passes,
) -> dict[str, float]:
    """1 - mean cosine of the residual stream before and after each block.

    Of a sub-layer, the stream is what goes into the norm before it that nothing else needs, or else what goes into its
    layer; what it adds is its result, after the norm behind it where there is one of its own.

    Args:
        model: the dense model; it runs in evaluation mode.
        batches: calibration data. Positions that an ``attention_mask`` [B, S] leaves out do not count.
        blocks: layers, attention and MLP sub-layers of the Space.
        track: shows progress.
        through: how the data goes through the model.

    Returns:
        Block name -> influence, 0 for one that does nothing; up to 2.

    Raises:
        SecateurError: without batches, and for activations that are not finite.
    """
    if not batches:
        raise SecateurError("there is no calibration batch to see the influence of blocks on")
    own = shared(batches)
    watch = _Watch(own)
    handles = [handle for block in blocks for handle in watch.hooks(model, block)]
    try:
        with world.as_one(), evaluating(model), torch.no_grad():
            shown(through, track, "block influence")(model, own, watch)
            watch.close()
    finally:
        for handle in handles:
            handle.remove()
    if world.split():
        watch.restore(world.add_up_named(watch.state()))
    found = {}
    for block in blocks:
        cosine, count = watch.sums.get(block.name, (0.0, 0))
        found[block.name] = 1 - cosine / count if count else 0.0
        if found[block.name] != found[block.name]:
            raise SecateurError(f"NaN or infinite activations at {block.name}: check the weights and dtype")
    return found


class _Watch:
    """Notes the stream before each block and what it adds."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.seeing = True
        self.mask: torch.Tensor | None = None
        self.before: dict[str, torch.Tensor] = {}
        self.added: dict[str, torch.Tensor] = {}
        self.sums: dict[str, tuple[float, int]] = {}

    def at(self, index: int | None) -> None:
        """See `load.through.Watcher`."""
        self.close()
        self.seeing = index is not None
        batch = None if index is None else self.batches[index]
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def state(self) -> dict[str, torch.Tensor]:
        """See `load.through.Watcher`."""
        self.close()
        return {name: torch.tensor(both, dtype=torch.float64) for name, both in self.sums.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `load.through.Watcher`."""
        self.sums = {name: (float(both[0]), int(both[1])) for name, both in state.items()}

    def hooks(self, model: nn.Module, block: Block) -> list[Any]:
        """Hooks for one block; the result of a norm of its own that runs after it replaces the block's."""
        name, own = block.name, model.get_submodule(block.name)
        layer = model.get_submodule(f"{block.stack}.{block.index}")
        handles = [layer.register_forward_pre_hook(self._enter(name), with_kwargs=True)]
        if block.kind == "layers":
            handles.append(layer.register_forward_hook(self._leave(name, whole=True)))
            return handles
        handles.append(own.register_forward_hook(self._leave(name)))
        for idle in block.idle:
            norm = model.get_submodule(idle)
            handles.append(norm.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(norm.register_forward_hook(self._leave(name, behind=True)))
        return handles

    def _enter(self, name: str) -> Any:
        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.seeing and name not in self.added:  # a norm behind the sub-layer sees no stream
                self.before[name] = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).detach()

        return see

    def _leave(self, name: str, *, whole: bool = False, behind: bool = False) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            if not self.seeing or (behind and name not in self.added):
                return
            result = (output[0] if isinstance(output, tuple | list) else output).detach()
            self.added[name] = result - self.before[name] if whole else result

        return see

    def close(self) -> None:
        """Add up the cosines of this batch."""
        for name, added in self.added.items():
            before = self.before[name]
            cosine = torch.cosine_similarity(before.float(), (before + added.reshape(before.shape)).float(), dim=-1)
            if self.mask is not None and self.mask.shape == cosine.shape:
                cosine = cosine[self.mask.to(cosine.device).bool()]
            old, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = old + float(cosine.sum(dtype=torch.float64)), count + cosine.numel()
        self.before.clear()
        self.added.clear()
