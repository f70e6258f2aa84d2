"""Watch a model multiply: every product of an activation with one of its weights, whatever module or code makes it.

Linear layers, convolutions, Hugging Face's Conv1D, attention's raw parameters and stacked experts all come down to a
few ATen operators whose operand shares the storage of a parameter; its strides tell which dimension is summed over.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.load.store import moved

_ATEN = torch.ops.aten
_MATMUL = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
}
"""Operator -> places of its two operands."""
_COPIES = (_ATEN._to_copy.default, _ATEN.clone.default)
_CONVOLUTIONS = (_ATEN.convolution.default, _ATEN.mkldnn_convolution.default)
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "secateur::grouped_product")
Span = tuple[int, int]
Dims = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One product with a part of a weight.

    Attributes:
        weight: Name of the parameter.
        columns: Its dimensions that are summed over.
        rows: Its dimensions that stay.
        part: For each dimension the range of it that took part.
        operand: The other operand, as the operator got it.
        form: How it is read: of a convolution its kernel, stride and so on.
        read: Makes of the operand what the weight's columns meet, [rows of the activation, columns].
        made: Makes of the operator's result what comes of that, [rows of the activation, rows of the part].
    """

    weight: str
    columns: tuple[int, ...]
    rows: tuple[int, ...]
    part: tuple[Span, ...]
    operand: torch.Tensor
    form: tuple[Any, ...]
    read: Callable[[], torch.Tensor]
    made: Callable[[torch.Tensor], torch.Tensor]


class Enough(BaseException):
    """Ends a forward pass early; no error, and for no handler of the model's own."""


class Products(TorchDispatchMode):
    """While it is on, `see` is called with every product of an activation with one of the weights.

    Args:
        weights: parameters by name.
        see: called before the product is worked out.
        last: a weight whose product is not worked out: `Enough` is raised, which the caller of the model catches.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], see: Callable[[Product], None], last: str | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.last = last
        self.weights: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self._at: dict[str, int] = {}
        self._names = {id(weight): name for name, weight in weights.items()}
        for name, weight in weights.items():
            self._put(name, weight)
        self.copies: dict[int, tuple[str, weakref.ref[torch.Tensor]]] = {}
        self.see = see

    def __enter__(self) -> Self:
        """Watch; streamed models tell where their weights are."""
        moved.append(self._see_moved)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Watch no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        moved.remove(self._see_moved)

    def _see_moved(self, weight: torch.Tensor) -> None:
        name = self._names.get(id(weight))
        if name is not None:
            place = self._at[name]
            self.weights[place] = [own for own in self.weights[place] if own[0] != name]
            self._put(name, weight)

    def _put(self, name: str, weight: torch.Tensor) -> None:
        self._at[name] = _storage(weight)
        self.weights.setdefault(self._at[name], []).append((name, weight))  # several may lie in one storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands, then run the operator."""
        if func in _MATMUL:
            left, right = (args[place] for place in _MATMUL[func])
            self._matmul(left, right)
        elif func in _CONVOLUTIONS and (found := self._of(args[1])) and args[1].shape == found[1].shape:
            self._convolution(*found, args)
        elif func.name().partition(".")[0] in _GROUPED:
            self._grouped(args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if func in _COPIES and (source := self._of(args[0])) and _laid_out(result) == _laid_out(source[1]):
            self.copies[_storage(result)] = source[0], weakref.ref(result)  # the weight itself, in another type
        return result

    def _tell(self, product: Product) -> None:
        self.see(product)
        if product.weight == self.last:
            raise Enough

    def _of(self, tensor: Any) -> tuple[str, torch.Tensor] | None:
        """The weight that a tensor is a view of, or of a copy of."""
        if not isinstance(tensor, torch.Tensor):
            return None
        place = _storage(tensor)
        for name, weight in self.weights.get(place, ()):
            if weight.storage_offset() <= tensor.storage_offset() < weight.storage_offset() + max(1, weight.numel()):
                return name, weight
        name, alive = self.copies.get(place, ("", None))
        copy = alive() if alive is not None else None
        return None if copy is None else (name, copy)

    def _matmul(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """[n, k] @ [k, m], or the same for each of a batch; the weight may stand on either side."""
        turned = False
        if found := self._of(right):
            weight, x = right, left
        elif found := self._of(left):
            weight, x, turned = left.mT, right.mT, True
        else:
            return
        batched = weight.dim() == 3 and weight.stride(0) != 0 and weight.shape[0] > 1
        batches = weight.shape[0] if batched else 1
        for index in range(batches):
            one = weight[index] if weight.dim() == 3 else weight
            rows = x[index] if batched else x

            def made(result: torch.Tensor, index: int = index) -> torch.Tensor:
                result = result.mT if turned else result
                result = result[index] if batched else result
                return result.reshape(-1, result.shape[-1])

            self._see_matrix(found, one, rows, made)

    def _grouped(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Rows [n, k] sorted by expert @ [experts, k, m], with the end of each expert's rows."""
        named = dict(zip(("input", "weight", "offs"), args, strict=False)) | dict(kwargs)
        x, weight, ends = (named.get(key) for key in ("input", "weight", "offs"))
        x, weight = (named.get("self", x), named.get("mat2", weight))
        found = self._of(weight)
        if found is None or x is None or weight is None or ends is None:
            return
        begin = 0
        for expert, end in enumerate(ends.tolist()):
            if end > begin:

                def made(result: torch.Tensor, begin: int = begin, end: int = end) -> torch.Tensor:
                    return result[begin:end]

                self._see_matrix(found, weight[expert], x[begin:end], made)
            begin = end

    def _see_matrix(
        self,
        found: tuple[str, torch.Tensor],
        view: torch.Tensor,
        x: torch.Tensor,
        made: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        place = _place(found[1], view)
        if place is not None:
            columns, rows, part = place
            self._tell(Product(found[0], columns, rows, part, x, (), lambda: x.reshape(-1, x.shape[-1]), made))

    def _convolution(self, name: str, weight: torch.Tensor, args: Any) -> None:
        x, transposed = args[0], args[6]
        groups = args[8] if len(args) > 8 else 1
        kernel = tuple(weight.shape[2:])
        whole = tuple((0, n) for n in weight.shape)
        spatial = tuple(range(2, weight.dim()))
        steps = tuple(list(given) * (len(kernel) // len(given)) for given in (*args[3:6], args[7]))
        per = x.shape[-len(kernel) - 1] // groups
        for group in range(groups):
            own = x.narrow(-len(kernel) - 1, group * per, per)
            side = 0 if transposed else 1
            out = weight.shape[0] // groups
            part = list(whole)
            part[0] = (group * out, (group + 1) * out)

            def read(own: torch.Tensor = own) -> torch.Tensor:
                return _upsampled_patches(own, kernel, *steps) if transposed else _patches(own, kernel, *steps[:3])

            def made(result: torch.Tensor, group: int = group) -> torch.Tensor:
                per = result.shape[-len(kernel) - 1] // groups
                own = result.narrow(-len(kernel) - 1, group * per, per)
                return own.movedim(-len(kernel) - 1, -1).reshape(-1, per)

            columns, rows = ((*spatial, side), (1 - side,))
            form = (kernel, tuple(map(tuple, steps)), transposed)
            self._tell(Product(name, columns, rows, tuple(part), own, form, read, made))


def _patches(
    x: torch.Tensor, kernel: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    """What a convolution reads, [positions, kernel * channels], channels innermost."""
    x = x if x.dim() == len(kernel) + 2 else x[None]
    x = functional.pad(x, [p for pair in zip(reversed(padding), reversed(padding), strict=True) for p in pair])
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart] if apart > 1 else x.unfold(dim, size, step)
    # [N, C, positions..., kernel...] -> [N, positions..., kernel..., C]
    order = [0, *range(2, x.dim()), 1]
    x = x.permute(order)
    return x.reshape(x.shape[: len(kernel) + 1].numel(), -1)


def _upsampled_patches(
    x: torch.Tensor,
    kernel: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    beyond: list[int],
) -> torch.Tensor:
    """What a transposed convolution reads: zeros between its inputs, then a convolution with the kernel mirrored."""
    x = x if x.dim() == len(kernel) + 2 else x[None]
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    around = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    wide = functional.pad(
        wide, [p for a, b in zip(reversed(around), reversed(beyond), strict=True) for p in (a, a + b)]
    )
    found = _patches(wide, kernel, [1] * len(kernel), [0] * len(kernel), dilation)
    return found.reshape(len(found), *kernel, -1).flip(tuple(range(1, len(kernel) + 1))).reshape(found.shape)


def _laid_out(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _place(weight: torch.Tensor, view: torch.Tensor) -> tuple[Dims, Dims, tuple[Span, ...]] | None:
    """(dimensions of the parameter that the view's first runs through, those of its second, the part that it covers).

    None for a view that cannot be placed, such as a diagonal.
    """
    steps, free = weight.stride(), set(range(weight.dim()))
    found: list[Dims] = []
    covered: dict[int, int] = {}
    for size, step in zip(view.shape, view.stride(), strict=True):
        dims: list[int] = []
        left, stride = size, step
        while left > 1 or not dims:  # innermost first; merged dimensions follow each other in memory
            fit = [d for d in free if (steps[d] == stride or left == 1) and weight.shape[d] > 0]
            fit.sort(key=lambda d: (weight.shape[d] != left, weight.shape[d] < left, d))
            if not fit:
                return None
            inner = fit[0]
            take = min(left, weight.shape[inner])
            if left % take:
                return None
            covered[inner] = take
            free.remove(inner)
            dims.insert(0, inner)
            left, stride = left // take, stride * take
        found.append(tuple(dims))
    start = view.storage_offset() - weight.storage_offset()
    firsts: dict[int, int] = {}
    for d in sorted(range(weight.dim()), key=lambda d: -steps[d]):
        firsts[d], start = (start // steps[d], start % steps[d]) if steps[d] else (0, start)
    part = [(firsts[d], firsts[d] + covered.get(d, 1)) for d in range(weight.dim())]
    fits = all(0 <= a < b <= n for (a, b), n in zip(part, weight.shape, strict=True))
    return (found[0], found[1], tuple(part)) if start == 0 and fits else None


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused forward passes of torch.nn's attention and transformer layers, whose products nobody sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
