"""Try cuts on one copy of full width: columns of units that go are zero, what stays is repaired from a survey.

That is the same function as the cut model's, without building or tracing it. Where only one block changes, what the
blocks before it give is kept and not worked out again.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.load.batches import Batch, run
from secateur.load.mode import evaluating
from secateur.load.modeling_secateur import Idle, RemovedSublayer
from secateur.measure.closeness import Closeness
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.survey import Survey
from secateur.space import Block
from secateur.space.products import Enough
from secateur.walk import chain_of


class Trials:
    """A working copy of the dense model, and how far it is from the dense one after cuts.

    Args:
        survey: of the dense model.
        closeness: what measures.
        adapt: batches that batch norms are estimated anew on before each measurement; unused where there are none.
        score: a user's own measure, higher is better; in place of `closeness`.
        sign: -1 turns a score into a loss, 1 where lower is better.
    """

    def __init__(
        self,
        survey: Survey,
        closeness: Closeness,
        *,
        adapt: Sequence[Batch] = (),
        score: Callable[[nn.Module], float] | None = None,
        sign: float = -1.0,
    ) -> None:
        self.survey, self.closeness, self.score, self.sign = survey, closeness, score, sign
        self.model = copy.deepcopy(survey.model).requires_grad_(requires_grad=False)
        self.parameters = dict(self.model.named_parameters())
        self.blocks = {block.name: block for block in survey.space.blocks}
        norms = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in self.model.modules())
        self.adapt = list(adapt) if norms else []
        self.count = 0
        """Measurements so far."""

    def loss(
        self,
        sizes: Mapping[str, int],
        dropped: Sequence[str] = (),
        which: Sequence[int] | None = None,
        prefix: "Prefix | None" = None,
    ) -> float:
        """How far the model is from the dense one with these sizes of axes and without these blocks.

        Args:
            sizes: axis -> units that stay in each group.
            dropped: blocks.
            which: numbers of the batches to measure on; all by default. A score of the user's sees all.
            prefix: kept results of the blocks before the first one that changes.

        Raises:
            SecateurError: where a score is not a finite number.
        """
        self.count += 1
        with self._cut(sizes, dropped):
            if self.adapt:
                adapt_batch_norm(self.model, self.adapt)
            if self.score is not None:
                value = self.sign * self.score(self.model)
                if not abs(value) < float("inf"):
                    raise SecateurError(f"the score of a cut model is {value}: give a function that returns a number")
                return value
            if prefix is None or self.adapt:
                return self.closeness(self.model, which)
            with prefix.replaying() as at:
                return self.closeness(self.model, which, at)

    @contextmanager
    def _cut(self, sizes: Mapping[str, int], dropped: Sequence[str]) -> Iterator[None]:
        tensors = self.survey.tensors(sizes)
        try:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    self.parameters[name].copy_(tensor)
            with without_blocks(self.model, [self.blocks[name] for name in dropped]):
                yield
        finally:
            with torch.no_grad():
                for name in tensors:
                    self.parameters[name].copy_(self.survey.parameters[name])


@contextmanager
def without_blocks(model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """While this is open, the model computes what it would without these blocks; then it is what it was."""
    before: dict[str, nn.Module] = {}
    silenced: list[tuple[nn.Module, Any]] = []
    try:
        for block in blocks:
            module = model.get_submodule(block.name)
            if block.kind == "layers":  # some models ask their layers of which type they are: it stays where it is
                silenced.append((module, vars(module).get("forward")))
                module.forward = Through(block).forward
                continue
            for path, stand_in in {
                block.name: RemovedSublayer(_without_weights(block.output)),
                **{idle: Idle() for idle in block.idle},
            }.items():
                before[path] = model.get_submodule(path)
                model.set_submodule(path, stand_in)
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)
        for module, own in silenced:
            _restore_forward(module, own)


def _restore_forward(module: nn.Module, own: Any) -> None:
    """Give back a forward of the module's own, or that of its class."""
    if own is None:
        vars(module).pop("forward", None)
    else:
        module.forward = own


def _without_weights(structure: Any) -> Any:
    """What a removed sub-layer returns: attention weights there are none any more."""
    leaves = pytree.tree_leaves(structure)
    if any(leaf is not None for leaf in leaves[1:]):
        return (structure[0], *(None for _ in structure[1:]))
    return structure


class Through(nn.Module):
    """Stands in for a dropped layer: hands on its first argument."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """What came in, in the structure in which the layer returns it."""
        leaves, structure = pytree.tree_flatten(self.block.output)
        given = [hidden_states if i == 0 else None for i in range(len(leaves))]
        return pytree.tree_unflatten(given, structure)


class Prefix:
    """What the blocks of the dense model give, kept up to one of them.

    Args:
        model: a copy of the dense model, uncut while this is made or moved on.
        batches: that it is run on.
        own: numbers of those that are asked for; all by default.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], own: Sequence[int] | None = None) -> None:
        self.model, self.batches = model, batches
        self.own = range(len(batches)) if own is None else own
        self.chain = chain_of(model, batches[0])
        self.done = 0
        """Blocks whose results are not worked out again."""
        self.kept: dict[int, Any] = {}

    def before(self, path: str) -> int:
        """How many blocks of the chain lie before the one that holds a module or parameter."""
        inside = [i for i, block in enumerate(self.chain) if f"{path}.".startswith(f"{block}.")]
        return inside[0] if inside else 0

    def advance(self, blocks: int) -> None:
        """Keep what the first so many blocks give."""
        while self.done < blocks:
            found: list[Any] = []
            module = self.model.get_submodule(self.chain[self.done])

            def take(_: nn.Module, __: Any, output: Any, *, found: list[Any] = found) -> None:
                found.append(output)
                raise Enough  # the blocks behind it are not worked out

            handle = module.register_forward_hook(take)
            try:
                with evaluating(self.model), torch.inference_mode(), self.replaying() as at:
                    for index in self.own:
                        at(index)
                        with contextlib.suppress(Enough):
                            run(self.model, self.batches[index])
            finally:
                handle.remove()
            self.kept, self.done = dict(zip(self.own, found, strict=True)), self.done + 1

    @contextmanager
    def replaying(self) -> Iterator[Callable[[int], None]]:
        """While this is open, the blocks that are done give what is kept; tell it the number of each batch.

        Those before the last hand on what nobody looks at: the chain was seen to pass on nothing but its last result.
        """
        index = 0

        def at(number: int) -> None:
            nonlocal index
            index = number

        def give(*_: Any, **__: Any) -> Any:
            return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self.kept[index])

        modules = [self.model.get_submodule(path) for path in self.chain[: self.done]]
        before = [vars(module).get("forward") for module in modules]  # some libraries put one there
        try:
            for module in modules:
                module.forward = give
            yield at
        finally:
            for module, own in zip(modules, before, strict=True):
                _restore_forward(module, own)


def prefix_of(trials: Trials) -> Prefix | None:
    """A prefix for the trials' model, or None where nothing can be replayed; see `find_prefix`."""
    if trials.adapt or trials.score is not None:
        return None
    closeness = trials.closeness
    own = closeness.own(range(len(closeness.batches)))
    return find_prefix(trials.model, closeness.batches, lambda at: closeness(trials.model, [0], at), own)


def find_prefix(
    model: nn.Module,
    batches: Sequence[Batch],
    measure: Callable[[Callable[[int], None] | None], Any],
    own: Sequence[int] | None = None,
) -> Prefix | None:
    """A prefix for a copy of the dense model, or None where its blocks form no chain that can be replayed.

    It is tried on the dense model: however many of the blocks are replayed, the outputs must be what they were.

    Args:
        model: the copy.
        batches: that it will be run on.
        measure: runs the model on the first batch; what it returns must be the same whatever is replayed.
        own: numbers of the batches that will be asked for; all by default.
    """
    try:
        probe = Prefix(model, batches[:1])
        if len(probe.chain) < 2:
            return None
        whole, same = measure(None), True
        for done in range(1, len(probe.chain)):  # a later block may read what one before it gave
            probe.advance(done)
            with probe.replaying() as at:
                same = same and measure(at) == whole
    except (RuntimeError, TypeError, ValueError, SecateurError):  # other blocks read what is not worked out any more
        return None
    return Prefix(model, batches, own) if same else None
