"""Models that fit only across processes: each holds a stage of the layers, and batches go from one to the next.

The rest of the model is there as well, with weights that stay in their files (`load.store`): each process runs what
comes before the layers on the batch itself (masks, positions), its own layers on what the stage before it gives, and
nothing behind them. What a module is seen to do is thus what it does in one process, in the same order.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.store import held
from secateur.load.through import Watcher
from secateur.methods.trials import Through
from secateur.space import Block, Space
from secateur.space.products import Enough
from secateur.walk import STAGES

AT_ONCE = 4
"""Batches on the way together, for each stage."""


def layers_per_stage(layers: int, stages: int | None, counts: Sequence[int]) -> list[int]:
    """How many layers each stage holds.

    Args:
        layers: of the model.
        stages: how many stages; as even as it goes, the first ones have one more.
        counts: the layers of each, in place of that.

    Raises:
        SecateurError: where they do not go with the model or with the number of processes.
    """
    count = len(counts) or stages or 1
    if count != world.size():
        raise SecateurError(
            f"{count} pipeline stages and {world.size()} processes: each process holds one stage, so start "
            f"torchrun with --nproc_per_node {count}"
        )
    found = list(counts) or [layers // count + (place < layers % count) for place in range(count)]
    if min(found) < 1:
        raise SecateurError(f"stages of {_shown(found)} layers: each must hold at least one of the {layers}")
    if sum(found) != layers:
        raise SecateurError(f"--layers-per-stage {_shown(found)} are {sum(found)} layers, and the model has {layers}")
    return found


def _shown(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))


class Stages:
    """This process's stage of a streamed model.

    Args:
        model: a streamed Hugging Face decoder.
        space: its Space.
        stages: how many stages there are, for an even share.
        counts: layers of each stage, in place of that.

    Raises:
        SecateurError: where the layers cannot be shared out so.
    """

    def __init__(self, model: nn.Module, space: Space, stages: int | None, counts: Sequence[int] = ()) -> None:
        blocks = space.layers()
        if len({block.stack for block in blocks}) != 1:
            raise SecateurError(
                f"{type(model).__name__} has {len({block.stack for block in blocks})} lists of layers, and pipeline "
                "stages are made of one"
            )
        self.model, self.blocks = model, blocks
        self.counts = layers_per_stage(len(blocks), stages, counts)
        self.first = sum(self.counts[: world.rank()])
        self.own = range(self.first, self.first + self.counts[world.rank()])

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the own layers in memory; while this is open, calibration goes through the stages."""
        with contextlib.ExitStack() as stack:
            for place in self.own:
                stack.enter_context(held(self.model, self.blocks[place].name))
            stack.enter_context(world.staging())
            object.__setattr__(self.model, STAGES, self)
            stack.callback(object.__delattr__, self.model, STAGES)
            yield

    def through(self, model: nn.Module, batches: Sequence[Batch], watcher: Watcher) -> None:
        """Run all batches through all stages; the watcher sees what this process's modules do. See `load.through`.

        An error does not keep the others waiting: this stage hands on NaN, and tells of it when all batches are done.
        """
        self.trouble: Exception | None = None
        begin = 0
        while begin < len(batches):
            end, shape = begin, _shape(batches[begin])
            while end < len(batches) and end - begin < AT_ONCE * len(self.counts) and _shape(batches[end]) == shape:
                end += 1
            self._send_through(model, batches, watcher, range(begin, end), shape)
            begin = end
        if self.trouble is not None:
            raise self.trouble

    def _send_through(
        self, model: nn.Module, batches: Sequence[Batch], watcher: Watcher, which: range, shape: tuple[int, ...]
    ) -> None:
        """Batches of one shape, one behind the other."""
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        rank, size = world.rank(), len(self.counts)
        config: Any = model.config
        width = config.get_text_config().hidden_size
        weight = next(p for p in model.get_submodule(self.blocks[self.first].name).parameters())
        hidden = torch.full((*shape[:2], width), torch.nan, dtype=weight.dtype, device=weight.device)
        numbers, done = torch.zeros(len(which), 1), torch.zeros(1, 1)
        gives = done if rank == size - 1 else hidden
        with _Stage(self, model, batches, watcher, which, gives) as stage:
            takes = numbers[:1] if rank == 0 else hidden
            piped = PipelineStage(stage, rank, size, weight.device, input_args=takes, output_args=gives)
            given = (numbers,) if rank == 0 else ()
            with world.told():
                ScheduleGPipe(piped, len(which)).step(*given, return_outputs=False)


class _Stage(nn.Module):
    """Runs the own layers: from the number of a batch, or what the stage before gives, to what the next one takes."""

    def __init__(
        self,
        stages: Stages,
        model: nn.Module,
        batches: Sequence[Batch],
        watcher: Watcher,
        which: range,
        gives: torch.Tensor,
    ) -> None:
        super().__init__()
        self.batches, self.watcher, self.left, self.stages, self.gives = batches, watcher, list(which), stages, gives
        self.number = 0
        self.hidden: torch.Tensor | None = None
        self.is_first, self.is_last = world.rank() == 0, world.rank() == len(stages.counts) - 1
        self._whole, self._blocks, self._own = [model], stages.blocks, stages.own  # in a list: it is no part of this
        self._list = [model.get_submodule(stages.blocks[0].stack)]
        self._before: dict[str, nn.Module] = {}

    def __enter__(self) -> "_Stage":
        """Put stand-ins for the layers of other stages, and around the first and the last of the own ones."""
        modules = self._list[0]._modules
        for place, block in enumerate(self._blocks):
            module = modules[str(block.index)]
            if module is None:
                raise ValueError(f"{block.name} is gone")
            self._before[str(block.index)] = module
            if place not in self._own:
                modules[str(block.index)] = _Passes(module, block)
            else:
                modules[str(block.index)] = _Ours(module, self, place == self._own[0], place == self._own[-1])
        return self

    def __exit__(self, *error: object) -> None:
        """Put the layers back."""
        self._list[0]._modules.update(self._before)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """One batch."""
        self.number = self.left.pop(0)
        if self.stages.trouble is None:
            try:
                return self._run(given)
            except Exception as error:  # noqa: BLE001 - raised again behind the last batch
                self.stages.trouble = error
        return self.gives.clone()

    def _run(self, given: torch.Tensor) -> torch.Tensor:
        self.hidden = None if self.is_first else given
        # What lies before the layers runs in all processes and counts in the first.
        self.watcher.at(self.number if self.is_first else None)
        self.ended = False
        with contextlib.suppress(Enough):
            run(self._whole[0], self.batches[self.number])
        if not self.ended or self.hidden is None:
            raise SecateurError("the layers of this stage were not run: pipeline stages do not go with this model")
        found, self.hidden = self.hidden, None
        return self.gives.clone() if self.is_last else found.contiguous()


class _Ours(nn.Module):
    """Around a layer of this stage."""

    def __init__(self, module: nn.Module, stage: _Stage, first: bool, last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "inside", (module, stage, first, last))

    def __getattr__(self, name: str) -> Any:
        """Some models ask their layers of which type they are."""
        return getattr(object.__getattribute__(self, "inside")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the stage before gives; end the pass behind the last one."""
        module, stage, first, last = self.inside
        if first and not stage.is_first:
            stage.watcher.at(stage.number)
            given = stage.hidden
            args, kwargs = ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})
        found = module(*args, **kwargs)
        if last:
            stage.hidden, stage.ended = found[0] if isinstance(found, tuple) else found, True
            raise Enough
        return found


class _Passes(nn.Module):
    """In place of a layer of another stage: hands on what comes in."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        super().__init__()
        object.__setattr__(self, "inside", (module, Through(block)))

    def __getattr__(self, name: str) -> Any:
        """As above."""
        return getattr(object.__getattribute__(self, "inside")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What came in, in the structure in which the layer returns it."""
        return self.inside[1](*args, **kwargs)


def _shape(batch: Batch) -> tuple[int, ...]:
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(batch if not hasattr(batch, "keys") else dict(batch))
    return tuple(next(x for x in leaves if isinstance(x, torch.Tensor)).shape)
