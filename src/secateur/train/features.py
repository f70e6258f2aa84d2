"""What blocks of a model give, and which blocks of teacher and student belong together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur import world
from secateur.choose.plan import Plan
from secateur.errors import SecateurError, nearest
from secateur.train.losses import relative_distance


def block_names(model: nn.Module) -> list[str]:
    """Paths of a model's blocks: what its outermost lists and sequences of larger parts consist of, in order."""
    found: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        children = list(module.named_children())
        if isinstance(module, nn.ModuleList | nn.Sequential):
            blocks = [f"{path}.{name}".lstrip(".") for name, child in children if next(child.children(), None)]
            if blocks:
                found.extend(blocks)
                return
        for name, child in children:
            visit(child, f"{path}.{name}".lstrip("."))

    visit(model, "")
    return found


def matched(
    teacher: nn.Module, student: nn.Module, layers: Mapping[str, str] | None, plan: Plan | None
) -> list[tuple[str, str]]:
    """Which block of the student is held against which of the teacher: (student's path, teacher's path).

    As said; else one to one where both have as many blocks; else, by the plan that cut the student, those that stayed;
    else evenly spread, the last with the last.

    Raises:
        SecateurError: for paths that are not there, or models without blocks.
    """
    if layers is not None:
        for model, names, who in ((student, layers, "student"), (teacher, layers.values(), "teacher")):
            known = [path for path, _ in model.named_modules() if path]
            for name in names:
                if name not in known:
                    raise SecateurError(f"layers: the {who} has no module {name!r}{nearest(name, known)}")
        return list(layers.items())
    own, wanted = block_names(student), block_names(teacher)
    if not own or not wanted:
        raise SecateurError("no blocks are found in the models: say which modules to compare, layers={own: teacher's}")
    if plan is not None:
        stay = [name for name in wanted if name not in plan.dropped]
        wanted = stay if len(stay) == len(own) else wanted
    if len(own) > len(wanted):
        raise SecateurError(f"the student has {len(own)} blocks and the teacher {len(wanted)}: give layers")
    ends = [round((i + 1) * len(wanted) / len(own)) - 1 for i in range(len(own))]
    return [(name, wanted[end]) for name, end in zip(own, ends, strict=True)]


@contextmanager
def watching(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what modules give while the model runs: path -> tensor (of a tuple, its first)."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for path in paths:

        def keep(_: nn.Module, __: Any, output: Any, *, path: str = path) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(first, torch.Tensor):
                raise SecateurError(f"{path} gives a {type(first).__name__}, not a tensor: leave it out of layers")
            found[path] = first

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rows_of(own: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of features [P, D] of both, of positions that count.

    Features are the dimension in which the two differ; where none does, the second of four and more, else the last.

    Args:
        own: of the student, [B, ...].
        wanted: of the teacher, equal but for one dimension.
        real: which positions [B, S] of [B, S, D] count.

    Raises:
        SecateurError: They differ in more than one dimension.
    """
    differ = [d for d in range(own.dim()) if own.dim() == wanted.dim() and own.shape[d] != wanted.shape[d]]
    if own.dim() != wanted.dim() or len(differ) > 1 or differ[:1] == [0]:
        raise SecateurError(
            f"features {list(own.shape)} of the student cannot be held against {list(wanted.shape)} of the teacher: "
            "they may differ in one dimension; say which modules to compare (layers)"
        )
    dim = differ[0] if differ else 1 if own.dim() > 3 else own.dim() - 1
    own, wanted = own.movedim(dim, -1), wanted.to(own.device).movedim(dim, -1)
    if real is not None and own.dim() == 3 and own.shape[:2] == real.shape:
        return own[real], wanted[real]
    return own.reshape(-1, own.shape[-1]), wanted.reshape(-1, wanted.shape[-1])


class Hidden(nn.Module):
    """Distance between what matched blocks give; where widths differ, through a linear map that is learned.

    The map starts as the least-squares solution on the first batch, so that it does not spoil the first steps.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.maps = nn.ModuleDict()

    def begin(
        self, own: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], real: torch.Tensor | None
    ) -> None:
        """Make the maps that are needed, from the features of one batch."""
        for number, (a, b) in enumerate(self.pairs):
            x, y = rows_of(own[a].detach(), wanted[b].detach(), real)
            if x.shape[1] == y.shape[1]:
                continue
            x, y = x.double(), y.double()
            wide = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            gram, target = wide.T @ wide, wide.T @ y
            world.add_up([gram, target])
            gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            solution = torch.linalg.solve(gram, target)
            linear = nn.Linear(x.shape[1], y.shape[1], device=x.device)
            with torch.no_grad():
                linear.weight.copy_(solution[:-1].T)
                linear.bias.copy_(solution[-1])
            self.maps[str(number)] = linear

    def forward(
        self, own: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], real: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean over the pairs of the relative squared distance."""
        found = []
        for number, (a, b) in enumerate(self.pairs):
            x, y = rows_of(own[a], wanted[b], real)
            x = self.maps[str(number)](x.float()) if str(number) in self.maps else x
            found.append(relative_distance(x, y, over_all=True))
        return torch.stack(found).mean()
